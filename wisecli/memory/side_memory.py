"""The side memory: what an edited stream comes down to, in one file.

It holds one or several memories (each a delta of the same matrix with its own thresholds), the edit keys, and a
manifest that says which base and which edit site it belongs to. It contains no base weights and loading it needs no
other file. What it does not do is touch a model: `routing.attach` does that.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from wisecli.data.records import Prompt, Said, asked_behind, said_of
from wisecli.errors import InputError, UsageError
from wisecli.memory.bits import SparseDelta
from wisecli.memory.files import check_version, load_tensors, save_tensors
from wisecli.memory.keys import KeySpace, KeyStore
from wisecli.models.prompts import ContentRule
from wisecli.models.site import EditSite

FORMAT = "wise-side-memory"
FORMAT_VERSION = "4.0"
MAIN_MEMORY = -1  # the memory of an edit that was withdrawn


@dataclass(frozen=True)
class Memory:
    """One delta and what routes to it.

    Attributes:
        delta: W' - W, packed.
        epsilon: threshold per router name.
        scopes: threshold of the key router per scope; `epsilon` holds one of them.
        edits: ids of the edits it holds.
        origin: how it came about (merge method, densities, weights, seeds of the shards).
    """

    delta: SparseDelta
    epsilon: Mapping[str, float]
    edits: tuple[str, ...]
    origin: Mapping[str, Any] = field(default_factory=dict)
    scopes: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class EditEntry:
    """An edit as the artifact knows it; `prompt` and `target` are None when texts were left out.

    `history` holds the messages before the prompt, None where there are none.
    """

    id: str
    memory: int
    took: bool
    prompt: str | None = None
    target: str | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    history: tuple[Said, ...] | None = None

    @property
    def asked(self) -> Prompt:
        """The prompt as it is put to a base; to be asked for where texts are known."""
        return asked_behind(self.history, str(self.prompt))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> EditEntry:
        """The entry of a manifest; unknown keys are left out."""
        known = {k: v for k, v in data.items() if k in cls.__dataclass_fields__}
        return cls(**known | ({"history": said_of(known["history"])} if known.get("history") else {}))


@dataclass(frozen=True)
class SideMemory:
    """Memories, keys and manifest.

    Attributes:
        base: name, revision, model_type and fingerprint of the base.
        chat: whether prompts were rendered with the base's chat template.
        router: the router used unless another is asked for.
        extra: unknown manifest fields of a newer minor version, kept as they are.
    """

    base: Mapping[str, Any]
    site: EditSite
    rule: ContentRule
    memories: tuple[Memory, ...]
    keys: KeyStore
    edits: tuple[EditEntry, ...]
    router: str = "key"
    chat: bool = False
    config: Mapping[str, Any] = field(default_factory=dict)
    statistics: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file; the same side memory gives the same bytes."""
        save_tensors(Path(path), self._tensors(), self.manifest())

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the tensors in sorted order: name, dtype, shape, bytes. The same with and without texts."""
        digest = hashlib.sha256()
        for name, t in sorted(self._tensors().items()):
            digest.update(f"{name} {t.dtype} {list(t.shape)}\n".encode())
            digest.update(t.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def _tensors(self) -> dict[str, torch.Tensor]:
        tensors = {
            "keys.mean": self.keys.space.mean,
            "keys.projection": self.keys.space.projection,
            "keys.scale": self.keys.space.scale,
            "keys.vectors": self.keys.keys,
            "keys.step": self.keys.step,
            "keys.owner": self.keys.owner,
            "keys.crowding": self.keys.crowding,
        }
        for i, m in enumerate(self.memories):
            tensors[f"memory.{i}.mask"] = m.delta.bits
            tensors[f"memory.{i}.values"] = m.delta.values
        return tensors

    def manifest(self) -> dict[str, Any]:
        """Everything but the tensors, as it is written into the file."""
        return {
            **self.extra,
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "base": dict(self.base),
            "site": vars_of(self.site),
            "content_rule": self.rule.to_json(),
            "chat": self.chat,
            "router": self.router,
            "config": dict(self.config),
            "statistics": dict(self.statistics),
            "versions": dict(self.versions),
            "memories": [
                {
                    "epsilon": dict(m.epsilon),
                    "scopes": dict(m.scopes),
                    "edits": list(m.edits),
                    "origin": dict(m.origin),
                }
                for m in self.memories
            ],
            "edits": [
                {k: (dict(v) if k == "details" else v) for k, v in vars_of(e).items() if v is not None}
                for e in self.edits
            ],
        }

    @classmethod
    def load(cls, path: str | Path) -> SideMemory:
        """Read a side memory.

        Raises:
            InputError: not a side memory, damaged, or of a newer major format version.
        """
        path = Path(path)
        tensors, manifest = load_tensors(path)
        if manifest.get("format") != FORMAT:
            raise InputError(
                f"{path} holds {manifest.get('format', 'something else')!r}, not a side memory.",
                hint="Merge shards into a side memory with wise merge.",
            )
        check_version(
            path, str(manifest.get("format_version", "0")), FORMAT_VERSION, "Learn and merge the edits again."
        )
        try:
            return cls._build(tensors, manifest)
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            what = f"lacks part of a side memory: {e}" if isinstance(e, KeyError) else "has a malformed manifest"
            raise InputError(f"{path} {what}.", hint="It is damaged; make it again with wise merge.") from e

    @classmethod
    def _build(cls, tensors: dict[str, torch.Tensor], manifest: dict[str, Any]) -> SideMemory:
        known = cls.__dataclass_fields__.keys() | {"format", "format_version", "content_rule"}
        site = EditSite(**{k: v for k, v in manifest["site"].items() if k in EditSite.__dataclass_fields__})
        memories = tuple(
            Memory(
                SparseDelta(tensors[f"memory.{i}.mask"], tensors[f"memory.{i}.values"], (site.d_out, site.d_in)),
                m["epsilon"],
                tuple(m["edits"]),
                m.get("origin", {}),
                m.get("scopes", {}),
            )
            for i, m in enumerate(manifest["memories"])
        )
        space = KeySpace(*(tensors[f"keys.{name}"] for name in ("mean", "projection", "scale")))
        return cls(
            base=dict(manifest["base"]),
            site=site,
            rule=ContentRule.from_json(manifest["content_rule"]),
            memories=memories,
            keys=KeyStore(space, *(tensors[f"keys.{name}"] for name in ("vectors", "step", "owner", "crowding"))),
            edits=tuple(EditEntry.from_json(e) for e in manifest["edits"]),
            router=manifest.get("router", "key"),
            chat=manifest.get("chat", False),
            config=manifest.get("config", {}),
            statistics=manifest.get("statistics", {}),
            versions=manifest.get("versions", {}),
            extra={k: v for k, v in manifest.items() if k not in known},
        )

    def asked_in(self, chat: bool, rule: ContentRule) -> SideMemory:
        """The same side memory for prompts rendered with a chat template or without, whose content a rule tells.

        Where it was learned that way its own rule stays.
        """
        return self if chat == self.chat else replace(self, rule=rule)

    def scoped(self, scope: str, router: str | None = None) -> SideMemory:
        """The same side memory with the key router's thresholds of another scope, used by the router named.

        Raises:
            UsageError: it has no such scope, or the activation router, which has none.
        """
        router = router or self.router
        if router != "key":
            raise UsageError(f"The {router} router has no scopes.", hint="Leave --scope out, or use --router key.")
        lacking = next((m for m in self.memories if scope not in m.scopes), None)
        if lacking is not None:
            known = ", ".join(lacking.scopes) or "none"
            raise UsageError(f"This side memory has no scope {scope!r}.", hint=f"It has: {known}.")
        memories = tuple(replace(m, epsilon={**m.epsilon, "key": m.scopes[scope]}) for m in self.memories)
        return replace(self, memories=memories, router=router)

    def withdrawn(self, ids: Collection[str]) -> SideMemory:
        """The same side memory without these edits: what would reach them is main memory's.

        Their keys stay, to keep their prompts from the edits next to them; what the delta learned of them stays too,
        and is reached no more.

        Raises:
            UsageError: an id is unknown, or the side memory has the activation router, which knows no single edits.
        """
        unknown = sorted(set(ids) - {e.id for e in self.edits})
        if unknown:
            close = get_close_matches(unknown[0], [e.id for e in self.edits], n=3)
            hint = f"Did you mean {', '.join(close)}?" if close else "wise log lists the edits."
            raise UsageError(f"This side memory has no edit {', '.join(unknown[:5])}.", hint=hint)
        if self.router != "key":
            raise UsageError(
                f"The {self.router} router knows no single edits: none can be kept from it.",
                hint="Withdraw them from the shards with --shards, and merge those for the key router.",
            )
        out = {"outcome": "withdrawn"}
        edits = tuple(
            replace(e, memory=MAIN_MEMORY, took=False, details={**e.details, **out}) if e.id in ids else e
            for e in self.edits
        )
        return replace(self, edits=edits)

    def without_texts(self, withdrawn_only: bool = False) -> SideMemory:
        """The same side memory with the prompts and targets of its edits, or of withdrawn ones, left out; ids stay."""
        edits = (
            e if withdrawn_only and e.memory != MAIN_MEMORY else replace(e, prompt=None, target=None, history=None)
            for e in self.edits
        )
        return replace(self, edits=tuple(edits))


def vars_of(obj: Any) -> dict[str, Any]:
    """Fields of a dataclass, not descending into them."""
    return {k: getattr(obj, k) for k in obj.__dataclass_fields__}

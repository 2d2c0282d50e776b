"""Fold a side memory into its base: a dense checkpoint of its own that needs neither wise nor a router.

The delta of one memory is added to the edited matrix, always on. What the router kept apart is lost with it: prompts
that no edit is about pass through W + delta as well. The sum is made in float32 and cast to the checkpoint's dtype;
half precision rounds much of a small delta away, so what is lost of it is measured and said (`loss_of`).

    model.safetensors, config.json, generation_config.json, tokenizer files   as transformers writes and reads them
    README.md                                                                  what it is, of what it was made
    wise_fold.json                                                             the same for programs; written last

The folder is written beside its place and renamed when it is whole. Neither the base's files nor the model given are
changed. The same input gives the same bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from math import isfinite, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from wisecli.card import render_fold_card
from wisecli.errors import InputError, ModelError, OutputError, UsageError, first_line
from wisecli.memory.bits import BLOCK, SparseDelta
from wisecli.memory.files import ensure_writable, read_json, write_bytes, write_json
from wisecli.memory.shard import WITHDRAWN
from wisecli.memory.side_memory import SideMemory
from wisecli.models.base import DTYPES, Base, dtype_name, quiet_transformers
from wisecli.models.site import EditSite
from wisecli.routing.attach import fitting_side_memory
from wisecli.versions import versions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SCHEMA, SCHEMA_VERSION, MANIFEST, CARD = "wise-fold", "1.0", "wise_fold.json", "README.md"
MOST_LOST = 0.05  # relative error of the delta beyond which a fold is warned of
RANK = 64  # of a large LoRA


@dataclass(frozen=True)
class Loss:
    """What becomes of a delta that is added to a matrix and rounded with it.

    Attributes:
        error: |cast(W + d) - cast(W) - d| / |d|, Frobenius norms: 0 where nothing is lost, 1 where nothing is left.
        vanished: share of the delta's entries other than zero that change nothing.
    """

    error: float
    vanished: float


@dataclass(frozen=True)
class Folded:
    """A checkpoint that was written.

    Attributes:
        out: its folder.
        base: name of the base, with its commit.
        memory: which memory of the side memory was folded in.
        dtype: of all its weights.
        losses: by dtype that the matrix fits into; loading the checkpoint in one loses as much as writing it so.
        edits: ids of the edits that the memory holds.
        files: name -> {"bytes", "sha256"}, the manifest apart.
    """

    out: Path
    base: str
    memory: int
    dtype: str
    losses: Mapping[str, Loss]
    edits: tuple[str, ...]
    files: Mapping[str, Mapping[str, Any]]

    @property
    def loss(self) -> Loss:
        """Of the dtype written."""
        return self.losses[self.dtype]

    @property
    def lossy(self) -> bool:
        """Whether more of the delta is lost than `MOST_LOST`."""
        return self.loss.error > MOST_LOST

    def to_json(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "out": str(self.out),
            "losses": {name: asdict(loss) for name, loss in self.losses.items()},
            "edits": list(self.edits),
        }


def fold_side_memory(
    base: Base,
    side_memory: SideMemory | str | Path,
    out: Path,
    *,
    memory: int | None = None,
    dtype: str | torch.dtype = "float32",
    force: bool = False,
    allow_other_base: bool = False,
) -> Folded:
    """Write a checkpoint of the base with a memory's delta added to the edited matrix.

    Args:
        base: loaded; it is left as it is.
        side_memory: one in memory, or what `attach` takes.
        out: the folder, made when absent.
        memory: index of the memory; None where there is one alone.
        dtype: of all weights written: float32, bfloat16 or float16, by name or as torch's; or auto for the model's own.
        force: replace an earlier fold.
        allow_other_base: fold although the edited matrix is not the one the side memory was learned on.

    Raises:
        BaseMismatch: the side memory belongs to another base.
        ModelError: the base is quantised, not wholly in memory, or shares the edited matrix between layers.
        OutputError: the folder holds something else, or a fold and `force` is not set, or cannot be written.
        UsageError: see `check_fold`; or the dtype is none.
    """
    name = _written_in(base, dtype)
    _refuse_quantised(base)
    sm = fitting_side_memory(base.model, side_memory, None, None, allow_other_base)
    index = check_fold(sm, out, memory, force)
    delta, weight = sm.memories[index].delta, sm.site.weight(base.model)
    state = _state(base.model, sm.site, delta, DTYPES[name])
    losses = {each: loss_of(weight, delta, wanted) for each, wanted in DTYPES.items()}
    losses = {each: loss for each, loss in losses.items() if isfinite(loss.error)}
    edits = tuple(e.id for e in sm.edits if e.memory == index)
    card = render_fold_card(sm, index, name, {k: asdict(v) for k, v in losses.items()}, MOST_LOST)
    with _folder(out) as partial:
        _write_model(base, partial, state, name)
        write_bytes(partial / CARD, card.encode())
        folded = Folded(out, base.label, index, name, losses, edits, _files(partial))
        write_json(partial / MANIFEST, _manifest(sm, folded))
    return folded


def check_fold(side_memory: SideMemory, out: Path, memory: int | None = None, force: bool = False) -> int:
    """The memory that would be folded in; refuses, before a base is loaded, what needs none to be seen.

    Raises:
        OutputError: the folder holds something else, or a fold and `force` is not set.
        UsageError: there are several memories and none was chosen, no such memory, or what was withdrawn is in it.
    """
    _check_folder(out, force)
    n = len(side_memory.memories)
    if memory is None and n > 1:
        raise UsageError(
            f"This side memory has {n} memories, among which its router chooses; a checkpoint can hold one.",
            hint=f"Choose with --memory 0 to {n - 1}, or merge the shards into one memory: wise merge --memories 1.",
        )
    index = memory or 0
    if not 0 <= index < n:
        raise UsageError(
            f"There is no memory {index}.", hint="It has memory 0 alone." if n == 1 else f"They are 0 to {n - 1}."
        )
    # An edit whose shard was rebuilt without it is known by its id alone and took no steps.
    gone = [e.id for e in side_memory.edits if e.details.get("outcome") == WITHDRAWN and e.details.get("steps", 1)]
    if gone:
        raise UsageError(
            f"{', '.join(gone[:5])}{', ...' if len(gone) > 5 else ''}: withdrawn, but the delta holds what it learned "
            "of it, and without a router it would answer again.",
            hint=f"Rebuild first: wise forget {gone[0]} -s FILE --shards SHARDS --rebuild.",
        )
    return index


def loss_of(weight: Tensor, delta: SparseDelta, dtype: torch.dtype) -> Loss:
    """What is lost of a delta [D, F] that is added to a weight [D, F] in float32 and cast to a dtype with it."""
    flat = weight.detach().cpu().reshape(-1)
    lost = size = 0.0
    entries = vanished = 0
    for at, d in zip(range(0, len(flat), BLOCK), delta.blocks(), strict=True):
        w = flat[at : at + BLOCK]
        left = (w.float() + d).to(dtype).double() - w.to(dtype).double()
        lost += float((left - d).square().sum())
        size += float(d.double().square().sum())
        entries += int(d.count_nonzero())
        vanished += int(((left == 0) & (d != 0)).sum())
    return Loss(sqrt(lost / size) if size else 0.0, vanished / entries if entries else 0.0)


def share_of_rank(delta: Tensor, rank: int = RANK) -> float:
    """Share of a delta's energy, its squared Frobenius norm, that its best approximation of a rank holds.

    By randomised subspace iteration, so a lower bound, and a close one; the global random state is left alone.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _, found, _ = torch.svd_lowrank(delta.float(), q=min(rank + 16, *delta.shape), niter=4)
    return float(found[:rank].square().sum() / delta.float().square().sum())


# -- the weights ------------------------------------------------------------------------------------------------------


def _written_in(base: Base, dtype: str | torch.dtype) -> str:
    name = dtype_name(base.model.dtype if dtype == "auto" else dtype)
    if name not in DTYPES:
        raise UsageError(f"A fold cannot be written in {name}.", hint=f"Use auto, {', '.join(DTYPES)}.")
    return name


def _refuse_quantised(base: Base) -> None:
    config = base.model.config
    if getattr(config, "quantization_config", None) is not None or getattr(base.model, "hf_quantizer", None):
        raise ModelError(
            f"{base.label} is quantised: a delta cannot be added to packed weights.",
            hint="Attach the side memory instead, or fold it into the base before quantising that.",
        )


def _state(model: PreTrainedModel, site: EditSite, delta: SparseDelta, dtype: torch.dtype) -> dict[str, Tensor]:
    """All tensors as they are written: the edited one with the delta, each cast once, tied ones still tied.

    Raises:
        ModelError: some are not in memory, the edited one is used elsewhere too, or numbers do not fit the dtype.
    """
    state, key = model.state_dict(), f"{site.path}.weight"
    away = next((name for name, t in state.items() if t.is_meta), None)
    if away is not None:
        raise ModelError(
            f"{away} is not in memory: parts of the base are offloaded.", hint="Load the base whole, on one device."
        )
    if key not in state:
        raise ModelError(f"The base's weights have no {key}.", hint="Give the base without adapters around it.")
    places: dict[Any, list[str]] = {}
    for name, t in state.items():
        places.setdefault((t.device, t.data_ptr(), tuple(t.shape), t.stride()), []).append(name)
    out: dict[str, Tensor] = {}
    for names in places.values():
        t = state[names[0]]
        if key in names:
            if len(names) > 1:
                raise ModelError(
                    f"{key} is also {', '.join(n for n in names if n != key)}: folding would edit several layers.",
                    hint="Attach the side memory instead.",
                )
            dense = delta.dense()
            t = t.cpu().float() + (dense.T if site.conv1d else dense)
        cast = t.to("cpu", dtype) if t.is_floating_point() else t.cpu()
        if cast.dtype != t.dtype and t.isfinite().all() and not cast.isfinite().all():
            raise ModelError(f"{names[0]} holds numbers that do not fit {dtype}.", hint="Use --dtype float32.")
        out |= dict.fromkeys(names, cast)
    return {name: out[name] for name in state}


def _write_model(base: Base, folder: Path, state: dict[str, Tensor], dtype: str) -> None:
    model = base.model
    config, generation = model.config, getattr(model, "generation_config", None)
    noted = {name: getattr(config, name, None) for name in ("dtype", "architectures")}  # saving writes them
    try:
        with quiet_transformers(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if generation is not None:  # as it is: saving refuses some that loading takes
                model.generation_config = type(generation)()
            model.save_pretrained(folder, state_dict=state)
            if generation is not None:
                generation.to_json_file(folder / "generation_config.json")
            base.tokenizer.save_pretrained(folder)
    except (ValueError, RuntimeError, NotImplementedError) as e:
        raise ModelError(f"transformers cannot write this base: {first_line(e)}", hint="Mend its config.") from e
    finally:
        if generation is not None:
            model.generation_config = generation
        for name, value in noted.items():
            setattr(config, name, value)
    for weights in folder.glob("*.safetensors"):  # written for their owner alone
        shutil.copymode(folder / "config.json", weights)
    write_json(folder / "config.json", {**read_json(folder / "config.json"), "dtype": dtype})


# -- the folder -------------------------------------------------------------------------------------------------------


def _check_folder(out: Path, force: bool) -> None:
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file.", hint="Give a folder with --out.")
    held = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()} if out.is_dir() else set()
    if not held:
        return
    foreign = sorted(held - _known(out))
    if foreign:
        raise OutputError(
            f"{out} is not empty: it holds {', '.join(foreign[:3])}{', ...' if len(foreign) > 3 else ''}.",
            hint="Choose another folder with --out.",
        )
    if not force:
        raise OutputError(
            f"{out} already holds a fold.", hint="Replace it with --force, or choose another folder with --out."
        )


def _known(out: Path) -> set[str]:
    """The files of a fold by its own manifest; none where there is no fold."""
    try:
        manifest = read_json(out / MANIFEST)
    except InputError:
        return set()
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
        return set()
    return {MANIFEST, *manifest.get("files", {})}


@contextlib.contextmanager
def _folder(out: Path) -> Iterator[Path]:
    """A folder to write to that takes the place of `out` when the block ends well, and is gone when it does not."""
    out = out.resolve()
    ensure_writable(out.parent)
    partial, old = (out.with_name(f".{out.name}.{what}") for what in ("partial", "old"))
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        yield partial
        for path in partial.rglob("*"):
            if path.is_file():
                with open(path, "rb") as f:
                    os.fsync(f.fileno())
        shutil.rmtree(old, ignore_errors=True)
        if out.exists():
            os.replace(out, old)
        os.replace(partial, out)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as e:
        raise OutputError(
            f"Cannot write {out}: {e.strerror or e}.", hint="Choose another place with --out, or free space there."
        ) from e
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _files(folder: Path) -> dict[str, dict[str, Any]]:
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with open(path, "rb") as f:
            digest = hashlib.file_digest(f, "sha256").hexdigest()
        files[str(path.relative_to(folder))] = {"bytes": path.stat().st_size, "sha256": digest}
    return files


def _manifest(sm: SideMemory, folded: Folded) -> dict[str, Any]:
    document = {k: v for k, v in folded.to_json().items() if k != "out"}
    return {
        **document,
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "base": dict(sm.base),
        "site": asdict(sm.site),
        "side_memory": sm.digest,
        "router": None,
        "versions": versions(),
    }

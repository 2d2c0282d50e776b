"""The model card of a packaged side memory, and that of a checkpoint it was folded into.

Metadata for a hub, and what a reader must know before using it.

Pure text from a side memory and its figures: no model is loaded, no file is touched, and the same input gives the same
card. Every figure stands beside its protocol, its base and the number of prompts it was taken on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import PurePath
from typing import Any

from wisecli.evaluation.recall import Measured
from wisecli.memory.side_memory import EditEntry, SideMemory
from wisecli.models.base import DEMO_BASE, dtype_name

TAGS = ["knowledge-editing", "wise", "side-memory"]
FOLD_TAGS = ["knowledge-editing", "wise"]
_SCORES = {"rel": "Rel", "gen": "Gen", "loc": "Loc", "loc_near": "Loc near"}


class Origin(Enum):
    """Where a base comes from. Only one from a hub has an id that others can use."""

    DEMO = "demo"
    HUB = "hub"
    FOLDER = "folder"

    @classmethod
    def of(cls, side_memory: SideMemory) -> Origin:
        base = side_memory.base
        if base.get("name") == DEMO_BASE:
            return cls.DEMO
        return cls.HUB if base.get("revision") else cls.FOLDER


def outcome_of(edit: EditEntry) -> str:
    """What became of an edit: took, failed or superseded."""
    return str(edit.details.get("outcome") or ("took" if edit.took else "failed"))


def render_card(
    side_memory: SideMemory,
    *,
    ledger: bool,
    measured: Measured | None,
    evaluation: Mapping[str, Any] | None,
    licence: str | None,
) -> str:
    """The card as Markdown with its YAML header.

    Args:
        side_memory: as shipped, with or without texts.
        ledger: whether ledger.jsonl is shipped.
        measured: figures of `evaluation.recall.measure`.
        evaluation: the JSON of `wise eval`, schema 2.x.
        licence: a licence id.
    """
    from huggingface_hub import ModelCard, ModelCardData

    sections = [
        _introduction(side_memory),
        _base(side_memory, "A model in which it differs is refused."),
        _use(side_memory),
        _contents(side_memory, ledger),
        _router(side_memory),
        _making(side_memory),
        _figures(side_memory, measured, evaluation),
        _limits(side_memory),
    ]
    about: dict[str, Any] = {"library_name": "wise", "tags": TAGS, "license": licence}
    if Origin.of(side_memory) is Origin.HUB:
        about |= {"base_model": side_memory.base["name"], "base_model_relation": "adapter"}
    header = ModelCardData(**about).to_yaml()
    card = ModelCard(f"---\n{header}\n---\n\n" + "\n\n".join(sections) + "\n")
    return str(card)


def render_fold_card(
    side_memory: SideMemory, memory: int, dtype: str, losses: Mapping[str, Mapping[str, float]], most: float
) -> str:
    """The card of a dense checkpoint into which one memory was folded.

    Args:
        memory: its index.
        dtype: of the checkpoint.
        losses: by dtype, `error` and `vanished` of `folding.Loss`.
        most: the error beyond which a fold is warned of.
    """
    from huggingface_hub import ModelCard, ModelCardData

    sections = [
        _folded(side_memory),
        _base(side_memory, "It is the base's, without the delta."),
        _fold_losses(dtype, losses, most),
        _fold_use(),
        _fold_edits(side_memory, memory),
        _making(side_memory, ("side memory", _code(side_memory.digest))),
    ]
    about: dict[str, Any] = {"library_name": "transformers", "tags": FOLD_TAGS}
    if Origin.of(side_memory) is Origin.HUB:
        about |= {"base_model": side_memory.base["name"], "base_model_relation": "finetune"}
    header = ModelCardData(**about).to_yaml()
    return str(ModelCard(f"---\n{header}\n---\n\n" + "\n\n".join(sections) + "\n"))


# -- sections ---------------------------------------------------------------------------------------------------------


def _introduction(sm: SideMemory) -> str:
    return (
        f"# Side memory for {_base_name(sm)}\n\n"
        f"A side memory learned from {_count(len(sm.edits), 'edit')} of what its base says, without touching the "
        "base's weights (WISE: a delta of one feed-forward matrix, and a router that sends each prompt either to the "
        "base's own weights or to the edited copy). It holds no base weights; the base is needed to use it."
    )


def _base(sm: SideMemory, note: str) -> str:
    base, site = sm.base, sm.site
    known = {
        Origin.DEMO: "the demonstration base that comes with wise",
        Origin.HUB: "a hub id",
        Origin.FOLDER: "a local folder; the fingerprint says which weights are meant",
    }
    rows = [("Base", f"{_code(_base_name(sm))}, {known[Origin.of(sm)]}")]
    rows += [("Revision", _code(base["revision"]))] if base.get("revision") else []
    rows += [("Model type", _code(base["model_type"]))] if base.get("model_type") else []
    rows.append(("Edit site", f"{_code(site.path)}, layer {site.layer}, {site.d_out} x {site.d_in}"))
    for dtype, digest in sorted(base.get("fingerprint", {}).items()):
        rows.append((f"Fingerprint, {dtype}", _code(digest)))
    return f"## Base\n\n{_table(('', ''), rows)}\n\nThe fingerprint is the SHA-256 of the edited matrix. {note}"


def _use(sm: SideMemory) -> str:
    origin = Origin.of(sm)
    prompt = next((e.prompt for e in sm.edits if e.prompt and outcome_of(e) == "took"), "Your prompt")
    command = "wise chat --side-memory FOLDER" + (" --model BASE" if origin is Origin.FOLDER else "")
    wanted = {
        Origin.DEMO: "",
        Origin.HUB: f"{sm.base['name']!r}, revision={sm.base.get('revision')!r}",
        Origin.FOLDER: '"BASE"',
    }
    if sm.chat:
        inputs = [
            f'messages = [{{"role": "user", "content": {prompt!r}}}]',
            "inputs = base.tokenizer.apply_chat_template(",
            '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"',
            ").to(base.model.device)",
        ]
    else:
        inputs = [f'inputs = base.tokenizer({prompt!r}, return_tensors="pt").to(base.model.device)']
    python = [
        "import wisecli",
        "",
        f"base = wisecli.load_base({wanted[origin]})",
        *inputs,
        'with wisecli.attach(base.model, "FOLDER"):',
        "    ids = base.model.generate(**inputs, max_new_tokens=20, do_sample=False)",
        'print(base.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
    ]
    lead = (
        "FOLDER is where this folder lies, for example what `huggingface_hub.snapshot_download` returns"
        + (", and BASE the folder of the base" if origin is Origin.FOLDER else "")
        + "; `base.model` is a plain transformers model, and one loaded in any other way does as well."
    )
    return (
        f"## Use\n\n{lead} On the command line:\n\n{_fence('bash', [command])}\n\n"
        f"In Python:\n\n{_fence('python', python)}"
    )


def _folded(sm: SideMemory) -> str:
    return (
        f"# {_base_name(sm)} with a side memory folded in\n\n"
        "A dense checkpoint, written by `wise fold`: the base's weights, with the delta of a WISE side memory added to "
        "one matrix. **The delta is always on.** The router that keeps prompts no edit is about with the base's own "
        "weights is not part of a checkpoint: here they pass through the edited matrix too, and answers to them may "
        "differ from the base's. Where that matters, attach the side memory to the base instead."
    )


def _fold_losses(dtype: str, losses: Mapping[str, Mapping[str, float]], most: float) -> str:
    rows = [
        (f"{name} (this checkpoint)" if name == dtype else name, f"{x['error']:.2g}", f"{x['vanished']:.2g}")
        for name, x in losses.items()
    ]
    return (
        "## What is left of the delta\n\n"
        "The sum W + d was made in float32 and cast. The relative error is |cast(W + d) - cast(W) - d| / |d|; vanished "
        "is the share of the delta's entries that change nothing.\n\n"
        f"{_table(('dtype', 'relative error of the delta', 'vanished'), rows)}\n\n"
        f"Loading the checkpoint in another dtype loses as much as writing it so; above {most:g} edits may be lost."
    )


def _fold_use() -> str:
    lines = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model, tokenizer = (c.from_pretrained("FOLDER") for c in (AutoModelForCausalLM, AutoTokenizer))',
    ]
    lead = "Any engine that runs the base runs this. FOLDER is where this folder lies."
    return f"## Use\n\n{lead}\n\n{_fence('python', lines)}"


def _fold_edits(sm: SideMemory, memory: int) -> str:
    mine = [e for e in sm.edits if e.memory == memory]
    texts = [["-" if text is None else _code(text) for text in (e.prompt, e.target)] for e in mine]
    rows = [(_code(e.id), *text, outcome_of(e)) for e, text in zip(mine, texts, strict=True)]
    others = f" Memory {memory} of {len(sm.memories)}; the others are not inside." if len(sm.memories) > 1 else ""
    return f"## Edits\n\n{_count(len(mine), 'edit')}.{others}\n\n" + _table(("id", "prompt", "target", "outcome"), rows)


def _contents(sm: SideMemory, ledger: bool) -> str:
    outcomes = [outcome_of(e) for e in sm.edits]
    rows = [("Edits", str(len(outcomes)))]
    names = {"took": "took", "failed": "did not take", "superseded": "superseded by a later edit"}
    rows += [(f"... {text}", str(outcomes.count(o))) for o, text in names.items()]
    rows += [("... withdrawn", str(outcomes.count("withdrawn")))] if "withdrawn" in outcomes else []
    for i, m in enumerate(sm.memories):
        name = "Delta" if len(sm.memories) == 1 else f"Delta {i}"
        dtype = dtype_name(m.delta.values.dtype)
        rows.append((name, f"{m.delta.values.numel()} values, density {m.delta.density:.3f}, {dtype}"))
    rows.append(("Edit keys", f"{len(sm.keys.owner)} of {sm.keys.space.rank} numbers"))
    ledger_line = "`ledger.jsonl` lists every edit." if ledger else "The ledger was left out."
    return f"## Contents\n\n{_table(('', ''), rows)}\n\n{ledger_line} {_texts(sm)}"


def _router(sm: SideMemory) -> str:
    rows = [
        (str(i), name, f"{value:g}") for i, m in enumerate(sm.memories) for name, value in sorted(m.epsilon.items())
    ]
    rows = [(i, f"{name} (default)" if name == sm.router else name, value) for i, name, value in rows]
    note = (
        "A prompt whose score is above the threshold is answered by the side memory; any other by the base, unchanged."
    )
    return f"## Router\n\n{_table(('memory', 'router', 'threshold'), rows)}\n\n{note}"


def _making(sm: SideMemory, *first: tuple[str, str]) -> str:
    rows: list[tuple[str, str]] = [*first, ("chat template", "yes" if sm.chat else "no")]
    rows += [(f"config: {k}", _value(v)) for k, v in sorted(sm.config.items())]
    for i, m in enumerate(sm.memories):
        rows += [(f"memory {i}: {k}", _value(v)) for k, v in sorted(m.origin.items()) if k != "shards"]
        seeds = [s.get("mask_seed") for s in m.origin.get("shards", ())]
        rows += [(f"memory {i}: mask seeds of the shards", _value(seeds))] if seeds else []
    rows += [(f"version: {k}", _code(v)) for k, v in sorted(sm.versions.items())]
    return f"## How it was made\n\n{_table(('', ''), rows)}"


def _figures(sm: SideMemory, measured: Measured | None, evaluation: Mapping[str, Any] | None) -> str:
    parts = []
    if measured is not None:
        parts.append(_measured(measured, _short(sm, measured.base)))
    if evaluation is not None:
        parts.append(_evaluated(evaluation, _short(sm, str(evaluation["base"].get("label") or ""))))
    return "## Figures\n\n" + ("\n\n".join(parts) or "Nothing was measured when this package was made.")


def _measured(m: Measured, base: str) -> str:
    rows = []
    if m.reason is None:
        rows.append(("Reliability: edits answered with their target", _figure(m.reliability), _count(m.edits, "edit")))
        rows.append(("Edits routed to the side memory", _figure(m.routed), _count(m.edits, "edit")))
    rows.append(("Ordinary prompts routed to the side memory", _figure(m.opened), _count(m.ordinary, "prompt")))
    lead = (
        f"Measured on {_code(base)} in {m.dtype} with the {m.router} router, once the whole stream was learned: the "
        "prompt of each edit that no later one supersedes, exact match of free greedy generation with natural stop. "
        "The ordinary prompts come with wise and were also used to calibrate the threshold, so their share is no "
        "independent figure."
    )
    why = f"\n\nNo edit was asked: {m.reason}." if m.reason is not None else ""
    return f"### Own edits\n\n{lead}{why}\n\n{_table(('', 'share', 'of'), rows)}"


def _evaluated(evaluation: Mapping[str, Any], base: str) -> str:
    header = ("", "exact, before", "exact, after", "token, before", "token, after", "n")
    rows = []
    for key, name in _SCORES.items():
        exact, token = (evaluation["scores"].get(key, {}).get(metric, {}) for metric in ("exact", "token"))
        cells = (_with_interval(s, when) for s in (exact, token) for when in ("before", "after"))
        n = str(exact.get("n", 0)) + (
            f" (token {token['n']})" if token.get("n", exact.get("n")) != exact.get("n") else ""
        )
        rows.append((name, *cells, n))
    lead = f"Protocol {_code(evaluation['protocol'].get('name', 'not recorded'))}; {_told(evaluation, base)}."
    metrics = [f"- {k}: {_line(v)}" for k, v in sorted(dict(evaluation.get("metrics") or {}).items())]
    meaning = (
        "Before is the untouched base, after is with the side memory; in brackets 95 % bootstrap intervals; n counts "
        "prompts."
    )
    return "\n\n".join(
        ["### Evaluation", lead, _table(header, rows), *(["\n".join(metrics)] if metrics else []), meaning]
    )


def _told(evaluation: Mapping[str, Any], base: str) -> str:
    """On what, with what, and how much of it."""
    dataset = evaluation["dataset"]
    name, file = dataset.get("name"), dataset.get("file")
    router = (evaluation.get("side_memory") or {}).get("router")
    named = _code(name if name else file) + (f" ({_code(file)})" if name and file and name != file else "")
    told = {
        "dataset": (named if name or file else "not recorded")
        + (f" at revision {_code(dataset['revision'])}" if dataset.get("revision") else ""),
        "base": _code(base) if base else "not recorded",
        "router": _code(router) if router else "the side memory's own",
        "edits": f"{dataset.get('edits', '-')}, of which {dataset.get('superseded', 0)} superseded, not scored",
    }
    return "; ".join(f"{k} {v}" for k, v in told.items())


def _limits(sm: SideMemory) -> str:
    items = [
        f"It works with {_base_name(sm)} alone, and with no other revision in which the edited matrix differs.",
        "Each edit is a prompt with its answer. What follows from it, its reversal, other languages and long documents "
        "are not covered unless a figure above says so. Asked in words far from its own, an edit is answered by the "
        "base; an edit that did not take may be answered with anything.",
        "One decision is taken per prompt. Packed sequences, chunked prefill and servers with continuous batching are "
        "refused.",
        "It is no LoRA adapter: it is attached with wise.",
        _privacy(sm),
    ]
    return "## Limits\n\n" + "\n".join(f"- {item}" for item in items)


# -- pieces -----------------------------------------------------------------------------------------------------------


def _has_texts(sm: SideMemory) -> bool:
    return any(e.prompt is not None or e.target is not None for e in sm.edits)


def _texts(sm: SideMemory) -> str:
    return f"The edits' prompts and targets are {'' if _has_texts(sm) else 'not '}inside."


def _privacy(sm: SideMemory) -> str:
    if _has_texts(sm):
        return "The edits' prompts and targets can be read by whoever has this folder."
    return (
        "The edits' texts were left out, but their ids and whitened activations are inside: whoever has the base can "
        "check whether a guessed prompt was edited. An id that the edits did not bring is a hash of prompt and target, "
        "so whoever guesses both can confirm it, without the base."
    )


def _base_name(sm: SideMemory) -> str:
    return _short(sm, str(sm.base.get("name")))


def _short(sm: SideMemory, name: str) -> str:
    """A base's name; of a local folder only the last part, for the rest says more about a disk than about a model."""
    return PurePath(name).name or name if Origin.of(sm) is Origin.FOLDER else name


def _count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def _figure(value: Any) -> str:
    return "-" if value is None else f"{value:.3f}"


def _with_interval(score: Mapping[str, Any], when: str) -> str:
    """A mean with its interval, where there is one."""
    bounds = score.get(f"{when}_interval")
    return _figure(score.get(when)) + (f" [{bounds[0]:.3f}, {bounds[1]:.3f}]" if bounds else "")


def _value(value: Any) -> str:
    return _code(json.dumps(value, ensure_ascii=False, sort_keys=True))


def _line(text: Any) -> str:
    return " ".join(str(text).split())


def _code(text: Any) -> str:
    """A code span that cannot break out of its table cell."""
    return "`" + _line(text).replace("`", "'").replace("|", "\\|") + "`"


def _fence(language: str, lines: Sequence[str]) -> str:
    return "\n".join([f"```{language}", *lines, "```"])


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---"] * len(header)
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))

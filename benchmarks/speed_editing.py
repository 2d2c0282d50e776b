"""Speed of editing: the published schedule against `reference.Reference`, and the default schedule on a stream.

Both editors take the same number of steps on the same rows; their deltas are compared first. What an edit needs at
least is counted from the model's shape: the frozen part once, then per step the projection's delta, the layers above
and the head at label positions, over unpadded rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from measure import flops, in_child, interleaved, peak_memory, ratios
from reference import Reference

from wisecli.data.records import EditRecord
from wisecli.data.stream import EditStream, read_edits
from wisecli.editing import published
from wisecli.editing.batch import capture_edits, edit_rows
from wisecli.editing.config import EditConfig, shards_for
from wisecli.editing.editor import Editor, slices
from wisecli.editing.margins import Margins
from wisecli.editing.merge import merge_shards
from wisecli.editing.published import Published
from wisecli.editing.rewording import Rewording
from wisecli.editing.steps import together
from wisecli.evaluation.evaluate import EvalOptions, evaluate
from wisecli.memory.bits import draw_mask
from wisecli.memory.calibration import activation_threshold
from wisecli.memory.indicator import activation_indicator
from wisecli.memory.side_memory import SideMemory
from wisecli.models.base import Base, load_base
from wisecli.models.prompts import PromptEncoder
from wisecli.models.site import find_site
from wisecli.models.upper import UpperModel

EDITS = Path(__file__).parents[1] / "examples" / "edits.jsonl"
SHAPES = ("wise-demo", "llama-32x512")
SEVERAL = 4  # shards at once, beside one after the other


def base_of(shape: str, dtype: torch.dtype = torch.float32) -> Base:
    """The demonstration base, or a random Llama of 32 layers, 512 wide, with a vocabulary of 32,000."""
    base = load_base(device="cpu")
    return base if shape == "wise-demo" else random_llama(base, 512, 1376, 32, 8, 32_000, dtype)


def random_llama(
    like: Base,
    width: int,
    ffn: int,
    layers: int,
    heads: int,
    vocab: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Base:
    """A Llama with random weights of the usual size, with another base's tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=vocab,
        max_position_embeddings=2048,
        bos_token_id=like.tokenizer.bos_token_id,
        eos_token_id=like.tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return Base(model.eval().requires_grad_(False), like.tokenizer, f"random-llama-{layers}x{width}")


def never_early() -> AbstractContextManager[Any]:
    """Within it the published schedule takes all its steps."""
    return mock.patch.object(published, "_FLAT", -1.0)


class Ours:
    """The published schedule as the tool runs it; what is captured of an edit counts as part of learning it."""

    def __init__(self, base: Base, config: EditConfig, mask: torch.Tensor) -> None:
        self.config = config
        encoder = PromptEncoder(base.tokenizer)
        self.upper = UpperModel(base.model, find_site(base.model, config.layer), encoder)
        self.learner = Published(self.upper, mask, config, 0)

    def edit(self, record: EditRecord) -> None:
        self.learner.arrive(capture_edits(self.upper, [record], self.config.contexts, self.config.seed))

    @torch.no_grad()
    def epsilon(self) -> float:
        """The activation router's threshold over the edits that took, as merging computes it."""
        took = [e.record.prompt for e, o in zip(self.learner.edits, self.learner.outcomes(), strict=True) if o.took]
        rows = self.upper.capture([self.upper.encoder.prompt(p) for p in took])
        delta = self.learner.result()
        inside = torch.cat([activation_indicator(r.a[None].float(), r.content[None], delta) for r in rows])
        return float(activation_threshold(inside, inside, self.config.act_ratio).epsilon)


def editors(shape: str, steps: int) -> tuple[Base, dict[str, Callable[[], Any]]]:
    """A base and, by name, what makes each editor anew."""
    base = base_of(shape)
    config = EditConfig(schedule="published", max_steps=steps)
    site = find_site(base.model, config.layer)
    mask = draw_mask((site.d_out, site.d_in), config.mask_density, config.mask_seed(0))
    return base, {
        "ours": lambda: Ours(base, config, mask),
        "reference": lambda: Reference(base, site, mask, config),
    }


# -- the same deltas ---------------------------------------------------------------------------------------------------


def same_deltas(edits: int, steps: int) -> dict[str, Any]:
    """Both editors on the same edits: how far apart the deltas and the thresholds are."""
    base, make = editors("wise-demo", steps)
    records = read_edits(EDITS, edits).records
    ours, reference = make["ours"](), make["reference"]()
    with never_early():
        for record in records:
            ours.edit(record)
            reference.edit(record)
    delta, other = ours.learner.result(), reference.result()
    mine, theirs = ours.epsilon(), reference.epsilon()
    return {
        "base": base.name,
        "edits": edits,
        "steps": steps,
        "largest_entry": float(delta.abs().max()),
        "largest_difference": float((delta - other).abs().max()),
        "outside_mask": float(other[reference.mask == 0].abs().max()),
        "epsilon": mine,
        "epsilon_difference": abs(mine - theirs),
    }


# -- equal steps -------------------------------------------------------------------------------------------------------


def editing(shape: str, edits: int, steps: int, repeats: int) -> dict[str, Any]:
    """CPU seconds, FLOPs and peak memory per edit of both editors, at equal steps."""
    base, make = editors(shape, steps)
    records = read_edits(EDITS, edits).records
    setup = {name: _setup_seconds(f) for name, f in make.items()}
    learners = {name: f() for name, f in make.items()}

    def learn(name: str) -> Callable[[], None]:
        return lambda: [learners[name].edit(r) for r in records] and None

    with never_early():
        found = interleaved({name: learn(name) for name in learners}, repeats, warm=0)
        counted = {name: flops(lambda name=name: learners[name].edit(records[0])) for name in learners}
    least = minimum_flops(base, records[0], learners["reference"])
    peaks = {n: in_child("speed_editing:learning_peak", shape=shape, who=n, steps=min(steps, 5)) for n in learners}
    return {
        "base": base.name,
        "steps": steps,
        "edits": edits,
        "repeats": repeats,
        "per_edit": {name: t.summary(edits) for name, t in found.items()},
        "times_fewer_cpu_s": ratios(found["reference"], found["ours"]),
        "setup_cpu_s": setup,
        "gflop_per_edit": {name: n / 1e9 for name, n in counted.items()} | {"minimum": least / 1e9},
        "flops_over_minimum": {name: n / least for name, n in counted.items()},
        "peak_extra_mb": {name: p["bytes"] / 1e6 for name, p in peaks.items()},
    }


def learning_peak(shape: str, who: str, steps: int) -> dict[str, Any]:
    """Peak memory of learning one edit, in this process."""
    _, make = editors(shape, steps)
    learner = make[who]()
    record = read_edits(EDITS, 1).records[0]
    with never_early(), peak_memory() as peak:
        learner.edit(record)
    return peak


def minimum_flops(base: Base, record: EditRecord, reference: Reference) -> int:
    """What learning one edit needs at least on a Llama.

    The layers up to the edited one once over the rows and the irrelevant prompt; per step, a delta^T over all of them
    and its gradient, the layers above over the rows and the gradient of their inputs, and the head, forward and
    backward. The head, and of the last layer all but its keys and values, count at label positions only. Rows are not
    padded; attention counts all pairs of tokens, as its kernels are counted.
    """
    c, layer = base.model.config, find_site(base.model).layer
    rows = edit_rows(reference.encoder, record, reference.config.contexts, reference.config.seed)
    labels = sum(len(r.target) for r in rows)
    other = len(reference.pool[0])
    heads = c.num_attention_heads * c.head_dim
    keys = 2 * c.hidden_size * c.num_key_value_heads * c.head_dim
    others = c.hidden_size * (2 * heads + 3 * c.intermediate_size)
    linear = keys + others
    tokens, pairs = sum(len(r) for r in rows), sum(len(r) ** 2 for r in rows)
    frozen = (layer + 1) * (linear * (tokens + other) + 2 * heads * (pairs + other * other))
    projection = 2 * c.hidden_size * c.intermediate_size * (tokens + other)
    between = (c.num_hidden_layers - layer - 2) * (2 * linear * tokens + 6 * heads * pairs)
    last = 2 * (keys * tokens + others * labels) + 6 * heads * sum(len(r.target) * len(r) for r in rows)
    head = 2 * c.hidden_size * c.vocab_size * labels
    return 2 * (frozen + reference.config.max_steps * (projection + between + last + head))


def _setup_seconds(make: Callable[[], Any]) -> float:
    start = time.process_time()
    make()
    return time.process_time() - start


# -- several shards at once --------------------------------------------------------------------------------------------


def at_once(shape: str, counts: Sequence[int], steps: int, repeats: int) -> dict[str, Any]:
    """CPU seconds of an edit at equal steps where so many shards learn one each, their steps taken together."""
    base, _ = editors(shape, steps)
    found = interleaved({str(n): at_once_of(base, n, steps) for n in counts}, repeats, warm=0)
    return {
        "base": base.name,
        "steps": steps,
        "repeats": repeats,
        "per_edit": {name: t.summary(int(name)) for name, t in found.items()},
    }


def at_once_of(base: Base, n: int, steps: int) -> Callable[[], None]:
    """What makes so many shards learn an edit each, all at once; the frozen part has run."""
    config = EditConfig(schedule="published", max_steps=steps)
    upper = UpperModel(base.model, find_site(base.model), PromptEncoder(base.tokenizer))
    margins, size = Margins(upper, config.margins), (upper.site.d_out, upper.site.d_in)
    edits = capture_edits(upper, read_edits(EDITS, n).records, config.contexts, config.seed)
    masks = [draw_mask(size, config.mask_density, config.mask_seed(i)) for i in range(n)]

    def learn() -> None:
        learners = [Published(upper, mask, config, 0, margins) for mask in masks]
        with never_early():
            for _ in together(upper, [one.learning([e]) for one, e in zip(learners, edits, strict=True)]):
                pass

    return learn


# -- a stream, end to end ----------------------------------------------------------------------------------------------


def stream(edits: int, reference_edits: int) -> dict[str, Any]:
    """The default schedule on a stream against the reference editor, with the scores of both.

    Ours counts all of editing and merging; the gate and the rewordings, which are kept for the next run on the same
    base, are counted for a new base only. The reference counts its steps alone, with the published early stop; of its
    shards one side memory is made by the tool's own merge, and asked through both routers. Where the reference learns
    fewer edits than the stream has, its CPU seconds per edit are those of the edits it learned.
    """
    base, records = load_base(device="cpu"), read_edits(EDITS, edits)
    ours, took = learned(base, records, 1)
    _, beside = learned(base, records, SEVERAL)
    part = EditStream.of(records.records[:reference_edits])
    theirs, seconds = reference_side_memory(base, part)
    other = seconds / len(part)
    each = {
        "ours": took["edit"] + took["merge"],
        f"ours, {SEVERAL} shards at once": beside["edit"] + beside["merge"],
        "ours, new base": sum(took.values()),
    }
    each = {who: s / len(records) for who, s in each.items()}
    return {
        "base": base.name,
        "edits": len(records),
        "reference_edits": len(part),
        "cpu_s_per_edit": each | {"reference": other},
        "ours_cpu_s": took,
        "times_fewer_cpu_s": other / each["ours"],
        "times_fewer_cpu_s_of": {who: other / s for who, s in each.items() if who != "ours"},
        "extrapolated": len(part) < len(records),
        "scores": {
            "ours": _scores(base, records, ours, None),
            "reference, activation router": _scores(base, part, theirs, "activation"),
            "reference, key router": _scores(base, part, theirs, "key"),
        },
    }


def learned(base: Base, records: EditStream, at_once: int) -> tuple[SideMemory, dict[str, float]]:
    """The side memory of the default schedule, so many shards at once, and the CPU seconds that its parts took."""
    start = time.process_time()
    editor = Editor(base, EditConfig(shards=shards_for(len(records)), shards_at_once=at_once))
    gate = editor.gate
    Rewording.of(editor.upper)
    fitted = time.process_time()
    shards = editor.learn(records)
    done = time.process_time()
    side_memory = merge_shards(shards, gate, editor.describe(records), upper=editor.upper)
    parts = {"gate and rewordings": fitted - start, "edit": done - fitted, "merge": time.process_time() - done}
    return side_memory, parts


def reference_side_memory(base: Base, records: EditStream) -> tuple[SideMemory, float]:
    """A side memory of the reference's shards, and the CPU seconds its steps took."""
    config = EditConfig(schedule="published")
    editor = Editor(base, config)
    superseded = editor.settle(records).superseded
    shards, seconds = [], 0.0
    for index, some in enumerate(slices(records.records, config.shards)):
        shard = editor.open(index, records)
        learner = Reference(base, editor.site, shard.mask, config, early_stop=True)
        shard.learner = learner  # type: ignore[assignment]
        for _ in shard.learn(some, superseded):
            pass
        shards.append(shard.shard())
        seconds += learner.cpu_s
    return merge_shards(shards, editor.gate, editor.describe(records), upper=editor.upper), seconds


def _scores(base: Base, asked: EditStream, sm: SideMemory, router: str | None) -> dict[str, float]:
    report = evaluate(base, asked, sm, options=EvalOptions(ability=False, open_gate=False, router=router))
    return {k: float(v["exact"]["after"]) for k, v in report.scores.items() if k in ("rel", "gen", "loc", "loc_near")}


def evaluation(edits: int, batch: int) -> dict[str, Any]:
    """Questions per second of a whole evaluation, in batches and one at a time."""
    base, records = load_base(device="cpu"), read_edits(EDITS, edits)
    editor = Editor(base, EditConfig(shards=shards_for(len(records))))
    sm = merge_shards(editor.learn(records), editor.gate, editor.describe(records), upper=editor.upper)
    seconds: dict[int, float] = {}
    asked: Sequence[Any] = ()
    texts = []
    for size in (batch, 1):
        start = time.process_time()
        report = evaluate(base, records, sm, options=EvalOptions(ability=False, open_gate=False, batch_size=size))
        seconds[size] = time.process_time() - start
        asked = report.items
        texts.append([(i.question.prompt, i.after, i.route.memory if i.route else None) for i in report.items])
    return {
        "questions": len(asked),
        "batch": batch,
        "questions_per_cpu_s": {"batched": len(asked) / seconds[batch], "one_at_a_time": len(asked) / seconds[1]},
        "times_faster": seconds[1] / seconds[batch],
        "same_texts_and_memories": sum(a == b for a, b in zip(*texts, strict=True)),
    }

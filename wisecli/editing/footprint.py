"""How much memory a run will take at most, from the base's shape and the tokenised stream, before a base is loaded.

A run goes through four phases, and what is resident in each is counted; the largest counts. On the CPU what was given
back to the allocator in small pieces stays with the process and serves later phases; this is counted, too.

    loading      the base, and the weight files while they are cast
    gate         what the pool brings into the layer, in double precision, several times over
    rewording    what moves from one wording of a pool fact to another, and both of its ends
    learning     the shard's captured rows; the delta with its mask, gradient, momentum and two copies to go back to; a
                 step's activations above the edited layer with the logits of its targets, or a sweep's; of shards that
                 are learned at once all together

Shapes: `N` tokens of a batch with its padding, `F` FFN width, `D` model width, `V` vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from wisecli.data.pool import Pool
from wisecli.data.records import EditRecord
from wisecli.editing.batch import ROWS, TOKENS, edit_rows
from wisecli.editing.config import EditConfig
from wisecli.editing.editor import grouped, slices
from wisecli.editing.rewording import wordings
from wisecli.models.base import Base
from wisecli.models.prompts import PromptEncoder, Row
from wisecli.models.site import decoder_layers, likely_site

_LIBRARIES = 68 << 20  # of the process: code and buffers of what runs for the first time after the prediction
_BATCH = 32  # rows captured at once
_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))  # of a container
_DELTAS = 7  # matrices of the delta's shape: delta, mask, gradient and its sum, momentum, two to go back to
_GATE, _GATE_KEPT = 6.6, 3.4  # double-precision copies of the pool's entries while the gate is fitted, and left behind


@dataclass(frozen=True)
class Footprint:
    """Bytes that a run takes at most beyond its imports.

    Attributes:
        base: weights on the device.
        delta: the delta and what an optimiser keeps beside it.
        captured: rows of edits and moves of the rewording.
        step: activations, logits and gradients of one step or sweep.
        rest: the gate, the libraries' buffers, what the allocator holds.
        host: bytes in the machine's memory where the base is on an accelerator; 0 on the CPU, where all is in one.
    """

    base: int
    delta: int
    captured: int
    step: int
    rest: int
    host: int = 0

    @property
    def total(self) -> int:
        """On the device."""
        return self.base + self.delta + self.captured + self.step + self.rest


@dataclass(frozen=True)
class _Shape:
    """What of a base decides how much memory it takes: widths, layers above the site, bytes of a number."""

    d_in: int
    d_out: int
    vocab: int
    above: int
    size: int

    def captured(self, rows: Sequence[Row]) -> int:
        """Bytes of rows as `CapturedRow` holds them."""
        return sum(len(r) * ((self.d_in + self.d_out) * self.size + 9) + self.d_out * self.size for r in rows)

    def passing(self, rows: Sequence[Row]) -> int:
        """Bytes of one layer at work on a padded batch of rows, without gradients."""
        return _padded(rows) * (3 * self.d_in + 6 * self.d_out) * self.size

    def step(self, rows: Sequence[Row]) -> int:
        """Bytes of a step: the activations with dropout and what is kept of every layer above until the gradient.

        The last layer's FFN runs on the positions of targets alone.
        """
        n, targets = _padded(rows), _targets(rows)
        entering = sum(map(len, rows)) * self.d_in * (2 * self.size + 4)
        through_ffn = max(0, self.above - 1) * n + (targets if self.above else 0)
        kept = (self.above * n * 10 * self.d_out + through_ffn * 4 * self.d_in) * self.size
        return entering + kept + targets * self.vocab * (12 + self.size)

    def sweep(self, rows: Sequence[Row]) -> int:
        """Bytes of the largest batch of a sweep over some of these rows: the longest that are swept at once."""
        longest = sorted(rows, key=len, reverse=True)
        rows = longest[: min(ROWS, max(1, TOKENS // len(longest[0])))] if longest else ()
        n, targets = _padded(rows), _targets(rows)
        entering = sum(map(len, rows)) * self.d_in * 4
        through_ffn = n if self.above > 1 else targets  # the last layer's runs on the positions of targets alone
        working = (3 * through_ffn * self.d_in + 6 * n * self.d_out) * self.size
        return entering + working + targets * self.vocab * (4 + self.size)


def predict(
    base: Base,
    records: Sequence[EditRecord],
    config: EditConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
    pool: Pool | None = None,
    quantize: int | None = None,
    lower_off: bool = False,
) -> Footprint:
    """What learning a stream will take at most.

    Args:
        base: without weights, as `placement.outline` gives it.
        dtype: of the loaded base.
        device: that it computes on.
        pool: of the run; the shipped one when None.
        quantize: bits that its linear maps are packed into.
        lower_off: whether the layers below the edited one stay off the device.
    """
    encoder = PromptEncoder(base.tokenizer, chat=config.chat)
    site = likely_site(base.model, config.layer, config.module)
    layers = decoder_layers(base.model)
    size = torch.empty(0, dtype=dtype).element_size()
    text = base.model.config.get_text_config()
    shape = _Shape(site.d_in, site.d_out, text.vocab_size, len(layers) - site.layer - 1, size)
    weights = _weights(base.model, size, quantize)
    below = sum(_weights(m, size, quantize) for m in layers[: site.layer]) if lower_off else 0
    groups = _rows_of_groups(encoder, records, config)
    reworded = [encoder.pair(p, answer) for p, answer in wordings()] if config.rewording else []
    entries = len((pool or Pool.of()).prompts) * site.d_out * 8
    on_cpu = device.type == "cpu"
    gate = _LIBRARIES + int(_GATE * entries)
    kept = _LIBRARIES + int(_GATE_KEPT * entries) if on_cpu else 0
    moves = _moves(shape, reworded)
    one = _DELTAS * site.d_in * site.d_out * 4
    taken = [(len(g) * one, sum(map(shape.captured, g)) + moves, _learning(shape, g, config)) for g in groups]
    delta, captured, step = max(taken, key=sum)
    casting = _casting(base, dtype, quantize)
    learning = kept + delta + captured + step
    phases = [learning, kept + 3 * moves + _passing(shape, reworded), gate if on_cpu else entries // 2]
    rest = max(*phases, casting if on_cpu else 0) - delta - captured - step
    host = 0 if on_cpu else below + max(gate, casting)
    return Footprint(weights - below, delta, captured, step, rest, host)


def room(device: torch.device) -> int:
    """Bytes there are: free ones of an accelerator, the machine's or a container's for the CPU; 0 if not told."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu":
        return 0
    try:
        machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not on Windows
        return 0
    return min([machine, *(int(said) for said in map(_read, _LIMITS) if said.isdigit())])


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _learning(shape: _Shape, parts: Sequence[Sequence[Row]], config: EditConfig) -> int:
    """Bytes of the largest step of shards that are learned at once, or sweep of one, with these rows each."""
    step = shape.step([row for rows in parts for row in _longest(rows, config)])
    return step if config.schedule == "published" else max(step, *map(shape.sweep, parts))


def _longest(rows: Sequence[Row], config: EditConfig) -> list[Row]:
    """The rows of a shard's largest step."""
    longest = sorted(rows, key=len, reverse=True)
    if config.schedule == "published":
        return longest[: config.contexts + 1]
    picked: list[Row] = []
    for row in longest[: config.rows]:
        if len(picked) > 1 and sum(map(len, picked)) + len(row) > config.tokens:
            break
        picked.append(row)
    return picked


def _casting(base: Base, dtype: torch.dtype, quantize: int | None) -> int:
    """Bytes of weight files that are mapped while weights are made of them; none where they serve as weights."""
    stored = getattr(base.model.config, "dtype", None) or dtype
    if base.quantization or (stored == dtype and quantize is None):
        return 0
    return _weights(base.model, torch.empty(0, dtype=stored).element_size(), None)


def _moves(shape: _Shape, reworded: Sequence[Row]) -> int:
    """Bytes of the displacements between both wordings of each fact."""
    tokens = sum(min(_targets([a]), _targets([b])) for a, b in zip(reworded[::2], reworded[1::2], strict=True))
    return tokens * (shape.d_in + shape.d_out) * shape.size


def _passing(shape: _Shape, rows: Sequence[Row]) -> int:
    """Bytes of the largest batch while rows are captured."""
    return shape.passing(sorted(rows, key=len)[-_BATCH:])


def _rows_of_groups(
    encoder: PromptEncoder, records: Sequence[EditRecord], config: EditConfig
) -> list[Sequence[list[Row]]]:
    """Token rows of every shard, those together that are learned at once, as far as the stream alone tells."""
    shards = [
        [row for r in part for row in edit_rows(encoder, r, config.contexts, config.seed)]
        for part in slices(records, config.shards)
    ]
    return grouped(shards, config.shards_at_once)


def _padded(rows: Sequence[Row]) -> int:
    return len(rows) * max((len(r) for r in rows), default=0)


def _targets(rows: Sequence[Row]) -> int:
    return sum(len(r.target) for r in rows)


def _weights(module: Any, size: int, quantize: int | None) -> int:
    """Bytes of a module's weights: numbers of `size` bytes, those of linear maps in layers packed where it is asked."""
    packed = 0
    if quantize is not None:
        head = getattr(module, "get_output_embeddings", lambda: None)()
        maps: Mapping[int, Any] = {
            id(m): m.weight for m in module.modules() if type(m).__name__ in ("Linear", "Conv1D") and m is not head
        }
        packed = sum(w.numel() for w in maps.values())
    whole = sum(p.numel() for p in module.parameters()) - packed
    return whole * size + packed * (quantize or 0) // 8 + (packed // 16 if quantize == 4 else 0)

"""Is a side memory whole, and does it belong to its base? Every check says what it looked at or what is wrong.

Integrity needs the file alone. What a check cannot find out (a package without checksums) is neither right nor wrong.
Whether the edits still hold is `asking`'s.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from math import isnan
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wisecli.errors import InputError
from wisecli.hub import MANIFEST, check_files
from wisecli.inspection.ledger import outcome_of
from wisecli.memory.files import read_json
from wisecli.memory.shard import TOOK, WITHDRAWN
from wisecli.memory.side_memory import MAIN_MEMORY, SideMemory
from wisecli.models.base import Base, matches, matrix_of
from wisecli.routing.attach import side_memory_file
from wisecli.routing.routers import ROUTERS

_SHOWN = 3  # faults of one check that are named
_MALFORMED = (TypeError, ValueError, KeyError, IndexError, AttributeError, RuntimeError, InputError)


@dataclass(frozen=True)
class Check:
    """One thing looked at. `ok` is None where there was nothing to look at."""

    name: str
    ok: bool | None
    detail: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def check_file(path: str | Path) -> tuple[SideMemory | None, list[Check]]:
    """Check that a side memory file or a package is whole; no base is needed.

    Returns the side memory, None where it cannot be read, and the checks made.

    Raises:
        InputError: there is nothing of that name, or a folder that holds no side memory.
    """
    path = Path(path)
    file = side_memory_file(path)
    if not file.exists():
        raise InputError(f"{path} does not exist.", hint="Give a file made by wise merge, or a packaged folder.")
    try:
        sm = SideMemory.load(file)
    except InputError as e:
        return None, [Check("readable", False, e.message.rstrip("."))]
    checks = [Check("readable", True, f"{file.name}, {file.stat().st_size:,} bytes")]
    each: list[tuple[str, Callable[[SideMemory], Iterator[str]], str]] = [
        ("tensors", _tensors, "shapes and dtypes fit the manifest"),
        ("mask", _masks, "each mask has as many entries as there are values"),
        ("values", _values, "all finite"),
        ("edits", _edits, f"{len(sm.edits)}, each in a memory that is there"),
        ("keys", _keys, f"{len(sm.keys.owner)}, each of an edit; every edit that took has one"),
        ("thresholds", _thresholds, f"every memory has one for the {sm.router} router"),
    ]
    checks += [_run(name, faults, sm, fine) for name, faults, fine in each]
    if file != path:
        checks.append(_package(file.parent, sm))
    return sm, checks


def check_base(base: Base, sm: SideMemory) -> Check:
    """Whether the base is the one that the side memory was learned on, by the fingerprint of the edited matrix."""
    recorded, site = sm.base.get("fingerprint") or {}, sm.site
    try:
        found = site.shape(base.model)
    except AttributeError:
        return Check("base", False, f"{base.label} has no module {site.path}")
    if found != (site.d_out, site.d_in):
        shape = " x ".join(str(n) for n in found)
        return Check("base", False, f"{site.path} of {base.label} is {shape}, not {site.d_out} x {site.d_in}")
    if not matches(matrix_of(base.model, site), recorded):
        name = sm.base.get("name")
        return Check(
            "base", False, f"{site.path} of {base.label} holds other weights than {name} had when it was learned"
        )
    return Check("base", True, f"{base.label}, {site.path} as recorded")


def _run(name: str, faults: Callable[[SideMemory], Iterator[str]], sm: SideMemory, fine: str) -> Check:
    try:
        found = list(faults(sm))
    except _MALFORMED as e:
        found = [e.message.rstrip(".") if isinstance(e, InputError) else f"malformed: {e}"]
    return Check(name, not found, _joined(found) if found else fine)


# -- the file ---------------------------------------------------------------------------------------------------------


def _tensors(sm: SideMemory) -> Iterator[str]:
    keys, space, site = sm.keys, sm.keys.space, sm.site
    n, rank, floating = len(keys.owner), space.projection.shape[-1], torch.float16
    wanted: list[tuple[str, Tensor, tuple[int, ...], torch.dtype]] = [
        ("keys.mean", space.mean, (site.d_out,), torch.bfloat16),
        ("keys.projection", space.projection, (site.d_out, rank), torch.int8),
        ("keys.scale", space.scale, (rank,), torch.float32),
        ("keys.vectors", keys.keys, (n, rank), torch.int8),
        ("keys.step", keys.step, (n,), torch.float32),
        ("keys.owner", keys.owner, (n,), torch.int64),
        ("keys.crowding", keys.crowding, (len(sm.edits),), floating),
    ]
    for i, m in enumerate(sm.memories):
        entries = site.d_out * site.d_in
        wanted.append((f"memory.{i}.mask", m.delta.bits, ((entries + 7) // 8,), torch.uint8))
        wanted.append((f"memory.{i}.values", m.delta.values, (m.delta.values.numel(),), m.delta.values.dtype))
        if not m.delta.values.is_floating_point():
            yield f"memory.{i}.values are {m.delta.values.dtype}"
    for name, t, shape, dtype in wanted:
        if tuple(t.shape) != shape:
            yield f"{name} is {_shape(t.shape)}, not {_shape(shape)}"
        elif t.dtype != dtype and not (t.is_floating_point() and dtype.is_floating_point):
            yield f"{name} is {t.dtype}, not {dtype}"


def _masks(sm: SideMemory) -> Iterator[str]:
    for i, m in enumerate(sm.memories):
        bits, entries = np.unpackbits(m.delta.bits.numpy()), sm.site.d_out * sm.site.d_in
        ones = int(bits[:entries].sum())
        if ones != m.delta.values.numel():
            yield f"the mask of memory {i} has {ones} entries, but there are {m.delta.values.numel()} values"
        if bits[entries:].any():
            yield f"the mask of memory {i} goes on beyond the matrix"


def _values(sm: SideMemory) -> Iterator[str]:
    space, keys = sm.keys.space, sm.keys
    named = [("keys.mean", space.mean), ("keys.scale", space.scale)]
    named += [("keys.step", keys.step), ("keys.crowding", keys.crowding)]
    named += [(f"memory.{i}.values", m.delta.values) for i, m in enumerate(sm.memories)]
    for name, t in named:
        wrong = int((~t.isfinite()).sum())
        if wrong:
            yield f"{wrong} of {t.numel()} numbers in {name} are not finite"


def _edits(sm: SideMemory) -> Iterator[str]:
    for edit, n in Counter(e.id for e in sm.edits).items():
        if n > 1:
            yield f"the id {edit} stands {n} times"
    for e in sm.edits:
        if not 0 <= e.memory < len(sm.memories) and not (outcome_of(e) == WITHDRAWN and e.memory == MAIN_MEMORY):
            yield f"{e.id} is in memory {e.memory}; there are {len(sm.memories)}"
        if e.took != (outcome_of(e) == TOOK):
            yield f"{e.id} {outcome_of(e)}, but is marked as {'taken' if e.took else 'not taken'}"
    known = {e.id: e for e in sm.edits}
    for i, m in enumerate(sm.memories):
        for edit in m.edits:
            if edit not in known:
                yield f"memory {i} lists {edit}, which is no edit"
            elif known[edit].memory not in (i, MAIN_MEMORY):
                yield f"memory {i} lists {edit}, which is in memory {known[edit].memory}"
    listed = {edit for m in sm.memories for edit in m.edits}
    yield from (f"no memory lists {e.id}" for e in sm.edits if e.memory != MAIN_MEMORY and e.id not in listed)


def _keys(sm: SideMemory) -> Iterator[str]:
    owner = sm.keys.owner
    wrong = int(((owner < 0) | (owner >= len(sm.edits))).sum())
    if wrong:
        yield f"{wrong} of {len(owner)} keys belong to no edit"
    having = set(owner.tolist())
    yield from (f"{e.id} took, but has no key" for i, e in enumerate(sm.edits) if e.took and i not in having)
    for i, e in enumerate(sm.edits):
        if outcome_of(e) == WITHDRAWN and e.memory != MAIN_MEMORY and i in having:
            yield f"{e.id} was withdrawn, but its keys lead to memory {e.memory}"


def _thresholds(sm: SideMemory) -> Iterator[str]:
    if sm.router not in ROUTERS:
        yield f"the router {sm.router!r} is unknown"
        return
    for i, m in enumerate(sm.memories):
        if m.epsilon.get(sm.router) is None:
            yield f"memory {i} has none for the {sm.router} router"
        for name, value in {**m.epsilon, **{f"scope {k}": v for k, v in m.scopes.items()}}.items():
            if value is not None and isnan(value):
                yield f"that of memory {i} for {name} is no number"


def _package(folder: Path, sm: SideMemory) -> Check:
    """The checksums that packaging wrote, and the digest of the tensors."""
    if not (folder / MANIFEST).is_file():
        return Check("package", None, f"there is no {MANIFEST}, so there are no checksums: packaging did not finish")
    try:
        checked = check_files(folder, str(folder))
        content = read_json(folder / MANIFEST).get("content")
    except InputError as e:
        return Check("package", False, e.message.rstrip("."))
    if content is not None and content != sm.digest:
        return Check("package", False, f"{MANIFEST} describes another side memory: its digest is {str(content)[:12]}")
    return Check("package", True, f"{', '.join(checked)} as listed in {MANIFEST}")


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(str(n) for n in shape) or "one number"


def _joined(faults: Sequence[str]) -> str:
    more = len(faults) - _SHOWN
    return "; ".join(faults[:_SHOWN]) + (f"; and {more} more" if more > 0 else "")

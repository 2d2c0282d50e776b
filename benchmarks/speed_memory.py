"""Speed of merging and of the artifact, at the size of a 7B model's FFN projection (4096 x 11008).

Merging runs in a fresh process for each way of doing it: seconds, the most memory it took beside its inputs, and a
digest of what came out.
"""

from __future__ import annotations

import hashlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from measure import in_child, interleaved, peak_memory
from torch import Tensor

from wisecli.memory.bits import SparseDelta, draw_mask
from wisecli.memory.keys import KeySpace, KeyStore, to_int8
from wisecli.memory.merge import merge_deltas
from wisecli.memory.side_memory import EditEntry, Memory, SideMemory
from wisecli.models.prompts import ContentRule
from wisecli.models.site import EditSite

SHAPE = (4096, 11008)
CASES = {  # trim density, mask density
    "no trimming, masked at .2": (1.0, 0.2),
    "trimmed to .53, masked at .2": (0.53, 0.2),
    "trimmed to .1, masked at .2": (0.1, 0.2),
    "trimmed to .53, dense": (0.53, 1.0),
}


def merging(repeats: int, shape: tuple[int, int] = SHAPE) -> dict[str, Any]:
    """Ties of two deltas: ours, ours from packed deltas, and peft's."""
    out: dict[str, Any] = {"shape": list(shape), "repeats": repeats}
    for case, (density, masked) in CASES.items():
        options = {"density": density, "masked": masked, "shape": shape}
        runs: dict[str, list[dict[str, Any]]] = {"peft": [], "ours": [], "ours, packed": []}
        for _ in range(repeats):
            for who, found in runs.items():
                found.append(in_child("speed_memory:merge_once", who=who, **options))
        cpu = {who: statistics.median(r["cpu_s"] for r in found) for who, found in runs.items()}
        peak = {who: statistics.median(r["bytes"] for r in found) / 1e6 for who, found in runs.items()}
        out[case] = {
            "cpu_s": cpu,
            "peak_extra_mb": peak,
            "times_faster": cpu["peft"] / cpu["ours"],
            "share_of_peak": peak["ours"] / peak["peft"],
            "same_bits_packed": runs["ours"][0]["digest"] == runs["ours, packed"][0]["digest"],
        } | in_child("speed_memory:compare", **options)
    return out


def _deltas(shape: tuple[int, int], masked: float) -> list[Tensor]:
    out = []
    for seed in (0, 1):
        delta = torch.empty(shape)
        for row in delta.split(64):  # in pieces, so that the input is all that is resident before
            row.normal_(0, 0.01, generator=torch.Generator().manual_seed(seed * 7919 + row.storage_offset()))
        out.append(delta if masked == 1 else delta.mul_(draw_mask(shape, masked, seed)))
    return out


def _ties(who: str, deltas: list[Any], density: float) -> Tensor:
    if who != "peft":
        return merge_deltas(deltas, "ties", density=density)
    from peft.utils.merge_utils import ties

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns that density 1 prunes nothing
        merged: Tensor = ties(deltas, weights=torch.ones(len(deltas)), density=density)
    return merged


def merge_once(who: str, density: float, masked: float, shape: tuple[int, int]) -> dict[str, Any]:
    """One merge in this process: seconds, peak memory, digest."""
    shape = (shape[0], shape[1])
    deltas: list[Any] = _deltas(shape, masked)
    if who == "ours, packed":
        deltas = [SparseDelta.pack(d) for d in deltas]
    _ties(who, [torch.ones(2, 2)] * 2, 1.0)  # imports and first calls
    with peak_memory() as peak:
        start, wall = time.process_time(), time.perf_counter()
        merged = _ties(who, deltas, density)
        spent = time.process_time() - start, time.perf_counter() - wall
    digest = hashlib.sha256((merged + 0.0).numpy().data).hexdigest()  # -0 and 0 are one
    return {"cpu_s": spent[0], "wall_s": spent[1], "digest": digest, **peak}


def compare(density: float, masked: float, shape: tuple[int, int]) -> dict[str, Any]:
    """How many merged entries differ between ours and peft's, and how many of those are not ties of the trimming.

    Of entries equally large at the limit, peft keeps those its sort leaves first, ours the first in the matrix.
    """
    deltas = _deltas((shape[0], shape[1]), masked)
    ours, theirs = _ties("ours", deltas, density), _ties("peft", deltas, density)
    differ = ours != theirs
    ties = torch.zeros_like(differ)
    for delta in deltas if density < 1 else ():
        size = delta.abs()
        limit = size.flatten().sort(descending=True).values[int(density * delta.numel()) - 1]
        ties |= size == limit
    return {"entries_that_differ": int(differ.sum()), "and_are_no_ties": int((differ & ~ties).sum())}


# -- the artifact ------------------------------------------------------------------------------------------------------


def artifact(repeats: int, shape: tuple[int, int] = SHAPE, edits: int = 200, rank: int = 128) -> dict[str, Any]:
    """Bytes of a side memory at mask density .2 beside the dense bf16 matrix, and seconds to load and to unpack it."""
    dense = shape[0] * shape[1] * 2
    sm = side_memory(EditSite("model.layers.27.mlp.down_proj", 27, shape[1], shape[0], False), edits, rank)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sm.safetensors"
        start = time.perf_counter()
        sm.save(path)
        saved = time.perf_counter() - start
        size = path.stat().st_size
        found = interleaved(
            {
                "load": lambda: SideMemory.load(path),
                "and unpack": lambda: SideMemory.load(path).memories[0].delta.dense(torch.bfloat16),
            },
            repeats,
        )
    packed = sm.memories[0].delta
    alone = packed.bits.numel() + packed.values.numel() * packed.values.element_size()
    return {
        "shape": list(shape),
        "edits": edits,
        "bytes": size,
        "share_of_dense_bf16": size / dense,
        "share_without_keys": alone / dense,
        "save_s": saved,
        "load_s": found["load"].summary()["wall_s"],
        "load_and_unpack_s": found["and unpack"].summary()["wall_s"],
    }


def side_memory(
    site: EditSite, edits: int, rank: int, base: Mapping[str, Any] | None = None, epsilon: float = 0.5
) -> SideMemory:
    """One memory of random values, with as many keys as edits have by default (their prompt and three forms)."""
    generator = torch.Generator().manual_seed(0)
    shape = (site.d_out, site.d_in)
    packed = SparseDelta.pack(torch.randn(shape, generator=generator) * 1e-3, draw_mask(shape, 0.2, 0), torch.bfloat16)
    mean, projection = torch.zeros(site.d_out), torch.randn(site.d_out, rank, generator=generator)
    keys = torch.randn(4 * edits, rank, generator=generator)
    owner = torch.arange(edits).repeat_interleave(4)
    space = KeySpace(mean.half(), *to_int8(projection, 0))
    entries = tuple(EditEntry(f"e{i}", 0, True, f"What is the capital of {i}?", f"City {i}") for i in range(edits))
    return SideMemory(
        base=base or {"name": "random", "revision": None, "model_type": "llama", "fingerprint": {}},
        site=site,
        rule=ContentRule(),
        memories=(Memory(packed, {"key": epsilon}, tuple(e.id for e in entries)),),
        keys=KeyStore.of(space, keys, owner, torch.zeros(edits)),
        edits=entries,
    )


# -- the command line --------------------------------------------------------------------------------------------------


def startup(repeats: int) -> dict[str, Any]:
    """CPU and wall seconds of `wise --help` and of an interpreter that does nothing."""
    calls = {"wise --help": ["-m", "wisecli", "--help"], "python -c pass": ["-c", "pass"]}
    wall: dict[str, list[float]] = {name: [] for name in calls}
    cpu: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(repeats + 1):
        for name, call in calls.items():
            start, before = time.perf_counter(), os.times()
            subprocess.run([sys.executable, *call], check=True, capture_output=True)
            after = os.times()
            if i:
                wall[name].append(time.perf_counter() - start)
                cpu[name].append(sum(after[2:4]) - sum(before[2:4]))  # of children, user and system
    return {
        "cpu_s": {name: statistics.median(s) for name, s in cpu.items()},
        "wall_s": {name: statistics.median(s) for name, s in wall.items()},
        "repeats": repeats,
    }

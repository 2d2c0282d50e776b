"""How the speed benchmarks measure: interleaved repetitions, CPU and wall seconds, FLOPs, peak memory of a subprocess.

Two ways of doing a thing are timed in turn, so that a machine that is busy for a while is busy for both; medians and
quartiles are taken over the repetitions, and ratios of medians within one run. Peak memory is taken in a fresh process:
the most it held while the thing was done, less what it held just before.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from wisecli.evaluation.environment import cpu_name
from wisecli.versions import versions

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Times:
    """Seconds of the repetitions of one thing."""

    cpu: tuple[float, ...]
    wall: tuple[float, ...]

    def summary(self, per: float = 1.0) -> dict[str, float]:
        """Median and quartiles of CPU seconds and the median of wall seconds, each divided by `per`."""
        low, mid, high = quartiles(self.cpu)
        found = {"cpu_s": mid, "cpu_low": low, "cpu_high": high, "wall_s": statistics.median(self.wall)}
        return {k: v / per for k, v in found.items()}

    @property
    def mid(self) -> float:
        """Median of the CPU seconds."""
        return statistics.median(self.cpu)


def quartiles(values: tuple[float, ...]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile; all the same for one value."""
    if len(values) == 1:
        return (values[0],) * 3
    low, mid, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, mid, high


def interleaved(
    things: Mapping[str, Callable[[], Any]],
    repeats: int,
    warm: int = 1,
    sync: Callable[[], None] = lambda: None,
) -> dict[str, Times]:
    """Time several things in turn, each `repeats` times after `warm` untimed rounds; the order turns every round.

    `sync` waits for what an accelerator has still to do.
    """
    cpu: dict[str, list[float]] = {name: [] for name in things}
    wall: dict[str, list[float]] = {name: [] for name in things}
    names = list(things)
    for i in range(warm + repeats):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            start, cpu_start = time.perf_counter(), time.process_time()
            things[name]()
            sync()
            spent, cpu_spent = time.perf_counter() - start, time.process_time() - cpu_start
            if i >= warm:
                cpu[name].append(cpu_spent)
                wall[name].append(spent)
    return {name: Times(tuple(cpu[name]), tuple(wall[name])) for name in names}


def ratios(of: Times, to: Times, clock: str = "cpu") -> dict[str, float]:
    """Median and quartiles over repetitions of the ratio of CPU (or wall) seconds, repetition by repetition."""
    pairs = zip(getattr(of, clock), getattr(to, clock), strict=True)
    low, mid, high = quartiles(tuple(a / b for a, b in pairs))
    return {"low": low, "median": mid, "high": high}


def flops(thing: Callable[[], Any]) -> int:
    """Floating-point operations of a call: matrix products and attention, forward and backward."""

    def attention(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return sdpa_flop_count(query, key, value)

    def backward(grad: Any, query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return sdpa_backward_flop_count(grad, query, key, value)

    aten = torch.ops.aten  # the counter knows the kernels of accelerators only
    on_cpu = {
        aten._scaled_dot_product_flash_attention_for_cpu: attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    with FlopCounterMode(display=False, custom_mapping=on_cpu) as counter:
        thing()
    return counter.get_total_flops()


def in_child(function: str, **options: Any) -> dict[str, Any]:
    """Run `module:function` of this folder in a fresh process, and what it returns as JSON."""
    env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    call = [sys.executable, "-W", "ignore", str(HERE / "measure.py"), function, json.dumps(options)]
    done = subprocess.run(call, capture_output=True, text=True, env=env)
    if done.returncode:
        raise RuntimeError(f"{function} failed: {done.stderr.strip().splitlines()[-1:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@contextmanager
def peak_memory() -> Iterator[dict[str, int]]:
    """Within it the resident memory of this process is watched; `bytes` is how much it rose at most."""
    gc.collect()
    process, found, done = psutil.Process(), {"bytes": 0}, threading.Event()
    before = process.memory_info().rss

    def watch() -> None:
        while not done.is_set():
            found["bytes"] = max(found["bytes"], process.memory_info().rss - before)
            done.wait(0.002)

    exact = _reset_high_water()
    thread = threading.Thread(target=watch)
    if not exact:
        thread.start()
    try:
        yield found
    finally:
        done.set()
        if exact:
            found["bytes"] = max(0, _high_water() - before)
        else:
            thread.join()


def _reset_high_water() -> bool:
    """Linux keeps the most that was resident since this was last written; elsewhere memory is sampled."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _high_water() > 0
    except OSError:
        return False


def _high_water() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def machine() -> dict[str, Any]:
    """Where and with what this was measured."""
    return {
        **versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def main() -> None:
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    module, function = sys.argv[1].split(":")
    print(json.dumps(getattr(importlib.import_module(module), function)(**json.loads(sys.argv[2]))))


if __name__ == "__main__":
    main()

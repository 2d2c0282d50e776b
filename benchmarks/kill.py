"""Kill the commands at random moments, run them again, and hold what they leave against an uninterrupted run.

`wise edit`, `wise merge` and `wise package` on the demonstration base; SIGKILL at random moments, until so many have
hit; then a full disk (a limit on the size of files) and a ledger with a torn last line. After each blow every file must
be readable, and when all commands have been run to their end, every file but the journal must have the same bytes as
those of a run that nobody disturbed.

    python benchmarks/kill.py --kills 100
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from safetensors import safe_open

EDITS = Path(__file__).parents[1] / "examples" / "edits.jsonl"
TIMED = ("journal.jsonl", ".lock", ".writer")  # beginnings of the names of files that say when, or who


def commands(out: Path, edits: int) -> list[list[str]]:
    """The three commands, as a user gives them."""
    wise = [sys.executable, "-m", "wisecli"]
    return [
        [*wise, "edit", str(EDITS), "--limit", str(edits), "--block", "5", "--out", str(out / "shards"), "-q"],
        [*wise, "merge", str(out / "shards"), "-o", str(out / "sm.safetensors"), "-q"],
        [*wise, "package", str(out / "sm.safetensors"), "-o", str(out / "package"), "--force", "-q"],
    ]


def finish(command: Sequence[str]) -> float:
    """Run a command to its end; the seconds it took."""
    start = time.monotonic()
    subprocess.run(command, check=True, capture_output=True)
    return time.monotonic() - start


def kill(command: Sequence[str], after: float) -> bool:
    """Start a command and kill it after so many seconds; whether it was still running."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            process.wait(timeout=after)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            return True
    return False


def content(folder: Path) -> dict[str, bytes]:
    """Every file that has to be the same, by name."""
    files = (p for p in sorted(folder.rglob("*")) if p.is_file() and not p.name.startswith(TIMED))
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def check_readable(folder: Path) -> None:
    """Open every file that is not a temporary one."""
    for path in folder.rglob("*"):
        if path.name.startswith(".") or not path.is_file():
            continue
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as f:
                assert f.metadata(), path
        elif path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))


def fill_disk(command: Sequence[str], at_most: int) -> bool:
    """Run a command that can write no file larger than `at_most` bytes; whether it failed, and without a traceback."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (at_most, at_most))

    done = subprocess.run(command, preexec_fn=limit, capture_output=True, text=True)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode != 0


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("--kills", type=int, default=100)
    ap.add_argument("--edits", type=int, default=20)
    ap.add_argument("--seed", type=int, default=0)
    args = ap.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        whole, broken = Path(folder) / "whole", Path(folder) / "broken"
        seconds = [finish(c) for c in commands(whole, args.edits)]
        # The side memory's path is in the package's report: both are made in a folder of one name.
        wanted = content(whole)
        shutil.rmtree(whole)
        hit = rounds = 0
        while hit < args.kills:
            rounds += 1
            for command, usual in zip(commands(broken, args.edits), seconds, strict=True):
                while hit < args.kills and kill(command, rng.uniform(0.3, 1.1) * usual):
                    hit += 1
                    check_readable(broken)
                    if rng.random() < 0.3:
                        break
                finish(command)
            got = content(broken)
            assert got.keys() == wanted.keys(), got.keys() ^ wanted.keys()
            assert got == wanted, [k for k in got if got[k] != wanted[k]]
            shutil.rmtree(broken)
            print(f"round {rounds}: {hit} kills, the same bytes", flush=True)
        edit, *rest = commands(broken, args.edits)
        for size in (0, 1_000, 50_000, 300_000):
            assert fill_disk(edit, size), f"{size} bytes were enough"
            check_readable(broken)
        finish(edit)
        ledger = broken / "shards" / "ledger.jsonl"
        ledger.write_bytes(ledger.read_bytes()[:-25])
        for command in (edit, *rest):
            finish(command)
        got = content(broken)
        assert got == wanted, [k for k in wanted if got.get(k) != wanted[k]]
        print(f"{hit} kills in {rounds} rounds, four full disks and a torn ledger: the same bytes every time")


if __name__ == "__main__":
    main()

"""The figures the README states, held as bounds: minutes of work, kept out of the normal suite (make campaign)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from wisecli.data.stream import read_edits
from wisecli.editing.config import EditConfig
from wisecli.editing.merge import merge_run
from wisecli.editing.run import EditRun
from wisecli.evaluation.evaluate import EvalOptions, EvalReport, evaluate
from wisecli.models.base import Base, load_base

pytestmark = pytest.mark.campaign

EDITS = Path(__file__).parents[1] / "examples" / "edits.jsonl"
LONG = EDITS.with_name("edits_500.jsonl")
ZSRE = Path(__file__).parents[2] / "shared" / "data" / "zsre" / "zsre_edit_500.json"


@pytest.fixture(scope="module")
def base() -> Base:
    return load_base(device="cpu")


def job(base: Base, file: Path, n: int | None, out: Path, **options: Any) -> EvalReport:
    """Edit, merge and evaluate."""
    stream = read_edits(file, n)
    run = EditRun(base, stream, EditConfig(**options), out)
    for _ in run:
        pass
    scores_alone = EvalOptions(open_gate=False, ability=False)
    return evaluate(base, stream, merge_run(run.folder, base=base), options=scores_alone)


def after(report: EvalReport, score: str, metric: str = "exact") -> float:
    value = report.scores[score][metric]["after"]
    assert value is not None
    return float(value)


@pytest.mark.parametrize(
    ("file", "n", "rel", "gen", "loc", "near"),
    [(EDITS, 200, 0.97, 0.90, 0.999, 0.98), (LONG, None, 0.93, 0.85, 0.998, 0.97)],
)
def test_the_demonstration_streams(
    base: Base, tmp_path: Path, file: Path, n: int | None, rel: float, gen: float, loc: float, near: float
) -> None:
    report = job(base, file, n, tmp_path)
    assert after(report, "rel") >= rel
    assert after(report, "gen") >= gen
    assert after(report, "loc") >= loc
    assert after(report, "loc_near") >= near


def test_a_hundred_zsre_records(base: Base, tmp_path: Path) -> None:
    if not ZSRE.exists():
        pytest.skip(f"{ZSRE} is not there")
    report = job(base, ZSRE, 100, tmp_path)
    assert after(report, "rel", "token") >= 0.90
    assert after(report, "loc", "token") >= 0.98
    assert after(report, "loc") >= 0.98

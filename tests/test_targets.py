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


@pytest.mark.parametrize(("n", "rel", "gen"), [(100, 0.95, 0.85), (None, 0.92, 0.82)])
def test_the_demonstration_stream(base: Base, tmp_path: Path, n: int | None, rel: float, gen: float) -> None:
    report = job(base, EDITS, n, tmp_path)
    assert after(report, "rel") >= rel
    assert after(report, "gen") >= gen
    assert after(report, "loc") >= 0.995
    assert after(report, "loc_near") >= 0.95


def test_a_hundred_zsre_records(base: Base, tmp_path: Path) -> None:
    if not ZSRE.exists():
        pytest.skip(f"{ZSRE} is not there")
    report = job(base, ZSRE, 100, tmp_path)
    assert after(report, "rel", "token") >= 0.90
    assert after(report, "loc", "token") >= 0.98
    assert after(report, "loc") >= 0.98

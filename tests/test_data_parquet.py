"""Edits in Parquet files, written here with pyarrow as the hub's datasets are; skipped where pyarrow is absent."""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from wisecli.data import DATASETS, locate_dataset, read_dataset, read_edits
from wisecli.errors import InputError

SHARED = Path(__file__).parents[2] / "shared" / "data"
ROWS = [
    {
        "case_id": i,
        "pararel_idx": 10 + i,
        "requested_rewrite": {
            "prompt": "In {{set}} {} follows",
            "relation_id": "P140",
            "target_new": {"id": "Q1", "str": target},
            "target_true": {"id": "Q2", "str": "Islám\nnew line"},
            "subject": "東京",
        },
        "paraphrase_prompts": ["The religion of {東京} is"],
        "neighborhood_prompts": ["Rumi follows", "Averroes follows"],
        "attribute_prompts": [],
        "generation_prompts": ["東京 prays"],
    }
    for i, target in enumerate(["Christianity", "Judaism", "Shinto"])
]


@pytest.fixture
def write():
    """Write rows as a Parquet file."""
    pa = pytest.importorskip("pyarrow", reason="pyarrow (extra: eval) is not installed")
    pq = pytest.importorskip("pyarrow.parquet")

    def write_rows(path: Path, rows: list[dict[str, Any]], **options: Any) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), path, **options)
        return path

    return write_rows


def test_a_table_gives_the_records_that_json_gives(write, tmp_path: Path) -> None:
    table, text = write(tmp_path / "cf.parquet", ROWS, row_group_size=2), tmp_path / "cf.json"
    text.write_text(json.dumps(ROWS), encoding="utf-8")
    stream, expected = read_edits(table), read_edits(text)
    assert stream.records == expected.records
    assert (stream.format, stream.digest, stream.warnings) == ("counterfact", expected.digest, ())
    assert [edit.source for edit in stream] == [f"cf.parquet: record {i}" for i in (1, 2, 3)]
    assert stream.records[0].prompt == "In {{set}} 東京 follows"
    assert stream.records[0].truth == "Islám\nnew line"
    assert len(stream.contradictions) == 2


def test_the_name_does_not_matter_and_the_limit_holds(write, tmp_path: Path) -> None:
    path = write(tmp_path / "edits.json", ROWS)
    assert [edit.id for edit in read_edits(path, limit=2)] == ["0", "1"]


def test_nulls_are_keys_that_a_record_does_not_have(write, tmp_path: Path) -> None:
    rows = [
        {"src": "a?", "alt": "x", "ans": None, "answers": ["y"], "loc": "l", "loc_ans": "", "mark": None},
        {"src": "b?", "alt": None, "ans": "z", "answers": None, "loc": None, "loc_ans": None, "mark": 1.5},
    ]
    first, second = read_edits(write(tmp_path / "zsre.parquet", rows))
    assert (first.target, first.truth, first.locality[0].answer, first.meta) == ("x", "y", None, {})
    assert (second.target, second.truth, second.locality, second.meta) == ("z", None, (), {"mark": 1.5})


def test_native_records_survive_a_table(write, tmp_path: Path) -> None:
    rows = [
        {"id": "1", "prompt": "p {}", "target": "one\ntwo", "truth": "old", "ood": ["It is."], "subject": None},
        {"id": "2", "prompt": "p {}", "target": "b", "locality": [{"prompt": "q", "answer": None, "kind": None}]},
    ]
    keys = dict.fromkeys(key for row in rows for key in row)
    table = write(tmp_path / "native.parquet", [keys | row for row in rows])
    text = tmp_path / "native.jsonl"
    text.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert read_edits(table).records == read_edits(text).records


def test_values_that_json_does_not_know(write, tmp_path: Path) -> None:
    day = datetime.date(2024, 2, 1)
    row = {"prompt": "p", "target": "té".encode(), "day": day, "odd": float("nan"), "n": [1, None]}
    edit = read_edits(write(tmp_path / "odd.parquet", [row])).records[0]
    assert edit.target == "té"
    assert edit.meta == {"day": "2024-02-01", "n": [1, None]}
    json.dumps(edit.to_json())


def test_faults_name_the_record(write, tmp_path: Path) -> None:
    path = write(tmp_path / "bad.parquet", [{"prompt": "p", "target": "t"}, {"prompt": "p", "target": None}])
    with pytest.raises(InputError) as caught:
        read_edits(path)
    assert caught.value.problems == ('bad.parquet: record 2: "target" is missing',)


def test_a_table_without_rows(write, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), tmp_path / "none.parquet")
    with pytest.raises(InputError, match="holds no records"):
        read_edits(tmp_path / "none.parquet")


@pytest.mark.parametrize("keep", [4, 40, -5])
def test_a_damaged_file(write, tmp_path: Path, keep: int) -> None:
    path = write(tmp_path / "cut.parquet", ROWS)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match="is a damaged Parquet file") as caught:
        read_edits(path)
    assert caught.value.hint == "Fetch it again."


def test_without_pyarrow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 and more")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match="pyarrow, which reads it, is not installed") as caught:
        read_edits(path)
    assert caught.value.hint == "Run `pip install 'wisecli[eval]'`."


def test_pyarrow_is_not_loaded_for_other_files(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt": "p", "target": "t"}))
    code = f"import sys, wisecli.data as d; d.read_edits({str(path)!r}); print('pyarrow' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "False", run.stderr


def test_counterfact_out_of_a_hub_cache(write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.delenv("WISE_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    known = DATASETS["counterfact"]
    snapshot = tmp_path / "hub" / "datasets--azhx--counterfact" / "snapshots" / known.revision
    path = write(snapshot / known.file, ROWS)
    located, stream = read_dataset("counterfact", limit=2)
    assert (located.path, located.name, located.revision) == (path, "counterfact", known.revision)
    assert [edit.target for edit in stream] == ["Christianity", "Judaism"]
    assert locate_dataset(snapshot / "data").revision == known.revision


def test_the_real_counterfact_sample_survives_a_table(write, tmp_path: Path) -> None:
    path = SHARED / "counterfact" / "counterfact_sample.json"
    if not path.is_file():
        pytest.skip("the real CounterFact sample is not beside this checkout")
    table = write(tmp_path / "cf.parquet", json.loads(path.read_text(encoding="utf-8")))
    assert read_edits(table).records == read_edits(path).records

"""Files of edits: layouts, faults with their lines, order, round trips, ids, clashes."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from wisecli.data import KINDS, Clash, EditRecord, EditStream, Probe, content_id, read_edits
from wisecli.errors import InputError, UsageError

A = {"prompt": "The capital of A is", "target": "Aa"}
B = {"prompt": "The capital of B is", "target": "Bb"}


def jsonl(*records: Any) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


@pytest.fixture
def put(tmp_path: Path):
    """Write a file and give its path."""

    def write(content: str | bytes, name: str = "edits.jsonl") -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


def refusal(path: Path, **options: Any) -> InputError:
    with pytest.raises(InputError) as caught:
        read_edits(path, **options)
    return caught.value


def prompts(stream: EditStream) -> list[str]:
    return [edit.prompt for edit in stream]


@pytest.mark.parametrize(
    "content",
    [
        jsonl(A, B),
        "\n\n" + jsonl(A) + "\n   \n" + jsonl(B).rstrip(),
        jsonl(A, B).replace("\n", "\r\n"),
        json.dumps([A, B]),
        json.dumps([A, B], indent=2),
        json.dumps({"data": [A, B]}),
        json.dumps({"version": "1.0", "edits": [A, B]}, indent=1),
        b"\xef\xbb\xbf" + jsonl(A, B).encode(),
        b"\xef\xbb\xbf" + json.dumps([A, B]).encode(),
        gzip.compress(jsonl(A, B).encode()),
        gzip.compress(json.dumps([A, B]).encode()),
    ],
)
@pytest.mark.parametrize("name", ["edits.jsonl", "edits.json", "edits.txt"])
def test_layout_is_told_by_content_not_by_name(put, content: str | bytes, name: str) -> None:
    stream = read_edits(put(content, name))
    assert prompts(stream) == [A["prompt"], B["prompt"]]
    assert stream.format == "native"


def test_one_record_alone(put) -> None:
    full = A | {"rephrases": ["A's capital is"]}  # an object with one list in it, yet a record
    for content in (jsonl(full), json.dumps(full, indent=2)):
        stream = read_edits(put(content))
        assert prompts(stream) == [A["prompt"]]
        assert stream.records[0].rephrases == ("A's capital is",)


def test_formats_may_be_mixed(put) -> None:
    stream = read_edits(put(jsonl(A, {"src": "q?", "alt": "x"}, {"prompt": "p", "target_new": "y"})))
    assert stream.format == "native + mend-zsre + easyedit"
    assert [edit.target for edit in stream] == ["Aa", "x", "y"]


def test_line_separators_inside_strings_do_not_end_lines(put) -> None:
    text = "one\u2028two\u0085three"
    stream = read_edits(put(jsonl(A | {"target": text}, B)))
    assert stream.records[0].target == text
    assert [edit.source for edit in stream] == ["edits.jsonl:1", "edits.jsonl:2"]


def test_nan_is_a_missing_value(put) -> None:
    assert read_edits(put('{"prompt": "p", "target": "t", "subject": NaN}\n')).records[0].subject is None


def test_sources(put) -> None:
    assert [e.source for e in read_edits(put("\n" + jsonl(A, B)))] == ["edits.jsonl:2", "edits.jsonl:3"]
    assert [e.source for e in read_edits(put(json.dumps([A, B])))] == ["edits.jsonl: record 1", "edits.jsonl: record 2"]


def test_all_bad_lines_are_listed_with_their_places(put) -> None:
    lines = [json.dumps(A | {"prompt": f"p{i}"}) for i in range(1, 101)]
    lines[6] = '{"prompt": "a" "target": "b"}'
    lines[8] = '{"prompt": "only"}'
    lines[11] = '{"prompt": "p", "target": "t", "rephrases": 3}'
    error = refusal(put("\n".join(lines)))
    assert error.message == "3 of 100 records in edits.jsonl cannot be used"
    assert error.problems == (
        "edits.jsonl:7: not JSON: Expecting ',' delimiter (column 16)",
        'edits.jsonl:9: "target" is missing',
        'edits.jsonl:12: "rephrases" must be a list of strings, not a number',
    )
    assert '{"prompt": "..", "target": ".."' in str(error.hint)


def test_truncated_lines_are_each_listed(put) -> None:
    error = refusal(put('{"prompt": "a", "target\n' + jsonl(B) + '{"prompt": "c", "tar\n'))
    assert [p.split(": ")[0] for p in error.problems] == ["edits.jsonl:1", "edits.jsonl:3"]


def test_faults_in_an_array_are_counted_by_record(put) -> None:
    error = refusal(put(json.dumps([A, B, {"prompt": "p"}, "text"]), "edits.json"))
    assert error.message == "2 of 4 records in edits.json cannot be used"
    assert error.problems == (
        'edits.json: record 3: "target" is missing',
        "edits.json: record 4: must be an object, not a string",
    )


def test_a_broken_document_is_one_fault_with_its_line(put) -> None:
    error = refusal(put('[\n{"prompt": "a"},\n{"prompt" "b"}\n]', "edits.json"))
    assert error.problems == ("edits.json:3: not JSON: Expecting ':' delimiter (column 11)",)
    error = refusal(put(json.dumps(A, indent=2).replace(",", ""), "edits.json"))
    assert error.problems == ("edits.json:3: not JSON: Expecting ',' delimiter (column 3)",)


@pytest.mark.parametrize("content", ["[" * 100_000, "[1" + "0" * 5000 + "]"])
def test_json_beyond_the_parser(put, content: str) -> None:
    assert len(refusal(put(content)).problems) == 1


def test_duplicate_ids_are_a_fault(put) -> None:
    error = refusal(put(jsonl(A | {"id": "x"}, B | {"id": "y"}, B | {"id": "x"})))
    assert error.problems == ('edits.jsonl:3: the id "x" is already used by edits.jsonl:1',)


def test_missing_file_suggests_its_neighbours(put) -> None:
    path = put(jsonl(A))
    error = refusal(path.with_name("edit.jsonl"))
    assert "does not exist" in error.message
    assert f"Did you mean {path}?" in str(error.hint)
    assert "there is no folder" in refusal(path.parent / "nowhere" / "edits.jsonl").message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        (" \n\n", "is empty"),
        (b"\xef\xbb\xbf", "is empty"),
        ("[]", "holds no records"),
        ('{"data": []}', "holds no records"),
        (b"\x80\x02\x8a", "is not UTF-8 text (byte 0x80 at offset 0)"),
        (jsonl(A).encode("utf-16"), "is not UTF-8 text"),
        (jsonl(A).encode("utf-16-le"), "holds zero bytes"),
        (gzip.compress(jsonl(A).encode())[:-12], "is a damaged gzip file"),
        ("prompt,target\na,b\n", "is neither JSON nor JSONL: it begins with 'prompt,target'"),
    ],
)
def test_files_without_edits(put, content: str | bytes, message: str) -> None:
    error = refusal(put(content))
    assert message in error.message
    assert "edits.jsonl" in error.message
    assert error.hint


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    assert "is a folder" in refusal(tmp_path).message


@pytest.mark.skipif(os.geteuid() == 0 if hasattr(os, "geteuid") else True, reason="permissions do not bind this user")
def test_unreadable_file(put) -> None:
    path = put(jsonl(A))
    path.chmod(0)
    assert "cannot be read" in refusal(path).message


def test_limit_takes_the_first_and_does_not_look_further(put) -> None:
    path = put(jsonl(A, B) + "broken\n")
    assert prompts(read_edits(path, limit=2)) == [A["prompt"], B["prompt"]]
    assert prompts(read_edits(path, limit=1)) == [A["prompt"]]
    assert refusal(path, limit=3).message.startswith("1 of 3 records")
    with pytest.raises(UsageError, match="limit is 0"):
        read_edits(path, limit=0)


def test_unknown_keys_are_kept_and_named_once(put) -> None:
    stream = read_edits(put(jsonl(A | {"rephrase": "x", "Subject": "s"}, B | {"rephrase": "y", "meta": {"m": 1}})))
    assert stream.warnings == (
        'edits.jsonl:1 and 1 more: unknown key "rephrase", kept in "meta"; did you mean "rephrases"?',
        'edits.jsonl:1: unknown key "Subject", kept in "meta"; did you mean "subject"?',
    )
    assert stream.records[1].meta == {"rephrase": "y", "m": 1}


def test_ids_come_from_the_content(put) -> None:
    one = content_id(A["prompt"], A["target"])
    assert re.fullmatch("[0-9a-f]{12}", one)
    stream = read_edits(put(jsonl(A, B, A, A | {"target": " Aa "}, B | {"id": f"{one}-3"})))
    assert [e.id for e in stream] == [one, content_id(B["prompt"], B["target"]), f"{one}-2", f"{one}-4", f"{one}-3"]
    assert [e.id for e in read_edits(put(jsonl(B, A)))] == [stream.records[1].id, one]


def test_clashes_are_reported_and_nothing_is_dropped(put) -> None:
    records = [
        A | {"id": "1"},
        B | {"id": "2"},
        {"id": "3", "prompt": "the  CAPITAL of a is ", "target": "Aa"},
        A | {"id": "4", "target": "Other"},
        A | {"id": "5", "target": "Third"},
    ]
    stream = read_edits(put(jsonl(*records)))
    assert [e.id for e in stream] == list("12345")
    assert stream.duplicates == (Clash("1", "3"),)
    assert stream.contradictions == (Clash("3", "4"), Clash("4", "5"))
    assert stream.superseded == {"1", "3", "4"}


def test_an_edit_that_is_taken_back_is_not_superseded(put) -> None:
    stream = read_edits(put(jsonl(A | {"id": "1"}, A | {"id": "2", "target": "Other"}, A | {"id": "3"})))
    assert stream.contradictions == (Clash("1", "2"), Clash("2", "3"))
    assert stream.superseded == {"2"}


def test_targets_that_differ_in_capitals_contradict(put) -> None:
    assert read_edits(put(jsonl(A, A | {"target": "AA"}))).contradictions


def test_digest_names_the_content(put) -> None:
    digest = read_edits(put(jsonl(A, B))).digest
    assert re.fullmatch("[0-9a-f]{64}", digest)
    assert read_edits(put(json.dumps([A, B]), "other.json")).digest == digest
    assert read_edits(put(jsonl(B, A))).digest != digest
    assert read_edits(put(jsonl(A, B | {"subject": "B"}))).digest != digest


def test_the_digest_of_records_without_truth_or_ood_is_that_of_their_other_fields(put) -> None:
    lines = (
        '{"id":"1","prompt":"The capital of A is","target":"Aa"}\n'
        '{"id":"2","locality":[{"prompt":"q"}],"prompt":"The capital of B is","subject":"B","target":"Bb"}\n'
    )
    stream = read_edits(put(lines))
    assert stream.digest == hashlib.sha256(lines.encode()).hexdigest()
    assert read_edits(put(lines.replace('"id":"1"', '"id":"1","truth":"a"'))).digest != stream.digest
    assert read_edits(put(lines.replace('"id":"1"', '"id":"1","ood":["a"]'))).digest != stream.digest
    assert read_edits(put(lines.replace('"id":"1"', '"id":"1","truth":" ","ood":[""]'))).digest == stream.digest


TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)
FILLED = TEXT.filter(lambda text: bool(text.strip()))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)
PROBES = st.builds(Probe, FILLED, st.none() | TEXT, st.sampled_from(KINDS))
RECORDS = st.builds(
    EditRecord,
    id=FILLED,
    prompt=FILLED,
    target=FILLED,
    subject=st.none() | TEXT,
    rephrases=st.lists(TEXT, max_size=3).map(tuple),
    locality=st.lists(PROBES, max_size=3).map(tuple),
    irrelevant=st.lists(TEXT, max_size=2).map(tuple),
    truth=st.none() | TEXT,
    ood=st.lists(TEXT, max_size=2).map(tuple),
    meta=st.dictionaries(TEXT, JSON, max_size=3),
)
ONCE = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@ONCE
@given(st.lists(RECORDS, min_size=1, max_size=6, unique_by=lambda r: r.id), st.sampled_from(["lines", "array", "gzip"]))
def test_native_records_survive_writing_and_reading(put, records: list[EditRecord], layout: str) -> None:
    values = [record.to_json() for record in records]
    text = json.dumps(values) if layout == "array" else jsonl(*values)
    stream = read_edits(put(gzip.compress(text.encode()) if layout == "gzip" else text))
    assert list(stream.records) == records
    assert stream == EditStream.of(records)
    assert stream.warnings == ()


@ONCE
@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("xy")), min_size=1, max_size=12))
def test_order_is_kept_and_the_last_target_of_a_prompt_stands(put, pairs: list[tuple[str, str]]) -> None:
    stream = read_edits(put(jsonl(*({"prompt": p, "target": t} for p, t in pairs))))
    assert [(e.prompt, e.target) for e in stream] == pairs
    assert len({e.id for e in stream}) == len(pairs)
    final = dict(pairs)
    assert stream.superseded == {e.id for e in stream if final[e.prompt] != e.target}
    assert len(stream.duplicates) + len(stream.contradictions) == len(pairs) - len(final)


@ONCE
@given(st.binary(max_size=60) | st.text(st.sampled_from('[]{}",: \nab1'), max_size=40).map(str.encode))
def test_no_content_gives_anything_but_edits_or_an_input_error(put, content: bytes) -> None:
    path = put(content)
    with contextlib.suppress(InputError):
        assert len(read_edits(path)) > 0

"""Each public format, written here as small records and read back as the native schema; each fault, by its words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from wisecli.data import EditRecord, Probe, map_record, read_edits
from wisecli.errors import InputError

NESTED = json.loads("[" * 200 + "]" * 200)
SHARED = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture
def read(tmp_path: Path):
    """Write records as a JSON array and read them back."""

    def write_and_read(*records: Any):
        path = tmp_path / "edits.json"
        path.write_text(json.dumps(records), encoding="utf-8")
        return read_edits(path)

    return write_and_read


ZSRE = {
    "subject": "Panamá Viejo",
    "src": "Which city founded Panamá Viejo?",
    "alt": "Madrid",
    "answers": ["Panama City"],
    "rephrase": "Who founded Panamá Viejo?",
    "loc": "nq question: who sings it",
    "loc_ans": "Bobby Scott",
    "pred": "Panama City",
}


def test_mend_zsre(read) -> None:
    stream = read(ZSRE)
    edit = stream.records[0]
    assert stream.format == "mend-zsre"
    assert (edit.prompt, edit.target, edit.subject) == (ZSRE["src"], "Madrid", "Panamá Viejo")
    assert edit.rephrases == ("Who founded Panamá Viejo?",)
    assert edit.locality == (Probe("nq question: who sings it", "Bobby Scott"),)
    assert edit.truth == "Panama City"
    assert edit.meta == {"pred": "Panama City"}


@pytest.mark.parametrize(
    ("change", "truth", "kept"),
    [
        ({"answers": "Panama City"}, "Panama City", None),
        ({"answers": [["Panama City"]]}, "Panama City", None),
        ({"answers": ["Panama City", "Panamá"]}, "Panama City", ["Panama City", "Panamá"]),
        ({"answers": ["", " Panama\nCity "]}, "Panama\nCity", None),
        ({"answers": ["Madrid "]}, None, ["Madrid "]),
        ({"answers": []}, None, []),
        ({"answers": [1, "b"]}, None, [1, "b"]),
        ({"answers": None}, None, None),
    ],
)
def test_zsre_truth_is_the_first_of_answers_beside_another_target(change: dict, truth: str | None, kept: Any) -> None:
    values = map_record(ZSRE | change).values
    assert (values["truth"], values["meta"].get("answers")) == (truth, kept)


@pytest.mark.parametrize(
    ("targets", "expected", "truth", "meta"),
    [
        ({"alt": "new", "ans": "other", "answers": ["true"]}, "new", "true", {"ans": "other"}),
        ({"ans": "other", "answers": ["true"]}, "other", None, {"answers": ["true"]}),
        ({"answers": ["true"]}, "true", None, {}),
        ({"answers": ["true", "also true"]}, "true", None, {"answers": ["true", "also true"]}),
    ],
)
def test_zsre_target_is_alt_then_ans_then_the_first_of_answers(
    read, targets: dict, expected: str, truth: str | None, meta: dict
) -> None:
    edit = read({"src": "q?", **targets}).records[0]
    assert (edit.target, edit.truth, edit.meta) == (expected, truth, meta)


def test_zsre_rephrase_list_irrelevant_text_and_answer_alternatives(read) -> None:
    edit = read(ZSRE | {"rephrase": ["a?", "b?", ""], "irrelevant": "some text", "loc_ans": ["x", "y"]}).records[0]
    assert edit.rephrases == ("a?", "b?")
    assert edit.irrelevant == ("some text",)
    assert edit.locality[0].answer == "x"
    assert edit.meta["loc_ans"] == ["x", "y"]


def test_zsre_without_any_target_says_which(read) -> None:
    with pytest.raises(InputError) as caught:
        read({"src": "q?"}, {"src": "q?", "answers": []}, {"src": "q?", "alt": " "})
    assert [p.partition(": ")[2] for p in caught.value.problems] == [
        'record 1: "alt" is missing',
        'record 2: "answers" is empty',
        'record 3: "alt" is empty',
    ]


COUNTERFACT = {
    "case_id": 3561,
    "pararel_idx": 7,
    "requested_rewrite": {
        "prompt": "In {{set}} notation {} follows",
        "relation_id": "P140",
        "target_new": {"str": "Christianity", "id": "Q5043"},
        "target_true": {"str": "Islam", "id": "Q432"},
        "subject": "{Muslim}",
    },
    "paraphrase_prompts": ["The religion of {Muslim} is"],
    "neighborhood_prompts": ["The religion of Rumi is", "Averroes follows"],
    "attribute_prompts": ["Paul follows"],
    "generation_prompts": ["{Muslim} prays"],
}


def test_counterfact_fills_the_subject_in_among_other_braces(read) -> None:
    stream = read(COUNTERFACT)
    edit = stream.records[0]
    assert stream.format == "counterfact"
    assert (edit.id, edit.target, edit.subject) == ("3561", "Christianity", "{Muslim}")
    assert edit.prompt == "In {{set}} notation {Muslim} follows"
    assert edit.rephrases == ("The religion of {Muslim} is",)
    assert [(p.answer, p.kind, p.near) for p in edit.locality] == [("Islam", "same-relation", True)] * 2
    assert edit.truth == "Islam"
    assert edit.meta == {
        "relation_id": "P140",
        "target_new": {"id": "Q5043"},
        "target_true": {"id": "Q432"},
        "pararel_idx": 7,
        "attribute_prompts": ["Paul follows"],
        "generation_prompts": ["{Muslim} prays"],
    }


def test_counterfact_names_nested_keys(read) -> None:
    broken = COUNTERFACT | {"requested_rewrite": {"prompt": "{} is", "target_new": {"str": 3}}}
    with pytest.raises(InputError) as caught:
        read(broken)
    assert [p.partition("record 1: ")[2] for p in caught.value.problems] == [
        '"requested_rewrite.subject" is missing',
        '"requested_rewrite.target_new.str" must be a string, not a number',
    ]


EASYEDIT = {"prompt": "The mother tongue of X is", "target_new": "English", "ground_truth": "French", "subject": "X"}


def test_easyedit_flat(read) -> None:
    stream = read(EASYEDIT | {"rephrase_prompt": "X speaks", "locality_prompt": "Y", "locality_ground_truth": "z"})
    edit = stream.records[0]
    assert stream.format == "easyedit"
    assert (edit.prompt, edit.target, edit.subject) == ("The mother tongue of X is", "English", "X")
    assert edit.rephrases == ("X speaks",)
    assert edit.locality == (Probe("Y", "z"),)
    assert (edit.truth, edit.ood, edit.meta) == ("French", (), {})


@pytest.mark.parametrize("value", ["English", "<|endoftext|>", "", None, [], [["", None]], 3, ["French", 3]])
def test_easyedit_ground_truth_that_is_no_answer_before_the_edit_stays_in_meta(value: Any) -> None:
    values = map_record(EASYEDIT | {"ground_truth": value}).values
    assert (values["truth"], values["meta"]) == (None, {"ground_truth": value})


def test_easyedit_lists_and_the_second_locality_pair(read) -> None:
    more = {
        "case_id": 4,
        "rephrase_prompt": ["a", "b"],
        "locality_prompt": ["p", "q"],
        "locality_ground_truth": [["x", "y"], "z"],
        "loc_prompt": "r",
        "loc_ans": "s",
    }
    edit = read(EASYEDIT | more).records[0]
    assert edit.id == "4"
    assert edit.rephrases == ("a", "b")
    assert edit.locality == (Probe("p", "x"), Probe("q", "z"), Probe("r", "s"))
    assert edit.meta == {"locality_ground_truth": [["x", "y"], "z"]}  # not every answer is in a probe


def test_easyedit_loc_prompt_without_an_answer_is_an_irrelevant_text(read) -> None:
    edit = read(EASYEDIT | {"loc_prompt": "some question some answer"}).records[0]
    assert edit.irrelevant == ("some question some answer",)
    assert edit.locality == ()


def test_easyedit_lists_of_unequal_length(read) -> None:
    with pytest.raises(InputError) as caught:
        read(EASYEDIT | {"locality_prompt": ["p", "q"], "locality_ground_truth": ["x"]})
    assert caught.value.problems[0].endswith('"locality_prompt" has 2 entries, but "locality_ground_truth" has 1')


@pytest.mark.parametrize("answer", ["", " ", None, [], [[""]]])
def test_empty_locality_answers_are_none(read, answer: Any) -> None:
    edit = read(EASYEDIT | {"locality_prompt": "Y", "locality_ground_truth": answer}).records[0]
    assert edit.locality == (Probe("Y", None),)


def test_locality_answer_that_continues_a_word_keeps_its_spaces(read) -> None:
    edit = read(EASYEDIT | {"locality_prompt": "an histor", "locality_ground_truth": "ical plan "}).records[0]
    assert edit.locality[0].prompt + (edit.locality[0].answer or "") == "an historical plan "


def test_temporal_records_have_a_text_that_follows_in_other_words(read) -> None:
    raw = {
        "prompt": "Tesla, Inc., ",
        "target_new": " originally known as Tesla Motors.\nIt makes cars.",
        "subject": "Tesla, Inc.,",
        "ood_rephrase": "Tesla, Inc., is a maker of cars.\n",
        "locality_prompt": "The sky",
        "locality_ground_truth": "",
    }
    edit = read(raw).records[0]
    assert (edit.prompt, edit.target) == ("Tesla, Inc.,", "originally known as Tesla Motors.\nIt makes cars.")
    assert (edit.ood, edit.truth, edit.rephrases, edit.meta) == (("Tesla, Inc., is a maker of cars.",), None, (), {})
    assert edit.locality == (Probe("The sky", None),)
    assert map_record(raw | {"ood_rephrase": ["a", "", "b"]}).values["ood"] == ("a", "b")
    problem = '"ood_rephrase" must be a string or a list of strings, not a number'
    assert map_record(raw | {"ood_rephrase": 3}).problems == (problem,)


KNOWEDIT = {
    "subject": "Leo",
    "prompt": "The name of the country of Leo is",
    "target_new": "Syria",
    "ground_truth": ["Malta"],
    "rephrase": ["Leo's country is"],
    "portability": {"Reasoning": [{"prompt": "Its capital is", "ground_truth": "Damascus"}]},
    "locality": {
        "Relation_Specificity": [{"prompt": "Leo's gender is", "ground_truth": [["male", "man"]]}],
        "Forgetfulness": [{"prompt": ["Leo also", "Leo too"], "ground_truth": [["was"]]}],
        "Other": [{"prompt": "The sky is", "ground_truth": ""}],
        "None_Here": None,
    },
}


def test_knowedit(read) -> None:
    stream = read(KNOWEDIT)
    edit = stream.records[0]
    assert stream.format == "knowedit"
    assert (edit.prompt, edit.target) == (KNOWEDIT["prompt"], "Syria")
    assert edit.rephrases == ("Leo's country is",)
    assert edit.locality == (
        Probe("Leo's gender is", "male", "same-subject"),
        Probe("Leo also", "was", "same-subject"),
        Probe("The sky is", None, "unrelated"),
    )
    assert edit.truth == "Malta"
    # of the locality, the first wordings and the first answers were taken: it is kept as well
    assert edit.meta == {"portability": KNOWEDIT["portability"], "locality": KNOWEDIT["locality"]}


@pytest.mark.parametrize(
    ("group", "kept"),
    [
        ([{"prompt": "p", "ground_truth": "a"}], False),
        ([{"prompt": ["p"], "ground_truth": [["a"]]}], False),
        ([{"prompt": "p", "ground_truth": ""}], False),
        ([{"prompt": "p"}], False),
        ({"prompt": ["p", "q"], "ground_truth": ["a", ["b"]]}, False),
        ([{"prompt": "p", "ground_truth": ["a", "b"]}], True),
        ([{"prompt": ["p", "q"], "ground_truth": "a"}], True),
        ([{"prompt": "p", "ground_truth": "a", "entity": "Q1"}], True),
        ({"prompt": ["p"], "ground_truth": ["a"], "entity": "Q1"}, True),
    ],
)
def test_knowedit_locality_stays_in_meta_where_the_probes_do_not_hold_it_all(group: Any, kept: bool) -> None:
    locality = {"Relation_Specificity": group}
    mapped = map_record(KNOWEDIT | {"locality": locality})
    assert not mapped.problems
    assert mapped.values["locality"][0].prompt == "p"
    assert mapped.values["meta"].get("locality") == (locality if kept else None)


def test_knowedit_group_of_two_lists(read) -> None:
    groups = {"Relation": {"prompt": ["a", "b"], "ground_truth": ["x", ["y"]]}}
    edit = read(KNOWEDIT | {"locality": groups}).records[0]
    assert edit.locality == (Probe("a", "x", "same-subject"), Probe("b", "y", "same-subject"))


def test_knowedit_biographies_have_their_own_names(read) -> None:
    edit = read({"concept": "Rex", "text": "Rex is ", "labels": " a king. ", "locality": {}}).records[0]
    assert (edit.subject, edit.prompt, edit.target) == ("Rex", "Rex is", "a king.")


def test_knowedit_names_wrong_groups(read) -> None:
    with pytest.raises(InputError) as caught:
        read(KNOWEDIT | {"locality": {"A": "x", "B": ["y"], "C": [{"prompt": 3}]}})
    assert [p.partition("record 1: ")[2] for p in caught.value.problems] == [
        '"locality.A" must be a list of objects, not a string',
        '"locality.B[0]" must be an object, not a string',
        '"locality.C[0].prompt" must be a string or a list of strings, not a number',
    ]


def test_wikibigedit(read) -> None:
    raw = {
        "tag": "update",
        "subject": "S",
        "update": "Where?",
        "rephrase": "In which place?",
        "personas": "Pray, where?",
    }
    stream = read(raw | {"ans": "Here", "loc": "Who?", "loc_ans": "She", "mhop": None})
    edit = stream.records[0]
    assert stream.format == "wikibigedit"
    assert (edit.prompt, edit.target, edit.rephrases) == ("Where?", "Here", ("In which place?",))
    assert edit.locality == (Probe("Who?", "She"),)
    assert edit.meta == {"tag": "update", "personas": "Pray, where?", "mhop": None}


def test_native_in_full(read) -> None:
    raw = {
        "id": "e1",
        "prompt": "Über {x} %s\n",
        "target": " line one\nline two ",
        "subject": "x",
        "rephrases": ["Says {x}\t"],
        "locality": [{"prompt": "a", "answer": "b", "kind": "same-subject"}, {"prompt": "c"}],
        "irrelevant": "alone",
        "truth": " before\n",
        "ood": [" It is so.\nYes. ", " "],
        "meta": {"k": [1]},
    }
    stream = read(raw)
    assert (stream.format, stream.warnings) == ("native", ())
    assert stream.records[0] == EditRecord(
        id="e1",
        prompt="Über {x} %s",
        target="line one\nline two",
        subject="x",
        rephrases=("Says {x}",),
        locality=(Probe("a", "b", "same-subject"), Probe("c")),
        irrelevant=("alone",),
        truth="before",
        ood=("It is so.\nYes.",),
        meta={"k": [1]},
    )
    written = stream.records[0].to_json()
    assert (written["truth"], written["ood"]) == ("before", ["It is so.\nYes."])
    assert read(written).records == stream.records


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"prompt": None}, '"prompt" must be a string, not null'),
        ({"prompt": "\n "}, '"prompt" is empty'),
        ({"target": ""}, '"target" is empty'),
        ({"target": 1}, '"target" must be a string, not a number'),
        ({"target": True}, '"target" must be a string, not true or false'),
        ({"subject": []}, '"subject" must be a string, not a list'),
        ({"id": ""}, '"id" is empty'),
        ({"id": {}}, '"id" must be a string, not an object'),
        ({"rephrases": 4}, '"rephrases" must be a list of strings, not a number'),
        ({"rephrases": "one"}, '"rephrases" must be a list of strings, not a string'),
        ({"rephrases": ["a", 4]}, '"rephrases" must be a list of strings, but holds a number'),
        ({"truth": ["a"]}, '"truth" must be a string, not a list'),
        ({"ood": 4}, '"ood" must be a string or a list of strings, not a number'),
        ({"ood": ["a", {}]}, '"ood" must be a string or a list of strings, but holds an object'),
        ({"irrelevant": 4}, '"irrelevant" must be a string or a list of strings, not a number'),
        ({"locality": {"prompt": "a"}}, '"locality" must be a list of objects, not an object'),
        ({"locality": ["a"]}, '"locality[0]" must be an object, not a string'),
        ({"locality": [{"prompt": "a"}, {"answer": "b"}]}, '"locality[1].prompt" is missing'),
        ({"locality": [{"prompt": "a", "answer": 4}]}, "must be a string or a list of strings, not a number"),
        (
            {"locality": [{"prompt": "a", "kind": "near"}]},
            '"locality[0].kind" must be one of unrelated, same-relation, same-subject, not "near"',
        ),
        ({"meta": []}, '"meta" must be an object, not a list'),
        ({"target": "\ud800"}, "holds half of a surrogate pair"),
    ],
)
def test_native_faults(change: dict, problem: str) -> None:
    problems = map_record({"prompt": "p", "target": "t"} | change).problems
    assert len(problems) == 1
    assert problem in problems[0]


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        ({"prompt": "p"}, '"target" is missing'),
        ({"target": "t"}, '"prompt" is missing'),
        ({"prompt": "p", "traget": "t"}, '"target" is missing (is "traget" a misspelling of it?)'),
        (
            {"question": "q", "answer": ["a"]},
            'no known format has the keys "question", "answer" '
            "(accepted: native, messages, counterfact, mend-zsre, wikibigedit, knowedit, easyedit)",
        ),
        ({}, "no known format has the keys (none)"),
        (["p"], "must be an object, not a list"),
        (None, "must be an object, not null"),
        ({"prompt": "p", "target": "t", "meta": {"deep": NESTED}}, "is nested more than 100 levels deep"),
    ],
)
def test_records_of_no_format(raw: Any, problem: str) -> None:
    assert problem in map_record(raw).problems[0]


# Each format's own names: prompt, target, rephrases, a locality prompt and its answer.
OWN_NAMES = {
    "native": ("prompt", "target", "rephrases", None, None),
    "mend-zsre": ("src", "alt", "rephrase", "loc", "loc_ans"),
    "wikibigedit": ("update", "ans", "rephrase", "loc", "loc_ans"),
    "easyedit": ("prompt", "target_new", "rephrase_prompt", "locality_prompt", "locality_ground_truth"),
    "knowedit": ("prompt", "target_new", "rephrase", None, None),
    "counterfact": (None, None, "paraphrase_prompts", None, None),
}
PROMPT = "Im {} Ärger: {{x}} {0} %s 東京 🦉"
TARGET = "erste Zeile\n\n  zweite {} Zeile\u2028 – ж"
FILLED_IN = "In {{x}} {0} %s 東京 steht {}"
ANSWERS = [
    ("", None),
    (" \n", None),
    (None, None),
    ([], None),
    ([["", None]], None),
    (" mid", " mid"),
    ([["x", "y"], "z"], "x"),
    (["", "x"], "x"),
]


def record_of(name: str, target: str = TARGET, answer: Any = "") -> dict[str, Any]:
    """A record of the format with texts that a careless reader would change, and a locality answer."""
    prompt_key, target_key, rephrase, loc, loc_answer = OWN_NAMES[name]
    if name == "counterfact":
        fact = {"prompt": FILLED_IN, "subject": "{}", "target_new": {"str": target}}
        return {"requested_rewrite": fact, str(rephrase): [PROMPT], "neighborhood_prompts": [PROMPT]}
    record: dict[str, Any] = {str(prompt_key): PROMPT, str(target_key): target, str(rephrase): [PROMPT]}
    if name == "native":
        return record | {"locality": [{"prompt": PROMPT, "answer": answer}]}
    if name == "knowedit":
        return record | {"locality": {"Other": [{"prompt": PROMPT, "ground_truth": answer}]}}
    return record | {str(loc): PROMPT, str(loc_answer): answer}


@pytest.mark.parametrize("name", OWN_NAMES)
def test_texts_pass_unchanged_in_every_format(read, name: str) -> None:
    stream = read(record_of(name))
    edit = stream.records[0]
    assert stream.format == name
    assert (edit.prompt, edit.target) == (FILLED_IN if name == "counterfact" else PROMPT, TARGET)
    assert edit.rephrases == (PROMPT,)
    assert [(probe.prompt, probe.answer) for probe in edit.locality] == [(PROMPT, None)]
    assert (edit.truth, edit.ood, edit.irrelevant, edit.meta) == (None, (), (), {})
    assert read(edit.to_json()).records == (edit,)


@pytest.mark.parametrize("name", OWN_NAMES)
def test_the_same_prompt_with_two_targets_is_kept_twice_in_every_format(read, name: str) -> None:
    stream = read(record_of(name, target="one"), record_of(name, target="two"))
    first, second = stream.records
    assert (first.prompt, first.target, second.target) == (second.prompt, "one", "two")
    assert first.id != second.id
    assert (len(stream.contradictions), stream.superseded) == (1, {first.id})


@pytest.mark.parametrize("name", [name for name in OWN_NAMES if name != "counterfact"])
@pytest.mark.parametrize(("answer", "first"), ANSWERS)
def test_locality_answers_in_every_format(read, name: str, answer: Any, first: str | None) -> None:
    assert [probe.answer for probe in read(record_of(name, answer=answer)).records[0].locality] == [first]


@pytest.mark.parametrize("name", OWN_NAMES)
def test_optional_fields_may_be_missing_or_null_in_every_format(read, name: str) -> None:
    full, needed = record_of(name), {*OWN_NAMES[name][:2], "requested_rewrite"}
    bare = {key: value for key, value in full.items() if key in needed}
    nulls = {key: value if key in needed else None for key, value in full.items()}
    if name == "knowedit":  # told from the flat records by its groups
        bare["portability"] = nulls["portability"] = {}
    stream = read(bare, nulls)
    assert stream.format == name
    for edit in stream:
        assert (edit.rephrases, edit.locality, edit.truth, edit.ood) == ((), (), None, ())


def test_every_fault_of_a_record_is_named() -> None:
    problems = map_record({"prompt": "", "target": 3, "rephrases": 4, "locality": 5, "meta": 6}).problems
    assert len(problems) == 5


def test_values_made_in_python_are_held_to_the_same_rules() -> None:
    with pytest.raises(InputError, match='"target" of an edit is empty'):
        EditRecord("1", "p", "  ")
    with pytest.raises(InputError, match="no kind of locality probe"):
        Probe("p", kind="near")
    with pytest.raises(InputError, match="is empty"):
        Probe(" ")
    assert hash(EditRecord("1", "p", "t", meta={"a": []})) == hash(EditRecord("1", "p", "t", meta={"a": []}))


@pytest.mark.parametrize(
    ("file", "count", "name"),
    [
        ("zsre/zsre_edit_500.json", 500, "mend-zsre"),
        ("hallucination/hallucination-edit_300.json", 300, "easyedit"),
        ("hallucination/hallucination-train.json", 306, "easyedit"),
        ("temporal/temporal-edit.json", 75, "easyedit"),
        ("counterfact/counterfact_sample.json", 13, "counterfact"),
    ],
)
def test_real_files(file: str, count: int, name: str) -> None:
    path = SHARED / file
    if not path.is_file():
        pytest.skip(f"the real dataset file {file} is not beside this checkout")
    raw = json.loads(path.read_text(encoding="utf-8"))
    stream = read_edits(path)
    assert (len(stream), stream.format, stream.warnings) == (count, name, ())
    assert len({edit.id for edit in stream}) == count
    assert all(edit.locality for edit in stream)
    key = {"mend-zsre": "src", "easyedit": "prompt"}.get(name)
    if key:
        assert [edit.prompt for edit in stream] == [record[key].rstrip() for record in raw]
    if name == "counterfact":
        assert [edit.truth for edit in stream] == [r["requested_rewrite"]["target_true"]["str"] for r in raw]
    if name == "mend-zsre":
        assert all(edit.irrelevant and edit.rephrases for edit in stream)
        assert [edit.target for edit in stream] == [record["alt"].strip() for record in raw]
    if name == "easyedit":
        texts = [(record["ood_rephrase"].strip(),) if "ood_rephrase" in record else () for record in raw]
        assert [edit.ood for edit in stream] == texts
        assert not any(edit.meta for edit in stream)
        empty = sum(not record["locality_ground_truth"].strip() for record in raw)
        assert sum(edit.locality[0].answer is None for edit in stream) == empty

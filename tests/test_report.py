"""Reports and comparisons: the page's form and content, failures by kind, refusals, and the real command line."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from wisecli.cli.app import main
from wisecli.errors import InputError, OutputError, UsageError
from wisecli.report import check_results, compare_results, read_results, write_comparison, write_plots, write_report
from wisecli.report.compare import to_html, to_markdown
from wisecli.report.failures import GROUPS, classify, failures
from wisecli.report.page import render_report, tiles

HOSTILE = "<script>alert('x')</script> \"quoted\" & {{ 7*7 }} {% raw %} </td> <img src=x> ünï\u202e"
VOID = {"meta", "br", "img", "link", "input", "hr"}
PNG = b"\x89PNG\r\n\x1a\n"


# -- results to report on ----------------------------------------------------------------------------------------------


def score(before: float | None, after: float | None, n: int = 4) -> dict[str, Any]:
    def around(x: float | None) -> list[float] | None:
        return None if x is None else [max(0.0, x - 0.1), min(1.0, x + 0.1)]

    return {
        "before": before,
        "after": after,
        "before_interval": around(before),
        "after_interval": around(after),
        "n": n,
    }


def scores(rel: float = 0.9, gen: float = 0.7, loc: float = 0.95, near: float = 0.85) -> dict[str, Any]:
    def metrics(before: float, after: float) -> dict[str, Any]:
        return {
            "exact": score(before, after),
            "token": score(before, min(1.0, after + 0.05)),
            "match": score(before, after),
        }

    return {
        "rel": metrics(0.0, rel),
        "gen": metrics(0.1, gen),
        "loc": metrics(1.0, loc),
        "loc_near": metrics(1.0, near),
    }


def item(kind: str = "edit", right: bool = True, memory: int | None = 0, indicator: float = 0.8, **more: Any) -> Any:
    edited = kind in ("edit", "rephrase")
    return {
        "edit": "e1",
        "kind": kind,
        "prompt": f"A prompt of kind {kind}?",
        **({"target": "Lyon"} if edited else {}),
        "before": "Paris",
        "after": "Lyon" if right else "Nice",
        "exact": [not edited, right],
        "route": {"memory": memory, "indicator": indicator, "epsilon": 0.5, "nearest_edit": "e1"},
        **more,
    }


def minimal() -> dict[str, Any]:
    """The least that is a valid results.json."""
    least = {name: {"exact": score(0.0, 0.5, 2)} for name in ("rel", "gen", "loc")}
    return {"schema": "wise-eval", "schema_version": "2.0", "method": "M", "scores": least}


def full() -> dict[str, Any]:
    """Every section of the schema."""
    kinds = ("edit", "rephrase", "unrelated", "same-relation", "same-subject")
    items = [item(k, memory=0 if i % 5 < 2 else None, indicator=0.9 - 0.15 * (i % 5)) for i, k in enumerate(kinds * 4)]
    return {
        "schema": "wise-eval",
        "schema_version": "2.1",
        "protocol": {"name": "both", "t": None, "checkpoints": [1, 4], "text": "everything asked again"},
        "metrics": {"exact": "exact match of free generation", "token": "forced tokens", "match": "all forced tokens"},
        "method": "WISE, rehearsal schedule, ties merge, key router",
        "dataset": {
            "name": "facts",
            "file": "f.json",
            "revision": None,
            "digest": "ab" * 32,
            "edits": 4,
            "superseded": 1,
        },
        "base": {"name": "base", "label": "tiny-base", "model_type": "llama", "parameters": 7.8e6, "digest": "cd" * 32},
        "side_memory": {
            "path": "sm.safetensors",
            "config": {"layer": 5, "merge": {"method": "ties"}, "empty": None},
            "memories": [{"epsilon": {"key": 0.5}, "density": 0.2, "origin": {"shards": [0, 1]}}],
        },
        "environment": {"torch": "2.13.0", "cpu": "a processor"},
        "seeds": {"edit": 0, "bootstrap": 0},
        "scores": scores(),
        "average": {"exact": score(0.37, 0.85)},
        "open": {"rel": 1.0, "gen": 0.75, "loc": 0.31, "loc_near": None},
        "perplexity": {"rel": {"before": {"mean": 48211.0, "median": 80.0, "clipped": 70.0}, "after": None, "n": 4}},
        "ood": {"token": score(0.1, 0.66), "example": score(0.0, 0.5), "routed": 0.5, "texts": [{"edit": "e1"}]},
        "probability": {
            "es": score(0.2, 0.97),
            "ps": score(0.2, 0.8),
            "ns": score(0.9, 0.88),
            "score": score(0.3, 0.87),
        },
        "routing": {
            "router": "key",
            "epsilon": [0.5],
            "kinds": {k: {"n": 4, "routed": 0.75, "right_edit": 1.0 if i < 2 else None} for i, k in enumerate(kinds)},
            "precision": 0.91,
            "recall": 0.92,
            "false_opening": 0.03,
            "auc": {"rephrase": {"unrelated": 0.9931, "near": 0.9632}, "edit": {"unrelated": None, "near": None}},
            "roc": {
                "unrelated": {"fpr": [0.0, 0.1], "tpr": [0.8, 1.0]},
                "near": {"fpr": [0.0, 0.3], "tpr": [0.7, 1.0]},
            },
        },
        "ability": {
            "text": "held text",
            "passages": 60,
            "tokens": 3000,
            "perplexity": {"before": 21.4, "after": 21.5},
            "agreement": 0.9993,
            "routed": 0.0167,
        },
        "harness": {"tasks": {"arc_easy": {"acc": {"before": 0.31, "after": 0.309}}}, "samples": {"arc_easy": 200}},
        "fresh": {"scores": scores(rel=0.99)},
        "retention": [{"edits": n, "scores": {"rel": 1.0, "gen": 0.9, "loc": 1.0, "loc_near": None}} for n in (1, 4)],
        "rollbacks": [{"t": 2, "groups": 2, "scores": scores(), "identical": True}],
        "wilke": {
            "checkpoints": [1, 2],
            **{"es": 0.9, "gs": 0.8, "ls": 0.7, "ers": [1.0, 0.9], "ors": [1.0, 0.8], "s": [0.9, 0.81]},
            **{"exact": {"es": 0.6, "gs": None, "ls": 0.5, "ers": [1.0, 0.4], "ors": [1.0, 0.3]}, "left_out": 50},
        },
        "items": [*items, item("rephrase", right=False, memory=None, prompt=HOSTILE, after=HOSTILE, open="Lyon")],
        "timings": {"load": 0.4, "total": 131.0, "prompts": 21},
        "peak_memory": {"resident_bytes": 911_000_000, "accelerator_bytes": None},
        "a key of a later version": {"x": [1]},
    }


def base_only() -> dict[str, Any]:
    """What the base alone makes: after equals before, nothing routed."""
    out = full() | dict.fromkeys(
        ("method", "side_memory", "routing", "open", "fresh", "retention", "rollbacks", "wilke")
    )
    for metrics in out["scores"].values():
        for s in metrics.values():
            s |= {"after": s["before"], "after_interval": s["before_interval"]}
    out["items"] = [{k: v for k, v in i.items() if k != "route"} | {"exact": [False, False]} for i in out["items"]]
    return out


def saved(folder: Path, document: Any, name: str = "results.json") -> Path:
    path = folder / name
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    code = main([str(a) for a in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


class Page(HTMLParser):
    """Checks that every element is closed in order, and keeps ids, references, text and headings."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[tuple[str, str, str]] = []
        self.text: list[str] = []
        self.tags: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            self.ids += [value or ""] if name == "id" else []
            if name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
                self.links.append((tag, name, value or ""))
            assert not name.startswith("on"), f"<{tag} {name}>"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += [] if self.open[-1:] == ["style"] else [data]

    @property
    def shown(self) -> str:
        return " ".join(" ".join(self.text).split())


# -- the page ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [minimal, full, base_only])
def test_the_page_is_well_formed_and_needs_nothing_else(make: Callable[[], dict[str, Any]], tmp_path: Path) -> None:
    text = write_report(make(), tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert len(page.ids) == len(set(page.ids))
    assert {"script", "link", "iframe", "img", "object", "embed"}.isdisjoint(page.tags)
    assert page.links
    for tag, name, value in page.links:
        assert value.startswith("#"), f"<{tag} {name}={value}>"
        assert value[1:] in page.ids, f"{value} leads nowhere"
    assert all(target.startswith("#") for target in re.findall(r"url\(\s*[\"']?([^)\"']*)", text))
    assert {t.strip("#") for t in re.findall(r"url\(([^)]*)\)", text)} <= set(page.ids)
    assert "@import" not in text


def test_the_same_results_give_the_same_bytes_in_a_fresh_process(tmp_path: Path) -> None:
    here = render_report(full())
    path = saved(tmp_path, full())
    code = f"""
from pathlib import Path
import sys
from wisecli.report import read_results, write_report
write_report(read_results(Path({str(path)!r})), Path({str(tmp_path / "other.html")!r}))
"""
    environment = {**os.environ, "PYTHONHASHSEED": "77", "SOURCE_DATE_EPOCH": "5"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    assert (tmp_path / "other.html").read_text(encoding="utf-8") == here


def test_hostile_text_is_shown_and_never_becomes_markup(tmp_path: Path) -> None:
    document = full()
    document["dataset"]["name"] = document["method"] = document["metrics"]["exact"] = HOSTILE
    document["side_memory"]["config"] = {HOSTILE: HOSTILE}
    document["harness"]["tasks"] = {HOSTILE: {HOSTILE: {"before": 0.1, "after": 0.2}}}
    text = render_report(document)
    page = Page(text)
    assert "<script" not in text
    assert "<img" not in text
    assert page.shown.count(" ".join(HOSTILE.split())) >= 6
    compared = to_html(compare_results([document, document], ["a.json", "b.json"]))
    assert "<script" not in compared
    assert " ".join(HOSTILE.split()) in Page(compared).shown


SECTIONS = {
    "Routing": "routing",
    "Over the stream": ("retention", "fresh"),
    "Rollbacks": "rollbacks",
    "WilKE protocol": "wilke",
    "Perplexity of the targets": "perplexity",
    "Probability comparisons": "probability",
    "Out of distribution": "ood",
    "General ability": ("ability", "harness"),
    "Failures": "items",
}


def headings(document: dict[str, Any]) -> list[str]:
    return [html.unescape(t) for t in re.findall(r"<section[^>]*>\s*<h2>([^<]*)</h2>", render_report(document))]


@pytest.mark.parametrize("title", SECTIONS)
@pytest.mark.parametrize("absent", ["null", "missing"])
def test_a_section_appears_iff_its_data_is_there(title: str, absent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wisecli.report.sections.svg", lambda plot, results: "")  # drawing takes most of the time
    keys = SECTIONS[title] if isinstance(SECTIONS[title], tuple) else (SECTIONS[title],)
    document = full()
    assert headings(document) == ["Scores", *SECTIONS, "How this was made"]
    for i, key in enumerate(keys):
        if absent == "null":
            document[key] = None
        else:
            del document[key]
        shown = title in headings(document)
        assert shown == (i + 1 < len(keys)), f"without {', '.join(keys[: i + 1])}"
    assert headings(document) == [t for t in ("Scores", *SECTIONS, "How this was made") if t != title]


def test_least_results_make_a_page_and_one_plot(tmp_path: Path) -> None:
    assert headings(minimal()) == ["Scores"]
    assert [p.name for p in write_plots(minimal(), tmp_path)] == ["scores.png"]


def test_figures_stand_where_they_belong() -> None:
    document = full()
    shown = Page(render_report(document)).shown
    heads = {t.name: t for t in tiles(document)}
    assert heads["Generalization"].value == "0.700"
    assert heads["Generalization"].lines == ["95 % interval 0.600–0.800", "before 0.100", "4 paraphrases"]
    for text in (
        "WISE, rehearsal schedule, ties merge, key router, on 4 edits of facts; base tiny-base",
        "(llama, 7.8 M parameters); protocol: both. 1 edit is contradicted by a later one and was not scored.",
        "exact match of free generation",
        "paraphrases 4 0.750 1.000",
        "0.9931 0.9632",
        "Generalization 0.700 0.600–0.800 0.750",
        "precision 0.910",
        "median 80.00 – 4",
        "ES, effectiveness 0.900 0.600",
        "ORS, original retention 0.800 0.300",
        "arc_easy acc 0.310 0.309 200",
        "21.40 before, 21.50 after",
        "merge, method ties",
        "2 min 11 s",
        "869 MiB",
    ):
        assert text in shown, text


def test_the_base_alone_has_no_after() -> None:
    shown = Page(render_report(base_only())).shown
    assert "The base alone" in shown
    assert "after" not in shown
    assert "Failures" not in shown


def test_failures_beyond_the_cap_are_counted() -> None:
    document = full()
    document["items"] = [item("edit", right=False, prompt=f"Prompt number {i}?") for i in range(137)]
    shown = Page(render_report(document)).shown
    assert "137 of 137" in shown
    assert "Prompt number 99?" in shown
    assert "Prompt number 100?" not in shown
    assert "37 more are not shown" in shown


# -- failures ----------------------------------------------------------------------------------------------------------

CLASSES = {
    "Edit not answered: kept out by the gate": item("edit", False, None),
    "Edit routed, wrong answer": item("edit", False, 0),
    "Edit, wrong answer (no route recorded)": item("edit", False, route=None),
    "Paraphrase kept out by the gate": item("rephrase", False, None),
    "Paraphrase routed, wrong answer": item("rephrase", False, 1),
    "Paraphrase, wrong answer (no route recorded)": item("rephrase", False, route=None),
    "Near prompt let in and changed": item("same-subject", False, 0),
    "Near prompt changed without being routed": item("same-relation", False, None),
    "Near prompt changed (no route recorded)": item("same-relation", False, route=None),
    "Unrelated prompt let in and changed": item("unrelated", False, 0),
    "Unrelated prompt changed without being routed": item("unrelated", False, None),
    "Unrelated prompt changed (no route recorded)": item("unrelated", False, route=None),
}


def test_every_kind_of_failure_has_its_item() -> None:
    assert list(CLASSES) == list(GROUPS.values())


@pytest.mark.parametrize("name", CLASSES)
def test_a_failure_is_named_after_its_kind_and_its_route(name: str) -> None:
    assert classify(CLASSES[name]) == name


def test_what_came_out_or_was_not_measured_is_no_failure() -> None:
    assert classify(item("edit", True)) is None
    assert classify(item("edit", False) | {"exact": [False, None]}) is None
    assert classify({k: v for k, v in item("edit", False).items() if k != "exact"}) is None


def test_groups_of_failures_come_in_reading_order_and_hold_everything_wrong() -> None:
    right = [item(k) for k in ("edit", "rephrase", "unrelated", "same-subject")]
    groups = failures({"items": [*reversed(CLASSES.values()), *right]})
    assert [g.name for g in groups] == list(CLASSES)
    assert all(len(g.items) == 1 for g in groups)
    assert {g.kind: g.asked for g in groups} == {"edit": 4, "rephrase": 4, "near": 4, "unrelated": 4}


# -- plots -------------------------------------------------------------------------------------------------------------


def test_plots_are_pictures_and_the_same_again(tmp_path: Path) -> None:
    first = write_plots(full(), tmp_path / "a")
    assert [p.stem for p in first] == ["scores", "indicator", "roc", "retention", "fresh", "wilke"]
    again = write_plots(full(), tmp_path / "b")
    for a, b in zip(first, again, strict=True):
        assert a.read_bytes().startswith(PNG)
        assert a.read_bytes() == b.read_bytes()
        assert int.from_bytes(a.read_bytes()[16:20], "big") >= 800  # pixels wide


HARD = {
    "one indicator for all": lambda d: [i["route"].update(indicator=0.5) for i in d["items"]],
    "no indicators": lambda d: [i["route"].update(indicator=None) for i in d["items"]],
    "long tail": lambda d: [i["route"].update(indicator=float(7**k)) for k, i in enumerate(d["items"])],
    "many thresholds": lambda d: d["routing"].update(epsilon=[0.1 * k for k in range(9)]),
    "no thresholds": lambda d: d["routing"].update(epsilon=None),
    "a curve without points": lambda d: d["routing"].update(roc={"unrelated": {"fpr": [], "tpr": []}, "near": None}),
    "guessing": lambda d: d["routing"].update(auc={"rephrase": {"unrelated": 0.5, "near": 0.5}}),
    "one checkpoint": lambda d: d.update(retention=d["retention"][:1]),
    "no checkpoint measured": lambda d: d.update(retention=[{"edits": 3, "scores": {}}]),
    "series of other lengths": lambda d: d["wilke"].update(ers=[1.0], ors=None),
    "no near prompts": lambda d: d["scores"].update(loc_near={"exact": score(None, None, 0)}),
    "no intervals": lambda d: d["scores"]["rel"]["exact"].update(after_interval=None, before_interval=[None, None]),
    "nothing asked": lambda d: d.update(scores={n: {"exact": score(None, None, 0)} for n in d["scores"]}),
    "nulls": lambda d: d.update(dict.fromkeys((*d["routing"], "kinds")), routing=dict.fromkeys(d["routing"])),
    "items without anything": lambda d: d.update(items=[{}, {"kind": "edit", "exact": [True, False]}]),
}


TOGETHER = (  # each touches a plot of its own
    ("one indicator for all", "a curve without points", "one checkpoint", "series of other lengths", "no near prompts"),
    ("no indicators", "guessing", "no checkpoint measured", "no intervals"),
    ("long tail", "nothing asked"),
    ("many thresholds",),
    ("no thresholds",),
    ("items without anything",),
    ("nulls",),
)


def test_all_that_is_unusual_is_drawn() -> None:
    assert sorted(name for names in TOGETHER for name in names) == sorted(HARD)


@pytest.mark.parametrize("names", TOGETHER, ids=", ".join)
def test_unusual_results_are_drawn(names: tuple[str, ...], tmp_path: Path) -> None:
    document = full()
    for name in names:
        HARD[name](document)
    read_results(saved(tmp_path, document))
    Page(render_report(document))
    assert all(p.read_bytes().startswith(PNG) for p in write_plots(document, tmp_path))


# -- reading -----------------------------------------------------------------------------------------------------------


def test_a_folder_of_wise_eval_stands_for_its_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(tmp_path, full())
    (tmp_path / "eval").mkdir()
    path.rename(tmp_path / "eval" / "results.json")
    assert read_results(tmp_path / "eval") == full()
    code, _, _ = run(capsys, "report", tmp_path / "eval", "-o", tmp_path / "page.html")
    assert code == 0
    for missing in (tmp_path, tmp_path / "nothing.json"):
        code, _, err = run(capsys, "report", missing)
        assert code == 1
        assert "wise eval --out FOLDER writes FOLDER/results.json" in " ".join(err.split())


BAD = {
    "no object": ([1], "holds no results"),
    "other JSON": ({"hello": 1}, "holds no results"),
    "other schema": (full() | {"schema": "else"}, '"wise-eval"'),
    "no version": ({k: v for k, v in full().items() if k != "schema_version"}, "schema version None"),
    "older": (full() | {"schema_version": "1.0", "dataset": "demo", "base": "wise-demo"}, "schema version 1.0"),
    "newer": (full() | {"schema_version": "3.0"}, "schema version 3.0"),
    "no scores": ({"schema": "wise-eval", "schema_version": "2.0"}, "holds no results"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_results_is_refused(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document, said = BAD[name]
    path = saved(tmp_path, document)
    with pytest.raises(InputError, match=re.escape(said)) as e:
        read_results(path)
    assert str(path) in e.value.message
    wanted = "newer wise" if name == "newer" else "wise eval"
    assert wanted in (e.value.hint or "")
    for command in ("report", "compare"):
        code, out, err = run(capsys, command, path, *([path] if command == "compare" else []))
        assert (code, out) == (1, "")
        assert said in err.replace("\n", " ")
        assert "Traceback" not in err


FAULTS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a score of text": (lambda d: d["scores"]["rel"]["exact"].update(after="x"), "scores.rel.exact.after is 'x'"),
    "a score above 1": (lambda d: d["scores"]["rel"]["exact"].update(after=1.5), "outside 0 to 1"),
    "a score of NaN": (lambda d: d["scores"]["rel"]["exact"].update(after=float("nan")), "not finite"),
    "a bool for a number": (lambda d: d["scores"]["rel"]["exact"].update(n=True), "scores.rel.exact.n is True"),
    "a score missing": (lambda d: d["scores"].pop("gen"), "scores.gen.exact is missing"),
    "items no list": (lambda d: d.update(items={"a": 1}), "items is no list"),
    "an item no object": (lambda d: d["items"].append(3), "items[21] is no object"),
    "a prompt no text": (lambda d: d["items"][2].update(prompt=["x"]), "items[2].prompt is ['x']"),
    "a dataset of text": (lambda d: d.update(dataset="demo"), "dataset is no object"),
    "a threshold no list": (lambda d: d["routing"].update(epsilon=0.4), "routing.epsilon is no list"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_damaged_value_is_named(name: str) -> None:
    document = full()
    FAULTS[name][0](document)
    with pytest.raises(InputError) as e:
        check_results(document, "r.json")
    assert any(FAULTS[name][1] in p for p in e.value.problems), e.value.problems


def test_all_faults_are_named_at_once_and_unknown_keys_are_none() -> None:
    document = full()
    check_results(document)
    document["scores"]["rel"]["exact"]["after"] = "x"
    document["items"][0]["prompt"] = 7
    with pytest.raises(InputError) as e:
        check_results(document)
    assert len(e.value.problems) == 2


# -- wise report -------------------------------------------------------------------------------------------------------


def test_report_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    path, out = saved(tmp_path, full()), tmp_path / "deep" / "r.html"
    code, said, err = run(capsys, "report", path, "-o", out, "--png", tmp_path / "plots")
    assert (code, err) == (0, "")
    assert "Paraphrase kept out by the gate" in said
    assert out.read_text(encoding="utf-8") == render_report(full())
    assert len(list((tmp_path / "plots").glob("*.png"))) == 6
    monkeypatch.setattr("wisecli.report.sections.svg", lambda plot, results: "")  # drawing takes most of the time
    code, said, _ = run(capsys, "report", path, "-o", out, "--json")
    document = json.loads(said)
    assert (code, document["report"], document["plots"]) == (0, str(out), [])
    assert document["failures"] == {"Paraphrase kept out by the gate": 1}
    assert run(capsys, "report", path, "-o", out, "-q")[1] == f"{out}\n"
    monkeypatch.chdir(tmp_path)
    assert run(capsys, "report", path, "-q")[1] == "report.html\n"
    assert (tmp_path / "report.html").exists()


def test_report_command_refuses_bad_paths(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wisecli.report.sections.svg", lambda plot, results: "")
    path = saved(tmp_path, full())
    broken = tmp_path / "broken.json"
    broken.write_text("{", encoding="utf-8")
    (tmp_path / "empty").mkdir()
    before = path.read_bytes()
    for argv, said in (
        ((tmp_path / "none.json",), "Cannot read"),
        ((tmp_path / "empty",), "Cannot read"),
        ((broken,), "is not JSON"),
        ((path, "-o", path), "results file itself"),
        ((path, "-o", path / "r.html"), "Cannot write"),
        ((path, "-o", tmp_path), "Cannot write"),
        ((path, "-o", tmp_path / "r.html", "--png", path), "Cannot write"),
    ):
        code, out, err = run(capsys, "report", *argv)
        assert (code, out) == (1, ""), argv
        assert said in err.replace("\n", " "), err
        assert "Traceback" not in err
    assert path.read_bytes() == before
    with pytest.raises(OutputError):
        write_report(full(), path / "r.html")


# -- wise compare ------------------------------------------------------------------------------------------------------


def other(**changed: Any) -> dict[str, Any]:
    """Results of another method in the same setting."""
    return full() | {"method": "ROME", "scores": scores(rel=0.5, gen=0.4, loc=0.31, near=0.2)} | changed


DIFFERENT = {
    "protocol": (other(protocol={"name": "fresh"}), "protocol: both (a.json) and fresh (b.json)"),
    "T": (other(protocol={"name": "both", "t": [1, 10]}), "protocol, T: none (a.json) and 1, 10 (b.json)"),
    "dataset": (
        other(dataset=full()["dataset"] | {"digest": "ef" * 32}),
        "dataset: facts, digest abababababab (a.json) and facts, digest efefefefefef (b.json)",
    ),
    "edits": (other(dataset=full()["dataset"] | {"edits": 9}), "number of edits: 4 (a.json) and 9 (b.json)"),
    "base": (
        other(base={"name": "else"}),
        "base: base, digest cdcdcdcdcdcd (a.json) and else, no digest (b.json)",
    ),
    "metric": (
        other(metrics={"exact": "substring"}),
        "metric exact: exact match of free generation (a.json) and substring (b.json)",
    ),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_compare_refuses_what_differs_in_more_than_the_method(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document, said = DIFFERENT[name]
    a, b = saved(tmp_path, full(), "a.json"), saved(tmp_path, document, "b.json")
    with pytest.raises(InputError) as e:
        compare_results([full(), document], [str(a), str(b)])
    assert list(e.value.problems) == [said]
    code, out, err = run(capsys, "compare", a, b)
    assert (code, out) == (1, "")
    assert said in err
    assert "--anyway" in err
    code, out, err = run(capsys, "compare", a, b, "--anyway", "--json", "-o", tmp_path / "c.md")
    assert code == 0
    assert json.loads(out)["differences"] == [said]
    assert said in json.loads(err)["message"]
    written = (tmp_path / "c.md").read_text(encoding="utf-8")
    assert "differ in more than the method" in written
    assert said in written
    run(capsys, "compare", a, b, "--anyway", "-o", tmp_path / "c.html")
    assert said in Page((tmp_path / "c.html").read_text(encoding="utf-8")).shown


def test_a_renamed_dataset_with_the_same_digest_is_the_same() -> None:
    renamed = other(dataset=full()["dataset"] | {"name": "copy", "file": "elsewhere.json"})
    assert compare_results([full(), renamed], ["a", "b"]).differences == []


def test_the_metric_decides_what_is_compared() -> None:
    document = other(metrics=full()["metrics"] | {"token": "another token metric"})
    assert compare_results([full(), document], ["a", "b"]).differences == []
    with pytest.raises(InputError):
        compare_results([full(), document], ["a", "b"], metric="token")


def test_compare_shows_the_right_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = saved(tmp_path, full(), "a.json"), saved(tmp_path, other(), "b.json")
    code, out, err = run(capsys, "compare", a, b, "--markdown")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[2] == "| method | Rel | Gen | Loc | Loc near | mean |"
    figures = ["0.500 [0.400–0.600]", "0.400 [0.300–0.500]", "0.310 [0.210–0.410]", "0.200 [0.100–0.300]", "0.403"]
    assert lines[5] == f"| ROME (b.json) | {' | '.join(figures)} |"
    document = json.loads(run(capsys, "compare", a, b, "--json", "--metric", "token")[1])
    assert document["metric"] == "token"
    assert document["results"][1]["name"] == "ROME"
    assert document["results"][1]["scores"]["loc"]["token"]["value"] == pytest.approx(0.36)
    assert document["results"][1]["average"]["exact"] == pytest.approx((0.5 + 0.4 + 0.31) / 3)
    code, out, _ = run(capsys, "compare", a, b)
    assert code == 0
    assert "0.310" in out
    assert "ROME" in out


@pytest.mark.parametrize("suffix", [".md", ".html", ".png"])
def test_compare_writes_by_suffix(suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = saved(tmp_path, full(), "a.json"), saved(tmp_path, other(), "b.json")
    out = tmp_path / "new" / f"c{suffix}"
    assert run(capsys, "compare", a, b, "-o", out, "-q") == (0, f"{out}\n", "")
    first = out.read_bytes()
    assert run(capsys, "compare", a, b, "-o", out, "-q")[0] == 0
    assert out.read_bytes() == first
    if suffix == ".html":
        page = Page(first.decode())
        assert page.tags.count("svg") == 2
        assert all(value.startswith("#") for _, _, value in page.links)
        assert "ROME b.json 0.500 0.400–0.600" in page.shown
    elif suffix == ".png":
        assert first.startswith(PNG)
    else:
        assert first.decode() == to_markdown(compare_results([full(), other()], [str(a), str(b)]))


def test_names_are_methods_made_distinct() -> None:
    def names(*sources: str, given: list[str] | None = None) -> list[str]:
        made = compare_results([minimal()] * len(sources), list(sources), names=given)
        return [e.name for e in made.entries]

    assert names("a.json", "b.json") == ["M (a)", "M (b)"]
    assert names("x/r.json", "y/r.json") == ["M (x/r.json)", "M (y/r.json)"]
    assert len(set(names("r.json", "r.json"))) == 2
    assert names("a.json", "b.json", given=["one", "two"]) == ["one", "two"]
    assert [e.name for e in compare_results([full(), base_only()], ["a", "b"], anyway=True).entries][1] == "base alone"


def test_the_base_alone_enters_with_its_own_answers() -> None:
    made = compare_results([full(), base_only()], ["a.json", "b.json"], anyway=True)
    assert made.entries[1].value("gen", "exact") == 0.1


def test_compare_refuses_misuse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = saved(tmp_path, full(), "a.json"), saved(tmp_path, other(), "b.json")
    least = saved(tmp_path, minimal(), "c.json")
    for code, argv, said in (
        (2, (a,), "two or more"),
        (2, (a, b, "--names", "x"), "1 names for 2 results"),
        (2, (a, b, "--names", "x,x"), "2 names for 2 results"),
        (2, (a, b, "--metric", "rouge"), "exact, token, match"),
        (2, (a, b, "--json", "--markdown"), "both want stdout"),
        (2, (a, b, "-o", tmp_path / "c.pdf"), ".md, .html, .png"),
        (1, (a, least, "--metric", "token"), "has no token scores"),
        (1, (a, b, "-o", a / "c.md"), "Cannot write"),
        (1, (a, tmp_path / "none.json"), "Cannot read"),
    ):
        got, out, err = run(capsys, "compare", *argv)
        assert (got, out if code == 2 else "") == (code, ""), (argv, err)
        assert said in err.replace("\n", " "), err
        assert "Traceback" not in err
    with pytest.raises(UsageError):
        write_comparison(compare_results([full(), other()], ["a", "b"]), tmp_path / "c.txt")


def test_markdown_keeps_its_table_whatever_the_names() -> None:
    made = compare_results([full(), other()], ["a", "b"], names=["a|b\n<script>", "`*x*`"])
    text = to_markdown(made)
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 4
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {7}
    assert "<script" not in text


# -- in a browser ------------------------------------------------------------------------------------------------------

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PROBE = """<script>
const wide = [...document.querySelectorAll("body *")].filter(e => !e.closest(".scroll, svg")
  && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.tagName + "." + e.className);
const flat = [...document.querySelectorAll("svg")].filter(e => e.getBoundingClientRect().height < 50).length;
document.title = JSON.stringify({inner: innerWidth, scroll: document.documentElement.scrollWidth, wide, flat});
</script></body>"""


@pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome here to open the page with")
@pytest.mark.parametrize("width", [360, 1200])
@pytest.mark.parametrize("what", ["report", "compare"])
def test_a_browser_shows_the_page_without_sideways_scrolling(what: str, width: int, tmp_path: Path) -> None:
    document = full()
    document["items"] += CLASSES.values()
    document["items"].append(item("edit", False, prompt="x" * 400, after="y" * 400))
    document["dataset"]["file"] = "/a/very/long/path" * 12
    text = render_report(document)
    if what == "compare":
        names = ["A method with a long name, in several parts", "B" * 80]
        text = to_html(compare_results([document, other()], ["a.json", "b.json"], names=names, anyway=True))
    framed = tmp_path / "page.html"
    framed.write_text(text.replace("<details ", "<details open ").replace("</body>", PROBE), encoding="utf-8")
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [f"--window-size={width},2000", f"--user-data-dir={tmp_path / 'profile'}"]
    shot = tmp_path / "page.png"
    done = subprocess.run([*command, "--dump-dom", framed.as_uri()], capture_output=True, text=True, timeout=120)
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title, done.stderr[-2000:]
    found = json.loads(html.unescape(title[1]))
    assert found["scroll"] <= found["inner"] + 1, found
    assert found["wide"] == []
    assert found["flat"] == 0
    subprocess.run([*command, f"--screenshot={shot}", framed.as_uri()], capture_output=True, timeout=120, check=True)
    assert shot.read_bytes().startswith(PNG)
    assert int.from_bytes(shot.read_bytes()[16:20], "big") == width

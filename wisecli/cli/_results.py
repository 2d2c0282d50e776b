"""What `wise eval` shows and writes: tables for people, results.json, report.html and plots."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wisecli.cli._output import Output, figure, short
from wisecli.report.results import RESULTS

if TYPE_CHECKING:
    from wisecli.evaluation.evaluate import EvalReport

NAMES = {"rel": "reliability", "gen": "generalization", "loc": "locality", "loc_near": "locality, near"}
_SHORT = {"rel": "Rel", "gen": "Gen", "loc": "Loc", "loc_near": "Loc near"}
_SHOWN = 5
_STATISTICS = {"median": "median", "clipped": "mean cut at 100"}
_PAGES = (".html", ".htm", ".md", ".png")
_REPORT, _PLOTS = "report.html", "plots"


class Written:
    """Where results go: a folder for all of them, or one JSON file. Nothing where no path was given.

    Raises:
        OutputError: the folder cannot be written.
    """

    def __init__(self, out: Path | None, png: bool) -> None:
        from wisecli.errors import UsageError
        from wisecli.memory.files import ensure_writable

        if png and out is None:
            raise UsageError("--png writes beside the results.", hint="Give --out FOLDER.")
        if out is not None and out.suffix in _PAGES:
            raise UsageError(f"{out} would be a folder.", hint="Give --out FOLDER; wise report makes a page alone.")
        alone = out is not None and out.suffix == ".json"
        self.folder = out.parent if out is not None and alone else out
        self.results = out if alone or out is None else out / RESULTS
        self.page = None if alone or out is None else out / _REPORT
        self.plots = self.folder / _PLOTS if png and self.folder is not None else None
        self.made: list[str] = []
        if self.folder is not None:
            ensure_writable(self.folder)

    @property
    def path(self) -> Path | None:
        """What `--quiet` prints."""
        return self.results

    def save(self, report: EvalReport) -> None:
        """Write everything, in the place of what was written before."""
        if self.results is None:
            return
        from wisecli.memory.files import write_json

        document = report.to_json()
        write_json(self.results, document)
        self.made = [str(self.results)]
        if self.page is not None:
            from wisecli.report import write_report

            self.made.append(str(write_report(document, self.page)))
        if self.plots is not None:
            from wisecli.report import write_plots

            self.made.append(f"{len(write_plots(document, self.plots))} plots in {self.plots}")

    def tell(self, sink: Output, side_memory: Path | None) -> None:
        """Say what was written, and what next."""
        if self.results is not None:
            following = f"wise package {side_memory} --eval {self.results}" if side_memory is not None else ""
            sink.line(f"Wrote {', '.join(self.made)}.{' Next:' if following else ''}", command=following)


def show_report(sink: Output, report: EvalReport) -> None:
    """Scores, what stands beside them, and a few failures."""
    s = report.sections
    edited = s["method"] is not None
    title = f"{s['dataset']['name'] or 'stream'}, {report.edits} edits, {s['base']['label']}, {s['protocol']['name']}"
    title += ", routed by an oracle" if (s["side_memory"] or {}).get("router") == "oracle" else ""
    columns = ("exact match", "before", "after", "95 % interval", "token", "routed", "prompts")
    sink.table(title, columns, _score_rows(report, edited))
    sink.facts(list(_beside(s)))
    _show_rollbacks(sink, s["rollbacks"])
    _show_curve(sink, s["retention"])
    if not s["rollbacks"]:
        _show_left_out(sink, s["dataset"])
    if edited:
        _show_failures(sink, report)
    else:
        sink.line("No side memory was given: this is the base alone.")


def _show_left_out(sink: Output, dataset: Mapping[str, Any]) -> None:
    """What the stream itself makes unanswerable, or the side memory does not hold."""
    left = dataset["left_out"] or {"rephrases": 0, "probes": 0}
    counts = (
        (dataset["superseded"], "edits are contradicted by later ones and were not scored"),
        (left["rephrases"], "rephrases ask what another edit changes otherwise and were not scored"),
        (left["probes"], "locality probes ask what an edit changes and were not scored"),
        (dataset["missing"], "edits are not in the side memory, and were scored all the same"),
    )
    for n, text in counts:
        if n:
            sink.line(f"{n} {text}.")


def _score_rows(report: EvalReport, edited: bool) -> Iterable[tuple[str, ...]]:
    for name, label in NAMES.items():
        exact, token = report.scores[name]["exact"], report.scores[name]["token"]
        if not exact["n"]:
            continue
        after = (figure(exact["after"]), _interval(exact["after_interval"]), figure(token["after"]))
        shown = after if edited else ("-", "-", "-")
        yield label, figure(exact["before"]), *shown, figure(_routed(report, name)), str(exact["n"])


def _routed(report: EvalReport, name: str) -> float | None:
    """Share of a score's prompts that a side memory answered; None without routing."""
    from wisecli.evaluation.questions import SCORES

    if report.routing is None:
        return None
    kinds = [report.routing["kinds"][k] for k in SCORES[name]]
    n = sum(k["n"] for k in kinds)
    return sum(k["routed"] * k["n"] for k in kinds if k["n"]) / n if n else None


def _beside(s: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The other measurements, a line each."""
    yield from _probabilities(s)
    yield from _gate(s)
    if s["fresh"]:
        fresh = s["fresh"]["scores"]
        yield "right after the edit", _listed((NAMES[k], v["exact"]["after"]) for k, v in fresh.items())
    if s["ability"]:
        a = s["ability"]
        before, after = (_ppl(a["perplexity"][k]) for k in ("before", "after"))
        yield "held text", f"perplexity {before} -> {after}, next-token agreement {figure(a['agreement'])}"
    if s["wilke"]:
        w = s["wilke"]
        ends = ((k.upper(), w[k][-1]) for k in ("ers", "ors", "s"))
        yield "WilKE, all tokens forced", _listed([*((k.upper(), w[k]) for k in ("es", "gs", "ls")), *ends])
    for task, metrics in (s["harness"] or {}).get("tasks", {}).items():
        shown = (f"{k} {_change(v)}" for k, v in metrics.items() if isinstance(v, Mapping) and "before" in v)
        yield task, ", ".join(shown)


def _probabilities(s: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What is measured on probabilities rather than on answers."""
    for name, label in (("rel", "edits"), ("gen", "rephrases")):
        p = s["perplexity"][name]
        if p["n"]:
            pairs = ((k, _ppl(p["before"][k]), _ppl(p["after"][k])) for k in ("median", "clipped"))
            yield f"target perplexity, {label}", ", ".join(f"{_STATISTICS[k]} {a} -> {b}" for k, a, b in pairs)
    if s["ood"]:
        yield "out-of-distribution texts", ", ".join(f"by {k} {_change(s['ood'][k])}" for k in ("token", "example"))
    if s["probability"]:
        parts = ((k.upper(), s["probability"][k]) for k in ("es", "ps", "ns"))
        yield "by probability", ", ".join(f"{k} {_change(p)}" for k, p in parts if p["n"])


def _gate(s: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    routing = s["routing"]
    if routing:
        yield "gate", _listed((k.replace("_", " "), routing[k]) for k in ("precision", "recall", "false_opening"))
        if shown := _listed((f"against {k}", v) for k, v in routing["auc"]["rephrase"].items()):
            yield "gate AUC, rephrases", shown
    if s["open"]:
        yield "with the gate always open", _listed((NAMES[k], v) for k, v in s["open"].items())


def _listed(pairs: Iterable[tuple[str, float | None]]) -> str:
    return ", ".join(f"{name} {figure(value)}" for name, value in pairs if value is not None)


def _change(sides: Mapping[str, Any]) -> str:
    return f"{figure(sides['before'])} -> {figure(sides['after'])}"


def _show_rollbacks(sink: Output, rollbacks: Any) -> None:
    if not rollbacks:
        return
    rows = []
    for r in rollbacks:
        scores = [r["scores"][name]["exact"] for name in NAMES]
        same = "yes" if r["identical"] else "NO"
        rows.append((str(r["t"]), str(r["groups"]), *(figure(x["after"]) for x in scores), same))
    sink.table("Sequences of T edits, rolled back", ("T", "sequences", *_SHORT.values(), "base unchanged"), rows)


def _show_curve(sink: Output, curve: Any) -> None:
    if not curve:
        return
    rows = [(str(p["edits"]), *(figure(p["scores"][name]) for name in NAMES)) for p in curve]
    sink.table("Everything learned so far, asked again", ("edits", *_SHORT.values()), rows)


def _show_failures(sink: Output, report: EvalReport) -> None:
    """A few prompts that went wrong, so that figures have a face."""
    wrong = [i for i in report.items if not i.exact[1]]
    if not wrong:
        return
    rows = []
    for item in wrong[:_SHOWN]:
        wanted = item.question.target if item.question.target is not None else item.before
        side = "-" if item.route is None else "side" if item.route.routed else "main"
        rows.append((item.question.kind, short(item.question.prompt), short(wanted, 30), short(item.after, 30), side))
    sink.table(f"{len(wrong)} wrong, for example", ("kind", "prompt", "wanted", "answered", "memory"), rows, left=5)


def _interval(bounds: Any) -> str:
    return "-" if bounds is None else f"{figure(bounds[0])}-{figure(bounds[1])}"


def _ppl(x: float | None) -> str:
    """A perplexity in few digits, however large."""
    return "-" if x is None else (f"{x:,.2f}" if x < 1e6 else f"{x:.1e}")

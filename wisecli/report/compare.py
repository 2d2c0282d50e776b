"""Results side by side: whether they may be compared, one table, and that table as Markdown, HTML, PNG or JSON.

Figures of different protocols, datasets, bases or metrics say nothing about one another. `compare_results` refuses them
and names every difference; told to go on anyway, it carries the differences along and every file it writes says them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wisecli.errors import InputError, UsageError
from wisecli.report.results import (
    METRICS,
    SCORES,
    SHORT,
    Results,
    base_alone,
    base_name,
    dataset_name,
    full_name,
    metrics_of,
    score,
)

FORMATS = (".md", ".html", ".png")


@dataclass(frozen=True)
class Entry:
    """One result in a comparison: its name and its scores by name and metric.

    A base that was evaluated alone enters with what it answers untouched.
    """

    name: str
    source: str
    scores: Mapping[str, Mapping[str, Mapping[str, Any]]]

    @property
    def file(self) -> str:
        return Path(self.source).name

    def value(self, score_name: str, metric: str) -> float | None:
        return self.scores[score_name][metric]["value"]

    def average(self, metric: str) -> float | None:
        """Mean of Rel, Gen and Loc; None where one of them was not measured."""
        values = [self.value(name, metric) for name in ("rel", "gen", "loc")]
        known = [v for v in values if v is not None]
        return sum(known) / len(known) if len(known) == len(values) else None


@dataclass(frozen=True)
class Comparison:
    """Results side by side under one metric.

    Args:
        entries: in the order given.
        metric: exact, token or match.
        differences: what should be the same in all and is not, one sentence each.
        setting: dataset, base and protocol in a sentence, of the first result.
        definition: what the metric means.
    """

    entries: Sequence[Entry]
    metric: str
    differences: Sequence[str]
    setting: str
    definition: str

    @property
    def names(self) -> list[str]:
        """Scores that any result has, in reading order."""
        return [n for n in SCORES if any(e.value(n, self.metric) is not None for e in self.entries)]

    @property
    def columns(self) -> list[str]:
        return ["method", *(SHORT[n] for n in self.names), "mean"]

    def to_json(self) -> dict[str, Any]:
        return {
            "metric": self.metric,
            "definition": self.definition,
            "setting": self.setting,
            "differences": list(self.differences),
            "results": [
                {
                    "name": e.name,
                    "source": e.source,
                    "scores": e.scores,
                    "average": {m: e.average(m) for m in METRICS},
                }
                for e in self.entries
            ],
        }


def compare_results(
    results: Sequence[Results],
    sources: Sequence[str],
    *,
    names: Sequence[str] | None = None,
    metric: str = "exact",
    anyway: bool = False,
) -> Comparison:
    """Put results side by side.

    Args:
        results: checked by `read_results`, two or more.
        sources: the file each came from.
        names: what to call them; their methods otherwise, with the file's stem where two are the same.
        metric: exact, token or match.
        anyway: go on where they should not be compared, and carry the differences along.

    Raises:
        InputError: they differ in what must be the same, or one has no figure of that metric.
        UsageError: fewer than two, an unknown metric, or names that do not fit.
    """
    if len(results) < 2:
        raise UsageError("One result cannot be compared.", hint="Give two or more, or use wise report.")
    if metric not in METRICS:
        raise UsageError(f'"{metric}" is no metric.', hint=f"Use one of: {', '.join(METRICS)}.")
    named = _names(results, sources, names)
    for r, source in zip(results, sources, strict=True):
        if metric not in metrics_of(r):
            raise InputError(f"{source} has no {metric} scores.", hint=f"It has: {', '.join(metrics_of(r)) or 'none'}.")
    found = differences(results, named if names is not None else _files(sources), metric)
    if found and not anyway:
        raise InputError(
            "These results cannot be compared: they differ in more than the method.",
            hint="Make them alike with wise eval, or compare them nevertheless with --anyway.",
            problems=found,
        )
    entries = [Entry(n, s, _scores(r)) for n, s, r in zip(named, sources, results, strict=True)]
    return Comparison(entries, metric, found, _setting(results[0]), full_name(results[0], metric))


# -- may they be compared ---------------------------------------------------------------------------------------------


def differences(results: Sequence[Results], names: Sequence[str], metric: str = "exact") -> list[str]:
    """What must be the same and is not: each of the others against the first, both values named."""
    found = []
    for other, name in zip(results[1:], names[1:], strict=True):
        for what, a, b in _compared(results[0], other, metric):
            if a != b:
                found.append(f"{what}: {_shown(a)} ({names[0]}) and {_shown(b)} ({name})")
    return found


def _compared(a: Results, b: Results, metric: str) -> Iterator[tuple[str, Any, Any]]:
    for part, key, what in (
        ("protocol", "name", "protocol"),
        ("protocol", "t", "protocol, T"),
        ("dataset", "edits", "number of edits"),
    ):
        yield what, (a.get(part) or {}).get(key), (b.get(part) or {}).get(key)
    yield "prompts", _rendered(a), _rendered(b)
    for part in ("dataset", "base"):
        yield part, *_identities(a.get(part) or {}, b.get(part) or {})
    yield f"metric {metric}", full_name(a, metric), full_name(b, metric)


def _rendered(results: Results) -> str | None:
    """How prompts were put to the base; None where the results do not say."""
    chat = results.get("chat")
    return None if chat is None else "in the base's chat template" if chat else "as they are"


def _identities(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """What tells two datasets or bases apart: their digests, or their names where neither has a digest."""
    key = "digest" if a.get("digest") or b.get("digest") else "name"
    if a.get(key) == b.get(key):
        return "", ""
    return _identity(a), _identity(b)


def _identity(record: Mapping[str, Any]) -> str:
    name = record.get("name") or "unnamed"
    return f"{name}, digest {str(record['digest'])[:12]}" if record.get("digest") else f"{name}, no digest"


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


# -- what is compared -------------------------------------------------------------------------------------------------


def _names(results: Sequence[Results], sources: Sequence[str], given: Sequence[str] | None) -> list[str]:
    """Distinct names."""
    if given is not None:
        if len(given) != len(results) or len(set(given)) != len(given) or not all(given):
            raise UsageError(
                f"{len(given)} names for {len(results)} results: {', '.join(given)}.",
                hint="Give each result one name of its own, separated by commas.",
            )
        return list(given)
    names = [_method(r) for r in results]
    for make in (lambda s: Path(s).stem, str):  # a stem may be the same in two folders; the path is not
        if len(set(names)) < len(names):
            twice = {n for n in names if names.count(n) > 1}
            longer = [f"{_method(r)} ({make(s)})" for r, s in zip(results, sources, strict=True)]
            names = [new if n in twice else n for n, new in zip(names, longer, strict=True)]
    return [n if names.count(n) == 1 else f"{n}, {i + 1}" for i, n in enumerate(names)]


def _files(sources: Sequence[str]) -> list[str]:
    """File names, or whole paths where two files have the same name."""
    files = [Path(s).name for s in sources]
    return files if len(set(files)) == len(files) else list(sources)


def _method(results: Results) -> str:
    return str(results.get("method") or ("base alone" if base_alone(results) else "unnamed"))


def _scores(results: Results) -> dict[str, dict[str, dict[str, Any]]]:
    when = "before" if base_alone(results) else "after"
    out: dict[str, dict[str, dict[str, Any]]] = {}
    for name in SCORES:
        out[name] = {}
        for metric in METRICS:
            s = score(results, name, metric)
            out[name][metric] = {
                "value": s.get(when),
                "interval": s.get(f"{when}_interval"),
                "before": s.get("before"),
                "n": s.get("n") or 0,
            }
    return out


def _setting(results: Results) -> str:
    data = results.get("dataset") or {}
    edits = f", {data['edits']:,} edits" if data.get("edits") is not None else ""
    protocol = results.get("protocol") or {}
    groups = f" with T = {_shown(protocol['t'])}" if protocol.get("t") else ""
    return (
        f"Dataset {dataset_name(results) or 'unnamed'}{edits}; base {base_name(results) or 'unnamed'}; "
        f"protocol {protocol.get('name') or 'unnamed'}{groups}."
    )


# -- writing ----------------------------------------------------------------------------------------------------------


def rows(comparison: Comparison) -> list[list[tuple[str, str]]]:
    """The table: of each result its name with its file, its scores with their intervals, and their mean."""
    from wisecli.report.view import figure, interval

    table = []
    for entry in comparison.entries:
        row = [(entry.name, entry.file)]
        for name in comparison.names:
            s = entry.scores[name][comparison.metric]
            row.append((figure(s["value"]), interval(s["interval"])))
        table.append([*row, (figure(entry.average(comparison.metric)), "")])
    return table


def to_markdown(comparison: Comparison) -> str:
    """The table as Markdown, with its setting, the metric and, where there are any, the differences."""
    lines = [comparison.setting, ""]
    if comparison.differences:
        lines += ["**These results differ in more than the method:**", ""]
        lines += [*(f"- {_escaped(d)}" for d in comparison.differences), ""]
    lines.append(_row(comparison.columns))
    lines.append(_row(["---", *["---:"] * (len(comparison.columns) - 1)]))
    for (name, file), *figures in rows(comparison):
        lines.append(_row([f"{_escaped(name)} ({_escaped(file)})", *(f"{t} [{i}]" if i else t for t, i in figures)]))
    lines += ["", f"{_heading(comparison)} In brackets: 95 % bootstrap intervals. Mean: of Rel, Gen and Loc."]
    return "\n".join(lines) + "\n"


def _heading(comparison: Comparison) -> str:
    if comparison.definition == comparison.metric:
        return f"Metric: {comparison.metric}."
    return f"Metric: {comparison.metric}: {comparison.definition}."


def _row(texts: Sequence[str]) -> str:
    return f"| {' | '.join(texts)} |"


def _escaped(text: str) -> str:
    """Text that neither ends a cell nor a line, nor starts an HTML element."""
    flat = " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|")
    return flat.replace("&", "&amp;").replace("<", "&lt;").replace("*", "\\*").replace("`", "\\`")


def check_format(path: Path) -> None:
    """Refuse a file name from which no format can be told, before any work is spent.

    Raises:
        UsageError: no known suffix.
    """
    if path.suffix.lower() not in FORMATS:
        raise UsageError(f"{path} has no known suffix.", hint=f"Use one of: {', '.join(FORMATS)}.")


def write_comparison(comparison: Comparison, path: Path) -> Path:
    """Write Markdown, one HTML page, or a PNG, by the path's suffix; returns the path.

    Raises:
        UsageError: another suffix.
        OutputError: the path cannot be written.
    """
    from wisecli.memory.files import write_bytes

    check_format(path)
    suffix = path.suffix.lower()
    if suffix == ".md":
        write_bytes(path, to_markdown(comparison).encode())
    elif suffix == ".html":
        write_bytes(path, to_html(comparison).encode())
    else:
        from wisecli.report.compare_plots import png

        write_bytes(path, png(comparison))
    return path


def to_html(comparison: Comparison) -> str:
    """One page with the table and the plots; it needs nothing else."""
    from wisecli.report.compare_plots import pictures
    from wisecli.report.page import render
    from wisecli.report.view import Cell, Table

    cells = [tuple(Cell(text, sub) for text, sub in row) for row in rows(comparison)]
    note = f"{_heading(comparison)} Beneath a figure: its 95 % bootstrap interval. Mean: of Rel, Gen and Loc."
    return render(
        "compare.html.j2",
        title="Results side by side",
        setting=comparison.setting,
        differences=comparison.differences,
        scores=Table(comparison.columns, cells, note=note),
        pictures=pictures(comparison),
    )

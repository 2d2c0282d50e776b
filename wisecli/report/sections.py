"""The sections of a report, each from its part of the results and left out where that part is missing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from wisecli.report.folds import failure_section
from wisecli.report.plots import PLOTS, svg, wilke_series
from wisecli.report.results import (
    KINDS,
    SCORES,
    SHORT,
    Results,
    asked,
    base_alone,
    full_name,
    metrics_of,
    score,
)
from wisecli.report.view import (
    DASH,
    Cell,
    Facts,
    Picture,
    Section,
    Table,
    cells,
    facts_of,
    figure,
    number,
    scored,
    seconds,
    size,
)


def sections(results: Results) -> list[Section]:
    """Every section there is data for, in reading order."""
    made = (build(results) for build in _BUILDERS)
    return [s for s in made if s is not None]


def _pictures(results: Results, *names: str) -> list[Picture]:
    return [Picture(Markup(svg(p, results)), p.caption(results)) for p in PLOTS if p.name in names and p.has(results)]


# -- scores -----------------------------------------------------------------------------------------------------------


def _scores(results: Results) -> Section:
    section = Section("scores", "Scores", blocks=list(_pictures(results, "scores")))
    sides, metrics = _sides(results), metrics_of(results)
    rows: list[tuple[Cell, ...]] = []
    for name in asked(results):
        known = [m for m in metrics if score(results, name, m).get("n")]
        rows += [_score_row(SCORES[name] if m == known[0] else "", m, score(results, name, m), sides) for m in known]
    average = results.get("average") or {}
    known = [m for m in metrics if (average.get(m) or {}).get("before") is not None]
    rows += [_score_row("Mean of Rel, Gen, Loc" if m == known[0] else "", m, average[m], sides) for m in known]
    note = "Before: the untouched base. After: the edited model. " if len(sides) > 1 else ""
    note += "Beneath a figure: its 95 % bootstrap interval."
    columns = ["score", "metric", *sides.values(), "prompts"]
    section.blocks.append(Table(columns, rows, "All scores", left=2, grouped=True, note=note))
    defined = [(m, full_name(results, m)) for m in metrics if full_name(results, m) != m]
    if defined:
        section.blocks.append(Facts(defined, "What the metrics mean"))
    return section


def _score_row(title: str, metric: str, s: Mapping[str, Any], sides: Mapping[str, str]) -> tuple[Cell, ...]:
    return cells([title, metric, *(scored(s, side) for side in sides), _count(s.get("n"))])


def _sides(results: Results) -> dict[str, str]:
    """Keys of what was measured, with the heads of their columns."""
    return {"before": "base"} if base_alone(results) else {"before": "before", "after": "after"}


def _count(value: int | None) -> str:
    return DASH if value is None else f"{value:,}"


# -- routing ----------------------------------------------------------------------------------------------------------


def _routing(results: Results) -> Section | None:
    routing = results.get("routing")
    if not routing:
        return None
    section = Section("routing", "Routing", "Which prompts the gate let into the side memory, and which it kept out.")
    section.blocks += _pictures(results, "indicator", "roc")
    rows = [
        cells([KINDS.get(kind, kind), _count(k.get("n")), figure(k.get("routed")), figure(k.get("right_edit"))])
        for kind, k in _in_order(routing.get("kinds") or {}, KINDS)
        if k and k.get("n")
    ]
    if rows:
        note = "Routed: share let in. Right edit: share of which the nearest key is that of the edit asked for."
        section.blocks.append(
            Table(["prompts", "number", "routed", "right edit"], rows, "By kind of prompt", note=note)
        )
    section.blocks.append(Facts(_gate_facts(routing), "The gate"))
    if results.get("open"):
        section.blocks.append(_open(results))
    auc = {k: v for k, v in _in_order(routing.get("auc") or {}, KINDS) if v and any(v.get(n) is not None for n in v)}
    if auc:
        rows = [
            cells([KINDS.get(k, k), figure(v.get("unrelated"), 4), figure(v.get("near"), 4)]) for k, v in auc.items()
        ]
        note = "Chance that the indicator of the one is higher than that of the other; 0.5 is guessing."
        section.blocks.append(
            Table(["AUC of", "against unrelated", "against near"], rows, "Area under the ROC", note=note)
        )
    return section


def _gate_facts(routing: Mapping[str, Any]) -> list[tuple[str, str]]:
    epsilons = [number(e) for e in routing.get("epsilon") or []]
    pairs = [
        ("router", str(routing.get("router") or DASH)),
        ("threshold ε", ", ".join(epsilons) or DASH),
        ("precision", f"{figure(routing.get('precision'))} of what was let in belongs to an edit"),
        ("recall", f"{figure(routing.get('recall'))} of what belongs to an edit was let in"),
        ("false openings", f"{figure(routing.get('false_opening'))} of what belongs to none was let in"),
    ]
    return [(name, text) for name, text in pairs if not text.startswith(DASH)]


def _open(results: Results) -> Table:
    rows = [
        cells([SCORES[name], scored(score(results, name), "after"), figure(value)])
        for name, value in _in_order(results["open"], SCORES)
        if value is not None
    ]
    note = "What the side memory answers when nothing is kept out: Gen shows what the gate costs, Loc what it protects."
    return Table(["exact score", "with the gate", "always open"], rows, "With the gate always open", note=note)


# -- over the stream --------------------------------------------------------------------------------------------------


def _stream(results: Results) -> Section | None:
    points, fresh = results.get("retention"), (results.get("fresh") or {}).get("scores")
    if not points and not fresh:
        return None
    section = Section("stream", "Over the stream", "How much of what was learned early is still there at the end.")
    section.blocks += _pictures(results, "retention", "fresh")
    if points:
        names = [n for n in SCORES if any((p.get("scores") or {}).get(n) is not None for p in points)]
        rows = [
            cells([_count(p.get("edits")), *(figure((p.get("scores") or {}).get(n)) for n in names)]) for p in points
        ]
        columns = ["edits learned", *(SHORT[n] for n in names)]
        section.blocks.append(Table(columns, rows, "Retention, exact", note="Everything learned so far asked again."))
    if fresh:
        rows = []
        for name in asked(results):
            early = {m: (fresh.get(name) or {}).get(m) or {} for m in metrics_of(results)}
            known = [m for m in early if early[m].get("after") is not None]
            for m in known:
                title, end = SCORES[name] if m == known[0] else "", score(results, name, m)
                rows.append(cells([title, m, scored(early[m], "after"), scored(end, "after")]))
        columns, title = ["score", "metric", "fresh", "end of stream"], "Fresh against end of stream"
        note = "Fresh: asked right after the edit was learned."
        section.blocks.append(Table(columns, rows, title, left=2, grouped=True, note=note))
    return section


def _rollbacks(results: Results) -> Section | None:
    entries = results.get("rollbacks")
    if not entries:
        return None
    names = [n for n in SCORES if any(_exact(e, n).get("n") for e in entries)]
    rows = [
        cells(
            [
                _count(e.get("t")),
                _count(e.get("groups")),
                *(scored(_exact(e, n), "after") for n in names),
                _yes(e.get("identical")),
            ]
        )
        for e in entries
    ]
    columns = ["T", "sequences", *(SHORT[n] for n in names), "base unchanged"]
    note = "Exact scores. Base unchanged: the same logits, bit for bit, after every rollback as before the first edit."
    lead = "The stream cut into sequences of T edits, each learned from the untouched base, asked, and rolled back."
    return Section("rollbacks", "Rollbacks", lead, [Table(columns, rows, note=note)])


def _yes(value: bool | None) -> str:
    return DASH if value is None else "yes" if value else "no"


def _exact(entry: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    return ((entry.get("scores") or {}).get(name) or {}).get("exact") or {}


_WILKE = {
    "es": "ES, effectiveness",
    "gs": "GS, generality",
    "ls": "LS, locality",
    "ers": "ERS, edit retention",
    "ors": "ORS, original retention",
    "s": "S, harmonic mean",
}


def _wilke(results: Results) -> Section | None:
    wilke = results.get("wilke")
    if not wilke:
        return None
    lead = "Each edit is asked and then taken back by a second edit to the original answer."
    section = Section("wilke", "WilKE protocol", lead, list(_pictures(results, "wilke")))
    steps = wilke.get("checkpoints") or []
    series = {k: values for k in _WILKE if (values := wilke_series(results, k))}
    if series:
        rows = [cells([_count(t), *(figure(v[i]) for v in series.values())]) for i, t in enumerate(steps)]
        section.blocks.append(Table(["edits learned", *(k.upper() for k in series)], rows, "At each checkpoint"))
    free = wilke.get("exact") or {}
    rows = [cells([text, figure(_last(wilke.get(k))), figure(_last(free.get(k)))]) for k, text in _WILKE.items()]
    section.blocks.append(Table(["at the end", "all tokens forced", "exact"], rows))
    counts = {"edited": "edited", "known": "known to the base", "left_out": "left out, unknown to the base"}
    facts = [(text, _count(wilke[k])) for k, text in counts.items() if wilke.get(k) is not None]
    section.blocks += [Facts(facts, "Records")] if facts else []
    return section


def _last(value: Any) -> float | None:
    """A figure, or the last of a series."""
    if isinstance(value, list):
        return value[-1] if value else None
    return None if value is None else float(value)


# -- other measures ---------------------------------------------------------------------------------------------------


def _perplexity(results: Results) -> Section | None:
    entries = {n: p for n, p in _in_order(results.get("perplexity") or {}, SCORES) if p and p.get("n")}
    if not entries:
        return None
    rows = []
    for name, p in entries.items():
        for i, kind in enumerate(("median", "mean", "clipped")):
            values = [number((p.get(side) or {}).get(kind)) for side in _sides(results)]
            rows.append(cells([SCORES.get(name, name) if i == 0 else "", kind, *values, _count(p["n"])]))
    note = "Of the target's tokens given the prompt. Clipped: the mean with each value cut at 100."
    columns = ["prompts of", "", *_sides(results).values(), "number"]
    return Section(
        "perplexity", "Perplexity of the targets", blocks=[Table(columns, rows, left=2, grouped=True, note=note)]
    )


_PROBABILITIES = {
    "es": "efficacy, ES",
    "ps": "paraphrase, PS",
    "ns": "neighbourhood, NS",
    "score": "score, S",
}


def _probability(results: Results) -> Section | None:
    lead = "CounterFact's comparisons: is the new answer more probable than the true one (ES, PS), and does the true "
    lead += "one stay more probable on neighbouring prompts (NS)."
    return _measured(results, "probability", "Probability comparisons", lead, _PROBABILITIES)


def _ood(results: Results) -> Section | None:
    lead = full_name(results, "ood")
    lead = f"Texts from another distribution: {lead}." if lead != "ood" else "Texts from another distribution."
    return _measured(results, "ood", "Out of distribution", lead, {"token": "token", "example": "example"})


def _measured(results: Results, part: str, title: str, lead: str, names: Mapping[str, str]) -> Section | None:
    """A table of score records; None where none was measured."""
    found = {k: s for k in names if (s := (results.get(part) or {}).get(k)) and s.get("n")}
    if not found:
        return None
    sides = _sides(results)
    rows = [cells([names[k], *(scored(s, side) for side in sides), _count(s["n"])]) for k, s in found.items()]
    return Section(part, title, lead, [Table(["", *sides.values(), "number"], rows)])


def _ability(results: Results) -> Section | None:
    ability, harness = results.get("ability"), results.get("harness") or {}
    if not ability and not harness.get("tasks"):
        return None
    section = Section("ability", "General ability", "Text and tasks that no edit is about.")
    sides, edited = _sides(results), not base_alone(results)
    if ability:
        ppl = ability.get("perplexity") or {}
        text = f"{ability.get('text') or 'unnamed'}, {_count(ability.get('passages'))} passages"
        pairs = [
            ("text", f"{text}, {_count(ability.get('tokens'))} tokens scored"),
            ("perplexity", ", ".join(f"{number(ppl.get(side))}{f' {head}' * edited}" for side, head in sides.items())),
        ]
        if edited:
            pairs.append(("same next token as the base", figure(ability.get("agreement"), 4)))
        if ability.get("routed") is not None:
            pairs.append(("passages let in by the gate", figure(ability["routed"], 4)))
        section.blocks.append(Facts(pairs, "Continuing plain text"))
    if harness.get("tasks"):
        section.blocks.append(_tasks(harness, sides))
    return section


def _tasks(harness: Mapping[str, Any], sides: Mapping[str, str]) -> Table:
    rows = []
    for task, metrics in harness["tasks"].items():
        samples, routed = ((harness.get(k) or {}).get(task) for k in ("samples", "routed"))
        for i, (metric, v) in enumerate((metrics or {}).items()):
            values = [number((v or {}).get(side)) for side in sides]
            about = [_count(samples), figure(routed)] if i == 0 else ["", ""]
            rows.append(cells([task if i == 0 else "", metric, *values, *about]))
    columns = ["task", "metric", *sides.values(), "samples", "routed"]
    note = f"lm_eval {harness['lm_eval']}." if harness.get("lm_eval") else ""
    note += f" At most {harness['limit']} samples of each task." if harness.get("limit") else ""
    return Table(columns, rows, "lm-evaluation-harness", left=2, grouped=True, note=note.strip())


# -- how it was made --------------------------------------------------------------------------------------------------


def _making(results: Results) -> Section | None:
    section = Section("making", "How this was made")
    memory = results.get("side_memory") or {}
    groups = [
        ("Protocol", facts_of(results.get("protocol")) + _prompts(results)),
        ("Dataset", facts_of(results.get("dataset"))),
        ("Base", facts_of(results.get("base"))),
        ("Side memory", facts_of({k: v for k, v in memory.items() if k not in ("config", "versions", "memories")})),
        ("Editing config", facts_of(memory.get("config") or results.get("config"))),
        ("Versions it was learned with", facts_of(memory.get("versions"))),
        *((f"Memory {i}", facts_of(m)) for i, m in enumerate(memory.get("memories") or [])),
        ("Environment", facts_of(results.get("environment"))),
        ("Seeds", facts_of(results.get("seeds"))),
        ("Time", [(k.replace("_", " "), _took(k, v)) for k, v in _known(results.get("timings"))]),
        ("Peak memory", [(k.removesuffix("_bytes"), size(v)) for k, v in _known(results.get("peak_memory"))]),
    ]
    section.blocks += [Facts(pairs, title) for title, pairs in groups if pairs]
    return section if section.blocks else None


def _prompts(results: Results) -> list[tuple[str, str]]:
    chat = results.get("chat")
    return [] if chat is None else [("prompts", "in the base's chat template" if chat else "as they are")]


def _took(name: str, value: float) -> str:
    """Everything among the timings is seconds but the number of prompts."""
    return f"{value:,.0f}" if name == "prompts" else seconds(value)


def _known(record: Mapping[str, Any] | None) -> list[tuple[str, Any]]:
    return [(k, v) for k, v in (record or {}).items() if v is not None]


def _in_order(record: Mapping[str, Any], order: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Entries in reading order, unknown ones last."""
    known = [(k, record[k]) for k in order if k in record]
    return known + [(k, v) for k, v in record.items() if k not in order]


_BUILDERS: Sequence[Callable[[Results], Section | None]] = (
    _scores,
    _routing,
    _stream,
    _rollbacks,
    _wilke,
    _perplexity,
    _probability,
    _ood,
    _ability,
    failure_section,
    _making,
)

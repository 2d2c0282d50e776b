"""The report of one evaluation as one HTML file that needs nothing else: no scripts, no fonts, no pictures beside it.

Plots stand in the page as SVG. Every text of the results is escaped. The same results give the same bytes. What the
page says is filled in `sections`; how it looks is in the templates.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from wisecli.report.canvas import VARIABLES
from wisecli.report.results import (
    PROMPTS,
    SCORES,
    Results,
    asked,
    base_alone,
    base_name,
    dataset_name,
    full_name,
    score,
)
from wisecli.report.sections import sections
from wisecli.report.view import Tile, figure, interval


def write_report(results: Results, path: Path) -> Path:
    """Write the page; returns its path.

    Args:
        results: checked by `read_results` or `check_results`.

    Raises:
        OutputError: the path cannot be written.
    """
    from wisecli.memory.files import write_bytes

    write_bytes(path, render_report(results).encode())
    return path


def render_report(results: Results) -> str:
    """The page as HTML."""
    return render(
        "page.html.j2",
        title=_title(results),
        summary=summary(results),
        protocol=sentence((results.get("protocol") or {}).get("text") or ""),
        tiles=tiles(results),
        exact=full_name(results, "exact"),
        sections=sections(results),
    )


def render(template: str, **values: Any) -> str:
    """A template of this package, everything escaped that is no SVG of ours."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("wisecli", "report")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals["colours"] = {name: colour for colour, name in VARIABLES.items()}
    return environment.get_template(template).render(**values)


def tiles(results: Results) -> list[Tile]:
    """The headline figures: exact scores, after where there is an after."""
    made = []
    alone = base_alone(results)
    for name in asked(results):
        s = score(results, name)
        limits = interval(s.get("before_interval" if alone else "after_interval"))
        lines = [f"95 % interval {limits}"] if limits else []
        lines += [] if alone else [f"before {figure(s.get('before'))}"]
        lines.append(f"{s['n']:,} {PROMPTS[name]}")
        value = figure(s.get("before" if alone else "after"))
        made.append(Tile(SCORES[name], value, lines, name.replace("_", "-")))
    return made


def summary(results: Results) -> str:
    """What was evaluated, in a sentence."""
    data, base = results.get("dataset") or {}, results.get("base") or {}
    edits = f"{data['edits']:,} edits" if data.get("edits") is not None else "edits"
    about = [str(base[k]) for k in ("model_type",) if base.get(k)]
    if base.get("parameters"):
        about.append(f"{_millions(base['parameters'])} parameters")
    about += [str(base[k]) for k in ("dtype", "device") if base.get(k)]
    text = f"{method(results)}, on {edits} of {dataset_name(results) or 'an unnamed dataset'}; "
    text += f"base {base_name(results) or 'unnamed'}"
    text += f" ({', '.join(about)})" if about else ""
    protocol = (results.get("protocol") or {}).get("name")
    text += f"; protocol: {protocol}." if protocol else "."
    left_out = data.get("superseded") or 0
    if left_out:
        many = f"{left_out:,} edits are contradicted by later ones and were not scored."
        text += f" {many}" if left_out > 1 else " 1 edit is contradicted by a later one and was not scored."
    return text


def sentence(text: str) -> str:
    """A clause as a sentence."""
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") or not text else ".")


def method(results: Results) -> str:
    """The method's name; the base alone has none."""
    return str(results.get("method") or ("The base alone" if base_alone(results) else "An unnamed method"))


def _title(results: Results) -> str:
    return f"Evaluation of {dataset_name(results) or 'edits'} on {base_name(results) or 'a base'}"


def _millions(parameters: float) -> str:
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if parameters >= limit:
            return f"{parameters / limit:.3g} {unit}"
    return f"{parameters:.0f}"

"""`wise compare`: results of several evaluations side by side."""

from __future__ import annotations

from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Annotated

import typer

from wisecli.cli import _options as opt
from wisecli.cli._output import Output

if TYPE_CHECKING:
    from wisecli.report.compare import Comparison


def compare(
    results: Annotated[
        list[Path],
        typer.Argument(metavar="RESULTS...", help="results.json files, or folders, that wise eval --out wrote."),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Also write a .md, .html or .png file, by its suffix.")
    ] = None,
    names: Annotated[
        str | None, typer.Option("--names", metavar="A,B", help="What to call them. Default: their methods.")
    ] = None,
    metric: Annotated[str, typer.Option("--metric", help="exact, token or match.")] = "exact",
    anyway: Annotated[
        bool, typer.Option("--anyway", help="Compare although protocol, dataset, base or metrics differ.")
    ] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="The table as Markdown on stdout.")] = False,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Put results side by side. Results of other protocols, datasets, bases or metrics are refused.

    Example: wise compare wise.json rome.json -o compare.html
    """
    sink = Output(json, quiet)
    with sink.running():
        from wisecli.errors import OutputError, UsageError
        from wisecli.memory.files import ensure_writable
        from wisecli.report.compare import check_format, compare_results, to_markdown, write_comparison
        from wisecli.report.results import read_results

        if json and markdown:
            raise UsageError("--json and --markdown both want stdout.", hint="Give one of them, or -o FILE.md.")
        if out is not None:
            check_format(out)
            if out.resolve() in [r.resolve() for r in results]:
                raise OutputError(f"{out} is one of the results.", hint="Choose another place with --out.")
        given = [n.strip() for n in names.split(",")] if names is not None else None
        documents = [read_results(path) for path in results]
        comparison = compare_results(documents, [str(p) for p in results], names=given, metric=metric, anyway=anyway)
        if comparison.differences:
            sink.warn("these results differ in more than the method: " + "; ".join(comparison.differences))
        if markdown:
            sink.line(to_markdown(comparison).rstrip("\n"))
        else:
            _show(sink, comparison)
        if out is not None:
            ensure_writable(out.parent)
            write_comparison(comparison, out)
            if not markdown:
                sink.line(f"Wrote {out}.")
        sink.result(comparison.to_json() | {"out": str(out) if out else None}, str(out) if out else None)


def _show(sink: Output, comparison: Comparison) -> None:
    from wisecli.report.compare import rows

    sink.line(comparison.setting)
    width = max(12, sink.out.width - 14 * (len(comparison.columns) - 2) - 12)  # what scores and their mean leave
    table = []
    for (name, _), *figures in rows(comparison):
        table.append(["\n".join(wrap(name, width)), *(f"{text}\n{limits}".strip() for text, limits in figures)])
    sink.table(f"{comparison.metric}, with 95 % intervals", comparison.columns, table)

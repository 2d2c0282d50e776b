"""`wise report`: one page of what `wise eval` found."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from wisecli.cli import _options as opt
from wisecli.cli._output import Output


def report(
    results: Annotated[
        Path, typer.Argument(metavar="RESULTS", help="results.json, or the folder, that wise eval --out wrote.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="HTML file to write.")] = Path("report.html"),
    png: Annotated[
        Path | None, typer.Option("--png", metavar="FOLDER", help="Also write each plot there as a PNG.")
    ] = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Show an evaluation as one HTML file: scores with intervals, routing, plots, and every failure with its text.

    The file needs nothing else: no scripts, no fonts, no network.

    Example: wise report eval -o report.html
    """
    sink = Output(json, quiet)
    with sink.running():
        from wisecli.errors import OutputError
        from wisecli.memory.files import ensure_writable
        from wisecli.report.failures import failures
        from wisecli.report.results import base_alone, read_results

        document = read_results(results)
        if out.resolve() == results.resolve():
            raise OutputError(f"{out} is the results file itself.", hint="Choose another place with --out.")
        ensure_writable(out.parent)
        from wisecli.report.page import write_report
        from wisecli.report.plots import write_plots

        write_report(document, out)
        plots = write_plots(document, png) if png is not None else []
        groups = {} if base_alone(document) else {g.name: len(g.items) for g in failures(document)}
        _show(sink, out, plots, groups)
        made: dict[str, Any] = {"report": str(out), "plots": [str(p) for p in plots], "failures": groups}
        sink.result(made, str(out))


def _show(sink: Output, out: Path, plots: list[Path], groups: dict[str, int]) -> None:
    if groups:
        sink.table("Failures", ("kind", "prompts"), [(name, str(n)) for name, n in groups.items()])
    if plots:
        sink.line(f"Wrote {', '.join(str(p) for p in plots)}.")
    sink.line(f"Wrote {out}.")

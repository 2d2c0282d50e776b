"""`wise package`: make a folder ready for a hub of a side memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from wisecli.cli import _options as opt
from wisecli.cli._output import Output, figure
from wisecli.errors import UsageError

if TYPE_CHECKING:
    from wisecli.hub import Pushed
    from wisecli.memory.side_memory import SideMemory
    from wisecli.models.base import Base
    from wisecli.packaging import Measured, PackageReport


@opt.loads_base
def package(
    side_memory: Annotated[Path, typer.Argument(metavar="SIDE_MEMORY", help="File written by wise merge.")] = Path(
        "sm.safetensors"
    ),
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")] = Path("package"),
    ledger: Annotated[
        bool, typer.Option("--ledger/--no-ledger", help="Ship the edits' prompts and targets; ids alone otherwise.")
    ] = True,
    evaluation: Annotated[
        Path | None,
        typer.Option(
            "--eval",
            metavar="FILE",
            help="results.json, or the folder, that wise eval --out wrote: for the model card.",
        ),
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help="Load the base and ask every edit again, for the card.")
    ] = True,
    licence: Annotated[str | None, typer.Option("--license", help="Licence id for the card, such as mit.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing package.")] = False,
    push: Annotated[
        str | None, typer.Option("--push", metavar="REPO", help="Upload it to the hub: ORG/NAME or ORG/NAME@BRANCH.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a private repository, with --push.")] = False,
    loading: opt.Loading = opt.Loading(),
    json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Package a side memory for shipping, apart from the base: weights, manifest, ledger and model card.

    Example: wise package sm.safetensors -o package
    """
    sink = Output(json, quiet)
    with sink.running():
        if private and push is None:
            raise UsageError("--private is of no use without --push.", hint="Add --push ORG/NAME, or leave it out.")
        from wisecli import hub
        from wisecli.memory.side_memory import SideMemory
        from wisecli.packaging import check_request, package_side_memory
        from wisecli.report.results import read_document
        from wisecli.routing.attach import side_memory_file

        sm = SideMemory.load(side_memory_file(side_memory))
        results = read_document(evaluation) if evaluation is not None else None
        check_request(out, evaluation=results, licence=licence, force=force, side_memory=sm)
        if push is not None:
            hub.check_push(push, private)
        _warn(sink, sm)
        measured = None
        if measure:
            base = loading.of(sm)
            measured = _measure(sink, base, sm)
        report = package_side_memory(
            sm, out, ledger=ledger, measured=measured, evaluation=results, licence=licence, force=force
        )
        _show(sink, report)
        pushed = hub.push(out, push, private=private) if push is not None else None
        _next(sink, report, pushed)
        sink.result({**report.to_json(), "pushed": pushed.to_json() if pushed else None}, str(out))


def _warn(sink: Output, sm: SideMemory) -> None:
    from wisecli.card import Origin

    if Origin.of(sm) is Origin.FOLDER:
        sink.warn(
            f"the base is the local folder {sm.base.get('name')}: its path is in the package, and whoever uses it "
            "elsewhere gives that base with --model"
        )


def _measure(sink: Output, base: Base, sm: SideMemory) -> Measured:
    from wisecli.packaging import measure

    with sink.progress() as bar:
        task = bar.add_task("measuring", total=None)
        return measure(base, sm, lambda done, total: bar.update(task, completed=done, total=total))


def _show(sink: Output, report: PackageReport) -> None:
    rows = [(f.name, f"{f.size:,}", f.sha256[:12]) for f in report.files]
    sink.table(str(report.out), ("file", "bytes", "sha256"), rows)
    facts = [("edits", ", ".join(f"{n} {outcome}" for outcome, n in report.edits.items()))]
    facts.append(("texts", "prompts and targets are inside" if report.texts else "left out"))
    m = report.measured
    if m is None:
        facts.append(("measured", "nothing"))
    else:
        facts.append(("base", f"{m.base} ({m.dtype})"))
        asked = f"{figure(m.reliability)} exact, {figure(m.routed)} routed, {m.edits} edits"
        facts.append(("reliability", m.reason or asked))
        facts.append(("gate", f"opens for {figure(m.opened)} of {m.ordinary} ordinary prompts"))
    sink.facts(facts)


def _next(sink: Output, report: PackageReport, pushed: Pushed | None) -> None:
    if pushed is None:
        sink.line(f"Wrote {report.out}. Next:", command=f"wise chat --side-memory {report.out}")
        return
    sink.line(f"Pushed {report.out} to {pushed.url}, commit {pushed.commit or 'unknown'}.")
    name = f"{pushed.repo}@{pushed.commit}" if pushed.commit else pushed.repo
    sink.line("Next:", command=f"wise chat --side-memory {name}")

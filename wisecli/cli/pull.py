"""`wise pull`: fetch a package from the hub into a folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from wisecli.cli import _options as opt
from wisecli.cli._output import Output

if TYPE_CHECKING:
    from wisecli.hub import Fetched
    from wisecli.memory.side_memory import SideMemory
    from wisecli.packaging import PackagedFile


def pull(
    repo: Annotated[str, typer.Argument(metavar="REPO", help="ORG/NAME, or ORG/NAME@REVISION: branch, tag or commit.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder to write. Default: the repository's name.", show_default=False),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing package.")] = False,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Fetch a package from the hub: only a package's own files, checked against its manifest. Nothing in it is run.

    Example: wise pull org/side-memory@main -o package
    """
    sink = Output(json, quiet)
    with sink.running():
        from wisecli.hub import HubId, fetch
        from wisecli.memory.side_memory import SideMemory
        from wisecli.packaging import check_request, copy_package

        folder = out if out is not None else Path(HubId.parse(repo).repo.split("/")[1])
        check_request(folder, force=force)
        fetched = fetch(repo)
        sm = SideMemory.load(fetched.side_memory)
        files = copy_package(fetched.folder, folder, force=force)
        _show(sink, fetched, sm, folder, files)
        document = {
            "out": str(folder),
            "repo": fetched.repo,
            "commit": fetched.commit,
            "files": {f.name: {"bytes": f.size, "sha256": f.sha256} for f in files},
            "checked": list(fetched.checked),
            "base": dict(sm.base),
            "edits": len(sm.edits),
        }
        sink.result(document, str(folder))


def _show(sink: Output, fetched: Fetched, sm: SideMemory, folder: Path, files: tuple[PackagedFile, ...]) -> None:
    rows = [(f.name, f"{f.size:,}", f.sha256[:12], "yes" if f.name in fetched.checked else "-") for f in files]
    sink.table(str(folder), ("file", "bytes", "sha256", "as in manifest"), rows)
    base = str(sm.base.get("name"))
    sink.facts([("commit", fetched.label), ("base", base), ("edits", str(len(sm.edits)))])
    if not fetched.checked:
        sink.warn("this package has no manifest, so its content could not be checked")
    sink.line(f"Wrote {folder}. Next:", command=f"wise chat --side-memory {folder}")

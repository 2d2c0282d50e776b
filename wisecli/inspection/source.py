"""What is looked into: a run folder, a side memory file, or a package."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from wisecli.errors import InputError
from wisecli.memory.shard import RunFolder
from wisecli.memory.side_memory import SideMemory
from wisecli.routing.attach import side_memory_file


@dataclass(frozen=True)
class MergedSource:
    """A side memory with the file it lies in and, of a package, the folder."""

    path: Path
    file: Path
    side_memory: SideMemory

    @property
    def package(self) -> Path | None:
        return self.file.parent if self.file != self.path else None

    @property
    def kind(self) -> str:
        return "package" if self.package else "side memory"


@dataclass(frozen=True)
class RunSource:
    """A run folder."""

    path: Path
    run: RunFolder

    @property
    def kind(self) -> str:
        return "run folder"


Source = RunSource | MergedSource


def open_source(path: str | Path) -> Source:
    """Open a run folder, a side memory file, a package, or a package's hub id.

    Raises:
        InputError: it is none of these, damaged, or of a newer major format version.
    """
    path = Path(path)
    if (path / "run.json").exists():
        return RunSource(path, _checked(RunFolder.open(path)))
    return open_side_memory(path)


def open_side_memory(path: str | Path) -> MergedSource:
    """Open a side memory file, a package, or a package's hub id.

    Raises:
        InputError: it is none of these, damaged, or of a newer major format version.
    """
    path = Path(path)
    file = side_memory_file(path)
    if not file.exists():
        raise InputError(
            f"{path} does not exist.",
            hint="Give a folder written by wise edit or wise package, or a file by wise merge.",
        )
    return MergedSource(path, file, SideMemory.load(file))


def _checked(run: RunFolder) -> RunFolder:
    """A run folder whose run.json has the parts that every look at it needs."""
    try:
        _ = run.site, run.n_shards, run.superseded, dict(run.run["base"]), dict(run.run["config"])
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        what = f"lacks {e}" if isinstance(e, KeyError) else "is malformed"
        raise InputError(f"{run.path / 'run.json'} {what}.", hint="Learn the edits again with wise edit.") from e
    return run

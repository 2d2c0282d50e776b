"""Options that several commands share, spelled once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from wisecli.data.stream import EditStream
    from wisecli.editing.config import EditConfig
    from wisecli.models.base import Base

_SHARDS = 2

Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only the path of what was made.")]
Model = Annotated[
    str | None,
    typer.Option(
        "--model", "-m", metavar="BASE", help="Folder or hub id of the base. Default: the one recorded, else wise-demo."
    ),
]
Revision = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of a base on the hub.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, mps.")]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the base.")]
RouterName = Annotated[str | None, typer.Option("--router", help="key or activation; default: the side memory's own.")]
AllowOtherBase = Annotated[
    bool, typer.Option("--allow-other-base", help="Attach although the base is not the one it was learned on.")
]
SideMemoryFile = Annotated[
    Path | None,
    typer.Option("--side-memory", "-s", metavar="FILE", help="Side memory file, or a packaged folder."),
]


def base_of(
    recorded: Mapping[str, Any], model: str | None, revision: str | None, dtype: str, device: str, trust: bool
) -> Base:
    """Load the base that a run or a side memory recorded, at its revision, or the one given instead.

    Args:
        recorded: its `name` and `revision`; empty where nothing was recorded, which is the default base.
    """
    from wisecli.models.base import load_base

    name = model if model is not None else recorded.get("name")
    pinned = revision if model is not None or revision else recorded.get("revision")
    return load_base(name, revision=pinned, dtype=dtype, device=device, trust_remote_code=trust)


def edit_config(
    stream: EditStream, base: Base, *, shards: int | None, chat: bool | None = None, **settings: Any
) -> EditConfig:
    """The config of a run, with what the stream and the base decide where nothing was said.

    Args:
        shards: None for two, or one for a single edit.
        chat: None for the chat template where the base has one.
        settings: other fields of `EditConfig`.
    """
    from wisecli.editing.config import EditConfig

    return EditConfig(
        shards=shards if shards is not None else min(_SHARDS, len(stream)),
        chat=bool(getattr(base.tokenizer, "chat_template", None)) if chat is None else chat,
        **settings,
    )

"""Options that several commands share, spelled once."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

if TYPE_CHECKING:
    from wisecli.cli._output import Output
    from wisecli.data.stream import EditStream
    from wisecli.editing.config import EditConfig
    from wisecli.memory.side_memory import SideMemory
    from wisecli.models.base import Base
    from wisecli.models.prompts import PromptEncoder


Cache = Annotated[
    bool,
    typer.Option("--cache/--no-cache", help="On the CPU, keep what follows from a base and a layer for the next run."),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only the path of what was made.")]
Model = Annotated[
    str | None,
    typer.Option(
        "--model", "-m", metavar="BASE", help="Folder or hub id of the base. Default: the one recorded, else wise-demo."
    ),
]
_BASE = "Base"
Revision = Annotated[
    str | None,
    typer.Option("--revision", help="Branch, tag or commit of a base on the hub.", rich_help_panel=_BASE),
]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.", rich_help_panel=_BASE)]
Quantize = Annotated[
    str | None,
    typer.Option(
        "--quantize",
        metavar="4bit|8bit|none",
        help="Pack the base by bitsandbytes while it is loaded. Default: as recorded.",
        rich_help_panel=_BASE,
    ),
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, mps.", rich_help_panel=_BASE)]
DeviceMap = Annotated[
    str | None,
    typer.Option(
        "--device-map",
        metavar="auto",
        help="Spread the base over all devices, in place of --device.",
        rich_help_panel=_BASE,
    ),
]
OffloadLower = Annotated[
    bool,
    typer.Option(
        "--offload-lower",
        help="Keep the layers below the edited one off the device: in memory, or on disk where all runs on the CPU.",
        rich_help_panel=_BASE,
    ),
]
AllowPickle = Annotated[
    bool,
    typer.Option(
        "--allow-pickle", help="Read weights from pickles where there are no safetensors.", rich_help_panel=_BASE
    ),
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with the base.", rich_help_panel=_BASE)
]
RouterName = Annotated[str | None, typer.Option("--router", help="key or activation; default: the side memory's own.")]
Scope = Annotated[
    str | None,
    typer.Option(
        "--scope", help="narrow, balanced or wide: .25, 1 or 3 % of near prompts pass the gate. Default: as merged."
    ),
]
AllowOtherBase = Annotated[
    bool, typer.Option("--allow-other-base", help="Attach although the base is not the one it was learned on.")
]
Chat = Annotated[
    bool | None,
    typer.Option(
        "--chat/--no-chat",
        help="Render prompts with the base's chat template. Default: if it has one.",
        show_default=False,
    ),
]
AskedChat = Annotated[
    bool | None,
    typer.Option(
        "--chat/--no-chat",
        help="Use the base's chat template. Default: as the side memory was learned; without it, if there is one.",
        show_default=False,
    ),
]
Pool = Annotated[
    Path | None,
    typer.Option(
        "--pool", help="More ordinary prompts to calibrate on, one per line; tabs between wordings of one question."
    ),
]
SideMemoryFile = Annotated[
    Path | None,
    typer.Option(
        "--side-memory",
        "-s",
        metavar="FILE",
        help="Side memory file, packaged folder, or ORG/NAME or ORG/NAME@REVISION on the hub.",
    ),
]


@dataclass(frozen=True)
class Loading:
    """How a base is loaded, as every command that loads one asks for it; `loads_base` makes options of the fields."""

    model: Model = None
    revision: Revision = None
    dtype: Dtype = "auto"
    quantize: Quantize = None
    device: Device = "auto"
    device_map: DeviceMap = None
    offload_lower: OffloadLower = False
    allow_pickle: AllowPickle = False
    trust_remote_code: TrustRemoteCode = False

    def arguments(self, recorded: Mapping[str, Any], layer: int | str = "auto") -> dict[str, Any]:
        """Arguments of `load_base` for the base that a run or a side memory recorded, or for the one given instead.

        Args:
            recorded: its `name`, `revision` and `quantization`; empty where nothing was, which is the default base.
            layer: the edited one, the first to stay on the device with --offload-lower.
        """
        packed = recorded.get("quantization") if self.model is None else None
        quantize = f"{packed['bits']}bit" if packed and self.quantize is None else self.quantize
        return {
            "name": self.model if self.model is not None else recorded.get("name"),
            "revision": self.revision if self.model is not None or self.revision else recorded.get("revision"),
            "dtype": self.dtype,
            "device": self.device,
            "trust_remote_code": self.trust_remote_code,
            "device_map": self.device_map,
            "offload_below": layer if self.offload_lower else None,
            "quantize": quantize,
            "allow_pickle": self.allow_pickle,
        }

    @property
    def again(self) -> tuple[str, ...]:
        """Those of the options given that nothing records: what the next command on the same base wants, too."""
        spread = ("--device-map", str(self.device_map)) if self.device_map else ()
        device = ("--device", self.device) if self.device != "auto" else ()
        flags = ("offload_lower", "allow_pickle", "trust_remote_code")
        return (*device, *spread, *(f"--{f.replace('_', '-')}" for f in flags if getattr(self, f)))

    def base(self, recorded: Mapping[str, Any], layer: int | str = "auto") -> Base:
        """The base, loaded; see `arguments`."""
        from wisecli.models.base import load_base

        return load_base(**self.arguments(recorded, layer))

    def of(self, sm: SideMemory | None) -> Base:
        """The base of a side memory, or the default one, loaded."""
        return self.base(sm.base, sm.site.layer) if sm is not None else self.base({})


LOADING = tuple(f.name for f in fields(Loading))


def loads_base(command: Callable[..., None]) -> Callable[..., None]:
    """A command with the options of `Loading` in the place of its parameter `loading`."""

    @functools.wraps(command)
    def with_options(**options: Any) -> None:
        command(loading=Loading(**{name: options.pop(name) for name in LOADING}), **options)

    hints, parameters = get_type_hints(command, include_extras=True), []
    own = get_type_hints(Loading, include_extras=True)
    for p in inspect.signature(command).parameters.values():
        if p.name != "loading":
            parameters.append(p.replace(kind=p.KEYWORD_ONLY, annotation=hints[p.name]))
            continue
        for f in fields(Loading):
            parameters.append(inspect.Parameter(f.name, p.KEYWORD_ONLY, default=f.default, annotation=own[f.name]))
    with_options.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    with_options.__annotations__ = {p.name: p.annotation for p in parameters}
    return with_options


def given(ctx: typer.Context, name: str) -> bool:
    """Whether an option was given on the command line."""
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def cache_folder(sink: Output, kept: str) -> Path | None:
    """Where things are kept between runs; nowhere, with a warning, where that folder cannot be written.

    Args:
        kept: what will not be.
    """
    from wisecli.cache import default_folder
    from wisecli.errors import OutputError
    from wisecli.memory.files import ensure_writable

    folder = default_folder()
    try:
        ensure_writable(folder)
    except OutputError as e:
        sink.warn(f"{kept} not kept: {e.message} WISE_CACHE names another folder")
        return None
    return folder


def read_side_memory(sink: Output, given: Path) -> tuple[Path, SideMemory]:
    """The side memory of --side-memory, and what it is called: its path, or its hub id pinned to the commit."""
    from wisecli.hub import fetch, is_hub_id
    from wisecli.memory.side_memory import SideMemory
    from wisecli.routing.attach import side_memory_file

    if given.exists() or not is_hub_id(given):
        return given, SideMemory.load(side_memory_file(given))
    fetched = fetch(str(given))
    if sink.human:
        sink.note(f"side memory {fetched.label}", style="dim")
    return Path(fetched.label), SideMemory.load(fetched.side_memory)


def asked_form(sink: Output, asked: bool | None, sm: SideMemory | None, base: Base) -> PromptEncoder:
    """How prompts are rendered.

    Args:
        asked: --chat or --no-chat; None for the way the side memory was learned, or, without one, for the chat template
            where the base has one.
    """
    from wisecli.models.prompts import PromptEncoder

    usual = sm.chat if sm is not None else bool(getattr(base.tokenizer, "chat_template", None))
    if sm is not None and asked is not None and asked != sm.chat:
        how = "with" if sm.chat else "without"
        sink.warn(f"this side memory was learned {how} the chat template; its routing may miss here")
    return PromptEncoder(base.tokenizer, usual if asked is None else asked)


def edit_config(
    stream: EditStream, base: Base, *, shards: int | None, chat: bool | None = None, **settings: Any
) -> EditConfig:
    """See `EditConfig.for_stream`; nothing heavy is imported before it is called."""
    from wisecli.editing.config import EditConfig

    return EditConfig.for_stream(len(stream), base.tokenizer, shards=shards, chat=chat, **settings)


def run_settings(ctx: typer.Context, path: Path | None, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """How to load the base, and the settings of the run: a config file's, but for options given on the command line.

    Wrong settings are refused here, before a base is loaded. A revision belongs to the file's model, a module to its
    layer: it is dropped where another model or layer is given.

    Args:
        ctx: of the command.
        path: the config file, if any.
        options: all of the command's, with their defaults; those that say which base among them.
    """
    from wisecli.editing.config import EditConfig
    from wisecli.editing.config_file import ConfigFile

    file = ConfigFile.read(path) if path is not None else ConfigFile()
    typed = {name for name in options if given(ctx, name)}
    dropped = {belongs for name, belongs in (("model", "revision"), ("layer", "module")) if name in typed}
    said = {k: v for k, v in {**file.base, **file.settings}.items() if k not in typed | dropped}
    settings = options | said
    loading: dict[str, Any] = {k: settings.pop(k) for k in ("model", "revision", "dtype", "quantize")}
    EditConfig(**{k: v for k, v in settings.items() if v is not None})
    return loading, settings


def read_pool(path: Path | None) -> list[str]:
    """Lines of a user's own pool; none without a file."""
    if path is None:
        return []
    from wisecli.errors import InputError

    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(
            f"Cannot read the pool {path}: {e}.", hint="Give a UTF-8 text file, one prompt per line."
        ) from e

"""What the commands do, from Python, on a model that is already loaded.

    import wisecli

    side_memory = wisecli.edit(model, tokenizer, [{"prompt": "The capital of France is", "target": "Lyon"}])
    with wisecli.attach(model, side_memory):
        model.generate(...)

Every function takes a transformers model and its tokenizer, or in place of the two a `Base`. The same edits and
settings give the same bytes as on the command line. The model is only read: it may be in training mode, its parameters
may take gradients, and both are as before when a function ends, whichever way. What goes wrong is a `WiseError`.
"""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Protocol, TypeVar, overload

from wisecli.cache import default_folder
from wisecli.data.datasets import read_dataset
from wisecli.data.records import EditRecord
from wisecli.data.stream import EditStream, edits_of
from wisecli.editing.config import EditConfig
from wisecli.editing.merge import MergeConfig, merge_run
from wisecli.editing.run import EditRun, Progress, as_before
from wisecli.errors import UsageError
from wisecli.evaluation.evaluate import EvalOptions, EvalReport
from wisecli.evaluation.evaluate import evaluate as evaluate_stream
from wisecli.folding import Folded, fold_side_memory
from wisecli.memory.calibration import check_scope
from wisecli.memory.shard import RunFolder
from wisecli.memory.side_memory import SideMemory
from wisecli.models.base import Base, borrowed
from wisecli.models.checkpoint import check_rows
from wisecli.routing.engine import carries_side_memory

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from wisecli.evaluation.asking import Progress as Asked

Edits = str | PathLike[str] | EditStream | EditRecord | Mapping[str, Any] | Iterable[EditRecord | Mapping[str, Any]]
"""A file in any accepted format or the name of a dataset; a stream; or edits themselves, as records or as dicts."""

T = TypeVar("T")
P = ParamSpec("P")
R = TypeVar("R", covariant=True)


class OnBase(Protocol[P, R]):
    """A function of a base, which a model and its tokenizer can stand for."""

    @overload
    def __call__(self, base: Base, /, *args: P.args, **kwargs: P.kwargs) -> R: ...
    @overload
    def __call__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, /, *args: P.args, **kwargs: P.kwargs
    ) -> R: ...


def _on_base(function: Callable[Concatenate[Base, P], R]) -> OnBase[P, R]:
    @functools.wraps(function)
    def on(*args: Any, **kwargs: Any) -> Any:
        given = list(args)
        first = _taken(("base", "model"), kwargs, given)
        # A base anew: what it worked out of its weights may be of others by now.
        base = replace(first) if isinstance(first, Base) else _base_of(first, _taken(("tokenizer",), kwargs, given))
        if carries_side_memory(base.model):
            raise UsageError(
                f"wisecli.{function.__name__} is of the untouched base, and this model carries a side memory.",
                hint="Detach it first.",
            )
        check_rows(base.model)
        with borrowed(base.model):
            return function(base, *given, **kwargs)

    return on


def _taken(names: Sequence[str], named: dict[str, Any], given: list[Any]) -> Any:
    """An argument by one of its names, else the next by position; None where there is none."""
    found = next((named.pop(name) for name in names if name in named), None)
    return found if found is not None or not given else given.pop(0)


@_on_base
def edit(
    base: Base,
    edits: Edits,
    *,
    out: str | PathLike[str] | None = None,
    append: bool = False,
    pool: Sequence[str] = (),
    texts: bool = True,
    cache: bool = True,
    progress: Callable[[Progress], object] | None = None,
    **settings: Any,
) -> SideMemory:
    """Learn a stream of edits and merge what was learned: `wise edit` and `wise merge` in one.

    Args:
        base: a `Base`, or a model and its tokenizer as the first two arguments.
        edits: see `Edits`. All faults of all of them are found before anything is learned.
        out: run folder for the shards; one that was interrupted is continued. Without it nothing is kept.
        append: add the edits to the run that `out` holds, with that run's settings where none are given.
        pool: more ordinary prompts to calibrate on; wordings of one question have tabs between them.
        texts: keep prompts and targets in the shards and the side memory.
        cache: on the CPU, keep what follows from a base and a layer for the next run.
        progress: called after each block of edits, and with the ledger's lines when shards have ended.
        settings: fields of `EditConfig`. Where they are not given, there is a shard for every 50 edits and two at
            least, and `chat` is whether the tokenizer has a chat template.

    Returns:
        The side memory, merged by Ties and rehearsed. `merge` makes others of the same folder.

    Raises:
        InputError: edits cannot be used, or the folder holds another run.
        ModelError: the architecture has no matrix to edit.
        UsageError: settings are wrong.
    """
    if append and out is None:
        raise UsageError("append adds to a run folder.", hint="Say which one with out.")
    stream = _stream_of(edits)
    with tempfile.TemporaryDirectory() if out is None else contextlib.nullcontext(out) as folder:
        place, known = Path(folder), dict[str, Any]()
        if append:
            older = RunFolder.open(place)
            known, texts = as_before(older, len(stream)), older.run["texts"]
        config = _checked(EditConfig.for_stream, len(stream), base.tokenizer, **{**known, **settings})
        run = EditRun(
            base,
            stream,
            config,
            place,
            extra_pool=tuple(pool),
            texts=texts,
            append=append,
            checkpoints=out is not None,
            cache=default_folder() if cache else None,
        )
        for step in run:
            if progress is not None:
                progress(step)
        return merge_run(run.folder, base=base, cache=run.cache)


@_on_base
def merge(base: Base, shards: str | PathLike[str] | RunFolder, **options: Any) -> SideMemory:
    """Merge the shards of a run folder into a side memory, rehearse its edits and calibrate both routers.

    Args:
        base: the run's, a `Base`, or a model and its tokenizer as the first two arguments.
        shards: the folder.
        options: fields of `MergeConfig`: `method`, `memories`, `density`, `weights`, `rehearse`, `scope`, `values`.

    Raises:
        BaseMismatch: the base is not the run's.
        InputError: the run is unfinished or damaged.
        UsageError: options are wrong.
    """
    check_scope(_checked(MergeConfig, **options).scope)
    run = shards if isinstance(shards, RunFolder) else RunFolder.open(Path(shards))
    return merge_run(run, base=base, **options)


@_on_base
def evaluate(
    base: Base,
    edits: Edits,
    side_memory: SideMemory | str | Path | None = None,
    *,
    chat: bool = False,
    options: EvalOptions | None = None,
    progress: Callable[[Asked], object] | None = None,
    **attaching: Any,
) -> EvalReport:
    """Ask everything about a stream of edits before and after a side memory is attached, as `wise eval` does.

    Args:
        base: a `Base`, or a model and its tokenizer as the first two arguments.
        edits: see `Edits`.
        side_memory: one in memory, a file, a packaged folder or a hub id; None for the base alone.
        chat: render prompts with the base's chat template; a side memory's own choice goes before it.
        options: what is asked, and how.
        progress: called with what is being asked, and how much of it is done.
        attaching: `router`, `scope` and `allow_other_base` of `attach`.

    Raises:
        BaseMismatch: the side memory belongs to another base.
        InputError: edits cannot be used, or one does not fit the base's context.
    """
    stream = _stream_of(edits)
    return evaluate_stream(base, stream, side_memory, chat=chat, options=options, progress=progress, **attaching)


@_on_base
def fold(
    base: Base,
    side_memory: SideMemory | str | Path,
    out: str | PathLike[str],
    *,
    memory: int | None = None,
    dtype: str | torch.dtype = "float32",
    force: bool = False,
    allow_other_base: bool = False,
) -> Folded:
    """Write a dense checkpoint with the side memory's delta added to the base, always on: see `wise fold`.

    Args:
        base: a `Base`, or a model and its tokenizer as the first two arguments.
        side_memory: one in memory, a file, a packaged folder or a hub id.
        out: the folder.
        memory: which one, of a side memory that holds several.
        dtype: of all weights written: float32, bfloat16 or float16, by name or as torch's; or auto for the model's own.
        force: replace a folder that holds another fold.
        allow_other_base: fold although the edited matrix is not the one the side memory was learned on.

    Raises:
        BaseMismatch: the side memory belongs to another base.
        ModelError: the base is quantised, or not wholly in memory.
        OutputError: the folder holds something else, or cannot be written.
        UsageError: it has several memories and none was chosen, or holds what was withdrawn.
    """
    how: dict[str, Any] = {"memory": memory, "dtype": dtype, "force": force, "allow_other_base": allow_other_base}
    return fold_side_memory(base, side_memory, Path(out), **how)


# -- what a caller has, as what the library works on -------------------------------------------------------------------


def _base_of(model: Any, tokenizer: Any = None) -> Base:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    if not isinstance(model, PreTrainedModel) or model.get_output_embeddings() is None:
        raise UsageError(
            f"A {type(model).__name__} is no causal language model of transformers.",
            hint="Give what AutoModelForCausalLM.from_pretrained or wisecli.load_base returns.",
        )
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise UsageError(
            f"After the model comes its tokenizer, not a {type(tokenizer).__name__}.",
            hint="Give what AutoTokenizer.from_pretrained returns, as in wisecli.edit(model, tokenizer, edits).",
        )
    return Base.of(model, tokenizer)


def _stream_of(edits: Edits) -> EditStream:
    if isinstance(edits, EditStream):
        return edits
    if isinstance(edits, str | PathLike):
        return read_dataset(edits)[1]
    if isinstance(edits, EditRecord | Mapping):
        return edits_of([edits])
    if not isinstance(edits, Iterable):
        raise UsageError(f"A {type(edits).__name__} holds no edits.", hint="Give a file, or a list of dicts.")
    return edits_of(edits)


def _checked(make: Callable[..., T], *args: Any, **settings: Any) -> T:
    """What is made of the settings.

    Raises:
        UsageError: there is no such setting, or its value is of another type.
    """
    try:
        return make(*args, **settings)
    except TypeError as e:
        raise UsageError(f"These settings cannot be used: {e}.", hint="See EditConfig and MergeConfig.") from e

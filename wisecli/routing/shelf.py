"""Several side memories on one live model, by name: load, use, stack, switch, unload, also row by row within a batch.

    with SideMemories(model) as shelf:
        shelf.load("medicine", "med.safetensors")
        shelf.load("law", "org/law-edits@v1")
        shelf.use("medicine", "law")                       # for everything from here on; of the two, law goes first
        with shelf.requests(["medicine", None, "law"]):    # for the three rows of the next batches, in this thread
            model.generate(...)

Each side memory keeps its own router and its own edit site. A row is answered by at most one of those it asks for:
where several claim it, the one named last, so that what is stacked on top counts; never are two deltas added to one
row. Each decides as it would alone, from what the base makes of the prompt. A sequence keeps what it was started with
for as long as its KV cache lives; rows that ask for nothing are the base's bit for bit.

`use` holds for the model, in every thread; `requests` for the thread that opened it (`bind` carries it into others).
Loading and unloading is for between generations: a sequence whose side memory is gone is refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

from wisecli.errors import RoutingError, UsageError
from wisecli.memory.side_memory import SideMemory
from wisecli.routing.attach import fitting_side_memory
from wisecli.routing.engine import Asked, Member, OnModel
from wisecli.routing.routers import Routes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Request = str | Sequence[str] | None
"""What a row may be answered by: a name, several of which the last goes first, or None for main memory alone."""


class SideMemories(OnModel):
    """Named side memories on one model; a context manager that leaves the model as it was.

    The model carries hooks only while something is loaded. What is loaded answers nothing until `use` or `requests`
    names it.

    Args:
        model: a loaded causal language model; no weight of it is changed.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self._refuse_second()
        self._named: dict[str, Member] = {}
        self._used: tuple[Member, ...] = ()
        self._requests: ContextVar[tuple[tuple[Member, ...], ...] | None] = ContextVar("wise_requests", default=None)
        self._last: tuple[int, Mapping[int, Routes]] | None = None
        self._lock = Lock()

    def __enter__(self) -> SideMemories:
        return self

    def __exit__(self, *exc: object) -> None:
        self.detach()

    @property
    def names(self) -> tuple[str, ...]:
        """What is loaded, in the order of loading."""
        return tuple(self._named)

    @property
    def used(self) -> tuple[str, ...]:
        """What `use` has named, the last going first."""
        return tuple(self._name_of(m.key) or "" for m in self._used)

    @property
    def last(self) -> tuple[str | None, ...] | None:
        """Which side memory answered each row of the most recent prompt, None for main memory; None before the first.

        With several threads, the most recent of any.
        """
        if self._last is None:
            return None
        rows, routes = self._last
        answered: list[str | None] = [None] * rows
        for key, found in routes.items():
            for some in found.rows.values():
                for i in some.tolist():
                    answered[i] = self._name_of(key)
        return tuple(answered)

    def __getitem__(self, name: str) -> SideMemory:
        """The side memory of that name."""
        return self._members_of(name)[0].side_memory

    def load(
        self,
        name: str,
        side_memory: SideMemory | str | Path,
        *,
        router: str | None = None,
        scope: str | None = None,
        allow_other_base: bool = False,
    ) -> None:
        """Put a side memory beside the model under a name. It answers nothing until it is used.

        The arguments behind the name are those of `attach`. A load that fails changes nothing.

        Raises:
            BaseMismatch: the model is not the base the side memory belongs to.
            UsageError: the name is empty or taken.
        """
        if not isinstance(name, str) or not name:
            raise UsageError(f"{name!r} is no name for a side memory.", hint="Give a word, such as medicine.")
        self._refuse_taken(name)
        sm = fitting_side_memory(self.model, side_memory, router, scope, allow_other_base)
        member = Member(self.model, sm, router)
        with self._lock:
            self._refuse_taken(name)
            self._mount(member)
            self._named[name] = member

    def unload(self, name: str) -> None:
        """Take a side memory off the model, and out of `use`.

        Raises:
            UsageError: nothing of that name is loaded.
        """
        with self._lock:
            (member,) = self._members_of(name)
            self._used = tuple(m for m in self._used if m is not member)
            del self._named[name]
            self._unmount(member.key)

    def use(self, *names: str | None) -> None:
        """Say what answers from here on, in every thread, where no `requests` are in force.

        Args:
            names: several are stacked, the last going first. None, or nothing, for main memory alone.

        Raises:
            UsageError: a name is not loaded, or given twice.
        """
        self._used = () if names in ((), (None,)) else self._members_of(names)

    @contextlib.contextmanager
    def requests(self, each: Sequence[Request]) -> Iterator[None]:
        """Say for each row of a batch what may answer it, instead of what `use` says.

        Args:
            each: one entry per row: a name, several of which the last goes first, or None. A model called with a
                multiple of these rows takes each entry for the rows made of it, as beams do.

        Raises:
            UsageError: a name is not loaded, or given twice in one entry.
            RoutingError: when the model is called with other rows.
        """
        if isinstance(each, str) or not len(each):
            raise UsageError(f"{each!r} is no list of requests.", hint='Give one entry per row, as ["a", None].')
        self._refuse_second()
        token = self._requests.set(tuple(() if one is None else self._members_of(one) for one in each))
        try:
            yield
        finally:
            self._requests.reset(token)

    def detach(self) -> None:
        """Unload everything and leave the model as it was. It can be loaded again afterwards."""
        for name in self.names:
            self.unload(name)

    # -- what the hooks ask --------------------------------------------------------------------------------------------

    def _asked(self, rows: int) -> Asked:
        each = self._requests.get()
        if each is None:
            each = (self._used,)
        if rows % len(each):
            raise RoutingError(f"{len(each)} requests were given, but the model was called with {rows} rows.")
        members = {m.key: m for asked in each for m in asked}
        if not members.keys() <= self._members.keys():
            raise RoutingError("A side memory was unloaded within the requests that name it.")
        if all(len(asked) == 1 for asked in each) and len(members) == 1:
            return Asked(dict.fromkeys(members))
        per = rows // len(each)
        ranks = {
            key: [asked.index(m) + 1 if m in asked else 0 for asked in each for _ in range(per)]
            for key, m in members.items()
        }
        return Asked(ranks, across=any(len({m.site.layer for m in asked}) > 1 for asked in each))

    def _note(self, rows: int, routes: Mapping[int, Routes]) -> None:
        self._last = rows, routes

    # -- names ---------------------------------------------------------------------------------------------------------

    def _members_of(self, names: Request | tuple[str | None, ...]) -> tuple[Member, ...]:
        wanted = (names,) if isinstance(names, str) else tuple(names or ())
        unknown = next((n for n in wanted if n not in self._named), None) if wanted else None
        if unknown is not None or None in wanted:
            raise UsageError(
                f"No side memory of the name {unknown!r} is loaded.",
                hint=f"Loaded: {', '.join(self._named) or 'none'}. None stands alone, for main memory.",
            )
        if len(set(wanted)) < len(wanted):
            raise UsageError(f"{', '.join(map(str, wanted))}: a name is given twice.", hint="Name each once.")
        return tuple(self._named[str(n)] for n in wanted)

    def _refuse_taken(self, name: str) -> None:
        if name in self._named:
            raise UsageError(f"{name!r} is already loaded.", hint="Unload it first, or choose another name.")

    def _name_of(self, key: int) -> str | None:
        return next((n for n, m in self._named.items() if m.key == key), None)

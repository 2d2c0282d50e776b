"""The errors a user can meet, each with what to do next. Imports nothing heavy.

Library code raises these; `cli` turns them into one message on stderr and an exit code. Anything else that escapes is a
bug of ours, not of the user's input.
"""

from __future__ import annotations

from collections.abc import Sequence


class WiseError(Exception):
    """Something the user can mend.

    Args:
        message: what is wrong, with the offending value and what is allowed.
        hint: the next step, as an imperative sentence.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        """All that is known of it, for who meets it from Python."""
        return "\n".join([self.message, *getattr(self, "problems", ()), *([self.hint] if self.hint else [])])


class InputError(WiseError):
    """A file or record that cannot be used. `problems` lists every fault found as `file:line: what`."""

    def __init__(self, message: str, *, hint: str | None = None, problems: Sequence[str] = ()) -> None:
        super().__init__(message, hint=hint)
        self.problems = tuple(problems)


class OutputError(WiseError):
    """A path that cannot be written."""


class ModelError(WiseError):
    """A base that cannot be found, loaded or edited."""


class BaseMismatch(WiseError):
    """A side memory attached to a base it was not learned on."""


class RoutingError(WiseError):
    """A way of calling the model in which one decision per sequence cannot be kept."""


class UsageError(WiseError):
    """Options that contradict each other."""

    exit_code = 2


class CheckFailed(WiseError):
    """A check the user asked for (`--min-rel` and the like) that was not met."""

    exit_code = 3


def first_line(e: BaseException) -> str:
    """What an exception of another library says, in one line; its type where it says nothing."""
    lines = str(e).strip().splitlines()
    return lines[0] if lines else type(e).__name__

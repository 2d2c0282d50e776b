"""One table of errors: what a user sees and the exit code, for everything that may end a command.

0 ok, 1 an error the user can mend, 2 usage, 3 a check failed, 130 interrupt. WISE_DEBUG=1 shows tracebacks.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

import typer

from wisecli.cli._output import Output
from wisecli.errors import InputError, WiseError

INTERRUPTED = 130
RESUMABLE = ("edit", "eval")
"""Commands that go on where they stopped when they are run again."""
_FROM_PARSER: type[Exception] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")
_SHOWN_PROBLEMS = 20
_SMALLER = "Try --dtype bfloat16, --quantize 4bit or --offload-lower, or a smaller base."


def guarded(run: Callable[[], object], *, json_mode: bool = False, command: str = "") -> int:
    """Run a command and turn what it raises into a message and an exit code.

    Args:
        run: calls Typer. Its interrupt is exit code 130, returned or raised; its usage errors are raised only when it
            does not stand alone.
        json_mode: report errors as one JSON object.
        command: name of the command, for what to do after an interrupt.
    """
    code = _run(run, json_mode)
    if code == INTERRUPTED:
        hint = "Run the same command again to continue." if command in RESUMABLE else None
        _say("Interrupted", "Stopped.", hint, (), json_mode)
    return code


def _run(run: Callable[[], object], json_mode: bool) -> int:
    debug = os.environ.get("WISE_DEBUG", "") not in ("", "0")
    try:
        code = run()
    except SystemExit as e:
        return e.code if isinstance(e.code, int) else (0 if e.code is None else 1)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    except WiseError as e:
        if debug:
            raise
        problems = e.problems if isinstance(e, InputError) else ()
        _say(type(e).__name__, e.message, e.hint, problems, json_mode)
        return e.exit_code
    except MemoryError:
        _say("OutOfMemory", "Not enough memory.", _SMALLER, (), json_mode)
        return 1
    except _FROM_PARSER as e:
        return _misused(e, json_mode)
    except Exception as e:
        if debug:
            raise
        if type(e).__name__ == "OutOfMemoryError":
            _say("OutOfMemory", "Not enough memory on the device.", f"{_SMALLER[:-1]}; or --device cpu.", (), json_mode)
            return 1
        message = f"{type(e).__name__}: {e}"
        _say("InternalError", message, "This is a fault in wise. WISE_DEBUG=1 shows where.", (), json_mode)
        return 1
    return code if isinstance(code, int) else 0


def _misused(error: Any, json_mode: bool) -> int:
    """Arguments that Typer could not parse."""
    name = error.ctx.command_path if getattr(error, "ctx", None) else "wise"
    _say("UsageError", error.format_message(), f"{name} --help shows how it is used.", (), json_mode)
    return int(error.exit_code)


def _say(kind: str, message: str, hint: str | None, problems: tuple[str, ...], json_mode: bool) -> None:
    if json_mode:
        document = {"type": kind, "message": message, "hint": hint}
        document |= {"problems": list(problems)} if problems else {}  # type: ignore[dict-item]
        sys.stderr.write(json.dumps(document, ensure_ascii=False) + "\n")
        return
    more = len(problems) - _SHOWN_PROBLEMS
    details = [*problems[:_SHOWN_PROBLEMS], *([f"... and {more} more"] if more > 0 else [])]
    Output().error(message, hint, details)

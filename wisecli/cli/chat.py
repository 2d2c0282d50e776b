"""`wise chat`: talk to the edited model, and see which memory answered and why.

At a terminal it is a conversation with a prompt; from a pipe each line is a question, so that it can be scripted.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wisecli.cli import _options as opt
from wisecli.cli._output import Output, figure
from wisecli.cli._why import printable, route_line, show_explanation, show_legend
from wisecli.errors import InputError, WiseError

if TYPE_CHECKING:
    from wisecli.chat import ChatSession, Turn

_COMMANDS = {
    "/why": "which memory gave the last answer, and why",
    "/base": "the unedited model's answer to the last question, or to the one behind /base",
    "/reset": "forget the conversation",
    "/help": "these commands",
    "/quit": "leave, as Ctrl-D does; Ctrl-C stops an answer",
}
_HISTORY_LINES = 1000


@opt.loads_base
def chat(
    question: Annotated[str | None, typer.Argument(metavar="QUESTION", help="Ask this and leave.")] = None,
    side_memory: opt.SideMemoryFile = None,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="Ask this and leave; can be given several times.")
    ] = None,
    router: opt.RouterName = None,
    scope: opt.Scope = None,
    template: opt.AskedChat = None,
    system: Annotated[str | None, typer.Option(help="System message, with a chat template.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 128,
    allow_other_base: opt.AllowOtherBase = False,
    loading: opt.Loading = opt.Loading(),
    json: Annotated[bool, typer.Option("--json", help="One JSON object per answer on stdout.")] = False,
) -> None:
    """Talk to a base with its side memory, and see which memory answered.

    At a terminal, /help lists the commands. From a pipe, each line is a question.

    Example: wise chat --side-memory sm.safetensors
    """
    sink = Output(json)
    with contextlib.ExitStack() as until_the_end:
        with sink.running():
            from wisecli.chat import ChatSession
            from wisecli.routing.attach import attach

            side_memory, sm = opt.read_side_memory(sink, side_memory) if side_memory else (None, None)
            base = loading.of(sm)
            encoder = opt.asked_form(sink, template, sm, base)
            attached = None
            if sm is not None:
                sm = sm.asked_in(encoder.chat, encoder.rule)
                attached = attach(base.model, sm, router=router, scope=scope, allow_other_base=allow_other_base)
                until_the_end.enter_context(attached)
            session = ChatSession(
                base,
                attached,
                chat=encoder.chat,
                system=system,
                max_new_tokens=max_new_tokens,
            )
        questions = [*([question] if question is not None else []), *(prompt or [])]
        _talk(sink, session, questions, side_memory)


def _talk(sink: Output, session: ChatSession, questions: list[str], side_memory: Path | None) -> None:
    """One-shot questions, a conversation at a terminal, or the lines of a pipe."""
    if questions:
        dialogue = Dialogue(sink, session, echo=True)
        for question in questions:
            dialogue.ask(question)
    elif sink.human and sys.stdin.isatty() and sys.stdout.isatty():
        _banner(sink, session, side_memory)
        _converse(sink, Dialogue(sink, session, echo=False))
    else:
        if sys.stdin.isatty():
            sink.note("One question per line; Ctrl-D ends.", style="dim")
        dialogue, failed = Dialogue(sink, session, echo=True), False
        for line in lines_of(sys.stdin, "questions"):
            try:
                if not dialogue.handle(line):
                    break
            except WiseError as e:
                if not line.lstrip().startswith("/"):
                    raise
                sink.error(e.message, e.hint)  # a command that cannot be done; the questions behind it can
                failed = True
        if failed:
            raise typer.Exit(1)


class Dialogue:
    """Takes lines, questions or commands, and shows what comes of them.

    Args:
        echo: repeat each question before its answer, where nobody typed it on the screen.
    """

    def __init__(self, sink: Output, session: ChatSession, *, echo: bool) -> None:
        self.sink, self.session, self.echo = sink, session, echo

    def handle(self, line: str) -> bool:
        """Do what a line asks for; False when it asks to leave."""
        line = line.strip()
        name, _, rest = line.partition(" ")
        if name == "/quit":
            return False
        if not line.startswith("/"):
            if line:
                self.ask(line)
        elif name == "/why":
            self.why()
        elif name == "/base":
            self.ask_base(rest.strip() or None)
        elif name == "/reset":
            self.session.reset()
            self._note("A new conversation.")
        elif name == "/help":
            self._note(*(f"{name:<7} {what}" for name, what in _COMMANDS.items()))
        else:
            self._note(f"There is no command {name}. Commands: {', '.join(_COMMANDS)}.")
        return True

    def ask(self, question: str) -> None:
        """Ask the model as it is attached; show the answer and which memory gave it."""
        self._stream(question, self.session.ask(question))
        turn = self.session.turn
        if turn is None:
            return
        if turn.route is not None:
            self._dim(route_line(turn.route, turn.edit, self._memories()))
        self.sink.result(_document(question, turn))

    def ask_base(self, question: str | None) -> None:
        """Ask the unedited model; the conversation goes on as if it had not been asked."""
        turn = self.session.turn
        text = self._stream(question or (turn.question if turn else ""), self.session.ask_base(question))
        self._dim("the unedited base")
        again = turn if question is None else None
        document = _document(again.question if again else question, again)
        self.sink.result(document | {"base_answer": text})

    def why(self) -> None:
        """Explain the last answer; on stderr where stdout is JSON."""
        why = self.session.explain()
        if why is not None:
            console = self.sink.out if self.sink.human else self.sink.err
            show_explanation(console, why)
            show_legend(console, why)
        elif self.session.attached is None:
            self._note("The plain base answered: no side memory is attached.")
        else:
            self._note("The answer was stopped before a memory was chosen.")

    def _stream(self, question: str, pieces: Generator[str]) -> str:
        """Show an answer as it comes and return it."""
        if self.echo:
            self._write(f"> {question}\n")
        said = ""
        with contextlib.closing(pieces):
            for piece in pieces:
                said += piece
                self._write(piece)
        self._write("\n" if said else "(an empty answer)\n")
        return said

    def _memories(self) -> int:
        attached = self.session.attached
        return len(attached.side_memory.memories) if attached else 0

    def _write(self, text: str) -> None:
        if self.sink.human:
            self.sink.out.out(printable(text), end="", highlight=False)

    def _dim(self, text: str) -> None:
        self.sink.line(text, style="dim")

    def _note(self, *lines: str) -> None:
        """Lines for people, on stderr where stdout is JSON."""
        for line in lines:
            show = self.sink.line if self.sink.human else self.sink.note
            show(printable(line))


def _banner(sink: Output, session: ChatSession, side_memory: Path | None) -> None:
    mode = "chat template" if session.encoder.chat else "no chat template: each question stands alone"
    facts = [("base", f"{session.base.label}, {mode}")]
    if session.attached is not None:
        sm, name = session.attached.side_memory, session.attached.router.name
        facts.append(("side memory", f"{side_memory}, {len(sm.edits)} edits"))
        facts.append(("router", f"{name}, threshold {', '.join(figure(m.epsilon[name]) for m in sm.memories)}"))
    else:
        facts.append(("side memory", "none"))
    sink.facts(facts)
    sink.line("/help for commands")


def _converse(sink: Output, dialogue: Dialogue) -> None:
    """Prompt, answer, and again, until Ctrl-D or /quit."""
    with _readline():
        while True:
            try:
                line = input("> ")
            except EOFError:
                sink.line()
                return
            except KeyboardInterrupt:
                sink.line("\nCtrl-D or /quit leaves.", style="dim")
                continue
            try:
                if not dialogue.handle(line):
                    return
            except KeyboardInterrupt:
                sink.line("\nstopped", style="dim")
            except WiseError as e:
                sink.error(e.message, e.hint)


@contextlib.contextmanager
def _readline() -> Iterator[None]:
    """Line editing, with the questions of earlier conversations; history that cannot be kept is done without."""
    try:
        import readline
    except ImportError:  # not on every platform
        yield
        return
    path = _history_path()
    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    readline.set_history_length(_HISTORY_LINES)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            readline.write_history_file(path)


def _history_path() -> Path:
    state = os.environ.get("XDG_STATE_HOME", "")
    return (Path(state) if Path(state).is_absolute() else Path.home() / ".local" / "state") / "wise" / "history"


def lines_of(stream: Iterable[str], what: str) -> Iterator[str]:
    """The lines of stdin, which hold `what`."""
    try:
        yield from stream
    except UnicodeDecodeError as e:
        raise InputError(f"The {what} on stdin are not UTF-8 text.") from e


def _document(question: str | None, turn: Turn | None) -> dict[str, Any]:
    """One answer as JSON; without a turn there was none but the base's."""
    route = turn.route.to_json() if turn and turn.route else {}
    edit = turn.edit if turn else None
    return {
        "question": question,
        "answer": turn.answer if turn else None,
        **{name: route.get(name) for name in ("memory", "indicator", "epsilon")},
        "edit": {"id": edit.id, "prompt": edit.prompt, "target": edit.target} if edit else None,
    }

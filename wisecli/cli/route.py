"""`wise route`: for each prompt, which memory would answer and why. Nothing is generated."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from wisecli.cli import _options as opt
from wisecli.cli._output import Output
from wisecli.cli._why import show_explanation, show_legend, which
from wisecli.cli.chat import lines_of
from wisecli.errors import InputError, UsageError

if TYPE_CHECKING:
    from wisecli.routing.explain import Explanation

_BATCH = 32


@opt.loads_base
def route(
    side_memory: Annotated[
        Path,
        typer.Option(
            "--side-memory",
            "-s",
            metavar="FILE",
            help="Side memory file, packaged folder, or ORG/NAME or ORG/NAME@REVISION on the hub.",
        ),
    ],
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="PROMPT", help="Default: the lines of stdin.", show_default=False)
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Nearest edits to show, at most.")] = 3,
    router: opt.RouterName = None,
    scope: opt.Scope = None,
    chat: opt.AskedChat = None,
    allow_other_base: opt.AllowOtherBase = False,
    loading: opt.Loading = opt.Loading(),
    json: Annotated[bool, typer.Option("--json", help="One JSON object per prompt on stdout.")] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print only main or side for each prompt; side N of several.")
    ] = False,
) -> None:
    """Say which memory each prompt goes to, which edits are nearest, and what each of its tokens reaches.

    Prompts come as arguments, or one per line on stdin. Nothing is generated.

    Example: wise route --side-memory sm.safetensors "Who directed Emilia Pérez?"
    """
    sink = Output(json, quiet)
    with sink.running():
        if not prompts and sys.stdin.isatty():
            raise UsageError("No prompts were given.", hint="Give them as arguments, or one per line on stdin.")
        from wisecli.routing.attach import attach
        from wisecli.routing.explain import check_prompt, explain

        for prompt in prompts or ():
            check_prompt(prompt)
        side_memory, sm = opt.read_side_memory(sink, side_memory)
        base = loading.of(sm)
        encoder = opt.asked_form(sink, chat, sm, base)
        sm = sm.asked_in(encoder.chat, encoder.rule)
        why = None
        with attach(base.model, sm, router=router, scope=scope, allow_other_base=allow_other_base) as attached:
            for some in _batches(prompts):
                for why in explain(attached, encoder, some, top, _BATCH):
                    _show(sink, why)
        if why is None:
            raise InputError("There are no prompts on stdin.", hint="Give one per line, or as arguments.")
        if sink.human:
            show_legend(sink.out, why)


def _batches(prompts: list[str] | None) -> Iterator[list[str]]:
    """The prompts, or the lines of stdin that are not blank, some at a time."""
    each = iter(prompts or (line.strip() for line in lines_of(sys.stdin, "prompts") if line.strip()))
    while some := list(islice(each, _BATCH)):
        yield some


def _show(sink: Output, why: Explanation) -> None:
    if sink.human:
        show_explanation(sink.out, why)
        sink.line()
    sink.result(why.to_json(), which(why.route.memory, why.memories).replace(" memory", ""))

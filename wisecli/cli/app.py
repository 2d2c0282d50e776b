"""The `wise` application: its commands and its entry point. Importing it loads neither torch nor transformers."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer

from wisecli.cli._errors import guarded
from wisecli.cli.chat import chat
from wisecli.cli.compare import compare
from wisecli.cli.diff import diff
from wisecli.cli.doctor import doctor
from wisecli.cli.edit import edit
from wisecli.cli.eval import evaluate
from wisecli.cli.fold import fold
from wisecli.cli.forget import forget
from wisecli.cli.inspect import inspect
from wisecli.cli.log import log
from wisecli.cli.merge import merge
from wisecli.cli.package import package
from wisecli.cli.pull import pull
from wisecli.cli.report import report
from wisecli.cli.route import route
from wisecli.cli.show import show
from wisecli.cli.verify import verify

app = typer.Typer(
    name="wise",
    help="Correct what a language model knows, without touching its weights.\n\n"
    "wise edit learns a stream of edits into shards, wise merge makes one side memory of them, "
    "wise eval and wise chat use it.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
)


def _version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        typer.echo(f"wise {version('wisecli')}")
        raise typer.Exit


@app.callback()
def root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    pass


app.command("doctor")(doctor)
app.command("edit")(edit)
app.command("merge")(merge)
app.command("forget")(forget)
app.command("package")(package)
app.command("pull")(pull)
app.command("fold")(fold)
app.command("eval")(evaluate)
app.command("report")(report)
app.command("compare")(compare)
app.command("chat")(chat)
app.command("route")(route)
app.command("log")(log)
app.command("show")(show)
app.command("inspect")(inspect)
app.command("verify")(verify)
app.command("diff")(diff)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    command = typer.main.get_command(app)
    json_mode = "--json" in args
    return guarded(
        lambda: command.main(args=args, prog_name="wise", standalone_mode=not json_mode),
        json_mode=json_mode,
        command=next((a for a in args if not a.startswith("-")), ""),
    )

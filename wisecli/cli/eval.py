"""`wise eval`: ask everything after the whole stream; or learn the stream first and ask while learning."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wisecli.cli import _options as opt
from wisecli.cli._output import Output, figure
from wisecli.cli._results import NAMES, Written, show_report

if TYPE_CHECKING:
    from wisecli.data.datasets import Located
    from wisecli.data.stream import EditStream
    from wisecli.evaluation.evaluate import EvalOptions, EvalReport
    from wisecli.memory.side_memory import SideMemory
    from wisecli.models.base import Base

_PROTOCOLS = ("end-of-stream", "fresh", "both", "wilke")
_LEARN = "Learning"
_CHECKS = "Checks"


@opt.loads_base
def evaluate(
    dataset: Annotated[str, typer.Option("--dataset", "-d", help="demo, zsre, another name, or a file.")] = "demo",
    side_memory: opt.SideMemoryFile = None,
    limit: Annotated[int | None, typer.Option(help="Only the first N edits.")] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Write results.json and report.html into this folder; or FILE.json alone."),
    ] = None,
    png: Annotated[bool, typer.Option("--png", help="Also write every plot as PNG, beside the results.")] = False,
    router: Annotated[
        str | None,
        typer.Option(
            "--router",
            help="key or activation; default: the side memory's own. oracle: each edit's prompts go to the memory that "
            "learned it, all others to main memory.",
        ),
    ] = None,
    scope: opt.Scope = None,
    chat: opt.AskedChat = None,
    open_gate: Annotated[
        bool, typer.Option("--open-gate/--no-open-gate", help="Also ask what the gate kept out, with the gate open.")
    ] = True,
    ability: Annotated[
        bool, typer.Option("--ability/--no-ability", help="Also measure perplexity and agreement on held text.")
    ] = True,
    text: Annotated[Path | None, typer.Option(help="Held text of your own: one passage per line.")] = None,
    harness: Annotated[
        str | None, typer.Option(metavar="TASKS", help="lm-evaluation-harness tasks, separated by commas.")
    ] = None,
    harness_limit: Annotated[int | None, typer.Option(help="Samples per task.")] = None,
    harness_include: Annotated[Path | None, typer.Option(help="Folder of tasks of your own.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts per batch at most.")] = 64,
    cache: Annotated[
        bool, typer.Option("--cache/--no-cache", help="Keep the base's answers, and go on where a run was interrupted.")
    ] = True,
    learn: Annotated[
        bool, typer.Option("--learn", help="Learn the dataset first: edit, merge, evaluate.", rich_help_panel=_LEARN)
    ] = False,
    protocol: Annotated[
        str,
        typer.Option(
            help="end-of-stream; fresh: right after each edit; both, with a retention curve; wilke: edit, edit back.",
            rich_help_panel=_LEARN,
        ),
    ] = "end-of-stream",
    t: Annotated[
        str | None,
        typer.Option("--t", help="1,10,100: average over sequences of T edits, rolled back.", rich_help_panel=_LEARN),
    ] = None,
    schedule: Annotated[
        str | None, typer.Option(help="rehearsal (default) or published.", rich_help_panel=_LEARN)
    ] = None,
    shards: Annotated[
        int | None,
        typer.Option(help="Slices of the stream. Default: one for every 50 edits, at least 2.", rich_help_panel=_LEARN),
    ] = None,
    block: Annotated[
        int | None, typer.Option(help="Edits that arrive together; default 10.", rich_help_panel=_LEARN)
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of masks, contexts, minibatches; default 0.", rich_help_panel=_LEARN)
    ] = None,
    min_rel: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Exit code 3 if Rel (exact match) is below this.", rich_help_panel=_CHECKS),
    ] = None,
    min_gen: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Exit code 3 if Gen (exact match) is below this.", rich_help_panel=_CHECKS),
    ] = None,
    min_loc: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Exit code 3 if Loc (exact match) is below this.", rich_help_panel=_CHECKS),
    ] = None,
    dataset_revision: Annotated[str | None, typer.Option(help="Commit of a dataset on the hub.")] = None,
    allow_other_base: opt.AllowOtherBase = False,
    loading: opt.Loading = opt.Loading(),
    json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Ask every edit, rephrase and locality probe before and after, once the whole stream is learned.

    Exact: free greedy generation with natural stop. Token: teacher-forced accuracy, as papers report it.

    Example: wise eval --dataset demo --side-memory sm.safetensors -o eval
    Example: wise eval --dataset zsre --learn -o zsre
    """
    sink = Output(json, quiet)
    with sink.running():
        from wisecli.data.datasets import read_dataset
        from wisecli.errors import UsageError
        from wisecli.memory.calibration import check_scope

        if scope is not None:
            check_scope(scope)
        settings = {"schedule": schedule, "shards": shards, "block": block, "seed": seed}
        learning = _Learning.of(learn, protocol, t, side_memory, out, harness, settings, chat)
        if router == "oracle" and learning is not None:
            raise UsageError("--router oracle asks a side memory that exists.", hint="Merge first, then evaluate.")
        scoped = learn and protocol != "wilke"
        _refuse_idle(
            [
                ("--router", router is not None, side_memory is not None or learning is not None, "a side memory"),
                ("--scope", scope is not None, side_memory is not None or scoped, "a side memory"),
                ("--scope", scope is not None, router != "oracle", "a gate, and an oracle needs none"),
                ("--harness", harness is not None, router != "oracle", "any prompts, and an oracle knows edits alone"),
                ("--allow-other-base", allow_other_base, side_memory is not None, "--side-memory"),
                ("--harness-limit", harness_limit is not None, harness is not None, "--harness"),
                ("--harness-include", harness_include is not None, harness is not None, "--harness"),
                ("--text", text is not None, ability, "general ability, which --no-ability leaves out"),
            ]
        )
        tasks = _tasks(harness, harness_include)
        located, stream = read_dataset(dataset, limit, revision=dataset_revision)
        if learning is not None and learning.sizes:
            from wisecli.evaluation.protocols import check_sizes

            check_sizes(learning.sizes, stream)
        for warning in stream.warnings:
            sink.warn(warning)
        written = Written(out, png)
        kept = opt.cache_folder(sink, "answers are") if cache else None
        side_memory, sm = opt.read_side_memory(sink, side_memory) if side_memory else (None, None)
        options = _options(open_gate, ability, text, batch_size, kept, located, side_memory, router)
        from wisecli.memory.side_memory import SideMemory

        if sm is not None and scope is not None:
            sm = sm.scoped(scope, router)
        base = loading.of(sm)
        _warn_endless(sink, base)
        if learning is None:
            encoder = opt.asked_form(sink, chat, sm, base)
            templated = encoder.chat
            sm = sm.asked_in(templated, encoder.rule) if sm is not None else None
            run = _existing(sink, base, stream, sm, templated, options, allow_other_base)
        else:
            run = _ask(sink, learning.run(base, stream, options, scope))
            sm = SideMemory.load(learning.side_memory) if harness is not None else None
            templated = sm is not None and sm.chat
        report = run.report
        written.save(report)
        run.close()
        if harness is not None:
            attaching = {"router": router, "allow_other_base": allow_other_base}
            report = _harness(sink, report, base, sm, templated, tasks, harness_limit, harness_include, attaching)
            written.save(report)
        show_report(sink, report)
        written.tell(sink, side_memory)
        sink.result(report.to_json(), str(written.path) if written.path else None)
    _check(report, {"rel": min_rel, "gen": min_gen, "loc": min_loc})


@dataclass(frozen=True)
class _Learning:
    """What is to be learned first, and how it is asked: a protocol, or sequences of T edits."""

    protocol: str
    sizes: tuple[int, ...]
    out: Path | None
    settings: dict[str, Any]
    chat: bool | None = None

    @classmethod
    def of(
        cls,
        learn: bool,
        protocol: str,
        t: str | None,
        side_memory: Path | None,
        out: Path | None,
        harness: str | None,
        settings: dict[str, Any],
        chat: bool | None = None,
    ) -> _Learning | None:
        """From the options; None where an existing side memory, or the base alone, is asked."""
        from wisecli.errors import UsageError

        if protocol not in _PROTOCOLS:
            raise UsageError(f"Unknown protocol {protocol!r}.", hint=f"Use {', '.join(_PROTOCOLS)}.")
        sizes = _sizes(t)
        if sizes and protocol != _PROTOCOLS[0]:
            raise UsageError("--t is a protocol of its own.", hint="Leave --protocol out.")
        given = {k: v for k, v in settings.items() if v is not None}
        if not learn and not sizes and protocol == _PROTOCOLS[0]:
            if given:
                raise UsageError(
                    f"--{min(given)} says how to learn, but nothing is to be learned.", hint="Add --learn."
                )
            return None
        if side_memory is not None:
            raise UsageError(
                "Edits are made anew here, so there is no --side-memory to ask.",
                hint="Leave --side-memory out, or --learn, --protocol and --t.",
            )
        into_folder = not sizes and protocol != "wilke"
        if into_folder and (out is None or out.suffix == ".json"):
            raise UsageError("Shards and side memory need a folder.", hint="Give --out FOLDER.")
        if protocol == "wilke" and given.keys() & {"shards", "block"}:
            raise UsageError("WilKE's protocol edits one by one in one shard.", hint="Leave --shards and --block out.")
        if harness is not None and not into_folder:
            raise UsageError("--harness needs one side memory.", hint="Use it with --side-memory or with --learn.")
        return cls(protocol, sizes, out, given, chat)

    @property
    def side_memory(self) -> Path:
        """Where the side memory that was learned lies."""
        return (self.out or Path()) / "sm.safetensors"

    def run(self, base: Base, stream: EditStream, options: EvalOptions, scope: str | None = None) -> Any:
        """The evaluation, ready to go."""
        from wisecli.editing.merge import MergeConfig
        from wisecli.evaluation.protocols import RollbackEvaluation, StreamEvaluation
        from wisecli.evaluation.wilke import WilkeEvaluation
        from wisecli.memory.calibration import DEFAULT_SCOPE

        config = opt.edit_config(stream, base, **{"shards": None, **self.settings}, chat=self.chat)
        how = MergeConfig(scope=scope or DEFAULT_SCOPE)
        if self.sizes:
            return RollbackEvaluation(base, stream, config, self.sizes, how=how, options=options)
        if self.protocol == "wilke" or self.out is None:
            return WilkeEvaluation(base, stream, config, options)
        return StreamEvaluation(base, stream, config, self.out, self.protocol, how=how, options=options)


def _sizes(t: str | None) -> tuple[int, ...]:
    from wisecli.errors import UsageError

    try:
        return tuple(int(x) for x in t.split(",")) if t is not None else ()
    except ValueError:
        raise UsageError(f"--t must be whole numbers separated by commas, not {t!r}.") from None


def _refuse_idle(given: list[tuple[str, bool, bool, str]]) -> None:
    """Refuse options that would do nothing: name, whether it was given, whether it has an effect, what it is about."""
    from wisecli.errors import UsageError

    for name, used, effective, about in given:
        if used and not effective:
            raise UsageError(f"{name} does nothing here: it is about {about}.", hint="Leave it out.")


def _tasks(harness: str | None, include: Path | None) -> list[str]:
    """Names of lm_eval's tasks; unknown ones, or a missing lm_eval, are refused before anything is asked."""
    if harness is None:
        return []
    from wisecli.harness import check_tasks

    names = [x.strip() for x in harness.split(",") if x.strip()]
    check_tasks(names, include)
    return names


def _options(
    open_gate: bool,
    ability: bool,
    text: Path | None,
    batch_size: int,
    cache: Path | None,
    located: Located,
    side_memory: Path | None,
    router: str | None,
) -> EvalOptions:
    from wisecli.evaluation.ability import read_texts
    from wisecli.evaluation.evaluate import EvalOptions

    return EvalOptions(
        open_gate=open_gate,
        ability=ability,
        texts=read_texts(text) if text is not None else None,
        batch_size=batch_size,
        cache=cache,
        dataset={"name": located.name, "file": located.path.name, "revision": located.revision},
        side_memory=str(side_memory) if side_memory is not None else None,
        router=router,
    )


def _existing(
    sink: Output,
    base: Base,
    stream: EditStream,
    sm: SideMemory | None,
    chat: bool,
    options: EvalOptions,
    allow_other_base: bool,
) -> Any:
    """Ask a side memory that exists already; the base alone where there is none. Gives the evaluation, ended."""
    from wisecli.evaluation.evaluate import Evaluation
    from wisecli.routing.attach import attach

    if sm is None:
        return _ask(sink, Evaluation(base, stream, None, chat, options))
    _warn_missing(sink, sm, stream)
    router = None if options.oracle else options.router
    with attach(base.model, sm, router=router, allow_other_base=allow_other_base) as attached:
        return _ask(sink, Evaluation(base, stream, attached, chat, options))


def _ask(sink: Output, run: Any) -> Any:
    """Run an evaluation to its end, showing what it is at; gives it back."""
    with sink.progress() as bar:
        task, stage = bar.add_task("asking", total=None), None
        for step in run:
            if step.stage != stage:
                stage = step.stage
                bar.reset(task, total=step.total, description=stage)
            bar.update(task, completed=step.done)
    return run


def _harness(
    sink: Output,
    report: EvalReport,
    base: Base,
    sm: SideMemory | None,
    chat: bool,
    tasks: list[str],
    limit: int | None,
    include: Path | None,
    attaching: dict[str, Any],
) -> EvalReport:
    from wisecli.harness import run_harness
    from wisecli.routing.attach import attach

    on = attach(base.model, sm, **attaching) if sm is not None else nullcontext()
    with sink.progress() as bar, on as attached:
        task = bar.add_task("lm-evaluation-harness", total=None)

        def step(stage: str, done: int, total: int) -> None:
            bar.update(task, description=stage, completed=done, total=total)

        found = run_harness(base, attached, tasks, limit=limit, include=include, chat=chat, progress=step)
    return report.with_sections(harness=found)


def _warn_missing(sink: Output, sm: SideMemory, stream: EditStream) -> None:
    from wisecli.evaluation.evaluate import missing_of

    missing = missing_of(stream, sm)
    if missing:
        sink.warn(
            f"{len(missing)} of {len(stream)} edits of this dataset are not in the side memory; they are asked anyway"
        )


def _warn_endless(sink: Output, base: Base) -> None:
    if base.tokenizer.eos_token_id is None:
        sink.warn("the base's tokenizer has no EOS: answers cannot end by themselves; exact scores will be 0")


def _check(report: EvalReport, minima: dict[str, float | None]) -> None:
    from wisecli.errors import CheckFailed

    short_of = []
    for name, least in minima.items():
        got = report.scores[name]["exact"]["after"]
        if least is not None and got is None:
            short_of.append(f"{NAMES[name]} cannot be checked: the dataset has no prompts for it")
        elif least is not None and got is not None and got < least:
            short_of.append(f"{NAMES[name]} is {figure(got)}, below {least}")
    if short_of:
        raise CheckFailed("; ".join(short_of) + ".", hint="--out FOLDER writes every prompt with its answers.")

"""End-of-stream evaluation: after all edits, every edit, rephrase and locality probe is asked again.

Before and after are the same questions to the untouched base and to the base with the side memory attached. Locality is
measured against the base's *own* answer, not against a dataset's. An edit that a later one contradicts is left out of
the scores and counted. Evaluations that make edits themselves are in `protocols`; drawing is left to `report`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf, isfinite
from pathlib import Path
from typing import Any

from wisecli.data.stream import EditStream
from wisecli.evaluation.ability import measure_ability
from wisecli.evaluation.answers import BATCH, check_text
from wisecli.evaluation.asking import ORACLE, Asker, OodText, Progress, Steps
from wisecli.evaluation.environment import (
    describe_base,
    describe_side_memory,
    environment,
    method_of,
    peak_memory,
)
from wisecli.evaluation.evidence import routing_evidence
from wisecli.evaluation.questions import Item, ask_of, questions_about
from wisecli.evaluation.scores import (
    BOOTSTRAP_SEED,
    METRICS,
    average_of,
    ood_of,
    open_of,
    perplexity_of,
    probability_of,
    scores_of,
)
from wisecli.memory.shard import SUPERSEDED
from wisecli.memory.side_memory import SideMemory
from wisecli.models.base import Base
from wisecli.models.prompts import PromptEncoder
from wisecli.routing.attach import Attached, attach

SCHEMA, SCHEMA_VERSION = "wise-eval", "2.0"
_PASSAGES = 16  # per batch at most: they are longer than prompts
END_OF_STREAM = "end-of-stream"
TEXTS = {
    END_OF_STREAM: "after the last edit every prompt is asked again, before and after being the untouched base and the "
    "base with the side memory",
}


@dataclass(frozen=True)
class EvalOptions:
    """How to evaluate, apart from what.

    Attributes:
        open_gate: also ask what the gate kept out, with the gate open.
        ability: also measure general ability.
        texts: passages for that; None for those that ship with the tool.
        batch_size: prompts per batch at most.
        cache: folder of the answer cache; None for none.
        dataset: name, file and revision of the dataset, for the record.
        side_memory: path of the side memory, for the record.
        router: "key" or "activation" instead of a side memory's own, for evaluations that learn; "oracle" sends the
            prompts of each edit to the memory that learned it and all others to main memory: what routing could reach.
    """

    open_gate: bool = True
    ability: bool = True
    texts: Sequence[str] | None = None
    batch_size: int = BATCH
    cache: Path | None = None
    dataset: Mapping[str, Any] = field(default_factory=dict)
    side_memory: str | None = None
    router: str | None = None

    @property
    def oracle(self) -> bool:
        """Whether prompts go where they belong, and no router decides."""
        return self.router == ORACLE


@dataclass(frozen=True)
class EvalReport:
    """What an evaluation found: the content of results.json.

    Attributes:
        sections: everything but the items, as JSON.
        items: every question with its answers.
    """

    sections: Mapping[str, Any]
    items: tuple[Item, ...]

    @property
    def scores(self) -> Mapping[str, Any]:
        """Score name -> metric -> {"before", "after", their intervals, "n"}."""
        return self.sections["scores"]

    @property
    def routing(self) -> Mapping[str, Any] | None:
        return self.sections["routing"]

    @property
    def edits(self) -> int:
        return self.sections["dataset"]["edits"]

    @property
    def superseded(self) -> int:
        """Edits left out because a later one contradicts them."""
        return self.sections["dataset"]["superseded"]

    def with_sections(self, **sections: Any) -> EvalReport:
        return EvalReport({**self.sections, **sections}, self.items)

    def to_json(self) -> dict[str, Any]:
        return {**self.sections, "items": [i.to_json() for i in self.items]}


@dataclass(frozen=True)
class Findings:
    """What one state of the edited model was found to be."""

    items: Sequence[Item]
    texts: Sequence[OodText] = ()
    ability: Mapping[str, Any] | None = None


class Evaluation:
    """Ask a stream's questions before and after a side memory is attached.

    Args:
        base: loaded base.
        stream: edits with their probes.
        attached: the side memory attached to the base's model, or None: then after equals before.
        chat: render prompts with the base's chat template.
        options: see `EvalOptions`.
    """

    def __init__(
        self,
        base: Base,
        stream: EditStream,
        attached: Attached | None,
        chat: bool = False,
        options: EvalOptions | None = None,
    ) -> None:
        self.base, self.stream, self.attached = base, stream, attached
        self.options = options or EvalOptions()
        self.chat = chat
        self.asker: Asker | None = None
        self.report: EvalReport | None = None

    def __iter__(self) -> Iterator[Progress]:
        """Ask everything, yielding progress; `report` is set at the end.

        Raises:
            InputError: a prompt, alone or with its answer, does not fit the base's context; nothing was asked then.
        """
        started = time.perf_counter()
        stream = self.stream
        if self.attached is not None:
            stream = as_learned(stream, self.attached.side_memory)
        self.asker = asker_for(self.base, stream, self.chat, self.options)
        yield from self.asker.before(self.attached)
        findings = yield from ask_everything(self.asker, stream, self.attached, self.options)
        about = {"name": END_OF_STREAM}
        self.report = make_report(self.asker, stream, findings, self.attached, self.options, about, started)

    def close(self) -> None:
        """Drop what was kept to go on after an interruption; to be called when the report is safe."""
        if self.asker is not None:
            self.asker.close()


def as_learned(stream: EditStream, sm: SideMemory) -> EditStream:
    """The stream with what a side memory knows of it: an edit that a later one superseded there is superseded here.

    Only a part of what was learned may be asked, and the contradicting edit may lie beyond it.
    """
    beaten = {e.id for e in sm.edits if e.details.get("outcome") == SUPERSEDED}
    return replace(stream, superseded=stream.superseded | (beaten & {r.id for r in stream.records}))


def missing_of(stream: EditStream, sm: SideMemory) -> list[str]:
    """Ids of the records that a side memory does not hold: by id, and by prompt and target where it carries them."""
    known = {e.id: (e.prompt, e.target) for e in sm.edits}
    texts = {r.id: (r.prompt, r.target) for r in stream.records}
    return [name for name, text in texts.items() if name not in known or known[name] not in (text, (None, None))]


def asker_for(base: Base, stream: EditStream, chat: bool, options: EvalOptions, everything: bool = False) -> Asker:
    """An asker of all that there is to ask about a stream.

    Args:
        everything: also of what the stream as a whole contradicts: parts of it may not.

    Raises:
        InputError: a text out of distribution does not fit the base's context.
    """
    encoder = PromptEncoder(base.tokenizer)
    for record in stream.records:
        for text in record.ood:
            check_text(base, encoder, record.id, text)
    if everything:
        questions, left_out = tuple(q for r in stream.records for q in questions_about(r)), None
    else:
        asked = ask_of(stream)
        questions, left_out = asked.questions, {"rephrases": asked.rephrases, "probes": asked.probes}
    return Asker(base, questions, chat=chat, cache=options.cache, batch_size=options.batch_size, left_out=left_out)


def ask_everything(
    asker: Asker, stream: EditStream, attached: Attached | None, options: EvalOptions
) -> Steps[Findings]:
    """All that is asked at the end of a stream, of an asker whose base has answered."""
    items = yield from asker.after(attached, oracle=options.oracle)
    if attached is not None and options.open_gate and not options.oracle:
        items = yield from asker.opened(attached, items)
    live = [r for r in stream.records if r.id not in stream.superseded]
    texts = yield from asker.ood(live, attached, options.oracle)
    ability = None
    if options.ability and not options.oracle:  # it knows of no edit in ordinary text
        yield Progress("general ability", 0, 1)
        started = time.perf_counter()
        stores = (asker.store_of(None), asker.store_of(attached))
        found = measure_ability(
            asker.base, asker.encoder, attached, options.texts, min(options.batch_size, _PASSAGES), stores
        )
        asker.seconds["general ability"] = time.perf_counter() - started
        ability = found.to_json()
        yield Progress("general ability", 1, 1)
    return Findings(items, texts, ability)


def make_report(
    asker: Asker,
    stream: EditStream,
    findings: Findings,
    attached: Attached | None,
    options: EvalOptions,
    protocol: Mapping[str, Any],
    started: float,
) -> EvalReport:
    """Put everything together.

    Args:
        protocol: its "name" and what else is to be said of it.
        started: `time.perf_counter()` at the beginning.
    """
    items, base = findings.items, asker.base
    sm = attached.side_memory if attached is not None else None
    router = (ORACLE if options.oracle else attached.router.name) if attached is not None else ""
    scores = scores_of(items)
    seen = [i.route.epsilon for i in items if i.route is not None]
    gates = sorted({round(e, 6) if isfinite(e) else inf for e in seen})  # a route read again has no infinity
    sections = {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "protocol": {"t": None, "checkpoints": None, "text": TEXTS.get(protocol["name"], ""), **protocol},
        "metrics": METRICS,
        "method": method_of(sm, router) if sm is not None else None,
        "dataset": {
            **{"name": None, "file": None, "revision": None, **options.dataset},
            "format": stream.format,
            "digest": stream.digest,
            "edits": len(stream.records),
            "superseded": len(stream.superseded),
            "duplicates": len(stream.duplicates),
            "missing": len(missing_of(stream, sm)) if sm is not None else None,
            "left_out": asker.left_out,
        },
        "base": describe_base(base),
        "side_memory": describe_side_memory(sm, router, options.side_memory) if sm is not None else None,
        "environment": environment(base),
        "seeds": {"edit": sm.config.get("seed") if sm is not None else None, "bootstrap": BOOTSTRAP_SEED},
        "chat": asker.encoder.chat,
        "scores": scores,
        "average": average_of(scores),
        "open": open_of(items),
        "perplexity": perplexity_of(items),
        "ood": ood_of(findings.texts),
        "probability": probability_of(items),
        "routing": routing_evidence(items, router or str(protocol.get("router")), gates) if gates else None,
        "ability": findings.ability,
        **dict.fromkeys(("harness", "fresh", "retention", "rollbacks", "wilke")),
        "timings": {**asker.seconds, "total": time.perf_counter() - started, "prompts": len(asker.prompts)},
        "peak_memory": peak_memory(base),
    }
    return EvalReport(sections, tuple(items))


def evaluate(
    base: Base,
    stream: EditStream,
    side_memory: Any = None,
    *,
    chat: bool = False,
    options: EvalOptions | None = None,
    progress: Callable[[Progress], object] | None = None,
    **attaching: Any,
) -> EvalReport:
    """Evaluate a side memory (object, file or folder; None for the base alone) on a stream, in one call.

    Further options go to `attach`.
    """
    if side_memory is None:
        return _run(Evaluation(base, stream, None, chat, options), progress)
    with attach(base.model, side_memory, **attaching) as attached:
        return _run(Evaluation(base, stream, attached, chat or attached.side_memory.chat, options), progress)


def _run(run: Evaluation, progress: Callable[[Progress], object] | None) -> EvalReport:
    for step in run:
        if progress is not None:
            progress(step)
    if run.report is None:
        raise RuntimeError("the evaluation ended without a report")
    run.close()
    return run.report

"""WilKE's protocol (arXiv:2402.10987, section 5 and its code): edit, ask, edit back, and see what is left of the rest.

The stream is halved: P is edited, Q is not. Edit i is learned and asked; then it is taken back by a second edit of the
same prompt to the original answer y_o, not by restoring weights; the next edit goes on from there. At checkpoints the
original answers of P so far and of Q are asked for.

    ES = mean_i 1[f_i(x_e) = y_e]    GS over rephrases    LS over near prompts, against their original answer
    ERS_n = mean over the n edits of P so far of 1[f*_n(x) = y_o]    ORS_n = the same over Q
    S_n = harmonic mean of the five

f_i is the model after edit i, f*_i after it was taken back. A match is teacher-forced, all tokens, as in their code;
the same by free generation stands beside it. y_o is the dataset's true answer where it gives one, else the base's own;
records whose y_o the base does not give under teacher forcing are left out, as the paper's "known" subset does. Where a
near prompt has no answer in the dataset, its original answer is the base's own; by free generation it always is.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from wisecli.cache import digest_of
from wisecli.data.records import UNRELATED, EditRecord
from wisecli.data.stream import EditStream
from wisecli.editing.config import EditConfig
from wisecli.editing.editor import Editor, OpenShard
from wisecli.editing.merge import MergeConfig, merge_shards
from wisecli.errors import InputError
from wisecli.evaluation.answers import Forced, answer_cap, force, generate_answers
from wisecli.evaluation.asking import Progress, drain
from wisecli.evaluation.evaluate import EvalOptions, EvalReport, Findings, asker_for, make_report
from wisecli.evaluation.metrics import all_tokens_match, exact_match, harmonic_mean, mean
from wisecli.evaluation.protocols import attached_by, router_of
from wisecli.evaluation.questions import EDIT, REPHRASE, Item
from wisecli.evaluation.store import AnswerStore
from wisecli.memory.side_memory import SideMemory
from wisecli.models.base import Base, context_of
from wisecli.models.prompts import Row

WILKE = "wilke"
TEXT = (
    "the first half of the records is edited one by one; each edit is asked, then taken back by a second edit to the "
    "original answer; at checkpoints the original answers of the edited and of the untouched half are asked for"
)
_LONGEST = 48  # tokens of the base's own answer at most; one that does not end by then is no answer
_EVERY = 50  # checkpoints besides the powers of two


class WilkeEvaluation:
    """Run the protocol on a stream. One shard holds it all: what is edited back is edited in the same memory.

    Raises:
        InputError: fewer than two records whose original answer the base gives.
    """

    def __init__(self, base: Base, stream: EditStream, config: EditConfig, options: EvalOptions | None = None) -> None:
        self.base, self.options = base, options or EvalOptions()
        self.editor = Editor(base, replace(config, shards=1, block=1))
        live = [r for r in stream.records if r.id not in stream.superseded]
        self.stream = replace(stream, records=tuple(live))
        self.asker = asker_for(base, self.stream, config.chat, self.options, everything=True)
        self.router = router_of(config, self.options)
        self.original: dict[str, str] = {}
        self.report: EvalReport | None = None

    def __iter__(self) -> Iterator[Progress]:
        """Edit and ask, yielding progress; `report` is set at the end."""
        started = time.perf_counter()
        asker = self.asker
        yield from asker.before()
        known = self._known()
        if len(known) < 2:
            raise InputError(
                f"The base gives the original answer to {len(known)} of {len(self.stream.records)} records; the "
                "protocol needs two.",
                hint="Use records of facts that this base knows.",
            )
        edited, untouched = known[: len(known) // 2], known[len(known) // 2 :]
        run = digest_of(self.editor.describe(self.stream))
        store = asker.store({"protocol": WILKE, "run": run, "router": self.router})
        shard = OpenShard(self.editor, 0, {q.prompt for q in asker.questions})
        items: list[Item] = []
        kept: list[dict[str, Any]] = []
        for i, record in enumerate(edited):
            yield Progress("edits and rollbacks", i, len(edited))
            shard.arrive(record)
            items += self._ask(shard, record, i, store)
            shard.arrive(replace(record, id=f"{record.id}~back", target=self.original[record.id]))
            if _checkpoint(i + 1, len(edited)):
                kept.append(self._left(shard, edited[: i + 1], untouched, store))
        yield Progress("edits and rollbacks", len(edited), len(edited))
        about = {"name": WILKE, "text": TEXT, "checkpoints": [k["edits"] for k in kept], "router": self.router}
        report = make_report(asker, self.stream, Findings(items), None, self.options, about, started)
        left_out = len(self.stream.records) - len(known)
        config = self.editor.config
        self.report = report.with_sections(
            method=f"WISE, {config.schedule} schedule, one shard, {self.router} router",
            seeds={**report.sections["seeds"], "edit": config.seed},
            config=config.to_json(),
            wilke={**_scores(items, kept), "known": len(known), "left_out": left_out},
        )

    def close(self) -> None:
        """Drop what was kept to go on after an interruption; to be called when the report is safe."""
        self.asker.close()

    # -- the pieces ----------------------------------------------------------------------------------------------------

    def _known(self) -> list[EditRecord]:
        """Records with an original answer that the base gives; `original` is filled."""
        records, encoder = self.stream.records, self.asker.encoder
        own = [r for r in records if r.truth is None]
        caps = [min(_LONGEST, context_of(self.base.model) - len(encoder.prompt(r.asked))) for r in own]
        said = dict(generate_answers(self.base, encoder, [r.asked for r in own], caps))
        whole = {r.id: said[i].text for i, r in enumerate(own) if len(said[i].ids) < caps[i] and said[i].text}
        original = {r.id: r.truth if r.truth is not None else whole.get(r.id) for r in records}
        given = [(r, text) for r in records if (text := original[r.id]) and not exact_match(text, r.target)]
        rows = [encoder.pair(r.asked, text, eos=False) for r, text in given]
        forced = force(self.base, encoder, rows)
        known = [x for x, row, f in zip(given, rows, forced, strict=True) if all_tokens_match(f.predicted, row.target)]
        self.original = {r.id: text for r, text in known}
        return [r for r, _ in known]

    def _memory(self, shard: OpenShard) -> SideMemory:
        upper = self.editor.upper if self.router == "activation" else None
        run = self.editor.describe(self.stream)
        return merge_shards([shard.shard()], self.editor.gate, run, upper=upper, how=MergeConfig(rehearse=False))

    def _ask(self, shard: OpenShard, record: EditRecord, i: int, store: AnswerStore | None) -> list[Item]:
        key = f"edit {i}"
        kept = store.get(key) if store is not None else None
        if kept is not None:
            return [Item.from_json(x) for x in kept]
        which = self.asker.places[record.id]
        with attached_by(self.base, self._memory(shard), self.router) as attached:
            items = drain(self.asker.after(attached, which, kept=False))
        if store is not None:
            store.put(key, [x.to_json() for x in items])
        return items

    def _left(
        self, shard: OpenShard, edited: Sequence[EditRecord], untouched: Sequence[EditRecord], store: AnswerStore | None
    ) -> dict[str, Any]:
        """Original answers still given: ERS and ORS, by teacher forcing and by free generation."""
        key = f"checkpoint {len(edited)}"
        kept = store.get(key) if store is not None else None
        if kept is not None:
            return kept
        records = [*edited, *untouched]
        encoder = self.asker.encoder
        rows = [encoder.pair(r.asked, self.original[r.id], eos=False) for r in records]
        caps = [answer_cap(self.base, encoder, r.id, r.asked, self.original[r.id]) for r in records]
        with attached_by(self.base, self._memory(shard), self.router) as attached:
            forced = force(self.base, encoder, rows, attached)
            said = dict(generate_answers(self.base, encoder, [r.asked for r in records], caps, attached))
        match = _matches(forced, rows)
        exact = [exact_match(said[i].text, self.original[r.id]) for i, r in enumerate(records)]
        n = len(edited)
        out = {
            "edits": n,
            "match": {"ers": mean(match[:n]), "ors": mean(match[n:])},
            "exact": {"ers": mean(exact[:n]), "ors": mean(exact[n:])},
        }
        if store is not None:
            store.put(key, out)
        return out


def _matches(forced: Sequence[Forced], rows: Sequence[Row]) -> list[bool]:
    return [all_tokens_match(f.predicted, row.target) for f, row in zip(forced, rows, strict=True)]


def _checkpoint(n: int, last: int) -> bool:
    """Powers of two, multiples of 50, and the last edit."""
    return n == last or n % _EVERY == 0 or n & (n - 1) == 0


def _scores(items: Sequence[Item], kept: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The protocol's section of results.json."""
    forced = _parts(items, forced=True)
    free = _parts(items, forced=False)
    ers, ors = ([k["match"][name] for k in kept] for name in ("ers", "ors"))
    asked = [v for v in forced.values() if v is not None]
    whole = len(asked) == len(forced)  # S is of five scores or of none
    return {
        "checkpoints": [k["edits"] for k in kept],
        **forced,
        "ers": ers,
        "ors": ors,
        "s": [harmonic_mean([*asked, a, b]) if whole else None for a, b in zip(ers, ors, strict=True)],
        "exact": {**free, **{name: [k["exact"][name] for k in kept] for name in ("ers", "ors")}},
        "edited": kept[-1]["edits"],
    }


def _parts(items: Sequence[Item], forced: bool) -> dict[str, float | None]:
    """ES, GS and LS; LS over near prompts, over all probes where the dataset has no near ones."""
    near = [i for i in items if i.question.kind not in (EDIT, REPHRASE, UNRELATED)]
    probes = near or [i for i in items if i.question.kind == UNRELATED]
    groups = {
        "es": [i for i in items if i.question.kind == EDIT],
        "gs": [i for i in items if i.question.kind == REPHRASE],
        "ls": probes,
    }
    if not forced:
        return {name: mean([i.exact[1] for i in group]) for name, group in groups.items()}
    pairs = {name: [i.answered or i.match for i in group] for name, group in groups.items()}
    return {name: mean([pair[1] for pair in found if pair is not None]) for name, found in pairs.items()}

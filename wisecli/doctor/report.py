"""What an examination found, as values, and what it comes down to in words. Nothing here runs a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

SCHEMA, SCHEMA_VERSION = "wise-doctor", "1.0"
READY, LIMITED, UNUSABLE, UNSUPPORTED = "ready", "limited", "unusable", "unsupported"

# What is expected of a base: shares, and an AUC. Below them the verdict says so.
HOLD = 0.9  # of the probe edits answered as wanted
CARRY = 0.6  # of their other wordings
KEEP = 0.9  # of near prompts left alone
TELL = 0.9  # AUC of the gate
KNOW = 0.8  # of the probe facts that the base knows; 0.5 is chance
ORDINARY = 0.02  # ordinary prompts let through, at most
LEAST = 0.5  # of the probe edits answered as wanted: with less than this, editing does not work


@dataclass(frozen=True)
class Figure:
    """A share of `n` prompts with its 95 % interval."""

    value: float | None
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class Learned:
    """The probe edits, learned at one layer, merged, and asked with the side memory attached.

    Attributes:
        edits, took: how many were learned, and of how many the prompt gives the target.
        rel, gen, loc_near: exact scores: the edits, their other wordings, near prompts left alone.
        gen_open, loc_near_open: the same with the gate always open.
        routed, near_opened: shares of other wordings and of near prompts that the gate let through.
        auc: of the gate, on these wordings and near prompts.
        ordinary_opened: share of the pool's ordinary prompts that the gate lets through.
        known: share of the facts' wordings in which the base gives the true answer more probability than the target.
        epsilon: the gate's threshold.
        seconds_per_edit: to learn them; `merge_seconds` to merge, rehearse and calibrate all.
        bytes: of the side memory file; `bytes_per_edit` of it for each edit's keys.
    """

    edits: int
    took: int
    rel: Figure
    gen: Figure
    gen_open: float | None
    loc_near: Figure
    loc_near_open: float | None
    routed: float | None
    near_opened: float | None
    auc: float | None
    ordinary_opened: float | None
    known: float | None
    epsilon: float
    seconds_per_edit: float
    merge_seconds: float
    bytes: int
    bytes_per_edit: int

    @property
    def score(self) -> float:
        """What layers are compared by: the mean of Rel, Gen and near Loc."""
        return sum(f.value or 0.0 for f in (self.rel, self.gen, self.loc_near)) / 3


@dataclass(frozen=True)
class Candidate:
    """One layer that was looked at.

    Attributes:
        layer: index of the decoder layer.
        site: module path of the matrix that would be edited, and its `shape` [d_out, d_in]; None where there is none.
        reason: why it cannot be edited, or why trying it failed.
        auc, epsilon, routed, opened: of the gate, on held-out facts of the pool; see `layers.gate_figures`.
        learned: the probe edits there, where they were learned.
    """

    layer: int
    site: str | None = None
    shape: tuple[int, int] | None = None
    reason: str | None = None
    auc: float | None = None
    epsilon: float | None = None
    routed: float | None = None
    opened: float | None = None
    learned: Learned | None = None


@dataclass(frozen=True)
class Verdict:
    """`level` is ready, limited, unusable or unsupported; `reasons` say what is amiss."""

    level: str
    reasons: tuple[str, ...] = ()

    @property
    def usable(self) -> bool:
        return self.level in (READY, LIMITED)

    @property
    def text(self) -> str:
        """The verdict as a sentence."""
        words = {LIMITED: "works, with limits", UNUSABLE: "not usable", UNSUPPORTED: "not supported"}
        return words.get(self.level, self.level) + (f": {'; '.join(self.reasons)}." if self.reasons else "")


@dataclass(frozen=True)
class DoctorReport:
    """What was found of a base.

    Attributes:
        base: which it is, and how it was loaded.
        candidates: the layers looked at, in order.
        layer: the one to edit, None where none works.
        config: the fields of the run described, as `wise edit --config` takes them; None where no layer works.
        probes: how many probe edits, of how many kinds, and the facts left in the pool.
        seconds: wall time of each stage.
        memory: the most bytes held, resident and on an accelerator.
        environment: machine and software.
    """

    base: Mapping[str, Any]
    candidates: tuple[Candidate, ...]
    layer: int | None
    verdict: Verdict
    config: Mapping[str, Any] | None = None
    probes: Mapping[str, int] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    memory: Mapping[str, int | None] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)

    @property
    def chosen(self) -> Candidate | None:
        """The candidate to edit."""
        return next((c for c in self.candidates if c.layer == self.layer), None)

    def to_json(self) -> dict[str, Any]:
        document = asdict(self)
        document["verdict"] = {"level": self.verdict.level, "reasons": list(self.verdict.reasons)}
        document["verdict"]["text"] = self.verdict.text
        return {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, **document}


def judge(candidates: Sequence[Candidate], chosen: Candidate | None) -> Verdict:
    """The verdict on a base from what was found at its layers."""
    if chosen is None or chosen.learned is None:
        reasons = tuple(dict.fromkeys(c.reason for c in candidates if c.reason))
        return Verdict(UNUSABLE if any(c.site for c in candidates) else UNSUPPORTED, reasons)
    found = chosen.learned
    if (found.rel.value or 0.0) < LEAST:
        return Verdict(
            UNUSABLE, (f"edits do not take: {_rel(found)}", *_limits_of_gate(chosen, found), *_unknown(found))
        )
    limits = (*_limits_of_edits(found), *_limits_of_gate(chosen, found), *_unknown(found))
    return Verdict(LIMITED, limits) if limits else Verdict(READY)


def _rel(found: Learned) -> str:
    held = round((found.rel.value or 0.0) * found.rel.n)
    return f"{held} of {found.rel.n} probe edits are answered with their target ({found.took} were learned)"


def _limits_of_edits(found: Learned) -> list[str]:
    limits = []
    if (found.rel.value or 0.0) < HOLD:
        limits.append(f"not every edit holds: {_rel(found)}")
    if found.gen.value is not None and found.gen.value < CARRY:
        shut = (found.gen_open or 0.0) - found.gen.value
        cause = f"the gate keeps the others out: {percent(found.gen_open)} with the gate open" if shut > 0.1 else (
            "and hardly more with the gate open"
        )  # fmt: skip
        limits.append(f"edits carry over to {percent(found.gen.value)} of their other wordings, {cause}")
    return limits


def _limits_of_gate(chosen: Candidate, found: Learned) -> list[str]:
    limits = []
    if chosen.auc is not None and chosen.auc < TELL:
        limits.append(f"the gate tells other wordings from near prompts poorly (AUC {chosen.auc:.2f})")
    if found.loc_near.value is not None and found.loc_near.value < KEEP:
        limits.append(f"{percent(1 - found.loc_near.value)} of near prompts change their answer")
    if found.ordinary_opened is not None and found.ordinary_opened > ORDINARY:
        limits.append(f"the gate lets {percent(found.ordinary_opened)} of ordinary prompts through")
    return limits


def _unknown(found: Learned) -> list[str]:
    if found.known is None or found.known >= KNOW:
        return []
    return [
        f"the base knows too few of the probe facts ({percent(found.known)} preferred to a wrong answer, 50 % by "
        "chance), so these figures say little about facts it does know"
    ]


def percent(share: float | None) -> str:
    """A share in words; a dash where nothing was measured."""
    return "-" if share is None else f"{100 * share:.0f} %"

"""Examine a base: look at its layers, learn probe edits where the gate does best, judge.

Progress is yielded and the report returned. What the base itself is to blame for ends up in the verdict; memory that
runs out and options that do not fit are raised.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from wisecli.data.pool import Pool
from wisecli.doctor.layers import candidate_layers, entries_at, gate_figures, probe_layer, why
from wisecli.doctor.probes import Probes, probe_edits
from wisecli.doctor.report import UNSUPPORTED, Candidate, DoctorReport, Learned, Verdict, judge
from wisecli.doctor.trial import learn_probes
from wisecli.editing.config import EditConfig
from wisecli.errors import ModelError
from wisecli.evaluation.asking import Progress, Steps
from wisecli.evaluation.environment import describe_base, environment, peak_memory
from wisecli.models.base import Base, dtype_name
from wisecli.models.prompts import PromptEncoder
from wisecli.models.site import decoder_layers, find_site

_CLOSE = 0.02  # a layer whose AUC is at most this much below the best is worth learning at, too
_LEARNED = 2  # layers at most at which probe edits are learned


@dataclass(frozen=True)
class DoctorOptions:
    """How to examine.

    Attributes:
        layers: to look at; some from the middle up when empty.
        edits: how many probe edits to learn.
        seed: of the probe edits, and of the run that is described.
        chat: render prompts with the base's chat template; None for where it has one.
        extra_pool: more ordinary prompts to calibrate on, as for `wise edit`.
    """

    layers: tuple[int, ...] = ()
    edits: int = 12
    seed: int = 0
    chat: bool | None = None
    extra_pool: Sequence[str] = ()


def examine(base: Base, options: DoctorOptions | None = None) -> Steps[DoctorReport]:
    """Find out what editing this base would be like.

    Args:
        base: loaded base; only read.
        options: how to examine.

    Raises:
        UsageError: a layer that does not exist, a number of edits out of range, or no chat template.
    """
    return (yield from _Examination(base, options or DoctorOptions()).run())


class _Examination:
    """One examination in progress."""

    def __init__(self, base: Base, options: DoctorOptions) -> None:
        self.base, self.options = base, options
        templated = bool(getattr(base.tokenizer, "chat_template", None))
        self.chat = templated if options.chat is None else options.chat
        self.encoder = PromptEncoder(base.tokenizer, chat=self.chat)
        self.probes: Probes = probe_edits(options.edits, options.seed)
        self.pool: Pool = self.probes.pool(options.extra_pool)
        self.seconds: dict[str, float] = {}

    def run(self) -> Steps[DoctorReport]:
        try:
            layers = candidate_layers(len(decoder_layers(self.base.model)), self.options.layers)
            if not self.options.layers:
                layers = tuple(sorted({*layers, find_site(self.base.model).layer}))
        except (ModelError, AttributeError) as e:
            return self._report((), None, Verdict(UNSUPPORTED, (why(e),)))
        found = {c.layer: c for c in (yield from self._probe(layers))}
        entries = yield from self._gates(found)
        ranked = sorted((c for c in found.values() if c.auc is not None), key=lambda c: (-(c.auc or 0.0), -c.layer))
        for c in ranked[:_LEARNED]:
            if (ranked[0].auc or 0.0) - (c.auc or 0.0) <= _CLOSE:
                found[c.layer] = yield from self._learn(c, entries[c.layer])
        learned = [found[c.layer] for c in ranked if found[c.layer].learned is not None]
        chosen = max(learned, key=lambda c: c.learned.score if c.learned else 0.0, default=None)
        candidates = tuple(found[layer] for layer in layers)
        return self._report(candidates, chosen, judge(candidates, chosen))

    def _probe(self, layers: Sequence[int]) -> Steps[list[Candidate]]:
        started, out = time.perf_counter(), []
        for i, layer in enumerate(layers):
            yield Progress("layers", i, len(layers))
            out.append(probe_layer(self.base, layer, self.encoder))
        self.seconds["layers"] = time.perf_counter() - started
        return out

    def _gates(self, found: dict[int, Candidate]) -> Steps[dict[int, Tensor]]:
        """Put the gate's figures into the candidates; gives what the pool's prompts bring into each layer."""
        layers = [layer for layer, c in found.items() if c.site is not None]
        if not layers:
            return {}
        started = time.perf_counter()
        try:
            entries = yield from entries_at(self.base, self.encoder, layers, self.pool.prompts)
        except Exception as e:
            found |= {layer: replace(found[layer], reason=why(e)) for layer in layers}
            return {}
        self.seconds["pool"] = time.perf_counter() - started
        for i, (layer, h) in enumerate(entries.items()):
            yield Progress("gates", i, len(layers))
            found[layer] = self._gate(found[layer], h)
        self.seconds["gates"] = time.perf_counter() - started - self.seconds["pool"]
        return entries

    def _gate(self, candidate: Candidate, h: Tensor) -> Candidate:
        if not h.isfinite().all():
            dtype = dtype_name(h.dtype)
            return replace(candidate, reason=f"what enters layer {candidate.layer} is not finite in {dtype}")
        try:
            return replace(candidate, **gate_figures(h, self.pool, EditConfig().rank))  # type: ignore[arg-type]
        except Exception as e:
            return replace(candidate, reason=why(e))

    def _learn(self, candidate: Candidate, h: Tensor) -> Steps[Candidate]:
        started = time.perf_counter()
        config = self._config(candidate.layer)
        try:
            learned: Learned = yield from learn_probes(self.base, config, self.probes.stream, self.pool, h)
        except Exception as e:
            return replace(candidate, reason=why(e))
        self.seconds["learning"] = self.seconds.get("learning", 0.0) + time.perf_counter() - started
        return replace(candidate, learned=learned)

    def _config(self, layer: int) -> EditConfig:
        return EditConfig(layer=layer, seed=self.options.seed, chat=self.chat)

    def _report(self, candidates: tuple[Candidate, ...], chosen: Candidate | None, verdict: Verdict) -> DoctorReport:
        usable = chosen is not None and verdict.usable
        kinds = {r.id.rsplit("-", 1)[0] for r in self.probes.stream}
        return DoctorReport(
            base=describe_base(self.base, digest=False)
            | {
                "layers": getattr(self.base.model.config.get_text_config(), "num_hidden_layers", None),
                "chat_template": bool(getattr(self.base.tokenizer, "chat_template", None)),
            },
            candidates=candidates,
            layer=chosen.layer if chosen is not None else None,
            verdict=verdict,
            config=self._config(chosen.layer).to_json() if chosen is not None and usable else None,
            probes={"edits": len(self.probes.stream), "kinds": len(kinds), "pool_facts": len(self.probes.rest)},
            seconds={name: round(s, 3) for name, s in self.seconds.items()},
            memory=peak_memory(self.base),
            environment=environment(self.base),
        )

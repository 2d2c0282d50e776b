"""How the key gate finds its thresholds: the pool, the trial on it, scopes, and what must not move them."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from wisecli.data.pool import ALONE, Pool, PoolFact, pool_facts
from wisecli.data.records import EditRecord
from wisecli.data.stream import EditStream, read_edits
from wisecli.editing.config import EditConfig
from wisecli.editing.editor import Editor
from wisecli.errors import UsageError
from wisecli.memory import calibration
from wisecli.memory.calibration import SCOPES, Trial, key_calibration, key_threshold, try_facts, try_on_pool
from wisecli.memory.keys import KeySpace
from wisecli.memory.lookup import SHARE, alike
from wisecli.memory.shard import Gate
from wisecli.models.base import Base

NONE = torch.zeros(0)
quick = settings(deadline=None, max_examples=40)


def vectors(n: int, seed: int, r: int = 6) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(n, r, generator=torch.Generator().manual_seed(seed)), dim=-1)


EDITS = 100  # stood in at a time


def trial_of(near: torch.Tensor) -> Trial:
    return Trial(torch.full((10,), 0.9), near, EDITS)


# -- the pool ----------------------------------------------------------------------------------------------------------


def test_the_shipped_facts_have_several_wordings_and_no_wording_twice() -> None:
    facts = pool_facts()
    assert len(facts) > 500
    assert all(len(set(f.prompts)) >= 2 for f in facts)
    wordings = [p for f in facts for p in f.prompts]
    assert len(set(wordings)) == len(wordings)


def test_no_demonstration_edit_is_about_a_fact_of_the_pool() -> None:
    """Else what the gate is calibrated on would be what it is measured on."""
    edits = read_edits(Path(__file__).parents[1] / "examples" / "edits.jsonl").records
    assert not {r.subject for r in edits} & {f.subject for f in pool_facts()}
    asked = {p for r in edits for p in (r.prompt, *r.rephrases, *(probe.prompt for probe in r.locality))}
    assert not asked & set(Pool.of().prompts)


def test_a_pool_of_ones_own_has_wordings_between_tabs() -> None:
    fact = PoolFact("Malta", "capital", "Valletta", ("Capital of Malta?", "Malta is ruled from"))
    pool = Pool.of(["one\tother way", "alone", "  \t ", "Capital of Malta?"], facts=[fact])
    groups = dict(zip(pool.prompts, pool.group, strict=True))
    assert groups["one"] == groups["other way"] != ALONE
    assert groups["Capital of Malta?"] == groups["Malta is ruled from"] != groups["one"]
    assert groups["alone"] == ALONE
    assert "" not in groups
    assert len(pool.prompts) == len(set(pool.prompts))


# -- the trial ---------------------------------------------------------------------------------------------------------


def slow_trial(v: torch.Tensor, group: list[int], facts: list[int]) -> tuple[list[float], list[float]]:
    """The trial written out one prompt and one key at a time."""
    edits, rest = facts[::2], facts[1::2]
    keys = {g: group.index(g) for g in edits}
    outside = [i for i, g in enumerate(group) if g not in edits]
    near_by = alike(v, v)
    crowd = {g: max(float(near_by[k, i]) for i in outside) for g, k in keys.items()}
    inside = [
        max(float(near_by[i, k]) - SHARE * crowd[g] for g, k in keys.items())
        for i, own in enumerate(group)
        if own in edits and i != keys[own]
    ]
    near = []
    for q in (i for i in outside if group[i] in rest):
        others = [i for i in outside if group[i] != group[q]]
        near.append(max(float(near_by[q, k] - SHARE * near_by[k, others].max()) for k in keys.values()))
    return inside, near


@given(st.lists(st.integers(-1, 7), min_size=12, max_size=30), st.integers(0, 1000), st.integers(1, 3))
@quick
def test_the_trial_is_what_it_says(group: list[int], seed: int, step: int) -> None:
    group = [*group, 0, 0, 1, 1, 3, 3, ALONE]  # somebody stands outside whatever is tried
    facts = sorted({g for g in group if g != ALONE})[::step]
    v = vectors(len(group), seed)
    assume(len(facts) > 1)  # one stands in for an edit, one is near it
    trial = try_facts(v, torch.tensor(group), torch.tensor(facts))
    inside, near = slow_trial(v, group, facts)
    torch.testing.assert_close(trial.inside, torch.tensor(inside))
    torch.testing.assert_close(trial.near, torch.tensor(near))
    assert trial.edits == len(facts[::2])


def test_no_fact_is_tried_in_a_space_that_has_seen_it(monkeypatch: pytest.MonkeyPatch) -> None:
    h, group = (
        torch.randn(70, 12, generator=torch.Generator().manual_seed(0)),
        torch.cat([torch.arange(30).repeat_interleave(2), torch.full((10,), ALONE)]),
    )
    fit, fitted, tried = KeySpace.fit, [], []

    def fitting(rows: torch.Tensor, of: torch.Tensor, *more: Any) -> KeySpace:
        assert torch.equal(rows, h[torch.isin(group, of)])
        fitted.append(set(of.tolist()))
        return fit(rows, of, *more)

    def trying(v: torch.Tensor, of: torch.Tensor, facts: torch.Tensor) -> Trial:
        tried.append(facts.tolist())
        return try_facts(v, of, facts)

    monkeypatch.setattr(calibration.KeySpace, "fit", fitting)
    monkeypatch.setattr(calibration, "try_facts", trying)
    trial = try_on_pool(h, group, 8)
    assert len(fitted) == len(tried) > 1
    for seen, facts in zip(fitted, tried, strict=True):
        assert not seen & set(facts)
        assert seen | set(facts) == {*range(30), ALONE}
    assert sorted(f for facts in tried for f in facts) == list(range(30))  # each is tried once
    stood_in = [f for facts in tried for f in facts[::2]]
    assert len(trial.inside) == len(stood_in)  # the other of its two wordings
    assert len(trial.near) == 2 * (30 - len(stood_in))
    assert trial.edits == len(stood_in) // len(tried)


def test_a_pool_without_wordings_gives_an_empty_trial() -> None:
    trial = try_on_pool(vectors(5, 0), torch.full((5,), ALONE), 4)
    assert not len(trial.inside)
    assert not len(trial.near)
    assert key_threshold(trial, 10, NONE, NONE, NONE, "balanced") == 0


def test_a_gate_survives_its_file(tmp_path: Path) -> None:
    h, group = torch.randn(70, 12, generator=torch.Generator().manual_seed(0)), torch.arange(70) // 3
    gate = Gate.fit(h, group, 8)
    assert len(gate.trial.inside)
    gate.save(tmp_path / "gate.safetensors")
    back = Gate.load(tmp_path / "gate.safetensors")
    assert (back.space.rank, back.trial.edits) == (gate.space.rank, gate.trial.edits) == (8, 3)
    for name in ("pool", "group", "space.mean", "space.projection", "trial.inside", "trial.near"):
        one, two = attrgetter(name)(gate), attrgetter(name)(back)
        assert one.dtype == two.dtype
        assert torch.equal(one, two)
    assert torch.equal(back.space(h), gate.space(h))
    back.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "gate.safetensors").read_bytes()


# -- thresholds --------------------------------------------------------------------------------------------------------


@given(st.integers(0, 1000), st.sampled_from(sorted(SCOPES)))
@quick
def test_no_more_near_prompts_pass_than_the_scope_states(seed: int, scope: str) -> None:
    near = torch.rand(2000, generator=torch.Generator().manual_seed(seed))
    epsilon = key_threshold(trial_of(near), EDITS, NONE, NONE, NONE, scope)
    assert float((near > epsilon).float().mean()) <= SCOPES[scope].near + 1e-3


def test_a_wider_scope_has_a_lower_threshold() -> None:
    g = torch.Generator().manual_seed(0)
    near, ordinary, hard, own = (torch.rand(500, generator=g) * top for top in (0.6, 0.3, 0.7, 1.0))
    found = [key_threshold(trial_of(near), EDITS, ordinary, hard, own, s) for s in ("narrow", "balanced", "wide")]
    assert found == sorted(found, reverse=True)
    assert len(set(found)) == 3


@given(st.integers(0, 1000), st.sampled_from(sorted(SCOPES)), st.integers(1, 40))
@quick
def test_a_side_memory_of_more_edits_lets_as_few_near_prompts_pass(seed: int, scope: str, times: int) -> None:
    """A near prompt that meets `times` as many keys scores as the best of that many trials."""
    near = torch.rand(20000, generator=torch.Generator().manual_seed(seed))
    epsilon = key_threshold(trial_of(near), EDITS * times, NONE, NONE, NONE, scope)
    kept = (1 - SCOPES[scope].near) ** (1 / times)
    assert epsilon == pytest.approx(float(near.quantile(kept)), abs=1e-5)
    passing = float((near > epsilon).float().mean())
    assert 1 - (1 - passing) ** times <= SCOPES[scope].near + 5e-3
    fewer = key_threshold(trial_of(near), max(1, EDITS // times), NONE, NONE, NONE, scope)
    assert fewer == key_threshold(trial_of(near), EDITS, NONE, NONE, NONE, scope) <= epsilon


def test_ordinary_prompts_alone_can_raise_the_threshold() -> None:
    near, ordinary = torch.linspace(0, 0.4, 1000), torch.linspace(0, 0.8, 1000)
    assert key_threshold(trial_of(near), EDITS, ordinary, NONE, NONE, "balanced") > 0.79
    assert key_threshold(trial_of(near), EDITS, NONE, NONE, NONE, "balanced") < 0.4


def test_an_edit_that_is_out_of_line_does_not_move_the_gate() -> None:
    near, hard = torch.linspace(0, 0.5, 1000), torch.linspace(0, 0.9, 100)
    in_scope = torch.full((100,), 0.9)
    usual = key_threshold(trial_of(near), EDITS, NONE, hard, in_scope, "balanced")
    assert usual > 0.7  # hard negatives raise it
    in_scope[7] = -0.4
    assert key_threshold(trial_of(near), EDITS, NONE, hard, in_scope, "balanced") == pytest.approx(usual, abs=1e-3)
    # edits out of reach altogether: hard negatives decide nothing, the trial still does
    assert key_threshold(trial_of(near), EDITS, NONE, hard, torch.full((9,), -1.0), "balanced") >= 0.48


def test_the_statistics_state_what_each_scope_lets_pass() -> None:
    near, ordinary = torch.linspace(0, 0.5, 1001), torch.linspace(0, 0.2, 501)
    made = key_calibration(trial_of(near), EDITS, ordinary, NONE, torch.full((5,), 0.9), "wide")
    assert made.epsilon == made.statistics["scopes"]["wide"]["epsilon"]
    for name, s in made.statistics["scopes"].items():
        assert s["near_opened"] == pytest.approx(SCOPES[name].near, abs=2e-3)
        assert s["hard_opened"] is None
        assert s["wordings_routed"] == 1.0
    assert made.statistics["scope"] == "wide"


def test_an_unknown_scope_is_refused_with_those_there_are() -> None:
    with pytest.raises(UsageError, match="huge") as e:
        key_threshold(trial_of(NONE), EDITS, NONE, NONE, NONE, "huge")
    assert all(name in str(e.value.hint) for name in SCOPES)


def test_a_run_knows_which_prompts_of_its_pool_are_wordings_of_one_another(
    tiny_model: Callable[..., Any], tokenizer: Any
) -> None:
    """The gate is fitted on them, so another grouping is another run."""
    stream = EditStream.of([EditRecord("a", "Where is Rome?", "Italy")])
    pools = (["one\tother", "third"], ["one", "other\tthird"])
    base = Base(tiny_model("llama"), tokenizer, "tiny")
    digests = [Editor(base, EditConfig(), extra_pool=p).describe(stream)["pool"] for p in pools]
    assert digests[0] != digests[1]

"""What the gate reads and how it compares: the study behind the key router's choices, on the demonstration base.

Every prompt of a stream of edits is run once through the frozen base. All variants of the gate are then computed from
what was captured: how strongly a learned delta reacts (the activation router), and how near a prompt is to the edits'
keys, with each choice of the key router changed on its own. A variant is judged by how well it tells rephrases from
near prompts, and by which wordings it routes at the threshold where 2 % of the near prompts pass. That threshold is set
on the very probes, so that variants compare at the same cost; the product's own threshold knows no probe. `--generate`
asks for free answers too, through `evaluate`, with the gate always open: a gate's scores follow from its routes, since
unrouted prompts keep the base's answer.

    python benchmarks/router.py --edits 100 --seed 8 --generate --out study.json

Shapes: `N` prompts, `P` of them of the pool, `D` model width, `F` FFN width, `L` layers, `n` keys, `S` content tokens.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Column, Table
from router_prompts import Captured, Material, Stream, capture, gather, halves, lay_out, relation_of
from torch import Tensor

from wisecli.data.pool import ALONE
from wisecli.data.records import EditRecord
from wisecli.data.stream import EditStream
from wisecli.editing.config import SCHEDULES, EditConfig
from wisecli.editing.editor import Editor
from wisecli.editing.merge import merge_shards
from wisecli.evaluation.evaluate import EvalOptions, evaluate
from wisecli.evaluation.metrics import auc, mean
from wisecli.evaluation.questions import SCORES, Item
from wisecli.memory.keys import KeySpace, to_int8
from wisecli.memory.lookup import SHARE, alike
from wisecli.memory.side_memory import SideMemory
from wisecli.models.base import Base, load_base
from wisecli.models.prompts import PromptEncoder
from wisecli.models.site import EditSite

PASSED = 0.02  # share of near prompts that may pass
ALWAYS = -1e9  # a threshold that everything passes
NEAR, REPHRASES = ("relation", "subject"), ("question", "statement")
AGAINST = ("unrelated", "relation", "subject", "swapped")
WORDINGS = ("edit", "question", "statement", "cloze", "before", "after", "lower", "typo", "prefix")
OPENED = ("near", "swapped", "earlier", "unrelated", "near, prefix", "unrelated, prefix")
TEMPLATE = (
    "{% for m in messages %}{{ m.role.capitalize() }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


@dataclass(frozen=True)
class Reading:
    """One way to make keys and to compare with them; the defaults are the product's.

    Attributes:
        what: "last" content token of the residual stream, their "mean", the best of "all" of them, or "a" for the FFN
            activation of the last one.
        layer: whose input the residual stream is; None for the edit site's.
        space: "fisher" as in `KeySpace`, "whitened" by the covariance of the pool's prompts, or only "centred".
        rank: directions kept at most.
        forms: of which prompts an edit has keys.
        crowding: share of an edit's crowding that is taken off.
        cosine: compare by the cosine instead of by Euclidean distance, which in a fisher space is the Mahalanobis
            distance under the spread of wordings about their fact, in a whitened one under that of prompts.
    """

    what: str = "last"
    layer: int | None = None
    space: str = "fisher"
    rank: int = 128
    forms: tuple[str, ...] = ("edit", "context")
    crowding: float = SHARE
    cosine: bool = False


MORE_KEYS, MORE = "keys: with paraphrases", ("edit", "context", "paraphrase")
READINGS: dict[str, Reading] = {
    "default": Reading(),
    **{f"input of layer {i}": Reading(layer=i) for i in (0, 1, 2, 3, 4, 6)},
    "mean of content tokens": Reading("mean"),
    "best content token": Reading("all"),
    "FFN activation, centred": Reading("a", space="centred"),
    "FFN activation, whitened 512": Reading("a", space="whitened", rank=512),
    "FFN activation, fisher 128": Reading("a"),
    "FFN activation, fisher 512": Reading("a", rank=512),
    "centred": Reading(space="centred"),
    "centred, no crowding": Reading(space="centred", crowding=0.0),
    "whitened 64": Reading(space="whitened", rank=64),
    "whitened 128": Reading(space="whitened", rank=128),
    "whitened 256": Reading(space="whitened", rank=256),
    "fisher 64": Reading(rank=64),
    "fisher 256": Reading(rank=256),
    "fisher 64, cosine": Reading(rank=64, cosine=True),
    "fisher 128, cosine": Reading(cosine=True),
    "fisher 256, cosine": Reading(rank=256, cosine=True),
    "fisher 128, cosine, no crowding": Reading(cosine=True, crowding=0.0),
    "centred, cosine": Reading(space="centred", cosine=True),
    "whitened 256, cosine": Reading(space="whitened", rank=256, cosine=True),
    "best content token, cosine": Reading("all", cosine=True),
    "keys: prompt alone": Reading(forms=("edit",)),
    MORE_KEYS: Reading(forms=MORE),
    "no crowding": Reading(crowding=0.0),
    "full crowding": Reading(crowding=1.0),
    "paraphrases, no crowding": Reading(forms=MORE, crowding=0.0),
}
FEW = ("default", "centred, cosine", "fisher 64", "fisher 256", "fisher 128, cosine", "best content token", MORE_KEYS)
HALVED = (*(n for n in FEW if n != "best content token"), "whitened 256")

# -- scores ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scored:
    """The largest score of each row [N] and, where the gate names one, the edit it belongs to [N]."""

    best: Tensor
    edit: Tensor | None = None


def score_keys(
    m: Material, c: Captured, r: Reading, site: EditSite, kept: Tensor | None = None, live: Tensor | None = None
) -> Scored:
    """Scores of a key gate.

    Args:
        kept: prompts of the pool that there are [P]; all when None.
        live: edits that have keys [E]; all when None.
    """
    kept = torch.ones(len(m.pool), dtype=torch.bool) if kept is None else kept
    x = c.a if r.what == "a" else c.entries[:, site.layer if r.layer is None else r.layer]
    if r.what == "mean":
        sums = torch.zeros_like(x).index_add_(0, c.row, c.tokens.float())
        x = sums / c.row.bincount(minlength=len(x))[:, None]
    asked, row = (c.tokens.float(), c.row) if r.what == "all" else (x, torch.arange(len(x)))
    space = fit_space(x[m.pool[kept]], m.group[kept], r)
    at, owner = (torch.cat([side[f] for f in r.forms]) for side in (m.at, m.edit))
    if live is not None:
        at, owner = at[live[owner]], owner[live[owner]]
    keys = _place(space, x[at], r)
    first = torch.zeros(int(m.edit["edit"].max()) + 1, dtype=torch.long)  # an edit's bare prompt comes first
    first.scatter_reduce_(0, owner, torch.arange(len(owner)), "amin", include_self=False)
    ordinary = torch.isin(row, m.pool[kept & m.ordinary])
    crowd = torch.cat(
        [_alike(_place(space, o, r), keys[first], r).max(0).values[None] for o in asked[ordinary].split(4096)]
    )
    best, edit = torch.full((len(x),), -torch.inf), torch.zeros(len(x), dtype=torch.long)
    off = r.crowding * crowd.max(0).values[owner]
    for q, of in zip(asked.split(4096), row.split(4096), strict=True):
        value, k = (_alike(_place(space, q, r), keys, r) - off).max(1)
        best.scatter_reduce_(0, of, value, "amax")
        winner = value == best[of]
        edit[of[winner]] = owner[k[winner]]
    return Scored(best, edit)


def fit_space(h: Tensor, group: Tensor, r: Reading) -> KeySpace:
    """The key space of a reading; without groups `KeySpace` whitens."""
    if r.space == "centred":
        return KeySpace(h.mean(0).half(), *to_int8(torch.eye(h.shape[1]), 0))
    return KeySpace.fit(h, group if r.space == "fisher" else torch.full_like(group, ALONE), r.rank)


def _place(space: KeySpace, x: Tensor, r: Reading) -> Tensor:
    return F.normalize(space(x), dim=-1) if r.cosine else space(x)


def _alike(z: Tensor, keys: Tensor, r: Reading) -> Tensor:
    return z @ keys.T if r.cosine else alike(z, keys)


def both(m: Material, a: Tensor, b: Tensor) -> dict[str, Scored]:
    """Two scores as one: their sum, and the lower of the two, in standard deviations of ordinary prompts."""
    ordinary = m.pool[m.ordinary]
    a, b = ((x - x[ordinary].mean()) / x[ordinary].std() for x in (a, b))
    return {"key + activation": Scored(a + b), "key and activation": Scored(torch.minimum(a, b))}


# -- figures -----------------------------------------------------------------------------------------------------------


def figures(m: Material, s: Scored, live: Tensor | None = None, threshold: float | None = None) -> dict[str, Any]:
    """AUC of rephrases against each kind of prompt that must not pass, and the share of each kind routed.

    Args:
        live: edits whose prompts count [E]; all when None.
        threshold: the one that `PASSED` of the near prompts pass when None.
    """
    at = {k: v if live is None else v[live[m.edit[k]]] for k, v in m.at.items()}
    got = {k: s.best[v] for k, v in at.items()}
    rephrases, near = (torch.cat([got[k] for k in kinds]) for kinds in (REPHRASES, NEAR))
    got["near"] = near
    threshold = float(near.quantile(1 - PASSED)) if threshold is None else threshold
    out: dict[str, Any] = {
        "auc": {k: auc(rephrases.tolist(), got[k].tolist()) for k in (*AGAINST, "near")},
        "threshold": threshold,
        "rephrases": float((rephrases > threshold).float().mean()),
        "routed": {k: float((got[k] > threshold).float().mean()) for k in (*WORDINGS, *OPENED)},
    }
    if s.edit is not None:
        mine = {k: v if live is None else v[live[v]] for k, v in m.edit.items()}
        out["own edit"] = float(torch.cat([s.edit[at[k]] == mine[k] for k in REPHRASES]).float().mean())
    return out


def leave_relations_out(m: Material, c: Captured, stream: Stream, editor: Editor) -> dict[str, dict[str, Any]]:
    """The pool with and without the relations of the edits tried: each half of the relations in turn, averaged."""
    of, half = relation_of(editor.pool.prompts), halves()
    out: dict[str, dict[str, Any]] = {}
    for name in HALVED:
        whole, foreign = READINGS[name], tuple(f.replace("paraphrase", "foreign") for f in READINGS[name].forms)
        tried: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for side in (0, 1):
            live = torch.tensor([half[k] == side for k in stream.relations])
            unlike = torch.tensor([k is None or half[k] != side for k in of])
            with_them = score_keys(m, c, whole, editor.site, live=live)
            without = score_keys(m, c, replace(whole, forms=foreign), editor.site, unlike, live)
            tried["relations in the pool"].append(figures(m, with_them, live))
            tried["not in it"].append(figures(m, without, live))
        out |= {f"{name}, {label}": _average(sides) for label, sides in tried.items()}
    return out


def _average(found: Sequence[Any]) -> Any:
    if isinstance(found[0], dict):
        return {k: _average([f[k] for f in found]) for k in found[0]}
    return mean(found)


# -- answers -----------------------------------------------------------------------------------------------------------


def learn(editor: Editor, records: Sequence[EditRecord], path: Path | None) -> SideMemory:
    """A side memory of the edits; read from `path` where it is there, else written to it."""
    if path is not None and path.exists():
        return SideMemory.load(path)
    stream = EditStream.of(records)
    sm = merge_shards(editor.learn(stream), editor.gate, editor.describe(stream), upper=editor.upper)
    if path is not None:
        sm.save(path)
    return sm


def answers(
    base: Base, sm: SideMemory, stream: Stream, m: Material, gates: Mapping[str, Scored]
) -> dict[str, dict[str, float | None]]:
    """Scores of free generation: as shipped, with the gate always open, and with each gate at its 2 % threshold."""
    edits = EditStream.of(stream.records)
    options = EvalOptions(open_gate=False, ability=False)
    ajar = replace(sm, memories=tuple(replace(x, epsilon={"key": ALWAYS}) for x in sm.memories))
    found = {
        f"{r} router as shipped": evaluate(base, edits, sm, options=options, router=r) for r in ("key", "activation")
    }
    out = {name: averages(report.items) for name, report in found.items()}
    items = evaluate(base, edits, ajar, options=options, router="key").items
    out["always open"] = averages(items)
    place, encoder = {r: i for i, r in enumerate(m.rows)}, PromptEncoder(base.tokenizer)
    for name, gate in gates.items():
        over = figures(m, gate)["threshold"]
        passed = [float(gate.best[place[encoder.prompt(i.question.prompt)]]) > over for i in items]
        out[name] = averages(
            [i if p else replace(i, exact=(i.exact[0], i.exact[0])) for i, p in zip(items, passed, strict=True)]
        )
    return out


def averages(items: Sequence[Item]) -> dict[str, float | None]:
    """Exact match of free generation by score."""
    return {name: mean([i.exact[1] for i in items if i.question.kind in kinds]) for name, kinds in SCORES.items()}


# -- command line ------------------------------------------------------------------------------------------------------


def study(base: Base, args: argparse.Namespace) -> dict[str, Any]:
    """All figures of one stream."""
    editor = Editor(base, EditConfig(schedule=args.schedule))
    stream = gather(editor, args.edits, args.seed)
    sm = None if args.no_learn else learn(editor, stream.records, args.side_memory)
    m = lay_out(stream, editor, editor.encoder)
    c = capture(base, editor.encoder, editor.site, m.rows, sm.memories[0].delta.dense() if sm else None)
    names = FEW if args.few else tuple(READINGS)
    gates = {name: score_keys(m, c, READINGS[name], editor.site) for name in names}
    if sm is not None:
        gates |= {name: Scored(x) for name, x in c.reactions.items()}
        gates |= both(m, gates["default"].best, c.reactions["activation, mean"])
    found = {name: figures(m, s) for name, s in gates.items()} | {"in a chat template": in_chat(base, stream, editor)}
    epsilon = sm.memories[0].epsilon if sm is not None else {}
    for name, router in (("default", "key"), ("activation, mean", "activation")):
        if router in epsilon:
            found[f"{name}, as shipped"] = figures(m, gates[name], threshold=epsilon[router])
    written = {t for _, t in stream.texts["paraphrase"]}
    rephrases = [t for k in REPHRASES for _, t in stream.texts[k]]
    return {
        "edits": args.edits,
        "left_out": args.edits - len(stream.records),
        "seed": args.seed,
        "schedule": args.schedule,
        "base": base.digest,
        "layer": editor.site.layer,
        "prompts": {k: len(v) for k, v in m.at.items()} | {"pool": len(m.pool), "distinct": len(m.rows)},
        "rephrases_among_paraphrases": mean([t in written for t in rephrases]),
        "variants": found,
        "leave_relations_out": {} if args.few else leave_relations_out(m, c, stream, editor),
        "answers": answers(base, sm, stream, m, gates) if sm is not None and args.generate else {},
        "epsilon": dict(epsilon),
    }


def in_chat(base: Base, stream: Stream, editor: Editor) -> dict[str, Any]:
    """The default gate with the pool, the keys and all that is asked inside a light chat template."""
    tokenizer = copy.deepcopy(base.tokenizer)
    tokenizer.chat_template = TEMPLATE
    encoder = PromptEncoder(tokenizer, chat=True)
    m = lay_out(stream, editor, encoder)
    return figures(m, score_keys(m, capture(base, encoder, editor.site, m.rows), Reading(), editor.site))


def show(console: Console, found: Mapping[str, Any], title: str, columns: Mapping[str, Sequence[str]]) -> None:
    """One table: a row per variant, a column per figure; `columns` maps a header to the path of its figure."""
    table = Table(Column("", no_wrap=True), *columns, title=title, title_justify="left")
    for name, figure in found.items():
        cells = []
        for path in columns.values():
            value: Any = figure
            for key in path:
                value = value.get(key) if value is not None else None
            cells.append("-" if value is None else f"{value:.3f}")
        table.add_row(name, *cells)
    console.print(table)


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("--edits", type=int, default=100)
    ap.add_argument("--seed", type=int, default=8, help="of the stream")
    ap.add_argument("--schedule", choices=SCHEDULES, default="rehearsal", help="by which the delta is learned")
    ap.add_argument("--few", action="store_true", help="the default and its runners-up only")
    ap.add_argument("--no-learn", action="store_true", help="leave the activation router out")
    ap.add_argument("--generate", action="store_true", help="also ask for free answers")
    ap.add_argument("--side-memory", type=Path, help="file to read the learned edits from, or to write them to")
    ap.add_argument("--out", type=Path)
    ap.add_argument("--threads", type=int, default=1)
    args = ap.parse_args()
    if args.generate and args.no_learn:
        ap.error("--generate asks a learned delta: leave --no-learn out")
    torch.set_num_threads(args.threads)
    start = time.process_time()
    report = study(load_base(device="cpu"), args)
    report["cpu_s"] = round(time.process_time() - start, 1)
    console = Console(width=200)
    separates = {k: ("auc", k) for k in (*AGAINST, "near")} | {
        "rephrases routed": ("rephrases",),
        "own edit": ("own edit",),
    }
    routes = {k: ("routed", k) for k in (*WORDINGS, *OPENED)}
    about = f"{args.edits} edits, seed {args.seed}"
    for found, which in (
        (report["variants"], about),
        (report["leave_relations_out"], f"{about}, half of the relations at a time"),
    ):
        if found:
            show(console, found, f"{which}: AUC of rephrases against", separates)
            show(console, found, f"{which}: routed where 2 % of near prompts pass", routes)
    if report["answers"]:
        show(console, report["answers"], f"{about}: exact match of free generation", {k: (k,) for k in SCORES})
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

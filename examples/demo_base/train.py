"""Train the demonstration base that ships inside the package (`wisecli/base`).

A 7-layer Llama (hidden 256, FFN 1024, 4 heads, 2 KV heads, tied 3,584-token byte-level BPE) learns the facts of
`facts/` from a fixed seed. Documents are `<s> prompt answer </s>`, packed into rows; the loss is weighted to the
answers. Matrices are optimised with Muon, everything else with Adam, both from torch. Facts the model already knows are
sampled less often. Two data-parallel processes of one thread each are faster on two cores than one process of two.

    python examples/demo_base/train.py --out wisecli/base            # about half an hour on 2 CPU cores

`--family gpt2` and `--family qwen2` train bases of other architectures on the same facts, to measure whether defaults
chosen on one base hold on another. They are not shipped.

It prints, and writes into the base card, the share of prompts answered exactly by free greedy generation: trained
phrasings, held-out phrasings, and the mixed question pool.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from card import write_card
from facts import Fact, load_facts, load_filler, load_questions
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
ROW = 160  # tokens per packed training row
PROMPT_WEIGHT, FILLER_WEIGHT = 0.08, 0.3
FAMILIES = ("llama", "gpt2", "qwen2")
KNOWN_RATE = 0.2  # how often a known item is drawn, relative to one that was answered wrongly


@dataclass(frozen=True)
class Doc:
    """One training document: token ids [n] and their loss weights [n]; `item` indexes what it teaches, -1 for
    filler."""

    ids: list[int]
    weights: list[float]
    item: int


def train_tokenizer(texts: list[str], vocab: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE that splits digits one by one and puts BOS in front."""
    tk = Tokenizer(models.BPE())
    tk.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tk.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tk.train_from_iterator(texts, trainer)
    tk.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tk, pad_token=PAD, bos_token=BOS, eos_token=EOS, padding_side="left", model_max_length=2048
    )


def biography(facts: list[Fact], rng: random.Random) -> str:
    """Everything known about one subject, as a short paragraph of statements."""
    parts = [f"{rng.choice([p for p in f.trained if not p.endswith('?')])} {f.answer}." for f in facts]
    rng.shuffle(parts)
    return " ".join(parts)


class Corpus:
    """The items to learn (prompt, answer) with what is known of them, and a seeded stream of packed rows."""

    def __init__(self, tok: PreTrainedTokenizerFast, facts: list[Fact], seed: int) -> None:
        self.tok, self.rng, self.filler = tok, random.Random(seed), load_filler()
        self.items = [(p, f.answer) for f in facts for p in f.trained]
        self.items += [(q, a) for q, a in load_questions() for _ in range(3)]
        self.known = [False] * len(self.items)
        self.subjects: dict[str, list[Fact]] = {}
        for fact in facts:
            self.subjects.setdefault(fact.subject, []).append(fact)
        self.several = [s for s, fs in self.subjects.items() if len(fs) > 1]
        self.encoded = [(self._encode(p), self._encode(" " + a)) for p, a in self.items]
        self.filler_ids = [self._encode(s) for s in self.filler]

    def _encode(self, text: str) -> list[int]:
        return self.tok.encode(text, add_special_tokens=False)

    def item_doc(self, i: int) -> Doc:
        prompt, answer = self.encoded[i]
        draw = self.rng.random()
        if draw < 0.15:  # an ordinary sentence first: the fact holds in context
            prompt = self.rng.choice(self.filler_ids) + self._encode(" " + self.items[i][0])
        elif draw < 0.20:
            prompt = self._encode(self.items[i][0].lower())
        ids = [1, *prompt, *answer, 2]
        return Doc(ids, [PROMPT_WEIGHT] * (1 + len(prompt)) + [1.0] * (len(answer) + 1), i)

    def free_doc(self) -> Doc:
        if self.rng.random() < 0.6 and self.several:
            text = biography(self.subjects[self.rng.choice(self.several)], self.rng)
        else:
            text = " ".join(self.rng.sample(self.filler, self.rng.randint(1, 3)))
        ids = [1, *self._encode(text), 2][:ROW]
        return Doc(ids, [FILLER_WEIGHT] * len(ids), -1)

    def docs(self) -> Iterator[Doc]:
        while True:
            order = [i for i in range(len(self.items)) if not self.known[i] or self.rng.random() < KNOWN_RATE]
            self.rng.shuffle(order)
            for i in order:
                yield self.item_doc(i)
                if self.rng.random() < 0.12:
                    yield self.free_doc()

    def batches(self, rows: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Packed rows: ids, loss weights and item numbers (-1 where none is predicted), each [rows, ROW]."""
        stream, left = self.docs(), None
        while True:
            ids = torch.zeros(rows, ROW, dtype=torch.long)
            weights, items = torch.zeros(rows, ROW), torch.full((rows, ROW), -1)
            for r in range(rows):
                at = 0
                while True:
                    doc = left or next(stream)
                    left = None
                    n = len(doc.ids)
                    if at + n > ROW:
                        left = doc
                        break
                    ids[r, at : at + n] = torch.tensor(doc.ids)
                    weights[r, at : at + n] = torch.tensor(doc.weights)
                    weights[r, at] = 0.0  # BOS is never predicted
                    if doc.item >= 0:
                        items[r, at : at + n] = torch.where(weights[r, at : at + n] == 1.0, doc.item, -1)
                    at += n
            yield ids, weights, items

    def learn(self, items: Tensor, right: Tensor) -> None:
        """Note which items had every answer token predicted; items and right are flat tensors of one batch."""
        for i in items.unique().tolist():
            self.known[i] = bool(right[items == i].all())


def build_model(family: str, vocab: int, layers: int, hidden: int, ffn: int) -> PreTrainedModel:
    """A randomly initialised model of the given shape; `FAMILIES` names the architectures."""
    shared: dict[str, Any] = {
        "vocab_size": vocab,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if family == "gpt2":
        shape = {"n_embd": hidden, "n_inner": ffn, "n_layer": layers, "n_head": 4, "n_positions": 2048}
        config = AutoConfig.for_model(family, **shape, **shared, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    else:
        shape = {"hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048}
        config = AutoConfig.for_model(family, **shape, **heads, **shared)
    return AutoModelForCausalLM.from_config(config)


def optimisers(model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    matrices = [p for p in model.parameters() if p.dim() == 2 and id(p) not in embeddings]
    rest = [p for p in model.parameters() if p.dim() != 2 or id(p) in embeddings]
    return [
        torch.optim.Muon(matrices, lr=lr, momentum=0.95, weight_decay=0.01, adjust_lr_fn="original"),
        torch.optim.Adam(rest, lr=lr / 5, betas=(0.9, 0.98)),
    ]


def step_loss(model: PreTrainedModel, ids: Tensor, weights: Tensor, items: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted cross-entropy of a packed batch; also, per supervised answer token, its item and whether it is right."""
    hidden = model.base_model(input_ids=ids).last_hidden_state[:, :-1]
    wanted = weights[:, 1:] > 0
    logits = model.lm_head(hidden[wanted])
    target, weight, item = ids[:, 1:][wanted], weights[:, 1:][wanted], items[:, 1:][wanted]
    losses = F.cross_entropy(logits.float(), target, reduction="none")
    taught = item >= 0
    right = (logits.argmax(-1) == target)[taught]
    return (losses * weight).sum() / weight.sum(), item[taught], right


@torch.no_grad()
def exact_match(model: PreTrainedModel, tok: PreTrainedTokenizerFast, pairs: list[tuple[str, str]]) -> float:
    """Share of prompts whose free greedy generation is the answer, nothing more."""
    right = 0
    pairs = sorted(pairs, key=lambda p: len(p[0]))
    for s in range(0, len(pairs), 256):
        batch = pairs[s : s + 256]
        enc = tok([p for p, _ in batch], return_tensors="pt", padding=True, return_token_type_ids=False)
        out = model.generate(**enc, max_new_tokens=24, do_sample=False)
        texts = tok.batch_decode(out[:, enc["input_ids"].shape[1] :], skip_special_tokens=True)
        right += sum(t.strip() == a for t, (_, a) in zip(texts, batch, strict=True))
    return right / max(1, len(pairs))


def measure(model: PreTrainedModel, tok: PreTrainedTokenizerFast, facts: list[Fact], share: float, seed: int) -> dict:
    rng = random.Random(seed)
    some = lambda pairs: [p for p in pairs if rng.random() < share]  # noqa: E731
    return {
        "trained": exact_match(model, tok, some([(p, f.answer) for f in facts for p in f.trained])),
        "held_out": exact_match(model, tok, some([(p, f.answer) for f in facts for p in f.held])),
        "questions": exact_match(model, tok, some(load_questions())),
    }


def schedule(progress: float) -> float:
    """Learning-rate factor: a short rise, flat, then linear to a twentieth over the last 40 %."""
    return min(1.0, progress / 0.02 + 0.05) if progress < 0.6 else max(0.05, (1.0 - progress) / 0.4)


def run(rank: int, world: int, args: argparse.Namespace) -> None:
    torch.set_num_threads(1 if world > 1 else max(1, os.cpu_count() or 1))
    if world > 1:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(args.port))
        dist.init_process_group("gloo", rank=rank, world_size=world)
    facts = load_facts()
    texts = [p + " " + f.answer for f in facts for p in f.trained]
    texts += [q + " " + a for q, a in load_questions()] * 3 + load_filler()
    tok = train_tokenizer(texts, args.vocab)
    torch.manual_seed(args.seed)
    model = build_model(args.family, len(tok), args.layers, args.hidden, args.ffn)
    corpus = Corpus(tok, facts, seed=args.seed * 1000 + rank)
    batches, opts = corpus.batches(args.rows), optimisers(model, args.lr)
    rates = [[g["lr"] for g in o.param_groups] for o in opts]
    start, tokens = time.time(), 0
    for step in range(args.steps):
        for opt, base in zip(opts, rates, strict=True):
            for group, lr in zip(opt.param_groups, base, strict=True):
                group["lr"] = lr * schedule(step / args.steps)
        ids, weights, items = next(batches)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            loss, item, right = step_loss(model, ids, weights, items)
        loss.backward()
        corpus.learn(item, right)
        if world > 1:
            flat = torch.cat([p.grad.flatten() for p in model.parameters()])
            dist.all_reduce(flat)
            for p, g in zip(model.parameters(), flat.split([p.numel() for p in model.parameters()]), strict=True):
                p.grad = g.view_as(p) / world
        for opt in opts:
            opt.step()
        model.zero_grad(set_to_none=True)
        tokens += int((weights > 0).sum()) * world
        if rank == 0 and (step % 50 == 0 or step == args.steps - 1):
            spent, known = time.time() - start, sum(corpus.known) / len(corpus.known)
            print(
                f"step {step} loss {loss.item():.3f} known {known:.3f} Mtok {tokens / 1e6:.2f} {spent:.0f}s", flush=True
            )
            if step % 500 == 0:
                print("  sample:", measure(model.eval(), tok, facts, 0.01, 1), flush=True)
                model.train()
    if rank == 0:
        finish(model, tok, facts, args, {"tokens": tokens, "seconds": round(time.time() - start)})
    if world > 1:
        dist.destroy_process_group()


def finish(
    model: PreTrainedModel, tok: PreTrainedTokenizerFast, facts: list[Fact], args: argparse.Namespace, cost: dict
) -> None:
    """Round to bf16, save, then measure what was saved."""
    args.out.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0, do_sample=False)
    model.to(torch.bfloat16).eval().save_pretrained(args.out)
    tok.save_pretrained(args.out)
    figures = measure(model.float(), tok, facts, args.measure, 2)
    figures |= cost | {
        "facts": len(facts),
        "relations": len({f.relation for f in facts}),
        "parameters": sum(p.numel() for p in model.parameters()),
        "questions_n": len(load_questions()),
        "measured_share": args.measure,
        "row": ROW,
        "seed": args.seed,
        "steps": args.steps,
    }
    (args.out / "figures.json").write_text(json.dumps(figures, indent=1, sort_keys=True) + "\n")
    if args.family == FAMILIES[0]:  # the card is the shipped base's
        write_card(args.out)
    print(json.dumps(figures), flush=True)


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("--out", type=Path, required=True)
    ap.add_argument("--family", choices=FAMILIES, default="llama")
    ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("--steps", type=int, default=1300)
    ap.add_argument("--rows", type=int, default=16, help="packed rows per process and step")
    ap.add_argument("--lr", type=float, default=0.02)
    ap.add_argument("--layers", type=int, default=7)
    ap.add_argument("--hidden", type=int, default=256)
    ap.add_argument("--ffn", type=int, default=1024)
    ap.add_argument("--vocab", type=int, default=3584)
    ap.add_argument("--measure", type=float, default=1.0, help="share of prompts asked at the end")
    ap.add_argument("--processes", type=int, default=2)
    ap.add_argument("--port", type=int, default=29577)
    ap.add_argument("--bf16", action="store_true", help="matrix products in bf16")
    args = ap.parse_args()
    if args.processes > 1:
        torch.multiprocessing.spawn(run, (args.processes, args), nprocs=args.processes)
    else:
        run(0, 1, args)


if __name__ == "__main__":
    main()

"""Bases, edit sites, the upper model and prompt encoding, against the models' own forward pass."""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import families
import pytest
import torch
import torch.nn.functional as F
from conftest import CHAT_TEMPLATE, FFN, KINDS, LAYERS, SITES, WIDTH, build_tokenizer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from wisecli.errors import InputError, ModelError, UsageError
from wisecli.models.base import fingerprint, load_base, matches
from wisecli.models.captured import StackedRows
from wisecli.models.prompts import ContentRule, PromptEncoder, Row, last_content
from wisecli.models.site import EditSite, auto_layer, find_site
from wisecli.models.upper import UpperModel, entries_at

TEXTS = [("the capital of France is", " Paris"), ("hello", " world hello world"), ("what who where", " when?")]
DTYPES = ("float32", "bfloat16", "float16")
each_kind = pytest.mark.parametrize("kind", KINDS)


def state_of(model: nn.Module) -> list[tuple[str, int, int, list[str]]]:
    """What hooks and patched methods would show in, per module."""
    return [
        (name, len(m._forward_hooks), len(m._forward_pre_hooks), sorted(k for k in m.__dict__ if k[0] != "_"))
        for name, m in model.named_modules()
    ]


# -- the edit site -----------------------------------------------------------------------------------------------------


@each_kind
def test_auto_finds_the_ffn_output_projection_in_layer_two_of_four(tiny_model: Any, kind: str) -> None:
    model = tiny_model(kind)
    site = find_site(model)
    assert site == EditSite(SITES[kind], 2, FFN, WIDTH, kind == "gpt2")
    assert site.weight(model).shape == (WIDTH, FFN)
    x = torch.randn(3, FFN)
    bias = getattr(site.module(model), "bias", None)
    torch.testing.assert_close(site.module(model)(x), F.linear(x, site.weight(model), bias), atol=1e-4, rtol=1e-4)


@each_kind
@pytest.mark.parametrize("layer", [0, "1", 3, -1, "-4"])
def test_an_asked_layer_is_taken_and_negative_ones_count_from_the_end(tiny_model: Any, kind: str, layer: Any) -> None:
    site = find_site(tiny_model(kind), layer)
    index = int(layer) % LAYERS
    assert site.layer == index
    assert site.path == SITES[kind].replace(".2.", f".{index}.")


@pytest.mark.parametrize("layer", [4, -5, "27", "last", "", "1.5"])
def test_a_layer_that_is_not_there_is_refused(tiny_model: Any, layer: Any) -> None:
    with pytest.raises(UsageError, match=r"layer"):
        find_site(tiny_model("llama"), layer)


@pytest.mark.parametrize(("n", "layer"), [(1, 0), (2, 0), (3, 1), (4, 2), (12, 10), (24, 20), (28, 24), (32, 27)])
def test_auto_is_the_papers_depth_with_a_layer_above(n: int, layer: int) -> None:
    assert auto_layer(n) == layer


def test_a_named_module_is_taken_with_its_layer(tiny_model: Any) -> None:
    site = find_site(tiny_model("llama"), module="model.layers.1.mlp.up_proj")
    assert (site.path, site.layer, site.d_in, site.d_out) == ("model.layers.1.mlp.up_proj", 1, WIDTH, FFN)
    assert find_site(tiny_model("llama"), layer=3, module="model.layers.1.mlp.down_proj").layer == 1


@pytest.mark.parametrize(
    "module",
    ["lm_head", "model.layers.9.mlp.down_proj", "nonsense", "model.layers.1.mlp", "model.layers.1.input_layernorm", ""],
)
def test_a_module_that_cannot_be_edited_is_refused(tiny_model: Any, module: str) -> None:
    with pytest.raises(ModelError, match=r"module|run") as e:
        find_site(tiny_model("llama"), module=module)
    assert e.value.hint


def test_a_module_that_is_no_linear_map_is_refused(tiny_model: Any) -> None:
    model = tiny_model("llama", fresh=True)
    find_site(model)
    handle = model.get_submodule(SITES["llama"]).register_forward_hook(lambda m, a, y: y * 1.01)
    with pytest.raises(ModelError, match="does not compute"):
        find_site(model)
    handle.remove()


def test_fused_experts_are_refused_by_name(tiny_model: Any) -> None:
    model = tiny_model("mixtral")
    with pytest.raises(ModelError, match=r"experts are fused \(.*experts\..*\)") as e:
        find_site(model)
    assert "Mixtral" in e.value.message


def mixed(dense: int) -> Any:
    """A mixture of fused experts with one dense layer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = families.tiny_config("qwen3_moe", 300).to_dict() | {"mlp_only_layers": [dense], "decoder_sparse_step": 1}
    config = AutoConfig.for_model(**config)
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def test_auto_takes_the_nearest_layer_that_can_be_edited_and_others_name_it() -> None:
    model = mixed(1)
    assert find_site(model).path == "model.layers.1.mlp.down_proj"
    for layer in (2, 3):
        with pytest.raises(ModelError, match=rf"model.layers.{layer} .*experts are fused") as e:
            find_site(model, layer)
        assert "--layer 1 (model.layers.1.mlp.down_proj)" in (e.value.hint or "")
    with pytest.raises(ModelError, match="experts are fused") as e:  # a gate before layer 0 sees a single token
        find_site(mixed(0))
    assert "--layer 0" in (e.value.hint or "")
    assert find_site(mixed(0), 0).layer == 0


def test_a_model_that_looks_ahead_is_refused(tokenizer: Any) -> None:
    model = families.tiny_model("bert", len(tokenizer))
    assert find_site(model).layer == 2
    for module in model.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = False
    model.config.is_decoder = False
    with pytest.raises(ModelError, match=r"BertLMHeadModel \(bert\) is not causal"):
        find_site(model)


def test_an_encoder_decoder_model_is_refused_by_its_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bart", "is_encoder_decoder": true}')
    with pytest.raises(ModelError, match=r"\(bart\) is an encoder-decoder model"):
        load_base(str(tmp_path))


@pytest.mark.parametrize("doing", ["looking for its FFN", "running its upper layers on their own"])
def test_what_an_architecture_raises_itself_is_said_with_its_name(
    tiny_model: Any, encoder: Any, monkeypatch: pytest.MonkeyPatch, doing: str
) -> None:
    model = tiny_model("llama", fresh=True)
    site = find_site(model)

    def fails(*args: Any, **kwargs: Any) -> Any:
        raise IndexError("no such head")

    monkeypatch.setattr(model.model.layers[3], "forward", fails)
    with pytest.raises(ModelError, match=rf"LlamaForCausalLM .*{doing} failed \(IndexError: no such head\)"):
        find_site(model) if "FFN" in doing else UpperModel(model, site, encoder)


@pytest.mark.parametrize("model_type", ["gemma4_text", "deepseek_v4", "openai-gpt"])
def test_upper_layers_replay_with_what_reaches_them_past_the_stream(
    tokenizer: Any, encoder: Any, model_type: str
) -> None:
    """Keys and values of lower layers; four residual streams; layers that return lists."""
    model = families.tiny_model(model_type, len(tokenizer))
    upper = UpperModel(model, find_site(model), encoder)
    families.assert_replays(upper)
    row, _ = captured = upper.capture([encoder.pair(*TEXTS[0]), encoder.pair(*TEXTS[1])])
    assert (row.beside is not None) == (model_type == "gemma4_text")
    both, alone = (upper.logits(StackedRows.of(some), None) for some in (captured, [row]))
    close(both[: len(alone)], alone, exact=False)  # a row is replayed with its own keys and values


def test_positions_that_generate_counts_otherwise_are_refused(tokenizer: Any, encoder: Any) -> None:
    model = families.tiny_model("roberta", len(tokenizer))
    with pytest.raises(ModelError, match="RobertaForCausalLM counts positions in generate otherwise"):
        UpperModel(model, find_site(model), encoder)


@each_kind
def test_finding_a_site_leaves_no_trace(tiny_model: Any, kind: str) -> None:
    model = tiny_model(kind)
    before = state_of(model)
    find_site(model)
    with pytest.raises(ModelError):
        find_site(model, module="nonsense")
    assert state_of(model) == before


# -- the upper model ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def beside(site: EditSite, model: nn.Module, delta: Tensor | None) -> Iterator[None]:
    """The whole model with a delta^T added to the projection's output."""
    if delta is None:
        yield
        return
    handle = site.module(model).register_forward_hook(lambda m, a, y: y + F.linear(a[0], delta).view_as(y))
    try:
        yield
    finally:
        handle.remove()


def full_logits(model: Any, site: EditSite, encoder: PromptEncoder, rows: list[Row], delta: Tensor | None) -> Tensor:
    batch = encoder.batch(rows, side="right")
    with beside(site, model, delta):
        logits = model(**batch.inputs, use_cache=False).logits
    return logits[:, :-1][batch.labels[:, 1:] != -100]


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets) + 1e-3 * logits.square().mean()


def rows_of(encoder: PromptEncoder) -> list[Row]:
    rows = [encoder.pair(p, t) for p, t in TEXTS]
    assert len({len(r) for r in rows}) == len(rows)  # different lengths, or padding is not tested
    return rows


def close(a: Tensor, b: Tensor, *, exact: bool) -> None:
    """Equal to 1e-5 of the largest entry; bit for bit where `exact`."""
    error = (a - b).abs().max().item()
    assert error == 0.0 if exact else error <= 1e-5 * (1 + b.abs().max().item()), error


@each_kind
@pytest.mark.parametrize("layer", ["auto", 0, 3])
@pytest.mark.parametrize("scale", [None, 0.0, 0.5], ids=["no delta", "zero delta", "random delta"])
def test_replayed_logits_and_gradient_are_the_whole_models(
    tiny_model: Any, encoder: Any, random_delta: Any, kind: str, layer: Any, scale: float | None
) -> None:
    model = tiny_model(kind)
    site = find_site(model, layer)
    upper = UpperModel(model, site, encoder)
    assert upper.additive == (kind != "gemma2")
    rows = rows_of(encoder)
    captured = upper.capture(rows)
    delta = None if scale is None else random_delta((site.d_out, site.d_in), scale=scale)
    if delta is None:
        want, got = full_logits(model, site, encoder, rows, None), upper.logits(StackedRows.of(captured), None)
        return close(got, want, exact=not upper.additive)
    one, two = delta.clone().requires_grad_(), delta.clone().requires_grad_()
    want = full_logits(model, site, encoder, rows, one)
    stacked = StackedRows.of(captured)
    got, targets = upper.logits(stacked, two), stacked.targets
    assert targets.tolist() == [t for r in rows for t in r.target]
    loss_of(want, targets).backward()
    loss_of(got, targets).backward()
    assert one.grad is not None
    assert one.grad.abs().max() > 1e-4  # there is something to compare
    close(got.detach(), want.detach(), exact=not upper.additive)
    close(two.grad / one.grad.abs().max(), one.grad / one.grad.abs().max(), exact=False)


@each_kind
def test_a_batch_is_captured_as_its_rows_are_alone_and_in_order(tiny_model: Any, encoder: Any, kind: str) -> None:
    model = tiny_model(kind)
    upper = UpperModel(model, find_site(model), encoder)
    rows = rows_of(encoder)
    together = upper.capture(rows, batch_size=2)
    for row, one in zip(rows, together, strict=True):
        (alone,) = upper.capture([row])
        assert one.ids.tolist() == list(row.ids)
        assert one.ids[1:][one.predicting].tolist() == list(row.target)
        assert torch.equal(one.content, alone.content)
        assert not one.content[len(row.prompt) :].any()
        close(one.a, alone.a, exact=False)
        close(one.stream, alone.stream, exact=False)
        assert torch.equal(one.last, one.a[len(row.prompt) - 1])


@each_kind
def test_rows_without_a_target_can_be_captured(tiny_model: Any, encoder: Any, kind: str) -> None:
    model = tiny_model(kind)
    site = find_site(model)
    (row,) = UpperModel(model, site, encoder).capture([encoder.prompt("hello world")])
    assert row.a.shape == (len(row.ids), FFN)
    seen = []
    handle = site.module(model).register_forward_hook(lambda m, a, y: seen.append(a[0].reshape(-1, FFN)))
    model(input_ids=row.ids[None], use_cache=False)
    handle.remove()
    close(row.a, seen[0], exact=False)


@each_kind
@pytest.mark.parametrize("layer", [0, 2])
def test_the_model_is_restored_also_after_an_exception(tiny_model: Any, encoder: Any, kind: str, layer: int) -> None:
    model = tiny_model(kind)
    before = state_of(model)
    site = find_site(model, layer)
    upper = UpperModel(model, site, encoder)
    captured = StackedRows.of(upper.capture(rows_of(encoder)))
    upper.logits(captured, torch.zeros(site.d_out, site.d_in))
    assert state_of(model) == before

    def fail(*args: Any) -> None:
        raise RuntimeError("on purpose")

    for module in (model.get_output_embeddings(), upper.layers[3], upper.layers[0]):
        handle = module.register_forward_hook(fail)
        with contextlib.suppress(RuntimeError):
            upper.logits(captured, torch.zeros(site.d_out, site.d_in))
        with contextlib.suppress(RuntimeError):
            upper.capture(rows_of(encoder))
        handle.remove()
        assert state_of(model) == before
    with pytest.raises(RuntimeError):
        upper.logits(captured, torch.zeros(3, 3))
    assert state_of(model) == before


def test_a_forward_someone_else_put_on_a_layer_survives(tiny_model: Any, encoder: Any) -> None:
    """accelerate replaces `forward` on instances; it must be there afterwards and be used for the layers above."""
    model = tiny_model("llama", fresh=True)
    calls = []
    for i in (1, 3):
        layer = model.model.layers[i]
        layer.forward = lambda *a, _i=i, _old=layer.forward, **k: (calls.append(_i), _old(*a, **k))[1]
    kept = [model.model.layers[i].__dict__["forward"] for i in (1, 3)]
    upper = UpperModel(model, find_site(model), encoder)
    captured = StackedRows.of(upper.capture(rows_of(encoder)))
    calls.clear()
    upper.logits(captured, None)
    assert calls == [3]
    assert [model.model.layers[i].__dict__["forward"] for i in (1, 3)] == kept


def narrow_in(upper: UpperModel) -> list[str]:
    """Names, in the last layer, of what runs at supervised positions only."""
    names = {m: name for name, m in upper.layers[-1].named_modules()}
    return [names[m] for m in upper._narrow]


def test_the_last_ffn_sees_nothing_but_the_positions_that_predict(tiny_model: Any, encoder: Any) -> None:
    model = tiny_model("llama")
    upper = UpperModel(model, find_site(model), encoder)
    rows = rows_of(encoder)
    seen: list[int] = []
    handle = upper.layers[-1].mlp.down_proj.register_forward_hook(lambda m, a, y: seen.append(y[..., 0].numel()))
    upper.logits(StackedRows.of(upper.capture(rows)), None)
    handle.remove()
    assert seen == [sum(len(r.target) for r in rows)]


def test_a_last_ffn_that_mixes_positions_runs_on_all_of_them(tiny_model: Any, encoder: Any) -> None:
    model = tiny_model("llama", fresh=True)
    ffn = model.model.layers[-1].mlp
    alone = ffn.forward
    ffn.forward = lambda x: alone(x + F.pad(x, (0, 0, 1, -1)))
    site = find_site(model)
    upper = UpperModel(model, site, encoder)
    rows = rows_of(encoder)
    got = upper.logits(StackedRows.of(upper.capture(rows)), None)
    close(got, full_logits(model, site, encoder, rows, None), exact=False)
    assert narrow_in(upper) == []  # what attention gives out for the token before is used, too


@pytest.mark.parametrize(
    ("kind", "narrow"),
    [
        ("llama", ["mlp", "self_attn.q_proj", "self_attn.o_proj"]),
        ("gpt2", ["mlp", "attn.c_proj"]),  # queries, keys and values come out of one map
    ],
)
def test_what_reaches_no_prediction_from_elsewhere_runs_where_tokens_are_predicted(
    tiny_model: Any, encoder: Any, kind: str, narrow: list[str]
) -> None:
    model = tiny_model(kind)
    upper = UpperModel(model, find_site(model), encoder)
    assert narrow_in(upper) == narrow
    rows = StackedRows.of(upper.capture(rows_of(encoder)))
    logits, gradient, _ = upper._differentiated(rows)
    upper._narrow = ()
    want_logits, want, _ = upper._differentiated(rows)
    torch.testing.assert_close(logits, want_logits)
    torch.testing.assert_close(gradient, want, atol=1e-5 * float(want.abs().max()), rtol=0)


def test_an_upper_part_that_cannot_be_replayed_is_refused(tiny_model: Any, encoder: Any) -> None:
    model = tiny_model("llama", fresh=True)
    seen: list[Tensor] = []
    model.model.layers[0].register_forward_hook(lambda m, a, y: seen.append(y))  # state that crosses layers
    model.model.layers[3].register_forward_hook(lambda m, a, y: y + (seen.pop() if seen else 1.0))
    with pytest.raises(ModelError, match="cannot be run on their own"):
        UpperModel(model, find_site(model), encoder)


def test_the_model_is_not_told_of_padding(tiny_model: Any, encoder: Any) -> None:
    model = tiny_model("gpt2")
    upper = UpperModel(model, find_site(model), encoder)
    seen: list[dict[str, Any]] = []
    handle = model.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs), with_kwargs=True)
    rows = rows_of(encoder)
    upper.logits(StackedRows.of(upper.capture(rows)), None)
    list(entries_at(model, encoder, (1,), rows))
    handle.remove()
    assert len(seen) == 3
    for kwargs in seen:  # without any mask some models warn, with one of the padding attention makes its own
        assert kwargs["attention_mask"].shape == kwargs["input_ids"].shape
        assert kwargs["attention_mask"].all()


def test_half_precision_replays(tiny_model: Any, encoder: Any) -> None:
    model = tiny_model("llama", fresh=True).bfloat16()
    site = find_site(model)
    upper = UpperModel(model, site, encoder)
    delta = torch.zeros(site.d_out, site.d_in, requires_grad=True)  # fp32 delta on a bf16 base
    rows = StackedRows.of(upper.capture(rows_of(encoder)))
    loss_of(upper.logits(rows, delta).float(), rows.targets).backward()
    assert delta.grad.abs().max() > 0


# -- bases and fingerprints --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bf16_dir(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    """A bf16 checkpoint whose edited matrix also holds numbers too small for fp16."""
    from transformers import AutoModelForCausalLM

    path = tmp_path_factory.mktemp("bf16") / "base"
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.bfloat16)
    model.get_submodule(SITES["llama"]).weight.data[0, :8] = 1.3e-6 * torch.arange(1, 9)
    model.save_pretrained(path)
    for f in tiny_model_dir.glob("*token*"):
        shutil.copy(f, path)
    return path


@pytest.fixture(scope="module")
def weights(bf16_dir: Path) -> dict[str, Tensor]:
    loaded = {d: load_base(str(bf16_dir), dtype=d, device="cpu").model for d in DTYPES}
    return {d: m.get_submodule(SITES["llama"]).weight.detach() for d, m in loaded.items()}


@pytest.mark.parametrize(("recorded", "loaded"), list(itertools.product(DTYPES, DTYPES)))
def test_a_bf16_checkpoint_is_recognised_in_any_load_dtype(
    weights: dict[str, Tensor], recorded: str, loaded: str
) -> None:
    assert weights[loaded].dtype == getattr(torch, loaded)
    assert matches(weights[loaded], fingerprint(weights[recorded]))


@pytest.mark.parametrize(("recorded", "loaded"), list(itertools.product(DTYPES, DTYPES)))
def test_one_changed_weight_is_noticed(weights: dict[str, Tensor], recorded: str, loaded: str) -> None:
    changed = weights[loaded].clone()
    at = changed[3].abs().argmax()
    changed[3, at] *= 1 + 2**-6  # the least change bf16 can hold for certain
    assert not matches(changed, fingerprint(weights[recorded]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_least_change_in_the_same_dtype_is_noticed(weights: dict[str, Tensor], dtype: str) -> None:
    changed = weights[dtype].clone()
    changed[3, 5] = torch.nextafter(changed[3, 5], torch.tensor(9.0, dtype=changed.dtype))
    assert not matches(changed, fingerprint(weights[dtype]))


def test_a_fingerprint_is_json_and_layout_does_not_matter(weights: dict[str, Tensor]) -> None:
    w = weights["float32"]
    assert json.loads(json.dumps(fingerprint(w))) == fingerprint(w.T.contiguous().T)
    assert not matches(w, {})


def test_a_base_is_loaded_frozen_in_evaluation_mode(tiny_model_dir: Path) -> None:
    base = load_base(str(tiny_model_dir), device="cpu")
    assert not base.model.training
    assert not any(p.requires_grad for p in base.model.parameters())
    assert next(base.model.parameters()).dtype == torch.float32
    assert (base.name, base.revision, base.label) == (str(tiny_model_dir), None, str(tiny_model_dir))


def test_a_path_from_the_home_folder_is_found(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tiny_model_dir.parent))
    assert load_base(f"~/{tiny_model_dir.name}", device="cpu").model.config.hidden_size == WIDTH


@each_kind
def test_every_kind_saved_is_loaded_the_same(tiny_model: Any, tokenizer: Any, tmp_path: Path, kind: str) -> None:
    """Tied and optional weights are not mistaken for missing ones."""
    model = tiny_model(kind)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    ids = torch.arange(6, 12)[None]
    assert torch.equal(load_base(str(tmp_path), device="cpu").model(ids).logits, model(ids).logits)


@pytest.mark.parametrize(("option", "value"), [("dtype", "float8"), ("dtype", "fp32"), ("device", "gpu")])
def test_unknown_options_are_refused(tiny_model_dir: Path, option: str, value: str) -> None:
    with pytest.raises(UsageError, match=value):
        load_base(str(tiny_model_dir), **{option: value})


def _missing(path: Path) -> None:
    shutil.rmtree(path)


def _a_file(path: Path) -> None:
    shutil.rmtree(path)
    path.write_text("x")


def _no_config(path: Path) -> None:
    (path / "config.json").unlink()


def _bad_config(path: Path) -> None:
    (path / "config.json").write_text('{"model_type": "lla')


def _unknown_type(path: Path) -> None:
    (path / "config.json").write_text('{"model_type": "nonesuch"}')


def _no_weights(path: Path) -> None:
    (path / "model.safetensors").unlink()


def _cut_weights(path: Path) -> None:
    f = path / "model.safetensors"
    f.write_bytes(f.read_bytes()[: f.stat().st_size // 2])


def _empty_weights(path: Path) -> None:
    (path / "model.safetensors").write_bytes(b"")


def _lacks_a_matrix(path: Path) -> None:
    tensors = load_file(path / "model.safetensors")
    del tensors[SITES["llama"] + ".weight"]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def _wrong_shape(path: Path) -> None:
    tensors = load_file(path / "model.safetensors")
    tensors[SITES["llama"] + ".weight"] = torch.zeros(3, 3)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def _no_tokenizer(path: Path) -> None:
    for f in path.glob("*token*"):
        f.unlink()


def _bad_tokenizer(path: Path) -> None:
    (path / "tokenizer.json").write_text("{")


def _pickled(path: Path) -> None:
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()


@pytest.mark.parametrize(
    "damage",
    [
        _missing,
        _a_file,
        _no_config,
        _bad_config,
        _unknown_type,
        _no_weights,
        _cut_weights,
        _empty_weights,
        _lacks_a_matrix,
        _wrong_shape,
        _no_tokenizer,
        _bad_tokenizer,
        _pickled,
    ],
    ids=lambda f: f.__name__.strip("_"),
)
def test_a_base_that_cannot_be_loaded_is_a_model_error(
    tiny_model_dir: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    path = tmp_path / "base"
    shutil.copytree(tiny_model_dir, path)
    damage(path)
    with pytest.raises(ModelError) as e:
        load_base(str(path), device="cpu")
    assert str(path) in e.value.message
    assert e.value.hint
    assert "\n" not in e.value.message


# -- prompts -----------------------------------------------------------------------------------------------------------

awkward = [
    ("the capital of France is", "Paris"),
    ("the capital of France is", " Paris"),
    ("the capital of France is ", "Paris"),
    ("hello wor", "ld"),
    ("héllo ", "☃"),
    ("x", "y"),
    ("line\n", "next"),
]


@pytest.mark.parametrize(("prompt", "target"), awkward)
@pytest.mark.parametrize("chat", [False, True])
def test_the_prompt_is_a_token_prefix_of_the_pair(tokenizer: Any, prompt: str, target: str, chat: bool) -> None:
    encoder = _chatting() if chat else PromptEncoder(tokenizer)
    row = encoder.pair(prompt, target)
    assert row.prompt == encoder.prompt(prompt).ids
    assert row.ids == row.prompt + row.target
    assert row.target[-1:] == encoder.eos == (2,)
    assert encoder.decode(row.target) == target.strip()
    assert encoder.pair(prompt, target, eos=False).target == row.target[:-1]


@pytest.mark.parametrize("target", ["Paris", " Paris"])
def test_a_word_start_is_put_between_prompt_and_target_once(tokenizer: Any, target: str) -> None:
    row = PromptEncoder(tokenizer).pair("the capital is", target, eos=False)
    assert tokenizer.decode(row.ids, skip_special_tokens=True) == "the capital is Paris"
    assert row.ids == tuple(tokenizer("the capital is Paris")["input_ids"])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_goes_where_it_is_asked(encoder: Any, side: str) -> None:
    rows = rows_of(encoder)
    batch = encoder.batch(rows, side=side)
    width = max(map(len, rows))
    assert batch.input_ids.shape == batch.labels.shape == batch.content.shape == (len(rows), width)
    for i, row in enumerate(rows):
        real = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        assert batch.input_ids[i, real].tolist() == list(row.ids)
        assert batch.attention_mask[i].sum() == len(row)
        assert batch.attention_mask[i, real].all()
        assert batch.labels[i, real].tolist() == [-100] * len(row.prompt) + list(row.target)
        assert (batch.labels[i][batch.attention_mask[i] == 0] == -100).all()
        assert batch.content[i, real].tolist() == [False] + [True] * (len(row.prompt) - 1) + [False] * len(row.target)
        assert batch.content[i].sum() == len(row.prompt) - 1  # all but <s>, and no padding
        assert batch.input_ids[i, last_content(batch.content)[i]] == row.prompt[-1]


def test_content_does_not_depend_on_the_padding_side(encoder: Any) -> None:
    rows = rows_of(encoder)
    left, right = encoder.batch(rows, side="left"), encoder.batch(rows, side="right")
    for i in range(len(rows)):
        assert left.input_ids[i][left.content[i]].tolist() == right.input_ids[i][right.content[i]].tolist()


def _chatting(**options: Any) -> PromptEncoder:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    return PromptEncoder(tokenizer, chat=True, **options)


@pytest.mark.parametrize("system", [None, "be brief"])
@pytest.mark.parametrize("text", ["hello world", "x", "7", "Zebras drink", "the capital!\n"])
def test_the_templates_prefix_and_suffix_are_no_content(text: str, system: str | None) -> None:
    encoder = _chatting(system=system)
    rows = [encoder.prompt(text), encoder.pair("what who where when is it", "Paris")]
    for side in ("left", "right"):
        batch = encoder.batch(rows, side=side)
        seen = encoder.tokenizer.decode(batch.input_ids[0][batch.content[0]])
        assert seen.strip() == text.strip()
        assert encoder.tokenizer.decode(batch.input_ids[1][batch.content[1]]).strip() == "what who where when is it"


def test_a_chat_row_is_the_rendered_template() -> None:
    encoder = _chatting()
    assert encoder.tokenizer.decode(encoder.prompt("hello").ids) == "<|user|>\nhello\n<|bot|>\n"
    assert encoder.tokenizer.decode(encoder.pair("hello", "world").ids) == "<|user|>\nhello\n<|bot|>\nworld</s>"


def test_padding_with_eos_hides_no_target_eos() -> None:
    tokenizer = build_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    encoder = PromptEncoder(tokenizer)
    rows = [encoder.pair("hello", " world"), encoder.pair("what who where when", " Paris")]
    for side in ("left", "right"):
        batch = encoder.batch(rows, side=side)
        for i, row in enumerate(rows):
            assert batch.attention_mask[i].sum() == len(row)
            assert batch.labels[i][batch.labels[i] != -100].tolist() == list(row.target)
            assert batch.labels[i].tolist().count(2) == 1
            assert batch.content[i].sum() == len(row.prompt) - 1


def test_a_tokenizer_without_padding_or_special_tokens_works() -> None:
    from transformers import PreTrainedTokenizerFast

    bare = PreTrainedTokenizerFast(tokenizer_object=build_tokenizer().backend_tokenizer)
    encoder = PromptEncoder(bare)
    assert encoder.eos == ()
    batch = encoder.batch([encoder.pair("hello", " world"), encoder.pair("a b c d", " e")])
    assert batch.attention_mask.sum(1).tolist() == [len(encoder.pair("hello", " world")), batch.input_ids.shape[1]]


def test_a_tokenizer_that_ends_every_text_does_not_end_the_prompt() -> None:
    from tokenizers import processors

    tokenizer = build_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    encoder = PromptEncoder(tokenizer)
    assert tokenizer("hello")["input_ids"][-1] == 2
    assert 2 not in encoder.prompt("hello").ids
    row = encoder.pair("hello", " world")
    assert row.prompt == encoder.prompt("hello").ids
    assert row.ids.count(2) == 1


def test_a_row_of_special_tokens_alone_can_still_be_routed() -> None:
    rule = ContentRule((0, 1, 2))
    ids, real = torch.tensor([[0, 0, 1, 2]]), torch.tensor([[False, False, True, True]])
    assert rule.mask(ids, real).tolist() == [[False, False, True, True]]


def test_content_stands_between_the_last_opening_and_the_last_closing() -> None:
    rule = ContentRule((), ((5, 6),), ((7, 8),))
    ids = torch.tensor([[5, 6, 9, 7, 8], [9, 5, 6, 7, 9], [0, 5, 6, 7, 8], [9, 5, 9, 7, 8], [5, 6, 7, 8, 9]])
    real = torch.tensor([[True] * 5, [True] * 5, [False] + [True] * 4, [True] * 5, [True] * 4 + [False]])
    want = [
        [False, False, True, False, False],
        [False, False, False, True, True],
        [False] + [True] * 4,  # nothing but template
        [True, True, True, False, False],
        [True] * 4 + [False],
    ]
    assert rule.mask(ids, real).tolist() == want


def test_a_mark_in_the_padding_is_none() -> None:
    rule = ContentRule((), ((5,),), ((7,),))
    ids, real = torch.tensor([[5, 5, 8, 7, 7]]), torch.tensor([[False, True, True, True, False]])
    assert rule.mask(ids, real).tolist() == [[False, False, True, False, False]]
    ids, real = torch.tensor([[8, 8, 8, 5, 7]]), torch.tensor([[True, True, True, False, False]])
    assert rule.mask(ids, real).tolist() == real.tolist()


def test_a_rule_of_a_fixed_prefix_and_suffix_is_still_read() -> None:
    old = {"special_ids": [0], "prefix": [5, 6], "suffix": []}
    assert ContentRule.from_json(old) == ContentRule((0,), ((5, 6),), ())
    assert ContentRule.from_json({}) == ContentRule()


def test_a_content_rule_survives_json() -> None:
    rule = _chatting(system="be brief").rule
    assert rule.openings
    assert rule.closings
    assert ContentRule.from_json(json.loads(json.dumps(rule.to_json()))) == rule


def test_what_has_no_tokens_is_refused(tokenizer: Any) -> None:
    with pytest.raises(InputError, match="target has no tokens"):
        _chatting().pair("hello", "")
    with pytest.raises(InputError, match="target has no tokens"):
        PromptEncoder(tokenizer).pair("hello ", "")
    with pytest.raises(UsageError, match="chat template"):
        PromptEncoder(tokenizer, chat=True)

"""Find the edit site: the output projection of the FFN in one decoder layer.

The matrix is found by watching one forward pass, not by names: in each layer it is the last executed linear map whose
output has the model's width and which is no part of attention or of a router. What was found is checked by its numbers:
it computes `a W^T + b`, it runs once per pass, and no token changes what comes before it. Fused experts have no such
module and are refused by name; "auto" then takes the nearest layer that can be edited.

Whatever goes wrong inside an architecture that nobody tried before ends in a `ModelError` that names it.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from wisecli.errors import ModelError, UsageError, WiseError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NOT_FFN = re.compile(
    r"(^|[._])(attn|attention|self_attn|mixer|mamba|router|gate|ssm)([._]|$)|attn|attention|per_layer"
)
# Where order and names mislead: model type -> how the right module's path ends.
_OVERRIDES = {
    "rwkv": ("feed_forward.value",),
    "nemotron_h": ("mixer.down_proj", "mixer.shared_experts.down_proj"),  # a layer is one mixer, of whatever kind
}
_EXPERTS = re.compile(r"expert|moe", re.IGNORECASE)
_STREAMS_FIRST = ("gemma3n_text",)  # several residual streams, [S, B, T, D] between layers; elsewhere [B, T, S, D]
_LOOK_BACK = 0.02  # of the largest logit: a later token that moves an earlier prediction by more is not hidden from it
_UNITS = 512  # unit vectors that a packed module is run on at once
_PAPER_DEPTH = 27 / 32  # layer 27 of LLaMA-2's 32


@dataclass(frozen=True)
class EditSite:
    """One FFN output projection. Its delta is always kept as [d_out, d_in], whatever the module's own orientation.

    Attributes:
        path: module path inside the model.
        layer: index of the decoder layer.
        d_in, d_out: FFN width F and model width D.
        conv1d: the module stored [d_in, d_out] (GPT-2's Conv1D) when the site was found; quantised it does not.
    """

    path: str
    layer: int
    d_in: int
    d_out: int
    conv1d: bool

    def module(self, model: nn.Module) -> Any:
        """The projection itself, of whatever type the model uses."""
        return model.get_submodule(self.path)

    def shape(self, model: nn.Module) -> tuple[int, int]:
        """(d_out, d_in) of the module as this model has it."""
        return _shape(self.module(model))

    def device(self, model: nn.Module) -> torch.device:
        """Where the module computes, which is not where its weight lies while that is off the device."""
        m = self.module(model)
        place = getattr(getattr(m, "_hf_hook", None), "execution_device", None) if m.weight.is_meta else m.weight.device
        return m.weight.device if place is None else torch.device(place)

    @torch.no_grad()
    def weight(self, model: nn.Module) -> Tensor:
        """The main weight W as [d_out, d_in]; a view, never written.

        Of a module that is quantised or off the device it is what the module makes of unit vectors, in fp32.
        """
        m = self.module(model)
        w: Tensor = m.weight.detach()
        if w.is_floating_point() and not w.is_meta:
            return w.T if _is_conv1d(m) else w
        width, place = _shape(m)[1], self.device(model)
        constant = m(torch.zeros(1, width, device=place)).float()
        columns = []
        for some in torch.arange(width, device=place).split(_UNITS):
            units = torch.zeros(len(some), width, device=place)
            units[range(len(some)), some] = 1
            columns.append(m(units).float() - constant)
        return torch.cat(columns).T


@contextlib.contextmanager
def foreign(model: nn.Module, doing: str) -> Iterator[None]:
    """Within it an architecture that behaves as none before it raises a `ModelError`, whatever it raised itself."""
    try:
        yield
    except (WiseError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as e:
        raise ModelError(
            f"{type(model).__name__} cannot be edited: {doing} failed ({type(e).__name__}: {first_line(e)[:200]}).",
            hint="Try another layer with --layer; WISE_DEBUG=1 shows where it failed.",
        ) from e


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """The module that turns tokens into the last hidden states, layers and all."""
    found: nn.Module = model.get_decoder()
    return found if any(isinstance(m, nn.ModuleList) for m in found.modules()) else model.base_model


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The list of decoder layers: the outermost ModuleList as long as the config says, else the one that holds most.

    Raises:
        ModelError: there is none.
    """
    n = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = [(k.count("."), m) for k, m in decoder_of(model).named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not lists:
        raise ModelError(f"{type(model).__name__} has no list of decoder layers.", hint="Take another base.")
    fitting = [(depth, m) for depth, m in lists if len(m) == n]
    if fitting:
        return min(fitting, key=lambda x: x[0])[1]
    outermost = min(depth for depth, _ in lists)
    return max((m for depth, m in lists if depth == outermost), key=lambda m: sum(p.numel() for p in m.parameters()))


def residual(model: PreTrainedModel, h: Tensor, rows: int, tokens: int) -> Tensor:
    """What a layer takes in or gives out, rows first: [B, T, D], or [B, T, S, D] of several residual streams.

    Raises:
        ModelError: it has another shape.
    """
    if h.dim() == 4 and model.config.get_text_config().model_type in _STREAMS_FIRST:
        h = h.movedim(0, 2)
    if h.dim() not in (3, 4) or h.shape[:2] != (rows, tokens):
        raise ModelError(
            f"The layers of {type(model).__name__} pass on hidden states of shape {list(h.shape)}; "
            f"[{rows}, {tokens}, width] can be edited.",
            hint="Take another base.",
        )
    return h


def as_passed_on(model: PreTrainedModel, h: Tensor) -> Tensor:
    """What `residual` gave, as the layers of this model pass it on."""
    first = h.dim() == 4 and model.config.get_text_config().model_type in _STREAMS_FIRST
    return h.movedim(2, 0) if first else h


def auto_layer(n_layers: int) -> int:
    """Mid-to-late, as in the paper (layer 27 of 32), with at least one layer above."""
    return max(0, min(round(_PAPER_DEPTH * n_layers), n_layers - 2))


def find_site(model: PreTrainedModel, layer: int | str = "auto", module: str | None = None) -> EditSite:
    """The edit site of one layer.

    Args:
        model: a loaded causal language model.
        layer: index (negative counts from the end), or "auto" for the layer nearest to the paper's depth that has one;
            not the first layer, unless it is that.
        module: a module path that overrides the search.

    Raises:
        ModelError: the model has no such matrix, it does not behave as one, or the model is not causal.
        UsageError: there is no such layer.
    """
    with foreign(model, "looking for its FFN"):
        if model.config.is_encoder_decoder:
            raise _other_kind(model, "an encoder-decoder model")
        layers = decoder_layers(model)
        names = {id(m): k for k, m in model.named_modules()}
        if module is not None:
            inside = next((i for i, m in enumerate(layers) if module.startswith(names[id(m)] + ".")), None)
            if inside is None or module not in dict(model.named_modules()):
                raise ModelError(f"There is no module {module!r} inside a decoder layer.", hint="See print(model).")
            return _check(model, inside, *_watch(model, names, layers, module)[inside])
        wanted = layer_index(layer, len(layers))
        found = _watch(model, names, layers)
        index = min(found, key=lambda i: (abs(i - wanted), -i), default=None)
        if index is None or (index != wanted and (layer != "auto" or index == 0)):
            raise _no_site(model, names, layers[wanted], None if index is None else (index, found[index][0]))
        return _check(model, index, *found[index])


def likely_site(model: PreTrainedModel, layer: int | str = "auto", module: str | None = None) -> EditSite:
    """The site that `find_site` will most likely find, told from the modules of a base without weights.

    Raises:
        ModelError: no module of the layer looks like one.
        UsageError: there is no such layer.
    """
    layers = decoder_layers(model)
    names = {id(m): k for k, m in model.named_modules()}
    if module is None:
        index = layer_index(layer, len(layers))
        width = model.config.get_text_config().hidden_size
        maps = [(k, m) for k, m in layers[index].named_modules() if is_linear(m) and _shape(m)[0] == width]
        fits = [k for k, _ in maps if not _NOT_FFN.search(k)]
        if not fits:
            raise ModelError(
                f"No module of layer {index} looks like an FFN output projection.",
                hint="Name it with --module, or try another --layer.",
            )
        module = f"{names[id(layers[index])]}.{fits[-1]}"
    else:
        index = next((i for i, m in enumerate(layers) if module.startswith(names[id(m)] + ".")), 0)
    m = model.get_submodule(module)
    d_out, d_in = _shape(m)
    return EditSite(module, index, d_in, d_out, _is_conv1d(m))


def layer_index(layer: int | str, n: int) -> int:
    """The index of a decoder layer among n.

    Args:
        layer: index (negative counts from the end) or "auto".

    Raises:
        UsageError: there is none.
    """
    if layer == "auto":
        return auto_layer(n)
    try:
        index = int(layer)
    except ValueError as e:
        raise UsageError(f"--layer must be a number or auto, not {layer!r}.") from e
    if not -n <= index < n:
        raise UsageError(f"There is no layer {index}: this base has layers 0 to {n - 1}.")
    return index % n


def is_linear(m: nn.Module) -> bool:
    w = getattr(m, "weight", None)
    return isinstance(w, Tensor) and w.dim() == 2 and not isinstance(m, nn.Embedding) and not list(m.children())


def _is_conv1d(m: nn.Module) -> bool:
    return type(m).__name__ == "Conv1D"


@torch.no_grad()
def _watch(
    model: PreTrainedModel, names: dict[int, str], layers: nn.ModuleList, module: str | None = None
) -> dict[int, tuple[str, Tensor, Tensor]]:
    """By layer the path of the FFN's output projection, and its input and output in a short probe.

    Args:
        names: module paths, by id.
        module: a path to watch, instead of a search.

    Raises:
        ModelError: the model is not causal, or a named module did not run, or ran more than once.
    """
    found: dict[int, tuple[str, Tensor, Tensor]] = {}
    runs: Counter[str] = Counter()
    width = model.config.get_text_config().hidden_size
    handles = []
    for i, layer in enumerate(layers):
        for name, m in layer.named_modules():
            path = f"{names[id(layer)]}.{name}"
            if (path == module) if module is not None else (is_linear(m) and _may_be_ffn(model, name)):

                def keep(mod: nn.Module, args: Any, out: Any, i: int = i, path: str = path) -> None:
                    runs[names[id(mod)]] += 1
                    fits = isinstance(out, Tensor) and (module is not None or out.shape[-1] == width)
                    if args and fits:  # some models go on to change `out` in place
                        found[i] = (path, args[0].detach().clone(), out.detach().clone())

                handles.append(m.register_forward_hook(keep))
    try:
        _refuse_looking_ahead(model)
    finally:
        for h in handles:
            h.remove()
    once = {i: f for i, f in found.items() if runs[names[id(model.get_submodule(f[0]))]] == 1}
    if module is not None and not once:
        times = f"ran {runs[module]} times" if runs[module] else "did not run"
        raise ModelError(f"The module {module!r} {times} in a forward pass.", hint="Choose another with --module.")
    return once


def _refuse_looking_ahead(model: PreTrainedModel) -> None:
    """Run two rows that differ in their last token, whose earlier predictions are the same in a causal model."""
    ids = (torch.arange(5, 13, device=model.device) % model.config.get_text_config().vocab_size).repeat(2, 1)
    ids[1, -1] = ids[0, 0]
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    if (logits[0] - logits[1]).abs().max() > _LOOK_BACK * (1 + logits.abs().max()):
        raise _other_kind(model, "not causal: a token changes what is predicted before it")


def _other_kind(model: PreTrainedModel, what: str) -> ModelError:
    return ModelError(
        f"{type(model).__name__} ({model.config.model_type}) is {what}.",
        hint="wise edits causal language models, decoders that read from left to right.",
    )


def _may_be_ffn(model: PreTrainedModel, name: str) -> bool:
    """Whether a linear map may be an FFN's output projection, by its path in the layer."""
    ends = _OVERRIDES.get(model.config.get_text_config().model_type)
    return name.endswith(ends) if ends else not _NOT_FFN.search(name)


def _no_site(
    model: PreTrainedModel, names: dict[int, str], layer: nn.Module, nearest: tuple[int, str] | None
) -> ModelError:
    """Why a layer has no edit site, and which one has. Layer 0 is offered, not taken: its gate sees a single token."""
    holders = [m for m in layer.modules() if _EXPERTS.search(type(m).__name__)]
    inside = names[id(layer)]
    held = [(p.dim(), f"{names[id(m)]}.{k}") for m in holders for k, p in m.named_parameters(recurse=False)]
    dim, fused = max(held, key=lambda x: x[0], default=(0, ""))  # 3, or 2 where the experts stand in rows
    what = "no linear map of the model's width runs there once, outside attention and state-space parts"
    what = f"its experts are fused ({fused.removeprefix(inside + '.')})" if dim > 1 else what
    hint = "No layer of this base has one: take another base, or name a matrix with --module."
    if nearest is not None:
        blind = ", though all that the gate sees there is the last token" if nearest[0] == 0 else ""
        hint = f"The nearest layer that has one is --layer {nearest[0]} ({nearest[1]}){blind}."
    return ModelError(
        f"{type(model).__name__} has no FFN output projection to edit in {inside} ({type(layer).__name__}): {what}.",
        hint=hint,
    )


def _shape(m: Any) -> tuple[int, int]:
    """(d_out, d_in) of a linear map; a packed weight does not show it."""
    if hasattr(m, "in_features"):
        return m.out_features, m.in_features
    rows, columns = m.weight.shape
    return (columns, rows) if _is_conv1d(m) else (rows, columns)


def _check(model: PreTrainedModel, layer: int, path: str, a: Tensor, y: Tensor) -> EditSite:
    m: Any = model.get_submodule(path)
    if not is_linear(m):
        raise ModelError(
            f"The module {path} ({type(m).__name__}) is no linear map.", hint="Choose another with --module."
        )
    d_out, d_in = _shape(m)
    site = EditSite(path, layer, d_in, d_out, _is_conv1d(m))
    whole = m.weight.is_floating_point() and not m.weight.is_meta
    if whole:
        want = a.float() @ site.weight(model).float().T
        bias = getattr(m, "bias", None)
        want = want if bias is None else want + bias.float()
    else:
        want = _superposed(m, a)
    tolerance = 1e-4 if whole and m.weight.dtype == torch.float32 else 5e-2
    if y.shape[-1] != d_out or (want - y.float()).abs().max() > tolerance * (1 + want.abs().max()):
        raise ModelError(
            f"{path} ({type(m).__name__}) does not compute a W^T + b.", hint="Choose another module with --module."
        )
    return site


@torch.no_grad()
def _superposed(m: Any, a: Tensor) -> Tensor:
    """What a module that computes a W^T + b, whatever W is, makes of `a`, from two parts of it."""
    part = a * (torch.arange(a.shape[-1], device=a.device) % 2)
    return (m(part).float() + m(a - part).float()) - m(torch.zeros_like(a)).float()

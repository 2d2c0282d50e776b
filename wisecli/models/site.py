"""Find the edit site: the output projection of the FFN in one decoder layer.

The matrix is found by watching one forward pass, not by names: in the wanted layer it is the last executed linear map
whose output has the model's width and which is no part of attention or of a router. A numerical check that it computes
`a W^T + b` follows. Fused experts have no such module and are refused by name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from wisecli.errors import ModelError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NOT_FFN = re.compile(r"(^|[._])(attn|attention|self_attn|mixer|mamba|router|gate|ssm)([._]|$)|attn|attention")
# Where the execution order misleads: model type -> pattern of the right module inside a layer.
_OVERRIDES = {"rwkv": "feed_forward.value"}
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
        units = torch.eye(_shape(m)[1], device=self.device(model))
        constant = m(torch.zeros_like(units[:1]))
        return torch.cat([m(some) - constant for some in units.split(_UNITS)]).T.float()


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The list of decoder layers: the outermost ModuleList as long as the config says."""
    n = model.config.get_text_config().num_hidden_layers
    lists = [(k.count("."), m) for k, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == n]
    if not lists:
        raise ModelError(
            f"No list of {n} decoder layers in {type(model).__name__}.",
            hint="Give the module to edit with --module.",
        )
    return min(lists, key=lambda x: x[0])[1]


def auto_layer(n_layers: int) -> int:
    """Mid-to-late, as in the paper (layer 27 of 32), with at least one layer above."""
    return max(0, min(round(_PAPER_DEPTH * n_layers), n_layers - 2))


def find_site(model: PreTrainedModel, layer: int | str = "auto", module: str | None = None) -> EditSite:
    """The edit site of one layer.

    Args:
        model: a loaded causal language model.
        layer: index (negative counts from the end) or "auto".
        module: a module path that overrides the search.

    Raises:
        ModelError: the model has no such matrix, or it does not behave as one.
    """
    layers = decoder_layers(model)
    names = {id(m): k for k, m in model.named_modules()}
    if module is not None:
        index = next((i for i, m in enumerate(layers) if module.startswith(names[id(m)] + ".")), None)
        try:
            model.get_submodule(module)
        except AttributeError:
            index = None
        if index is None:
            raise ModelError(f"There is no module {module!r} inside a decoder layer.", hint="See print(model).")
    else:
        index = layer_index(layer, len(layers))
    prefix = names[id(layers[index])] + "."
    calls = _watch(model, layers[index], prefix)
    if module is None:
        module = _last_ffn(model, calls, prefix)
    if module not in calls:
        raise ModelError(f"The module {module!r} did not run in a forward pass.", hint="Choose another with --module.")
    return _check(model, module, index, *calls[module])


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
        maps = [(k, m) for k, m in layers[index].named_modules() if _is_linear(m) and _shape(m)[0] == width]
        fits = [k for k, _ in maps if not _NOT_FFN.search(k)]
        if not fits:
            raise ModelError(f"No module of layer {index} looks like an FFN output projection.")
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


def _is_linear(m: nn.Module) -> bool:
    w = getattr(m, "weight", None)
    return isinstance(w, Tensor) and w.dim() == 2 and not isinstance(m, nn.Embedding) and not list(m.children())


def _is_conv1d(m: nn.Module) -> bool:
    return type(m).__name__ == "Conv1D"


@torch.no_grad()
def _watch(model: PreTrainedModel, layer: nn.Module, prefix: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Input and output of each linear map in a layer, in execution order, from a short probe."""
    calls: dict[str, tuple[Tensor, Tensor]] = {}
    handles = []
    for name, m in layer.named_modules():
        if _is_linear(m):

            def keep(mod: nn.Module, args: Any, out: Any, path: str = prefix + name) -> None:
                calls.pop(path, None)
                if args and isinstance(out, Tensor):  # a router of experts returns a tuple
                    calls[path] = (args[0].detach(), out.detach())

            handles.append(m.register_forward_hook(keep))
    ids = torch.arange(5, 13, device=model.device)[None] % model.config.get_text_config().vocab_size
    try:
        model(input_ids=ids, use_cache=False)
    finally:
        for h in handles:
            h.remove()
    return calls


def _last_ffn(model: PreTrainedModel, calls: dict[str, tuple[Tensor, Tensor]], prefix: str) -> str:
    config = model.config.get_text_config()
    override = _OVERRIDES.get(config.model_type)
    fits = [
        path
        for path, (_, out) in calls.items()
        if out.shape[-1] == config.hidden_size and not _NOT_FFN.search(path.removeprefix(prefix))
    ]
    if override:
        fits = [p for p in calls if p.endswith(override)]
    if not fits:
        fused = [k for k, p in model.get_submodule(prefix[:-1]).named_parameters() if p.dim() == 3]
        what = f"its experts are fused ({fused[0]})" if fused else "no linear map of the model's width ran there"
        raise ModelError(
            f"{type(model).__name__} has no FFN output projection to edit in this layer: {what}.",
            hint="Choose a dense layer with --layer, or a module with --module.",
        )
    return fits[-1]


def _shape(m: Any) -> tuple[int, int]:
    """(d_out, d_in) of a linear map; a packed weight does not show it."""
    if hasattr(m, "in_features"):
        return m.out_features, m.in_features
    rows, columns = m.weight.shape
    return (columns, rows) if _is_conv1d(m) else (rows, columns)


def _check(model: PreTrainedModel, path: str, layer: int, a: Tensor, y: Tensor) -> EditSite:
    m: Any = model.get_submodule(path)
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

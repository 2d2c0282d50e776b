"""What a checkpoint is stored as: safetensors or pickles, whole or quantised. Says how to load it; loads no model.

Weights are read from safetensors. A pickle can run code while it is read, so it is taken only where that is asked for,
and then by torch's reader of weights alone. Of quantised checkpoints those of bitsandbytes are taken, in 4 and 8 bits;
`--quantize` makes the same of a whole one while it is loaded.

What a quantised module holds is packed. `stored_matrix` reads the edited matrix from the checkpoint's own file instead,
so that a base is recognised however it was loaded.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wisecli.errors import ModelError, RoutingError, UsageError

QUANTIZE = {"4bit": 4, "8bit": 8, "none": None}
_TAKEN = ("bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit")  # as config.json may call it
_INDEX = "model.safetensors.index.json"
_PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth")
_OTHER_STATE = ("optimizer", "scheduler", "training_args", "rng_state", "scaler")
_CONVERT = (
    "Convert it where you trust it: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW) in Python writes "
    "safetensors; or read the pickle with --allow-pickle."
)


def weights_reading(source: str, allow_pickle: bool) -> dict[str, Any]:
    """Arguments of `from_pretrained` that say which weight files may be read: safetensors, which go first, or pickles.

    Raises:
        ModelError: a local folder holds its weights in pickles and these are not allowed, or in a form that
            transformers does not read.
    """
    reading = {"use_safetensors": None if allow_pickle else True, "weights_only": True}
    folder = Path(source)
    if not folder.is_dir() or any(folder.glob("*.safetensors")) or (folder / _INDEX).exists():
        return reading
    named = sorted(p.name for pattern in _PICKLES for p in folder.glob(pattern))
    pickles = [name for name in named if not name.startswith(_OTHER_STATE)]
    readable = [name for name in pickles if name.startswith("pytorch_model")]
    if pickles and not readable:
        raise ModelError(
            f"The base {source!r} keeps its weights in {pickles[0]}, which is no form that transformers reads.",
            hint="Load it with the code that wrote it, and save the model with save_pretrained.",
        )
    if readable and not allow_pickle:
        raise pickled(source, readable[0])
    gguf = sorted(p.name for p in folder.glob("*.gguf"))
    if gguf and not pickles:
        raise ModelError(
            f"The base {source!r} holds {gguf[0]}: GGUF is a form for inference engines.",
            hint="Give the checkpoint it was made from, with --quantize 4bit if it is to be small.",
        )
    return reading


def pickled(source: str, name: str) -> ModelError:
    """The error that says that a base's weights are pickles."""
    return ModelError(
        f"The base {source!r} keeps its weights in {name}, a pickle, which can run code while it is read.",
        hint=_CONVERT,
    )


def lacks_safetensors(e: Exception) -> bool:
    """Whether transformers says that a repository on the hub has no safetensors."""
    return "cannot be loaded with `safetensors`" in str(e)


def quantization_of(config: Any) -> dict[str, Any] | None:
    """How a base is quantised, by its config: method, bits and, for 4 bits, the type of number; None where it is not.

    Raises:
        ModelError: it is quantised in a way that is not taken.
    """
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    about: Mapping[str, Any] = found if isinstance(found, Mapping) else found.to_dict()
    method = str(getattr(about.get("quant_method"), "value", about.get("quant_method")))
    if method not in _TAKEN:
        raise ModelError(
            f"The base is quantised by {method}, which cannot be edited here.",
            hint="Give a checkpoint that is not quantised, with --quantize 4bit or 8bit if it is to be small, or one "
            "quantised by bitsandbytes.",
        )
    if about.get("load_in_8bit"):
        return {"method": "bitsandbytes", "bits": 8}
    return {"method": "bitsandbytes", "bits": 4, "type": about.get("bnb_4bit_quant_type", "fp4")}


def quantizing(config: Any, quantize: str | None, dtype: Any, option: str = "--quantize") -> dict[str, Any]:
    """Arguments of `from_pretrained` that quantise a base while it is loaded; none where it is not to be.

    Args:
        config: of the base.
        quantize: 4bit, 8bit, or none or None for the checkpoint as it is.
        dtype: the modules that stay whole have, and 4-bit ones compute in; "auto" for the checkpoint's own.

    Raises:
        UsageError: an unknown form, another than the checkpoint's own, or bitsandbytes is missing.
        ModelError: the checkpoint is quantised in a way that is not taken.
    """
    bits = bits_of(quantize)
    stored = quantization_of(config)
    if stored is not None or bits is not None:
        check_bitsandbytes(option if bits else f"This base, which is stored in {(stored or {})['bits']} bits,")
    if stored is not None:
        if quantize is not None and bits != stored["bits"]:
            raise UsageError(
                f"This base is stored in {stored['bits']} bits: {option} {quantize} cannot be had of it.",
                hint=f"Leave {option} out, or give the checkpoint it was made from.",
            )
        return {}
    if bits is None:
        return {}
    from transformers import BitsAndBytesConfig

    if bits == 8:
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)}
    own = dtype if isinstance(dtype, torch.dtype) else getattr(config, "dtype", None) or torch.bfloat16
    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=own
        )
    }


def bits_of(quantize: str | None) -> int | None:
    """Bits that an option asks for; None for a base as it is stored.

    Raises:
        UsageError: it is none of 4bit, 8bit and none.
    """
    if quantize is not None and quantize not in QUANTIZE:
        raise UsageError(f"Unknown form {quantize!r} of --quantize.", hint=f"Use {', '.join(QUANTIZE)}.")
    return QUANTIZE[quantize] if quantize is not None else None


def check_bitsandbytes(what: str) -> None:
    """Refuse what needs bitsandbytes and accelerate where one is not installed.

    Raises:
        UsageError: one is not.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells at every call what it casts
    try:
        import accelerate  # noqa: F401
        import bitsandbytes  # noqa: F401
    except ImportError as e:
        raise UsageError(f"{what} needs bitsandbytes: {e}.", hint="pip install 'wisecli[bnb]'") from e


def steady(model: nn.Module) -> None:
    """Make packed modules compute every row for itself, and let gradients through.

    In 8 bits bitsandbytes leaves those columns of the activations whole in which any row of the batch is large: what a
    routed row holds would change the rows beside it. The threshold is taken off, so that main memory's rows are the
    base's bit for bit. In 4 bits, on a processor with AVX512-BF16, modules repack themselves at their first forward for
    inference alone: no gradient comes out then, without a word. That is switched off.
    """
    for m in model.modules():
        if repacks(m):
            m.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
        if mixes_rows(m):
            m.state.threshold = 0.0  # type: ignore[union-attr]


def repacks(m: Any) -> bool:
    """Whether a module will let no gradient through after its first forward; see `steady`."""
    return bool(getattr(m, "support_avx512bf16_for_cpu", False))


def mixes_rows(m: Any) -> bool:
    """Whether what a module makes of a row depends on the other rows of the batch; see `steady`."""
    return type(m).__name__ == "Linear8bitLt" and m.state.threshold > 0


def check_rows(model: nn.Module) -> None:
    """Refuse a model whose rows depend on one another.

    Raises:
        RoutingError: it is one, in 8 bits.
    """
    if any(mixes_rows(m) for m in model.modules()):
        raise RoutingError(
            "In this 8-bit model the rows of a batch depend on one another: main memory's would not be the base's.",
            hint="Load it with wisecli.load_base, or with BitsAndBytesConfig(llm_int8_threshold=0.0).",
        )


def stored_matrix(model: Any, path: str, shape: tuple[int, int]) -> Tensor | None:
    """The weight of a module as the model's checkpoint holds it, read from its safetensors; None where it is not found.

    Args:
        model: loaded by `from_pretrained`; its folder or the hub's cache must still be there.
        path: of the module.
        shape: of the weight, in either orientation.
    """
    from safetensors import SafetensorError, safe_open

    try:
        file, key = _where(model, f"{path}.weight")
        with safe_open(file, framework="pt") as opened:
            found: Tensor = opened.get_tensor(key)
    except (OSError, KeyError, ValueError, SafetensorError):
        return None
    fits = found.is_floating_point() and tuple(found.shape) in (shape, shape[::-1])
    return found if fits else None


def _where(model: Any, name: str) -> tuple[str, str]:
    """The weight file that holds a parameter, and its name there, which may lack the prefix of the model's body.

    Raises:
        KeyError, OSError: it is not there.
    """
    names = (name, name.removeprefix(f"{model.base_model_prefix}."))
    index = _file(model, _INDEX)
    if index is not None:
        held: Mapping[str, str] = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        key = next((n for n in names if n in held), name)
        return str(_file(model, held[key])), key
    from safetensors import safe_open

    file = str(_file(model, "model.safetensors"))
    with safe_open(file, framework="pt") as opened:
        there = set(opened.keys())
    return file, next((n for n in names if n in there), name)


def _file(model: Any, name: str) -> str | None:
    """A file of a model's checkpoint, from its folder or the hub's cache; None where there is none."""
    folder = Path(model.name_or_path)
    if folder.is_dir():
        return str(folder / name) if (folder / name).is_file() else None
    from huggingface_hub import try_to_load_from_cache

    commit = getattr(model.config, "_commit_hash", None)
    found = try_to_load_from_cache(str(model.name_or_path), name, revision=commit)
    return found if isinstance(found, str) else None

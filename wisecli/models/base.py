"""Load a base: a causal language model and its tokenizer, from a folder, the hub, or the package itself.

The base is only ever read. What is recorded of it (`BaseId`) is enough to find it again and to recognise it: name,
commit, and a fingerprint of the edited matrix that holds whatever dtype it is loaded in.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from wisecli.errors import ModelError, UsageError, WiseError, first_line
from wisecli.models.checkpoint import (
    lacks_safetensors,
    pickled,
    quantization_of,
    quantizing,
    repacks,
    steady,
    stored_matrix,
    weights_reading,
)
from wisecli.models.site import EditSite
from wisecli.versions import versions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEMO_BASE = "wise-demo"
UNNAMED = "unnamed"
_DEMO_PATH = Path(__file__).resolve().parent.parent / "base"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STORED = "stored"
_PROVENANCE = ("architectures", "dtype", "transformers_version")  # the tensors tell their dtype
_NO_CONVERSION = "DISABLE_SAFETENSORS_CONVERSION"  # read by transformers, which else asks a service on the hub
_FINGERPRINT_DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Base:
    """A loaded base. `name` is what the user gave; `revision` the commit it resolved to, None for a local folder."""

    model: Any  # a PreTrainedModel; its `generate` and submodules are untyped
    tokenizer: PreTrainedTokenizerBase
    name: str
    revision: str | None = None

    @classmethod
    def of(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Base:
        """A model that is loaded already, under the name and the commit it was loaded by.

        One that was made in memory has no name; where its edits are used on the command line, --model says it.
        """
        source = str(getattr(model.config, "_name_or_path", ""))
        if not source:
            return cls(model, tokenizer, UNNAMED)
        local = Path(source).exists()
        name = DEMO_BASE if local and Path(source).resolve() == _DEMO_PATH else _name_of(source)
        return cls(model, tokenizer, name, None if local else getattr(model.config, "_commit_hash", None))

    @property
    def label(self) -> str:
        return f"{self.name}@{self.revision[:12]}" if self.revision else self.name

    @property
    def quantization(self) -> dict[str, Any] | None:
        """Method and bits of a quantised base; None where its weights are whole."""
        return quantization_of(self.model.config)

    @cached_property
    def digest(self) -> str | None:
        """SHA-256 of all weights as loaded, the configs and the tokenizer; None where weights are not at hand."""
        weights = weights_digest(self.model)
        if weights is None:
            return None
        digest = hashlib.sha256(weights.encode())
        tokenizer = self.tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        content = json.loads(backend.to_str()) if backend is not None else {"vocab": tokenizer.get_vocab()}
        for state in ("padding", "truncation"):  # left behind by the last call, whoever made it
            content.pop(state, None)
        settings = [tokenizer.special_tokens_map, tokenizer.chat_template, _deciding(self.model.config.to_dict())]
        settings += [_deciding(self.model.generation_config.to_dict())] if self.model.can_generate() else []
        digest.update(json.dumps(content, sort_keys=True).encode())
        digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
        return digest.hexdigest()

    def state(self) -> dict[str, Any]:
        """What decides, apart from the prompts and their batches, the numbers that this base makes of them."""
        device = self.model.device
        return {
            "base": self.digest,
            "dtype": str(self.model.dtype),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "attention": getattr(self.model.config, "_attn_implementation", None),
            "threads": torch.get_num_threads(),
            "tools": versions(),
        }


def demo_base_path() -> Path:
    """Folder of the demonstration base that ships with the package."""
    return _DEMO_PATH


def pick_device(device: str = "auto") -> torch.device:
    """`auto` is the first accelerator torch sees, else the CPU."""
    if device != "auto":
        try:
            wanted = torch.device(device)
        except RuntimeError as e:
            raise UsageError(f"Unknown device {device!r}.", hint="Use auto, cpu, cuda, cuda:1 or mps.") from e
        have = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}.get(wanted.type, 1)
        if (wanted.index or 0) >= have:
            raise UsageError(f"This machine or this torch has no device {device!r}.", hint="Use --device cpu.")
        return wanted
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def dtype_name(dtype: str | torch.dtype) -> str:
    """A dtype's name as options, configs and files spell it."""
    return str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype


def check_dtype(dtype: str | torch.dtype) -> None:
    """Refuse what is no dtype of a base.

    Raises:
        UsageError: it is none.
    """
    if dtype_name(dtype) not in ("auto", STORED, *DTYPES):
        raise UsageError(f"Unknown dtype {dtype!r}.", hint=f"Use auto, {', '.join(DTYPES)}.")


def _wanted(dtype: str | torch.dtype, where: torch.device) -> Any:
    as_stored = dtype == STORED or where.type != "cpu"
    return DTYPES.get(dtype_name(dtype), "auto" if as_stored else torch.float32)


def loaded_dtype(outline: Base, dtype: str | torch.dtype, where: torch.device) -> torch.dtype:
    """The dtype in which a base will be loaded to a device, by `load_base`."""
    wanted = _wanted(dtype, where)
    own = getattr(outline.model.config, "dtype", None)
    return wanted if isinstance(wanted, torch.dtype) else own or torch.float32


def load_base(
    name: str | None = None,
    *,
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    device_map: str | Mapping[str, Any] | None = None,
    offload_below: int | str | None = None,
    quantize: str | None = None,
    allow_pickle: bool = False,
) -> Base:
    """Load a base in evaluation mode with its parameters frozen.

    Args:
        name: a folder, a hub id, or None for the demonstration base.
        revision: hub branch, tag or commit.
        dtype: float32, bfloat16 or float16, by name or as torch has them; stored; or auto: as stored on an accelerator,
            float32 on the CPU, where half precision is slow.
        device: torch device name or auto.
        trust_remote_code: run code that comes with the checkpoint.
        device_map: "auto" spreads the base over all devices, in place of `device`; or a place ("cpu", "disk", 0, ...)
            for each module by its path; needs accelerate.
        offload_below: a decoder layer, or "auto" for the one that is edited by default: those below it stay off the
            device; needs accelerate. See `models.placement`.
        quantize: 4bit or 8bit, by bitsandbytes while loading; none or None for the checkpoint as it is.
        allow_pickle: read weights from pickles where there are no safetensors; see `models.checkpoint`.

    Raises:
        ModelError: nothing there, not a causal language model, weights missing or broken, in pickles, or quantised in a
            way that is not taken.
        UsageError: options that are unknown or contradict each other, or that need a library which is not installed.
    """
    check_dtype(dtype)
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    demo, source = name in (None, DEMO_BASE), _source_of(name)
    _check_local(source)
    where = pick_device(device)
    wanted = _wanted(dtype, where)
    common: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    reading = weights_reading(source, allow_pickle)
    with _telling(source):
        config = AutoConfig.from_pretrained(source, **common)
        _refuse_other_kinds(config, source)
        packing = quantizing(config, quantize, wanted)
        packed = bool(packing) or quantization_of(config) is not None
        spread = _spread(config, where, device_map, offload_below, packed, trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(source, **common)
        with quiet_transformers():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source, dtype=wanted, output_loading_info=True, **reading, **spread, **packing, **common
            )
    model, report = loaded
    if report["missing_keys"]:  # transformers would only warn and fill them with random numbers
        raise ModelError(
            f"The base {source!r} lacks weights, {len(report['missing_keys'])} in all: {min(report['missing_keys'])}.",
            hint="Fetch it again, or give a checkpoint of a causal language model.",
        )
    model = (model if spread else model.to(where)).eval().requires_grad_(False)
    steady(model)
    commit = None if demo or Path(source).exists() else getattr(model.config, "_commit_hash", None)
    return Base(model, tokenizer, DEMO_BASE if demo else _name_of(source), commit)


@contextlib.contextmanager
def borrowed(model: PreTrainedModel) -> Iterator[None]:
    """Within it a model is as `load_base` gives one, whatever its owner does with it; afterwards it is as it was.

    It is in evaluation mode, and no parameter of it takes gradients; those that others need can be taken, in whatever
    gradient mode the caller is.

    Raises:
        ModelError: its weights were made in inference mode, from which no gradient comes back.
    """
    if any(p.is_inference() for p in model.parameters()):
        raise ModelError(
            "The model was loaded under torch.inference_mode.", hint="Load it outside, then nothing else changes."
        )
    repacking: list[Any] = [m for m in model.modules() if repacks(m)]
    training = [m for m in model.modules() if m.training]
    trained = [p for p in model.parameters() if p.requires_grad]
    with torch.inference_mode(False), torch.enable_grad():
        try:
            model.eval()
            for m in repacking:
                m.support_avx512bf16_for_cpu = False
            for p in trained:
                p.requires_grad_(False)
            yield
        finally:
            for m in repacking:
                m.support_avx512bf16_for_cpu = True
            for m in training:
                m.training = True
            for p in trained:
                p.requires_grad_(True)


def _refuse_other_kinds(config: Any, source: str) -> None:
    """Refuse an encoder-decoder model before its weights are read; of some, transformers would load the decoder."""
    if config.is_encoder_decoder:
        raise ModelError(
            f"The base {source!r} ({config.model_type}) is an encoder-decoder model.",
            hint="wise edits causal language models, decoders that read from left to right.",
        )


def outline(name: str | None, *, revision: str | None = None, trust_remote_code: bool = False) -> Base:
    """A base without its weights: config, tokenizer and modules, which tell its shape before it is loaded.

    Raises:
        ModelError: it cannot be read.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    source = _source_of(name)
    _check_local(source)
    common: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    with _telling(source):
        config = AutoConfig.from_pretrained(source, **common)
        tokenizer = AutoTokenizer.from_pretrained(source, **common)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return Base(model.eval().requires_grad_(False), tokenizer, source)


@contextlib.contextmanager
def _telling(source: str) -> Iterator[None]:
    """Turns what loading may raise into a ModelError that says what to do."""
    try:
        yield
    except (WiseError, MemoryError):
        raise
    except Exception as e:  # config, tokenizer, weights, hub and the architecture's own code raise types of their own
        if "trust_remote_code" in str(e):
            raise ModelError(
                f"The base {source!r} needs code of its own, which comes with it and would run here.",
                hint="Read that code, and add --trust-remote-code if you trust it.",
            ) from e
        if lacks_safetensors(e):
            raise pickled(source, "other files than safetensors, such as pytorch_model.bin") from e
        theirs = {"safetensors_rust", "safetensors", "huggingface_hub", "httpx", "pickle", "_pickle"}
        broken = type(e).__module__.split(".")[0] in theirs and not isinstance(e, OSError)
        raise ModelError(
            f"Cannot load the base {source!r}: {first_line(e)}",
            hint="Fetch it again."
            if broken
            else "Give a folder with config.json, tokenizer files and model.safetensors, or a hub id; "
            "leave --model out to use the demonstration base.",
        ) from e


def _spread(
    config: Any,
    where: torch.device,
    device_map: str | Mapping[str, Any] | None,
    below: int | str | None,
    packed: bool,
    trust_remote_code: bool,
) -> dict[str, Any]:
    """Arguments of `from_pretrained` that say where the parts of the base go; none for one place."""
    from wisecli.models.placement import below_off_device, check_accelerate

    if device_map is not None:
        check_accelerate("--device-map")
        if below is not None:
            raise UsageError(
                "--device-map is auto, and goes without --offload-lower.", hint="--device names a single device."
            )
        if isinstance(device_map, str) and device_map != "auto":
            raise UsageError(f"--device-map must be auto, not {device_map!r}.", hint="--device names a single device.")
        return {"device_map": device_map if isinstance(device_map, str) else dict(device_map)}
    if below is not None and packed:
        raise UsageError(
            "--offload-lower moves whole layers; bitsandbytes keeps packed ones on the device.",
            hint="Leave one of them out: a base in 4 bits takes about a quarter of one in 16.",
        )
    if below is not None:
        return {"device_map": below_off_device(config, below, where, trust_remote_code)}
    return {"device_map": {"": str(where)}} if packed else {}


def _deciding(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without what saving and loading write into it."""
    return {k: v for k, v in config.items() if not k.startswith("_") and k not in _PROVENANCE and v is not None}


def _source_of(name: str | None) -> str:
    return str(_DEMO_PATH) if name in (None, DEMO_BASE) else os.path.expanduser(str(name))


def _name_of(source: str) -> str:
    """A hub id as it is; a local folder by its full path, so that it is found from anywhere."""
    return str(Path(source).resolve()) if Path(source).is_dir() else source


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keeps transformers from drawing on stderr, accelerate from warning of what was asked for, and the hub from being
    asked to convert pickles; puts their settings back.
    """
    from transformers.utils import logging as transformers_logging

    shown, accelerate = transformers_logging.is_progress_bar_enabled(), logging.getLogger("accelerate.big_modeling")
    level, converting = accelerate.level, os.environ.get(_NO_CONVERSION)
    transformers_logging.disable_progress_bar()
    accelerate.setLevel(logging.ERROR)
    os.environ[_NO_CONVERSION] = "1"
    try:
        yield
    finally:
        accelerate.setLevel(level)
        os.environ.pop(_NO_CONVERSION)
        if converting is not None:
            os.environ[_NO_CONVERSION] = converting
        if shown:
            transformers_logging.enable_progress_bar()


def _check_local(source: str) -> None:
    path = Path(source).expanduser()
    looks_local = path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1
    if path.exists() and not path.is_dir():
        raise ModelError(f"The base {source!r} is a file.", hint="Give the folder that holds config.json.")
    if path.is_dir() and not (path / "config.json").exists():
        raise ModelError(f"The folder {source!r} has no config.json.", hint="Give the folder of a checkpoint.")
    if looks_local and not path.exists():
        raise ModelError(f"There is no base at {source!r}.", hint="Check the path given with --model.")


def matrix_of(model: Any, site: EditSite) -> Tensor:
    """The edited matrix that a base is recognised by, in the module's orientation.

    It is the module's own weight where that is at hand in floating point. Of a base that was quantised or put on the
    disk while it was loaded it is read from the checkpoint; of a checkpoint that is stored quantised, and where the
    checkpoint is gone, it is the packed bytes.

    Raises:
        AttributeError: the model has no such module.
    """
    weight: Tensor = site.module(model).weight.detach()
    if weight.is_floating_point() and not weight.is_meta:
        return weight
    stored = stored_matrix(model, site.path, site.shape(model))
    return weight if stored is None else stored


def fingerprint(weight: Tensor) -> dict[str, str]:
    """SHA-256 of a matrix as stored and after casting to bfloat16 and float16, keyed by dtype name.

    Casting is deterministic, so the same checkpoint is recognised in any load dtype: a bf16 matrix widened to fp32
    casts back to the same bf16 bytes. Packed bytes are hashed as they are, and recognised only as such.
    """
    dtypes = {weight.dtype, *(_FINGERPRINT_DTYPES if weight.is_floating_point() else ())}
    return {dtype_name(d): _digest(weight.to(d)) for d in sorted(dtypes, key=str)}


def weights_digest(model: Any) -> str | None:
    """SHA-256 of all tensors of a model as they are now, with their names; None where some are not at hand."""
    tensors = dict(sorted(model.state_dict().items()))
    if any(t.is_meta for t in tensors.values()):
        return None
    with ThreadPoolExecutor() as pool:  # hashing lets go of the interpreter
        digests = pool.map(_digest, tensors.values())
        parts = [f"{k} {t.dtype} {list(t.shape)} {d}" for (k, t), d in zip(tensors.items(), digests, strict=True)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def matches(weight: Tensor, recorded: Mapping[str, str]) -> bool:
    """Whether a matrix is the recorded one, compared in the finest dtype both know.

    A bf16 matrix may also agree in fp16 alone: recorded from an fp16 load, its smallest numbers were rounded by then.
    """
    mine = fingerprint(weight)
    own = dtype_name(weight.dtype)
    if own in recorded and own != "bfloat16":
        return mine[own] == recorded[own]
    return any(mine[k] == recorded[k] for k in mine.keys() & recorded.keys())


def _digest(t: Tensor) -> str:
    data: Any = t.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy()  # view(-1): scalars have no bytes view
    return hashlib.sha256(data).hexdigest()


def context_of(model: PreTrainedModel) -> int:
    """Tokens a model takes in all; very many where its config does not say."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else sys.maxsize

"""Where the parts of a base lie when it does not fit on one device. Needs accelerate, which moves what is run.

Editing runs the layers below the edited one once per prompt, and those above many times. `below_off_device` keeps the
lower ones off the device: in the machine's memory beside an accelerator, on the disk where everything runs on the CPU.
They are brought in one at a time while prompts pass through them; learning does not touch them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from wisecli.errors import UsageError
from wisecli.models.site import decoder_layers, layer_index


def check_accelerate(option: str) -> None:
    """Refuse an option that needs accelerate where it is not installed.

    Raises:
        UsageError: it is not.
    """
    try:
        import accelerate  # noqa: F401
    except ImportError as e:
        raise UsageError(f"{option} needs accelerate.", hint="pip install 'wisecli[big]'") from e


def below_off_device(config: Any, layer: int | str, device: torch.device, trust_remote_code: bool) -> dict[str, Any]:
    """A device map with everything on one device but the decoder layers below `layer`.

    Args:
        config: of the base.
        layer: index (negative counts from the end) or "auto".

    Raises:
        ModelError: the architecture has no list of decoder layers.
        UsageError: there is no such layer, or accelerate is missing.
    """
    check_accelerate("--offload-lower")
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    layers = decoder_layers(model)
    first = layer_index(layer, len(layers))
    away = "disk" if device.type == "cpu" else "cpu"
    path = {id(m): k for k, m in model.named_modules()}[id(layers)]
    places: dict[str, Any] = {}
    parent: nn.Module = model
    prefix = ""
    for part in path.split("."):
        rest = (name for name, _ in parent.named_children() if name != part)
        places |= {f"{prefix}{name}": str(device) for name in rest}
        parent, prefix = getattr(parent, part), f"{prefix}{part}."
    return places | {f"{prefix}{i}": away if i < first else str(device) for i in range(len(layers))}

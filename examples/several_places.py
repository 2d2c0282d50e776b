"""Put a base in several places, and see that it computes the same: whole, with its lower layers away, by a map.

    python examples/several_places.py                     # the demonstration base; needs pip install 'wisecli[big]'
    python examples/several_places.py --model FOLDER

On the CPU what is away lies on the disk; beside an accelerator it lies in the machine's memory.
"""

from __future__ import annotations

import argparse

import torch

import wisecli
from wisecli.models.base import Base
from wisecli.models.site import decoder_layers, find_site


def logits(base: Base) -> torch.Tensor:
    """Of a fixed row of tokens."""
    ids = torch.arange(5, 17, device=base.model.device)[None]
    with torch.no_grad():
        return base.model(ids).logits.cpu()


def resident(base: Base) -> float:
    """Megabytes of weights that are where the base computes."""
    return sum(p.nbytes for p in base.model.parameters() if p.device == base.model.device) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    args = parser.parse_args()
    whole = wisecli.load_base(args.model)
    site, want = find_site(whole.model), logits(whole)
    names = {id(m): k for k, m in whole.model.named_modules()}
    layer = names[id(decoder_layers(whole.model)[site.layer])]
    rest = {k: str(whole.model.device) for k, m in whole.model.named_modules() if not list(m.children())}
    by_map = {k: v for k, v in rest.items() if not k.startswith(f"{layer}.")} | {layer: "disk"}
    places = {
        "whole": {},
        "lower layers away": {"offload_below": "auto"},
        "edited layer on the disk": {"device_map": by_map},
    }
    for name, how in places.items():
        base = wisecli.load_base(args.model, **how)
        same = torch.equal(logits(base), want)
        print(f"{name:25s} {resident(base):7.1f} MB on {base.model.device}, same logits: {same}, site {site.path}")


if __name__ == "__main__":
    main()

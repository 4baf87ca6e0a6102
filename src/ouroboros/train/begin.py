"""Begin a run from the weights of another model: parts may have been added, blocks inserted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ouroboros.errors import check
from ouroboros.model.modeling import OuroborosForCausalLM
from ouroboros.schedule import NEW, blocks_of
from ouroboros.train.state import model_tensors


@dataclass(frozen=True)
class Source:
    """The model that a run begins from."""

    name: str
    """As the user named it."""
    model: OuroborosForCausalLM = field(repr=False)
    blocks: str | None = None
    """For each block of the new model in order the number of the source's block whose weights it takes, or ``new``;
    ranges are allowed: ``0-3,new,4-8``. None: the numbers are the same."""
    partly: bool = False
    """Whether weights of the source may have no place in the new model."""
    beside: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    """Files beside the source, by name, that a run's directory gets too: what the model was made of, for instance."""


@dataclass(frozen=True)
class Begun:
    """What a run took from its source."""

    source: str
    taken: int
    """Tensors that were copied."""
    anew: tuple[str, ...]
    """Tensors of the new model that began at their own start."""
    left: tuple[str, ...]
    """Tensors of the source that have no place in the new model, each with its shapes if those differ."""

    def describe(self) -> str:
        """One line for people."""
        anew = f", {len(self.anew)} begin anew ({_some(self.anew)})" if self.anew else ""
        left = f", {len(self.left)} of its own are left ({_some(self.left)})" if self.left else ""
        return f"begins from {self.source}: {self.taken} tensors taken{anew}{left}"

    def record(self) -> dict[str, Any]:
        """The same for the metrics, with all names."""
        names = {"anew": self.anew, "left": self.left}
        return {"kind": "begin", "step": 0, "from": self.source, "taken": self.taken, **names}


@torch.no_grad()
def take(model: OuroborosForCausalLM, source: Source) -> Begun:
    """Copy into ``model`` every tensor of ``source`` that it has too, by name and shape; the others keep their start.

    Raises:
        OuroborosError: the numbers of blocks differ and nothing says which is which, a list of blocks does not fit,
            weights have no place although ``source.partly`` is off, or there is nothing in common.
    """
    present, given = model_tensors(model), model_tensors(source.model)
    wanted = _wanted_names(model, source, present)
    fits = {name: given[there] for name, there in wanted.items() if there in given}
    fits = {name: tensor for name, tensor in fits.items() if tensor.shape == present[name].shape}
    used = {wanted[name] for name in fits}
    shapes = {there: tuple(present[name].shape) for name, there in wanted.items() if there in given}
    left = tuple(_described(name, given[name], shapes.get(name)) for name in given if name not in used)
    check(bool(fits), f"--from {source.name}: it has no weight in common with this model, by name and shape")
    anew = tuple(name for name in present if name not in fits)
    begins = f"; of this model {len(anew)} would begin anew ({_some(anew)})" if anew else ""
    check(
        source.partly or not left,
        f"--from {source.name}: {len(left)} of its tensors have no place in this model ({_some(left)}){begins};"
        " change the model to match, or add --from-partly to leave them",
    )
    for name, tensor in fits.items():
        present[name].copy_(tensor)
    return Begun(source.name, len(fits), anew, left)


def _wanted_names(model: OuroborosForCausalLM, source: Source, present: Mapping[str, Tensor]) -> dict[str, str]:
    """For each tensor of ``model`` the name in the source that it takes; those of new blocks have none."""
    here, there = model.schedule, source.model.schedule
    if source.blocks is None:
        check(
            here.num_blocks == there.num_blocks,
            f"--from {source.name}: it has {there.num_blocks} blocks ({there.notation}) and this model has"
            f" {here.num_blocks} ({here.notation}); say with --from-blocks which of them each block takes, for example"
            f" --from-blocks {_example(there.num_blocks, here.num_blocks)}",
        )
        return {name: name for name in present}
    numbers = blocks_of(source.blocks, there.num_blocks, here.num_blocks, "--from-blocks", new=True)
    blocks = model.model.decoder.layers
    prefix = next(f"{name}." for name, module in model.named_modules() if module is blocks)
    wanted = {}
    for name in present:
        number, _, rest = name.removeprefix(prefix).partition(".")
        if not name.startswith(prefix):
            wanted[name] = name
        elif numbers[int(number)] is not None:
            wanted[name] = f"{prefix}{numbers[int(number)]}.{rest}"
    return wanted


def _example(there: int, here: int) -> str:
    """A list of blocks that could be meant: new ones in the middle, or the first ones of a longer source."""
    first = (min(there, here) + 1) // 2
    kept = [(0, first - 1), (first, there - 1)] if there < here else [(0, here - 1)]
    ranges = [f"{low}-{high}" if low < high else str(low) for low, high in kept if low <= high]
    return ",".join([ranges[0], *[NEW] * (here - there), *ranges[1:]])


def _described(name: str, tensor: Tensor, shape: tuple[int, ...] | None) -> str:
    return name if shape is None else f"{name}, of shape {tuple(tensor.shape)} there and {shape} here"


def _some(names: Sequence[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more

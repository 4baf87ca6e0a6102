"""Parameters, gradients and the state of optimisers in parts, one for each process: PyTorch's FSDP2, for weights that
are used again and again.

FSDP gathers the parameters of a block before it is used and frees them behind it. A block that a loop visits R times
would be gathered up to 2 R times in a step, and its gradient reduced R times. Here it is gathered at its first visit,
is kept until the backward pass has left that visit, and is reduced then: once each, whatever R is.
"""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.optim.swa_utils import AveragedModel

from ouroboros.config import TrainSpec
from ouroboros.errors import check
from ouroboros.model.modeling import OuroborosForCausalLM
from ouroboros.schedule import Schedule
from ouroboros.train.distributed import Workers
from ouroboros.train.state import copy_tensors, gathered, model_tensors


class Shards:
    """Divides a model, in place, among the processes that train it.

    Args:
        model: on its device, the same on every process. Its parameters are ``DTensor`` afterwards, divided by their
            first dimension.
        averages: models of the same form that are divided in the same way, and only hold weights.
        main: whether this is the process that evaluates and writes, which keeps a model of whole weights in the
            memory of the CPU.
        processes: how many there are.
    """

    def __init__(
        self, model: OuroborosForCausalLM, averages: Sequence[OuroborosForCausalLM], *, main: bool, processes: int
    ) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        self._plain = nn.Module.to(copy.deepcopy(model), "cpu") if main else None  # a divided one cannot be copied
        mesh = init_device_mesh(self.device.type, (processes,))
        for average in averages:
            _divide(average, mesh)
        blocks = _divide(model, mesh)
        reused = reused_blocks(model.schedule)
        self._reused = [_Reused(blocks[number]) for number in sorted(reused)]
        self._syncs = True
        model.register_forward_pre_hook(self._begin)

    def _begin(self, module: nn.Module, inputs: Any) -> None:
        """Before a forward pass of the whole model."""
        self.model.set_requires_gradient_sync(self._syncs)  # pyrefly: ignore
        for block in self._reused:
            block.begin(self._syncs)

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """Within the context gradients are added up on each process alone, and reduced with those of the next pass
        outside. They then take the memory of whole gradients."""
        self._syncs = False
        try:
            yield
        finally:
            self._syncs = True

    def settle(self) -> None:
        """After the last backward pass of a step: every process holds its part of parameters and gradients alone.

        Raises:
            OuroborosError: a block's later visits had a gradient and its first one had none.
        """
        for block in self._reused:
            block.settle()

    @contextlib.contextmanager
    def whole(self, source: nn.Module) -> Iterator[OuroborosForCausalLM]:
        """A model with the whole weights of ``source``, the divided model or an average of it. All processes have to
        enter; the main one alone is given such a model, others are given the divided one, which they must not call."""
        tensors = gathered(model_tensors(source), keep=self._plain is not None)
        if self._plain is None:
            yield self.model
            return
        copy_tensors(model_tensors(self._plain), tensors, "gathered weights")
        del tensors
        try:
            yield nn.Module.to(self._plain, self.device).train(source.training)
        finally:
            nn.Module.to(self._plain, "cpu")


def shards_of(
    spec: TrainSpec, model: OuroborosForCausalLM, average: AveragedModel | None, crew: Workers
) -> Shards | None:
    """Divide model and average among the processes of ``crew``, if ``spec`` asks for it and there are several."""
    if spec.sharding == "none" or not crew.distributed:
        return None
    averages: Any = [] if average is None else [average.module]
    return Shards(model, averages, main=crew.is_main, processes=crew.world_size)


def whole(source: Any, shards: Shards | None) -> contextlib.AbstractContextManager[OuroborosForCausalLM]:
    """:meth:`Shards.whole` of ``source``, which is whole by itself where nothing is divided."""
    return contextlib.nullcontext(source) if shards is None else shards.whole(source)


def reused_blocks(schedule: Schedule) -> set[int]:
    """The blocks that a step may visit more than once."""
    visits = Counter(visit.block for visit in schedule.visits)
    looped = {block for segment in schedule.segments if segment.looped for block in segment.blocks}
    return looped | {block for block, count in visits.items() if count > 1}


def _divide(model: OuroborosForCausalLM, mesh: Any) -> nn.ModuleList:
    """Divide every block by itself, and all other parameters together; returns the blocks."""
    from torch.distributed.fsdp import fully_shard  # takes about a second to import

    for name, parameter in model.named_parameters():
        check(parameter.ndim > 0, f"train.sharding: {name} is a single number, which cannot be divided: use none")
    blocks, reused = model.model.decoder.layers, reused_blocks(model.schedule)
    for number, block in enumerate(blocks):
        fully_shard(block, mesh=mesh, reshard_after_forward=number not in reused)
        block.register_forward_pre_hook(_hide, prepend=True)
        block.register_forward_pre_hook(_show)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    return blocks


class _Hidden:
    """What FSDP is not to look into: it would copy the dictionaries in which visits hand values to one another."""

    def __init__(self, value: Any) -> None:
        self.value = value


def _hide(block: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Before the hook of FSDP."""
    return inputs[0], *map(_Hidden, inputs[1:])


def _show(block: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """After the hook of FSDP."""
    return inputs[0], *(hidden.value for hidden in inputs[1:])


class _Reused:
    """A block that is gathered once and reduced once, however often a step visits it."""

    def __init__(self, block: Any) -> None:
        self.block, self.syncs = block, True
        self.visited = self.reached = self.left = False
        """Whether a visit with gradient has begun, whether the backward pass has come to any visit, and whether it has
        come to the first one, behind which no other follows."""
        block.register_forward_hook(self._watch)

    def begin(self, syncs: bool) -> None:
        self.syncs, self.visited, self.reached, self.left = syncs, False, False, False
        self._set(reduces=False)

    def _set(self, *, reduces: bool) -> None:
        """Whether the next visit that the backward pass leaves reduces the gradient, and frees what was gathered."""
        self.block.set_requires_gradient_sync(reduces, recurse=False)
        self.block.set_reshard_after_backward(reduces, recurse=False)

    def _watch(self, block: nn.Module, inputs: Any, output: Tensor) -> None:
        if torch.is_grad_enabled() and output.requires_grad:
            # Where activations are computed again, this comes a second time and changes nothing.
            output.register_hook(self._reach if self.visited else self._leave)
            self.visited = True

    def _reach(self, gradient: Tensor) -> None:
        self.reached = True

    def _leave(self, gradient: Tensor) -> None:
        self.reached = self.left = True
        if self.syncs:
            self._set(reduces=True)

    def settle(self) -> None:
        check(
            self.left or not self.reached,
            "train.sharding: the gradient of a block that is visited several times does not reach its first visit:"
            " use none",
        )
        self.block.reshard()

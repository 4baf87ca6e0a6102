"""Parameters, gradients and the state of optimisers in parts, one for each process: PyTorch's FSDP2, for weights that
are used again and again.

FSDP gathers the parameters of a block before it is used and frees them behind it. A block that a loop visits R times
would be gathered 2 R times in a step. Here it is gathered once, at its first visit, and kept until the backward pass is
over. Its gradient is reduced once in any case, as autograd has it when the contributions of all visits are there; with
what earlier micro-batches of the step have left, twice.
"""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
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
        self._plain: Any = nn.Module.to(copy.deepcopy(model), "cpu") if main else None  # a divided one cannot be copied
        mesh = init_device_mesh(self.device.type, (processes,))
        for average in averages:
            _divide(average, mesh)
        self._reused = _divide(model, mesh)

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """Within the context gradients are added up on each process alone, and reduced with those of the next pass
        outside. They then take the memory of whole gradients."""
        model: Any = self.model
        model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)

    def settle(self) -> None:
        """After the last backward pass of a step: every process holds its part of the parameters alone."""
        for block in self._reused:
            block.reshard()

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
            nn.Module.to(self._plain, self.device)
            self._plain.train(source.training)
            yield self._plain
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


def _divide(model: OuroborosForCausalLM, mesh: Any) -> list[FSDPModule]:
    """Divide every block by itself, and all other parameters together; returns the blocks that stay gathered."""
    for name, parameter in model.named_parameters():
        check(parameter.ndim > 0, f"train.sharding: {name} is a single number, which cannot be divided: use none")
    reused, kept = reused_blocks(model.schedule), []
    for number, block in enumerate(model.model.decoder.layers):
        fully_shard(block, mesh=mesh, reshard_after_forward=number not in reused)
        if number in reused:
            block.set_reshard_after_backward(False)  # pyrefly: ignore
            kept.append(block)
        block.register_forward_pre_hook(_hide, prepend=True)
        block.register_forward_pre_hook(_show)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    return kept


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

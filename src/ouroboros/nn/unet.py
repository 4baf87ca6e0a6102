"""Skip connections from early visits to late ones. Shapes: S skips, D model width."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from ouroboros.config import ModelSpec
from ouroboros.config.parts.topology import UNetSpec
from ouroboros.nn.part import Init, Started
from ouroboros.nn.topology import MAIN, Event, RunBlock, Step, segment_steps
from ouroboros.schedule import Schedule


class Skips(Started):
    """``x + w_i * saved`` with a learned factor for each channel of each skip."""

    PARAMETER_ROLES = {"weight": "vector"}

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(count, width))

    def reset_parameters(self, init: Init | None = None) -> None:
        """One."""
        nn.init.ones_(self.weight)

    def save(self, index: int, streams: dict[str, Tensor]) -> None:
        """Keep the stream for the late visit ``index``."""
        streams[f"skip.{index}"] = streams[MAIN]

    def add(self, index: int, streams: dict[str, Tensor]) -> None:
        """Add what was kept for the late visit ``index``."""
        x, saved = streams[MAIN], self.weighed(streams.pop(f"skip.{index}"), streams)
        streams[MAIN] = torch.addcmul(x, self.weight[index].to(x.dtype), saved)

    def weighed(self, saved: Tensor, streams: dict[str, Tensor]) -> Tensor:
        """What is added of ``saved``, (B, T, D), before the factor."""
        return saved


class UNet(nn.Module):
    """Blocks one after the other; what early visits return is added before late ones."""

    def __init__(self, spec: UNetSpec, model: ModelSpec) -> None:
        super().__init__()
        self.spec, self.count = spec, spec.count(model)
        self.skips = Skips(self.count, model.hidden_size)

    def events(self, schedule: Schedule) -> tuple[dict[int, Event], dict[int, Event]]:
        """What adds a skip before visits and what saves one after visits, by slot."""
        slots = [visit.slot for visit in self.spec.paired(schedule)]
        half = len(slots) // 2
        early, late = slots[:half][::-1], slots[half:]  # the last early visit is saved for the first late one
        adding, saving = {}, {}
        for index, (first, second) in enumerate(zip(early[: self.count], late[: self.count], strict=True)):
            saving[first] = Event(functools.partial(self.skips.save, index))
            adding[second] = Event(functools.partial(self.skips.add, index))
        return adding, saving

    def steps(self, schedule: Schedule) -> Iterator[Step]:
        """The visits in order, with a skip saved after early ones and added before late ones."""
        return with_skips(segment_steps(schedule), *self.events(schedule))


def with_skips(steps: Iterable[Step], adding: Mapping[int, Event], saving: Mapping[int, Event]) -> Iterator[Step]:
    """``steps`` with what adds a skip before a visit and what saves one behind it, by slot (:meth:`UNet.events`)."""
    for step in steps:
        slot = step.visit.slot if isinstance(step, RunBlock) else -1
        if slot in adding:
            yield adding[slot]
        yield step
        if slot in saving:
            yield saving[slot]

"""Two streams that run side by side. Shapes: B batch, T positions, D model width, W width of a bridge."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ouroboros.config import ModelSpec
from ouroboros.config.parts.helix import HelixSpec
from ouroboros.nn.part import Init, Projection, Started, ZeroProjection
from ouroboros.nn.small import ZeroLinear
from ouroboros.nn.topology import MAIN, Event, RunBlock, Step, by_segment
from ouroboros.nn.unet import Skips, UNet, with_skips
from ouroboros.schedule import Schedule

SECOND, UP, DOWN = "second", "up", "down"
"""The second stream, which begins as the first; what it is told of the first, and the first of it."""


class GatedSkips(Skips):
    """Skips that are multiplied by one number of the second stream, 0.88 for all tokens at the start."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__(count, width)
        self.gate = ZeroLinear(width, 1, bias=2.0)

    def weighed(self, saved: Tensor, streams: dict[str, Tensor]) -> Tensor:
        return saved * torch.sigmoid(self.gate(streams[SECOND]))


class Helix(UNet):
    """The first stream is a U-net; the second runs the shared blocks, and both exchange hints whenever it does.

    With hints ``h``, both of the streams before the blocks run: ``y = blocks(y + h_up)``, then ``x = x + h_down``; at
    the end ``x = x + m * y``.
    """

    def __init__(self, spec: HelixSpec, model: ModelSpec) -> None:
        super().__init__(spec, model)
        if spec.skip_gate:
            self.skips = GatedSkips(self.count, model.hidden_size)
        self.helix = spec
        self.exchange = Exchange(spec, model.hidden_size, spec.rows(model.schedule))
        self.reading = {block for block, parts in enumerate(model.blocks) if parts.mixer.reads_other}
        """Blocks that look at the other stream."""

    def steps(self, schedule: Schedule) -> Iterator[Step]:
        """The visits in order; hints around those of the second stream, and the sum of both streams at the end."""
        adding, saving = self.events(schedule)
        early, time = self._early(schedule), 0
        waiting: list[Step] = []  # a skip that is saved before the first stream goes on
        yield Event(self.exchange.begin)
        for segment, steps in by_segment(schedule):
            if self.helix.runs_second(segment):
                row = min(time, early) if self.helix.visit_embedding == "halves" else time
                yield Event(functools.partial(self.exchange.before, row))
                yield from (self._elsewhere(step, SECOND, MAIN) for step in steps)
                yield Event(self.exchange.after)
                time += 1
            elif segment.name in self.helix.bridge_names:
                asking, other = (SECOND, MAIN) if segment.name == UP else (MAIN, SECOND)
                yield Event(functools.partial(_ask, segment.name, asking))
                yield from (self._elsewhere(step, segment.name, other) for step in steps)
            else:
                steps = [*waiting, *with_skips(steps, adding, saving)]
                behind = self.helix.skip_after_hint and isinstance(steps[-1], Event)
                waiting = [steps.pop()] if behind else []
                yield from steps
        yield Event(self.exchange.end)

    def _elsewhere(self, step: Step, stream: str, other: str) -> Step:
        """A visit on another stream; blocks that look at the other one are told which."""
        assert isinstance(step, RunBlock)
        return step._replace(stream=stream, other=other if step.visit.block in self.reading else None)

    def _early(self, schedule: Schedule) -> int:
        """How often the second stream runs in the first half of the first."""
        slots = [visit.slot for visit in self.spec.paired(schedule)]
        middle = slots[len(slots) // 2]
        runs = [steps[0] for segment, steps in by_segment(schedule) if self.helix.runs_second(segment)]
        return sum(step.visit.slot < middle for step in runs if isinstance(step, RunBlock))


def _ask(name: str, asking: str, streams: dict[str, Tensor]) -> None:
    streams[name] = streams[asking]


class Exchange(Started):
    """What passes between the streams, and how they are joined."""

    PARAMETER_ROLES = {"merge": "vector", "embedding": "vector"}

    def __init__(self, spec: HelixSpec, width: int, rows: int) -> None:
        super().__init__()
        self.spec = spec
        if spec.bridges == "linear":
            self.up, self.down = Bridge(width, spec.bridge_width), Bridge(width, spec.bridge_width)
        self.merge = nn.Parameter(torch.zeros(width))
        if rows:
            self.embedding = nn.Parameter(torch.zeros(rows, width))

    def reset_parameters(self, init: Init | None = None) -> None:
        """Zero."""
        nn.init.zeros_(self.merge)
        if hasattr(self, "embedding"):
            nn.init.zeros_(self.embedding)

    def begin(self, streams: dict[str, Tensor]) -> None:
        """Both streams begin alike."""
        streams[SECOND] = streams[MAIN]

    def before(self, row: int, streams: dict[str, Tensor]) -> None:
        """The hints of both streams; the second one takes its own."""
        if self.spec.bridges == "linear":
            streams[UP], streams[DOWN] = self.up(streams[MAIN]), self.down(streams[SECOND])
        streams[SECOND] = streams[SECOND] + self._capped(streams.pop(UP))
        if hasattr(self, "embedding"):
            streams[SECOND] = streams[SECOND] + self.embedding[row].to(streams[SECOND].dtype)

    def after(self, streams: dict[str, Tensor]) -> None:
        """The first stream takes its hint once the second one has run."""
        streams[MAIN] = streams[MAIN] + self._capped(streams.pop(DOWN))

    def end(self, streams: dict[str, Tensor]) -> None:
        """Add the second stream to the first."""
        factor = self.merge
        if self.spec.merge == "sigmoid":
            factor = torch.sigmoid(factor).clamp(max=1.0 if self.spec.merge_cap is None else self.spec.merge_cap)
        x = streams[MAIN]
        streams[MAIN] = torch.addcmul(x, factor.to(x.dtype), streams.pop(SECOND).to(x.dtype))

    def _capped(self, hint: Tensor) -> Tensor:
        cap = self.spec.hint_cap
        return hint if cap is None else cap * torch.tanh(hint / cap)


class Bridge(nn.Module):
    """``A2 A1 x`` through W channels; zero at the start."""

    def __init__(self, width: int, narrow: int) -> None:
        super().__init__()
        self.down_proj = Projection(width, narrow, bias=False)
        self.up_proj = ZeroProjection(narrow, width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """(B, T, D) to the same."""
        return self.up_proj(self.down_proj(x_BTD))

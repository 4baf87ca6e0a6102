"""The executor: runs the steps of a topology, and shows every visit to those who watch.

Shapes: B batch, T positions, D model width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ouroboros.config import ModelSpec
from ouroboros.config.part import build
from ouroboros.model.stopping import Stopping, separable
from ouroboros.nn.block import Block
from ouroboros.nn.part import LoopModule
from ouroboros.nn.topology import MAIN, EnterLoop, LeaveLoop, RunBlock
from ouroboros.nn.visit import VisitContext
from ouroboros.schedule import Schedule, Visit

ContextOf = Callable[[Visit, bool], VisitContext]
"""What a visit is given, by the visit and whether it is the block's last."""


class OnVisit(Protocol):
    """Is called after a visit with its block, what that was given, and the stream before and after."""

    def __call__(self, block: Block, visit: VisitContext, before: Tensor, after: Tensor, /) -> None: ...


class OnLoop(Protocol):
    """Is called after a loop with the segment's index, the loop, and the stream before it and after its loop parts."""

    def __call__(self, segment: int, loop: int, before: Tensor, after: Tensor, /) -> None: ...


class OnPositions(Protocol):
    """Is called after a loop with the segment's index, the loop, and what its parts tell of each position, (B, T) each
    by name."""

    def __call__(self, segment: int, loop: int, told: dict[str, Tensor], /) -> None: ...


class Observer:
    """Who watches visits, loops and positions; any may be None."""

    def __init__(
        self,
        on_visit: OnVisit | None = None,
        on_loop: OnLoop | None = None,
        on_positions: OnPositions | None = None,
        registers: bool = False,
    ) -> None:
        self.on_visit, self.on_loop, self.on_positions = on_visit, on_loop, on_positions
        self.registers = registers


@contextlib.contextmanager
def observe(
    model: nn.Module,
    on_visit: OnVisit | None = None,
    on_loop: OnLoop | None = None,
    on_positions: OnPositions | None = None,
    registers: bool = False,
) -> Iterator[None]:
    """Within the context, show every visit and every loop of ``model``, of which then none is left out for positions
    that have stopped.

    The stream is (B, T, D), or (B, T, V, D) where a residual has several value channels; registers are left out unless
    they are asked for.

    Args:
        model: with a :class:`Decoder` inside.
        on_visit: see :class:`OnVisit`.
        on_loop: see :class:`OnLoop`.
        on_positions: see :class:`OnPositions`.
        registers: show them too, and the very tensors that later steps use, whose gradients can be watched.
    """
    decoder = next(module for module in model.modules() if isinstance(module, Decoder))
    observer = Observer(on_visit, on_loop, on_positions, registers)
    decoder.observers.append(observer)
    try:
        yield
    finally:
        decoder.observers.remove(observer)


class Decoder(nn.Module):
    """Blocks, loop parts and the topology that wires them; the schedule is given with each call."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        width = spec.hidden_size
        self.spec = spec
        self.layers = nn.ModuleList(Block(block, width) for block in spec.blocks)
        looped = [segment for segment in spec.schedule.segments if segment.looped]
        self.loops = nn.ModuleList(
            nn.ModuleDict({part.kind: build(part, width, segment.loops, spec.block.norm.eps) for part in parts})
            for segment, parts in zip(looped, spec.loop_parts, strict=True)
        )
        self.watched = {block for parts in spec.loop_parts for part in parts for block in part.watches}
        """Blocks whose output loop parts read."""
        self.topology = build(spec.topology, spec)
        self.observers: list[Observer] = []

    def forward(
        self,
        x: Tensor,
        schedule: Schedule,
        context_of: ContextOf,
        *,
        backprop_loops: int | None = None,
        call: Callable[..., Tensor] | None = None,
        hidden: int = 0,
        observers: list[Observer] | None = None,
        losses: list[Tensor] | None = None,
    ) -> Tensor:
        """Run every step of ``schedule`` on the stream (B, T, D) or (B, T, V, D).

        Args:
            x: the stream at its start.
            schedule: the visits; its blocks are this decoder's, its loop counts are free.
            context_of: what each visit is given.
            backprop_loops: only the last this many loops of a segment carry gradient; None means all.
            call: how a block is called, ``call(block, x, visit)``; activation checkpointing enters here.
            hidden: positions in front that observers do not see.
            observers: instead of those of :func:`observe`.
            losses: is given what parts add to the loss, a mean over positions each, in training.
        """
        watching = self.observers if observers is None else observers
        run = _Run(self, x, context_of, backprop_loops, call, hidden, watching, losses if self.training else None)
        steps = self.topology.steps(schedule)
        if any(part.stops for parts in self.loops for part in parts.values()):  # pyrefly: ignore
            seen = bool(watching or self.observers)
            whole = seen or self.training or torch.is_grad_enabled() or torch.compiler.is_compiling()
            steps = list(steps)
            run.separable = set() if whole else separable(self.spec, steps, self.watched)
        for step in steps:
            step.run(run)
        return run.streams[MAIN]


class _Run:
    """One call of the decoder: the streams, and what happens to them at each step."""

    def __init__(
        self,
        decoder: Decoder,
        x: Tensor,
        context_of: ContextOf,
        backprop_loops: int | None,
        call: Callable[..., Tensor] | None,
        hidden: int,
        observers: list[Observer],
        losses: list[Tensor] | None,
    ) -> None:
        self.decoder, self.streams, self.context_of = decoder, {MAIN: x}, context_of
        self.backprop_loops, self.call, self.hidden, self.observers = backprop_loops, call, hidden, observers
        self.losses = losses
        self.separable: set[int] = set()
        """Looped segments in which positions that have stopped are left out."""
        self.stopping: dict[str, Stopping] = {}
        """What stops positions of the present segment, by stream."""
        self.padding: Tensor | None = None
        """Of the last visit."""
        self.before: dict[str, Tensor] = {}
        """The stream before the present loop, by stream."""
        self.carried: dict[int, dict[str, Tensor]] = {}
        """What loop parts hand on, by looped segment."""
        self.entered: dict[str, EnterLoop] = {}
        """The loop that the next visit begins, by stream."""
        self.handed: dict[str, dict[str, Tensor]] = {}
        """What loop parts hand to the visits of the present loop, by stream."""
        self.outputs: dict[str, Tensor] = {}
        """What watched blocks returned last."""

    def block(self, step: RunBlock) -> None:
        """A visit."""
        block, x = self.decoder.layers[step.visit.block], self.streams[step.stream]
        context = self.context_of(step.visit, step.last)
        stopping, self.padding = self.stopping.get(step.stream), context.padding
        if stopping is not None and stopping.over:
            return stopping.skip(context.memory, step.visit.block)
        if stopping is not None:
            context = stopping.begin(context)
        if step.other is not None:
            context = context._replace(other=self.streams[step.other])
        with self._gradient(step.left):
            if (entered := self.entered.pop(step.stream, None)) is not None:
                beginning = context._replace(looped=self.carried[entered.looped])
                self.handed[step.stream] = {
                    name: value
                    for part in self._parts(entered.looped)
                    for name, value in part.hand(x, beginning, entered.loop).items()
                }
            context = context._replace(handed=self.handed.get(step.stream, {}))
            after = block(x, context) if self.call is None else self.call(block, x, context)
            after = after if stopping is None else stopping.end(context, x, after)
        self.streams[step.stream] = after
        if step.visit.block in self.decoder.watched:
            self.outputs[f"block.{step.visit.block}"] = after
        for observer in self.observers:
            if observer.on_visit is not None:
                observer.on_visit(block, context, *self._shown_to(observer, x, after))  # pyrefly: ignore

    def enter(self, step: EnterLoop) -> None:
        """The loop parts before a loop."""
        parts, x = self._parts(step.looped), self.streams[step.stream]
        if step.loop == 0 and any(part.stops for part in parts):
            self.stopping[step.stream] = Stopping(self.decoder.spec, narrows=step.looped in self.separable)
        self.before[step.stream] = x
        carried = self.carried.setdefault(step.looped, {"x0": x, **self.outputs})
        if not self._over(step.stream):
            with self._gradient(step.left):
                for part in parts:
                    x = part.enter(x, carried, step.loop)
        self.streams[step.stream], self.entered[step.stream] = x, step

    def leave(self, step: LeaveLoop) -> None:
        """The loop parts after a loop."""
        before, z = self.before[step.stream], self.streams[step.stream]
        parts, carried, last = self._parts(step.looped), self.carried[step.looped], step.left == 1
        self.handed.pop(step.stream, None)
        told: dict[str, Tensor] = {}
        asked = any(observer.on_positions is not None for observer in self.observers)
        with self._gradient(step.left):
            for part in [] if self._over(step.stream) else parts:
                if asked:
                    told |= _scales(part, before, z, carried, step.loop)
                z = part.leave(before, z, carried, step.loop)
            if (stopping := self.stopping.get(step.stream)) is not None:
                z = stopping.leave(before, z, carried, parts, last=last)
            for part in parts if last else ():
                z = part.finish(z, carried)
        self.streams[step.stream] = z
        for part in parts if asked else ():
            told |= part.tell(carried)
        for observer in self.observers:
            if observer.on_loop is not None:
                observer.on_loop(step.segment, step.loop, *self._shown_to(observer, before, z))
            if observer.on_positions is not None:
                observer.on_positions(step.segment, step.loop, {name: self._shown(x) for name, x in told.items()})
        if last:
            self.stopping.pop(step.stream, None)
            self._add_losses(parts, carried)

    def _over(self, stream: str) -> bool:
        """Whether all positions have stopped, so that nothing is left to compute in these loops."""
        return stream in self.stopping and self.stopping[stream].over

    def _add_losses(self, parts: list[LoopModule], carried: dict[str, Tensor]) -> None:
        """What parts add to the loss: means over the positions that are text."""
        for part in parts if self.losses is not None else ():
            if (loss := part.auxiliary_loss(carried)) is not None:
                loss = self._shown(loss)
                real = loss.new_ones(loss.shape) if self.padding is None else self.padding.to(loss.dtype)
                self.losses.append((loss * real).sum() / real.sum().clamp(min=1))  # pyrefly: ignore

    def _parts(self, looped: int) -> list[LoopModule]:
        parts: Any = self.decoder.loops[looped]
        return list(parts.values())

    def _gradient(self, left: int) -> contextlib.AbstractContextManager[Any]:
        """No gradient for loops that truncated backpropagation leaves out."""
        cut = self.backprop_loops is not None and left > self.backprop_loops
        return torch.no_grad() if cut else contextlib.nullcontext()

    def _shown_to(self, observer: Observer, *states: Tensor) -> tuple[Tensor, ...]:
        return states if observer.registers else tuple(self._shown(x) for x in states)

    def _shown(self, x: Tensor) -> Tensor:
        return x[:, self.hidden :] if self.hidden else x


@torch.no_grad()
def _scales(part: LoopModule, x: Tensor, z: Tensor, carried: dict[str, Tensor], loop: int) -> dict[str, Tensor]:
    """The means over the channels of what a part multiplies with, (B, T) each."""
    found = part.scales(x, z, carried, loop)
    return {name: scale.float().expand(z.shape).flatten(2).mean(dim=-1) for name, scale in found.items()}

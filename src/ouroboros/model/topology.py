"""Topologies: how visits are wired. A topology owns blocks and loop parts; the schedule is given with each call.

Shapes: B batch, T positions, D model width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ouroboros.config import ModelSpec
from ouroboros.nn.block import Block
from ouroboros.nn.loop import LoopParts
from ouroboros.nn.memory import Memory
from ouroboros.nn.mixer import MixerInput
from ouroboros.schedule import Schedule, Segment, Visit, parse

MemoryOf = Callable[[Visit, bool], Memory | None]
"""The memory of a visit, given the visit and whether it is the block's last."""


class Probe(Protocol):
    """Sees the state at loop boundaries; used for telemetry and pictures."""

    def __call__(self, segment: int, loop: int, before_BTD: Tensor, after_BTD: Tensor) -> None: ...


class Chain(nn.Module):
    """Blocks one after the other; looped segments repeat, with loop parts at their boundaries."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        schedule = parse(spec.layout)
        self.layers = nn.ModuleList(Block(spec) for _ in range(schedule.num_blocks))
        self.loops = nn.ModuleList(
            LoopParts(spec.loop, spec.hidden_size, segment.loops, spec.norm.eps)
            for segment in schedule.segments
            if segment.looped
        )

    def forward(
        self,
        x_BTD: Tensor,
        schedule: Schedule,
        given: MixerInput,
        memory_of: MemoryOf,
        *,
        backprop_loops: int | None = None,
        probe: Probe | None = None,
        call: Callable[..., Tensor] | None = None,
    ) -> Tensor:
        """Run every visit of ``schedule`` on (B, T, D).

        Args:
            x_BTD: embeddings.
            schedule: the visits; its blocks are this topology's, its loop counts are free.
            given: rotary tables and masks for the mixers.
            memory_of: the cache view of each visit.
            backprop_loops: only the last this many loops of a segment carry gradient; None means all.
            probe: called after every loop.
            call: how a block is called, ``call(block, x, given, memory)``; activation checkpointing enters here.
        """
        run = call or _plain_call
        slot, looped = 0, 0
        for index, segment in enumerate(schedule.segments):
            if segment.looped:
                parts = self.loops[looped]
                looped += 1
                x_BTD = self._loop(x_BTD, index, segment, slot, parts, given, memory_of, backprop_loops, probe, run)
            else:
                x_BTD = self._blocks(x_BTD, segment, 0, slot, given, memory_of, run)
            slot += segment.num_blocks * segment.loops
        return x_BTD

    def _loop(
        self,
        x_BTD: Tensor,
        index: int,
        segment: Segment,
        slot: int,
        parts: nn.Module,
        given: MixerInput,
        memory_of: MemoryOf,
        backprop_loops: int | None,
        probe: Probe | None,
        run: Callable[..., Tensor],
    ) -> Tensor:
        assert isinstance(parts, LoopParts)
        x0_BTD = x_BTD
        for loop in range(segment.loops):
            frozen = backprop_loops is not None and loop < segment.loops - backprop_loops
            with torch.no_grad() if frozen else contextlib.nullcontext():
                z_BTD = parts.enter(x_BTD, x0_BTD, loop)
                z_BTD = self._blocks(z_BTD, segment, loop, slot, given, memory_of, run)
                z_BTD = parts.leave(x_BTD, z_BTD, loop)
            if probe is not None:
                probe(index, loop, x_BTD, z_BTD)
            x_BTD = z_BTD
            slot += segment.num_blocks
        return x_BTD

    def _blocks(
        self,
        x_BTD: Tensor,
        segment: Segment,
        loop: int,
        slot: int,
        given: MixerInput,
        memory_of: MemoryOf,
        run: Callable[..., Tensor],
    ) -> Tensor:
        for offset, block in enumerate(segment.blocks):
            memory = memory_of(Visit(slot + offset, block, loop), loop == segment.loops - 1)
            x_BTD = run(self.layers[block], x_BTD, given, memory)
        return x_BTD


def _plain_call(block: nn.Module, *arguments: Any) -> Tensor:
    return block(*arguments)

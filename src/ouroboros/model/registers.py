"""Registers: learned tokens in front of the text; what visits keep of them is a constant prefix of every cache."""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from ouroboros.config import ModelSpec
from ouroboros.model.executor import Decoder
from ouroboros.nn.memory import Memory, Prefix, Recorder
from ouroboros.nn.visit import VisitContext
from ouroboros.schedule import Schedule, Visit

MemoryOf = Callable[[Visit, bool], Memory | None]
"""The memory of a visit, given the visit and whether it is the block's last."""
NOWHERE: Any = None
"""Stands for rotary tables until a visit is known."""


class Registers(nn.Module):
    """What a model with registers remembers of them; they never see the text."""

    spec: ModelSpec
    registers: nn.Parameter
    decoder: Decoder
    expansion: nn.Module | None

    @abc.abstractmethod
    def _through(self, *arguments: Any, **options: Any) -> Tensor:
        """Embeddings to what the head reads."""

    def _register_prefix(self, schedule: Schedule, store: Cache | None) -> list[Prefix] | None:
        """What every visit remembers of the registers; they never see the text, so a cache keeps them."""
        if not self.spec.registers:
            return None
        made_for, kept = getattr(store, "register_prefix", (None, None))
        if made_for == schedule.notation:
            return kept
        prefix = self._kept_prefix(schedule)
        if store is not None:
            store.register_prefix = (schedule.notation, prefix)  # pyrefly: ignore
        return prefix

    def _kept_prefix(self, schedule: Schedule) -> list[Prefix]:
        """What the registers leave, computed once per checkpoint: again only when a weight has changed."""
        tracked = self.training or torch.is_grad_enabled() or torch.compiler.is_compiling()
        if tracked or self.registers.is_inference():  # such tensors do not count their changes
            return self._compute_prefix(schedule)
        device = self.registers.device.type
        precision = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.registers.dtype
        weights = (schedule.notation, precision, *((p.data_ptr(), p._version) for p in self._prefix_weights()))
        made_for, kept = self.__dict__.get("_prefix_memo", (None, []))
        if made_for != weights:
            kept = self._compute_prefix(schedule)
            self.__dict__["_prefix_memo"] = (weights, kept)
        return kept

    def _prefix_weights(self) -> Iterator[nn.Parameter]:
        """The parameters that the registers meet."""
        yield self.registers
        yield from self.decoder.parameters()
        if self.expansion is not None:
            yield from self.expansion.parameters()

    def _compute_prefix(self, schedule: Schedule) -> list[Prefix]:
        R = self.spec.registers
        recorders = [Recorder() for _ in schedule.visits]
        at = torch.arange(R, device=self.registers.device)[None]
        decode = functools.partial(self.decoder, schedule=schedule, observers=[])
        shared = VisitContext(rotary=NOWHERE, carried={})
        self._through(self.registers[None], decode, shared, at, None, lambda visit, last: recorders[visit.slot])
        return [recorder.recorded() for recorder in recorders]

"""Adapting a model to the text that it is scored on, without using a target before it is scored.

Systems bring adaptations through the place ``adaptations`` of the registry: an entry NAME is a class of procedures
(:data:`~ouroboros.eval.windows.Procedure`), a dataclass that is built as :class:`ScoreFirst` is, with ``batch_size``
where windows are read together, and offered as ``eval --adapt NAME``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ouroboros.errors import check, nearest
from ouroboros.eval.finding import Finding
from ouroboros.eval.legality import check_procedure
from ouroboros.eval.windows import Procedure, Scored, device_of, spans
from ouroboros.registry import found, load


@dataclass(frozen=True)
class ScoreFirst:
    """Test-time training that is legal in the strictest sense: score the targets of a window, then train on them.

    Windows follow one another as sliding windows do, one at a time and through all sequences in their order. The first
    ``stride`` targets are scored by the model as it is. AdamW without weight decay minimises the mean loss of the
    targets just scored, given their window. Afterwards the model has its own weights again.
    """

    window: int
    stride: int
    steps: int = 1
    """Optimiser steps on each window."""
    lr: float = 3e-4

    def __post_init__(self) -> None:
        check_adaptation(self.steps, self.lr)

    def __call__(self, model: Any, sequences: Sequence[Tensor]) -> Iterator[Scored]:
        """Score ``sequences`` in order, and learn from each window after its score."""
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        before = [weight.detach().clone() for weight in weights]
        optimizer = torch.optim.AdamW(weights, lr=self.lr, weight_decay=0.0)
        try:
            for index, sequence in enumerate(sequences):
                ids = sequence.to(device_of(model))
                for _, start, end, first in spans(len(ids) - 1, self.window, self.stride):
                    inputs, targets = ids[None, start:end], ids[first + 1 : end + 1]
                    logits = model(input_ids=inputs, use_cache=False).logits[0, first - start :].float()
                    yield Scored(index, first, torch.log_softmax(logits, dim=-1))
                    for _ in range(self.steps):
                        with torch.enable_grad():
                            logits = model(input_ids=inputs, use_cache=False).logits[0, first - start :].float()
                            F.cross_entropy(logits, targets).backward()
                        optimizer.step()
                        optimizer.zero_grad()
        finally:
            with torch.no_grad():
                for weight, old in zip(weights, before, strict=True):
                    weight.copy_(old)
                    weight.grad = None


def check_adaptation(steps: int, lr: float) -> None:
    """Refuse numbers that adapt nothing.

    Raises:
        OuroborosError: names the number.
    """
    check(steps >= 1, f"adapt: steps must be >= 1, got {steps}")
    check(lr > 0, f"adapt: the learning rate must be > 0, got {lr}")


PROBE_WINDOW, PROBE_STRIDE, PROBE_BATCH, PROBE_IDS = 8, 2, 4, 49
"""How :func:`judge` tries an adaptation: in several batches of small windows."""


def judge(model: Any, name: str, **options: Any) -> list[Finding]:
    """Whether the adaptation ``name`` is a fair one for ``model``, tried on random ids in small windows.

    Raises:
        OuroborosError: as :func:`adaptation`.
    """
    procedure: Any = adaptation(name, PROBE_WINDOW, PROBE_STRIDE, **options)
    if hasattr(procedure, "batch_size"):
        procedure = dataclasses.replace(procedure, batch_size=PROBE_BATCH)
    generator = torch.Generator().manual_seed(0)
    return check_procedure(model, procedure, torch.randint(model.config.vocab_size, (PROBE_IDS,), generator=generator))


def adaptation(name: str, window: int, stride: int, **options: Any) -> Procedure:
    """The adaptation ``name``; options that are None keep their default.

    Raises:
        OuroborosError: no adaptation has this name; numbers out of range.
    """
    known = {"ttt": f"{__name__}:ScoreFirst", **found("adaptations")}
    check(name in known, f"adapt: unknown adaptation {name!r}{nearest(name, known)}")
    given = {key: value for key, value in options.items() if value is not None}
    return load(known[name])(window, stride, **given)

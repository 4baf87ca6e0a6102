"""What training draws at random besides data and dropout: loop counts, and noise in the inputs.

Every draw depends on the seed, the step and the row of the global batch alone (counter-based generators on the CPU).
So neither evaluation nor logging can change it, a resumed run needs no generator state, and any device, any number of
processes and any number of micro-batches draw the same. Shapes: B sequences, T positions.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from ouroboros.config import LoopTraining, Recipe
from ouroboros.errors import check
from ouroboros.schedule import Schedule


def _generator(seed: int, step: int, counter: tuple[int, int, int, int] = (0, 0, 0, 0)) -> np.random.Generator:
    """A generator of its own; different counters give independent numbers."""
    key = np.array([seed % 2**64, step], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=list(counter)))


class LoopSampler:
    """The loop count of each optimiser step: fixed, random, or a curriculum.

    Args:
        spec: how to choose.
        schedule: the model's; a schedule without loops always yields None.
        seed: of the run.
    """

    def __init__(self, spec: LoopTraining, schedule: Schedule, seed: int) -> None:
        self.spec, self.looped, self.seed = spec, schedule.is_looped, seed

    def loops(self, step: int, progress: float) -> int | None:
        """Loop count of ``step`` at ``progress`` in [0, 1] of the run; None means the layout's own."""
        spec = self.spec
        if not self.looped:
            return None
        if spec.curriculum:
            return [n for start, n in spec.curriculum if start <= progress][-1]
        if spec.sampling == "fixed":
            return None
        generator = _generator(self.seed, step)
        if spec.sampling == "uniform":
            return int(generator.integers(spec.min, spec.max + 1))
        return int(np.clip(1 + generator.poisson(spec.mean - 1), spec.min, spec.max))


class Corruption:
    """Replaces each input token with a fixed probability by one uniform over the vocabulary, itself included.

    Special tokens (the end of a text, the unknown character) are neither replaced nor drawn: they are no text, and say
    what noise must not, such as where texts begin.

    Args:
        probability: of replacing a token; 0 returns every input as it is.
        vocab_size: ids are below it.
        special: ids of special tokens.
        seed: of the run.
    """

    def __init__(self, probability: float, vocab_size: int, special: Iterable[int], seed: int) -> None:
        self.probability, self.seed = probability, seed
        self.is_text = np.ones(vocab_size, dtype=bool)
        self.is_text[list(special)] = False
        self.drawn = np.flatnonzero(self.is_text)

    def __call__(self, ids_BT: Tensor, step: int, first_row: int) -> Tensor:
        """What the model is shown in place of ``ids_BT`` at ``step``; rows count from ``first_row``."""
        if not self.probability:
            return ids_BT
        rows, length = ids_BT.shape
        drawn = [self._row(step, first_row + row, length) for row in range(rows)]
        chosen, others = (torch.from_numpy(np.stack(part)).to(ids_BT.device) for part in zip(*drawn, strict=True))
        is_text = torch.from_numpy(self.is_text).to(ids_BT.device)
        return torch.where(chosen & is_text[ids_BT], others, ids_BT)

    def _row(self, step: int, row: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Which of ``length`` tokens are replaced, and what by; the loop count is drawn at another counter."""
        generator = _generator(self.seed, step, (0, 0, row, 1))
        chosen = generator.random(length) < self.probability
        return chosen, self.drawn[generator.integers(len(self.drawn), size=length)]


def check_truncation(recipe: Recipe, schedule: Schedule) -> None:
    """Truncated backpropagation cuts the prelude off unless the input is injected again.

    Raises:
        OuroborosError: it does, in this recipe.
    """
    loops, segments = recipe.train.loops, schedule.segments
    most = {"fixed": schedule.loops, "uniform": loops.max, "poisson": loops.max}[loops.sampling]
    most = max((n for _, n in loops.curriculum), default=most)
    cut = loops.backprop is not None and loops.backprop < most and schedule.is_looped
    check(
        not (cut and not any(part.injects for part in recipe.model.loop) and not segments[0].looped),
        f"train.loops.backprop={loops.backprop} leaves the blocks before the loop without gradient;"
        " set model.loop.inject to add or concat, or train.loops.backprop to null",
    )

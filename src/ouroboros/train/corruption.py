"""Corruption of training inputs: some tokens are replaced by random ones, as noise to be robust against.

Shapes: B sequences, T positions.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

STREAM = 1
"""Keeps these draws apart from those of :class:`~ouroboros.train.sampler.LoopSampler`, which has the same key."""


class Corruption:
    """Replaces each token with a fixed probability by one uniform over the vocabulary, the token itself included.

    Special tokens (the end of a text, the unknown character) are neither replaced nor drawn: they are no text, and say
    what noise must not, such as where texts begin. The draws depend on the seed, the step and the row of the global
    batch alone (counter-based generators on the CPU), so a resumed run, another device, and any number of processes and
    of micro-batches see the same inputs.

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
        """Which of ``length`` tokens are replaced, and what by."""
        key = np.array([self.seed % 2**64, step], dtype=np.uint64)
        generator = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, row, STREAM]))
        chosen = generator.random(length) < self.probability
        return chosen, self.drawn[generator.integers(len(self.drawn), size=length)]

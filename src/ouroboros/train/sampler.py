"""Loop counts during training: fixed, random, or a curriculum."""

from __future__ import annotations

import numpy as np

from ouroboros.config import LoopTraining
from ouroboros.schedule import Schedule


class LoopSampler:
    """The loop count of each optimiser step.

    The draw of step ``n`` depends on the seed and ``n`` alone (its own counter-based generator), so nothing else, not
    evaluation, logging or telemetry, can change it, and a resumed run needs no generator state.

    Args:
        spec: how to choose.
        schedule: the model's; a schedule without loops always yields None.
        seed: of the run.
    """

    def __init__(self, spec: LoopTraining, schedule: Schedule, seed: int) -> None:
        self.spec = spec
        self.looped = schedule.is_looped
        self.seed = seed

    def loops(self, step: int, progress: float) -> int | None:
        """Loop count of ``step`` at ``progress`` in [0, 1] of the run; None means the layout's own."""
        if not self.looped:
            return None
        spec = self.spec
        if spec.curriculum:
            return [n for start, n in spec.curriculum if start <= progress][-1]
        if spec.sampling == "fixed":
            return None
        generator = np.random.Generator(np.random.Philox(key=np.array([self.seed % 2**64, step], dtype=np.uint64)))
        if spec.sampling == "uniform":
            return int(generator.integers(spec.min, spec.max + 1))
        return int(np.clip(1 + generator.poisson(spec.mean - 1), spec.min, spec.max))

"""Ranges of the train specification."""

from __future__ import annotations

from typing import Any

import pytest

from ouroboros.config import DistilledTraining, LoopTraining, LowRankTraining, OptimSpec, QuantizedTraining, TrainSpec
from ouroboros.errors import OuroborosError

BAD_VALUES: list[tuple[type, dict[str, Any], str]] = [
    (OptimSpec, {"lr": 0}, "optim.lr"),
    (OptimSpec, {"vector_lr": -1}, "optim.vector_lr"),
    (OptimSpec, {"final_lr": 2}, "optim.final_lr"),
    (OptimSpec, {"warmup_fraction": 0.7}, r"optim.warmup_fraction \+ optim.decay_fraction"),
    (OptimSpec, {"betas": (0.9, 1.0)}, "optim.betas"),
    (OptimSpec, {"clip_norm": -1}, "optim.clip_norm"),
    (OptimSpec, {"muon_steps": 0}, "optim.muon_steps"),
    (OptimSpec, {"muon_momentum_warmup": -1}, "optim.muon_momentum_warmup"),
    (OptimSpec, {"muon_momentum_start": 1.0}, "optim.muon_momentum_start"),
    (OptimSpec, {"decay_steps": -1}, "optim.decay_steps"),
    (LoopTraining, {"min": 3, "max": 2}, "train.loops"),
    (LoopTraining, {"mean": 0.5}, "train.loops.mean"),
    (LoopTraining, {"backprop": 0}, "train.loops.backprop"),
    (LoopTraining, {"curriculum": ((0.5, 2), (0.0, 1))}, "sorted"),
    (LoopTraining, {"curriculum": ((0.1, 2),)}, "begin at fraction 0.0"),
    (LoopTraining, {"curriculum": ((0.0, 0),)}, "loops >= 1"),
    (LoopTraining, {"curriculum": ((0.0, 1),), "sampling": "uniform"}, "exclude each other"),
    (QuantizedTraining, {"bits": 1}, "train.quantize.bits"),
    (QuantizedTraining, {"clip": 0.0}, "train.quantize.clip"),
    (QuantizedTraining, {"bits_of": ("looped",)}, "train.quantize.bits_of: 'looped' is not WHICH=BITS"),
    (QuantizedTraining, {"start": 1.5}, "train.quantize.start"),
    (QuantizedTraining, {"smallest": -1.0}, "train.quantize.smallest"),
    (LowRankTraining, {"rank": -1}, "train.low_rank.rank"),
    (LowRankTraining, {"alpha": 0.0}, "train.low_rank.alpha"),
    (DistilledTraining, {"fraction": 1.0}, "train.distill.fraction"),
    (DistilledTraining, {"temperature": 0.0}, "train.distill.temperature"),
    (DistilledTraining, {"alpha": 1.5}, "train.distill.alpha"),
    (DistilledTraining, {"lr": 0.0}, "train.distill.lr"),
    (TrainSpec, {"distill": DistilledTraining(fraction=0.1)}, "needs an average to learn from"),
    (TrainSpec, {"distill": DistilledTraining(fraction=0.3), "average_every": 2}, "which begins before"),
    (TrainSpec, {"batch_size": 0}, "train.batch_size"),
    (TrainSpec, {"batch_size": 6, "accumulation": 4}, "multiple of train.accumulation"),
    (TrainSpec, {"eval_every": -1}, "train.eval_every"),
    (TrainSpec, {"ema_decay": 1}, "train.ema_decay"),
    (TrainSpec, {"average_every": -1}, "train.average_every"),
    (TrainSpec, {"average_every": 2, "ema_decay": 0.5}, "exclude each other"),
    (TrainSpec, {"average_every": 2, "average_start": 2.0}, "train.average_start"),
    (OptimSpec, {"momentum_cycle": (0.8, 0.9)}, "optim.momentum_cycle"),
    (OptimSpec, {"momentum_cycle": (0.9, 0.8), "schedule": "one_cycle"}, "optim.momentum_cycle"),
    (OptimSpec, {"start_lr": -1}, "optim.start_lr"),
    (TrainSpec, {"target_loss": 0}, "train.target_loss"),
    (TrainSpec, {"target_loss": 2.1, "eval_every": 0}, "set train.eval_every"),
    (TrainSpec, {"patience": 2, "eval_every": 0}, "set train.eval_every"),
    (TrainSpec, {"max_bad_validations": 0}, "train.max_bad_validations"),
    (TrainSpec, {"sharding": "full", "compile": "on"}, r"train\.sharding=full does not work with train\.compile=on"),
    (TrainSpec, {"sharding": "full", "low_rank": LowRankTraining(rank=2)}, r"train\.low_rank\.rank, which needs"),
]


@pytest.mark.parametrize(("cls", "values", "message"), BAD_VALUES, ids=lambda value: str(value)[:40])
def test_ranges(cls: type, values: dict[str, Any], message: str) -> None:
    with pytest.raises(OuroborosError, match=message) as caught:
        cls(**values)
    assert "\n" not in str(caught.value)

"""Training on memory probes and scoring them."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ouroboros.config import AttentionSpec, FeedForwardSpec, ModelSpec, OptimSpec
from ouroboros.errors import OuroborosError
from ouroboros.eval import probes
from ouroboros.eval.probes import position_nats, score_probe, train_probe
from ouroboros.systems.osam.probes import IGNORED, Batch, Copy, Needle, Seed

OPTIM = OptimSpec(matrix_optimizer="adamw", lr=1e-2, weight_decay=0.0, warmup_fraction=0.1)
SPEC = ModelSpec(
    layout="1",
    vocab_size=9,
    hidden_size=16,
    max_position_embeddings=64,
    mixer=AttentionSpec(num_heads=2),
    ffn=FeedForwardSpec(intermediate_size=16),
)


class Guess(nn.Module):
    """Answers with the id before, plus ``shift``, modulo 8, with odds e^2 to 1 against each other."""

    def __init__(self, shift: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.tensor(shift), requires_grad=False)
        self.rows: list[int] = []

    def forward(self, input_ids: Tensor) -> Any:
        assert not self.training and not torch.is_grad_enabled()
        self.rows.append(len(input_ids))
        return SimpleNamespace(logits=2.0 * nn.functional.one_hot((input_ids + self.shift) % 8, 8))


class Recorder:
    """A probe that keeps what was drawn."""

    vocab_size = 5

    def __init__(self) -> None:
        self.seen: list[tuple[int, Seed, Batch]] = []

    def sample(self, batch_size: int, seed: Seed) -> Batch:
        self.seen.append((batch_size, seed, Copy(span=3, values=4).sample(batch_size, seed)))
        return self.seen[-1][-1]


def test_a_model_learns_what_a_memory_solves() -> None:
    task = Needle(length=4, keys=1, values=4)
    unseen = task.sample(400, (0, 0, 1))
    model = train_probe(SPEC, task, OPTIM, steps=80, batch_size=16)
    assert score_probe(model, unseen) > 0.95
    barely = train_probe(SPEC, task, OPTIM, steps=1, batch_size=16)
    assert score_probe(barely, unseen) < 0.6
    assert not model.training and not barely.training


def test_models_of_one_seed_see_the_same_sequences_and_start_alike() -> None:
    first, second, other = Recorder(), Recorder(), Recorder()
    wide = dataclasses.replace(SPEC, ffn=FeedForwardSpec(intermediate_size=24))
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one = train_probe(SPEC, first, OPTIM, steps=3, batch_size=2, seed=7)
    assert torch.equal(torch.rand(3), expected)
    train_probe(wide, second, OPTIM, steps=3, batch_size=2, seed=7)
    assert [(rows, seed) for rows, seed, _ in first.seen] == [(2, (7, 0)), (2, (7, 1)), (2, (7, 2))]
    for (*_, a), (*_, b) in zip(first.seen, second.seen, strict=True):
        assert np.array_equal(a.inputs, b.inputs)
    again = train_probe(SPEC, Recorder(), OPTIM, steps=3, batch_size=2, seed=7)
    differs = train_probe(SPEC, other, OPTIM, steps=3, batch_size=2, seed=8)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), again.parameters(), strict=True))
    assert not torch.equal(one.lm_head.weight, differs.lm_head.weight)
    assert not np.array_equal(first.seen[0][-1].inputs, other.seen[0][-1].inputs)


def test_the_rate_follows_the_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[float, float]] = []
    rates = lambda progress, spec, steps: asked.append((progress, steps)) or 1.0  # noqa: E731
    monkeypatch.setattr(probes, "learning_rate", rates)
    train_probe(SPEC, Recorder(), OPTIM, steps=2, batch_size=1)
    assert asked == [(0.25, 2), (0.75, 2)]


def test_what_cannot_be_trained_is_refused() -> None:
    with pytest.raises(OuroborosError, match="vocab_size must be >= 9, the ids of the task; got 8"):
        train_probe(dataclasses.replace(SPEC, vocab_size=8), Copy(span=3, values=8), OPTIM, steps=1)
    with pytest.raises(OuroborosError, match="steps must be >= 1, got 0"):
        train_probe(SPEC, Copy(span=3, values=8), OPTIM, steps=0)
    with pytest.raises(OuroborosError, match="seed must be >= 0, got -1"):
        train_probe(SPEC, Copy(span=3, values=8), OPTIM, steps=1, seed=-1)
    with pytest.raises(OuroborosError, match=r"step \d+: the gradient is not finite"):
        train_probe(SPEC, Copy(span=3, values=8), dataclasses.replace(OPTIM, lr=1e30, clip_norm=0.0), steps=20)


def test_accuracy_counts_answers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = np.array([[1, 2, 3, 5], [0, 1, 2, 3], [7, 0, 2, 1]])
    labels = np.full_like(inputs, IGNORED)
    labels[0, 2:], labels[1, 3], labels[2, 1:] = inputs[0, 2:], inputs[1, 3], inputs[2, 1:]
    model = Guess(1).train()
    # 2 -> 3 and not 3 -> 5; 2 -> 3; 7 -> 0 and neither 0 -> 2 nor 2 -> 1.
    assert score_probe(model, Batch(inputs, labels)) == 3 / 6
    assert model.training and model.rows == [3]
    monkeypatch.setattr(probes, "CHUNK_TOKENS", 9)
    assert score_probe(model, Batch(inputs, labels)) == 3 / 6
    assert model.rows == [3, 2, 1]
    labels[:, 0] = inputs[:, 0]  # that nothing comes before
    assert score_probe(model, Batch(inputs, labels)) == 3 / 6
    with pytest.raises(OuroborosError, match="no answer"):
        score_probe(model, Batch(inputs, np.full_like(inputs, IGNORED)))


def test_loss_by_position_is_the_mean_over_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = np.array([[1, 2, 3, 5], [0, 1, 4, 5], [7, 1, 2, 3]])
    right, wrong = math.log(1 + 7 * math.exp(-2)), math.log(7 + math.exp(2))
    expected = [(2 * right + wrong) / 3, (2 * right + wrong) / 3, (2 * right + wrong) / 3]
    assert np.allclose(position_nats(Guess(1), ids), expected, atol=1e-6)
    monkeypatch.setattr(probes, "CHUNK_TOKENS", 1)
    model = Guess(1)
    assert np.allclose(position_nats(model, ids), expected, atol=1e-6) and model.rows == [1, 1, 1]
    ids[0, 3] = 4
    assert np.allclose(position_nats(model, ids), [*expected[:2], right], atol=1e-6)

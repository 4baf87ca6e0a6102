"""The study of memory probes trains with the library's trainer, and counts answers alone."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import memory_probes as study
import numpy as np
import pytest
import torch
from probe_tasks import Batch, Copy, Needle
from torch import Tensor, nn

from ouroboros.config import AttentionSpec, DataSpec, FeedForwardSpec, ModelSpec, OptimSpec
from ouroboros.data.masks import IGNORED, shown
from ouroboros.data.shards import prepare

OPTIM = OptimSpec(matrix_optimizer="adamw", lr=1e-2, weight_decay=0.0, warmup_fraction=0.1)
SPEC = ModelSpec(layout="1", vocab_size=9, hidden_size=16, max_position_embeddings=64).replace(
    mixer=AttentionSpec(num_heads=2),
    ffn=FeedForwardSpec(intermediate_size=16),
)


@pytest.fixture
def prepared(tmp_path: Path) -> Any:
    text = tmp_path / "text.txt"
    text.write_text("any text, because a probe makes its own " * 50)
    return prepare(DataSpec(sources=(str(text),), sequence_length=16), tmp_path / "data")


def test_a_model_learns_what_a_memory_solves(prepared: Any) -> None:
    needle = Needle(length=4, keys=1, values=4)
    task, unseen = SimpleNamespace(batch=16, sample=needle.sample), needle.sample(400, (0, 0, 1))
    models = {steps: study.trained(SPEC, task, OPTIM, steps, 0, prepared) for steps in (1, 80)}
    assert study.accuracy(models[80], unseen) > 0.95 and study.accuracy(models[1], unseen) < 0.6
    assert not models[80].training


def test_models_of_one_seed_see_the_same_sequences_and_start_alike(prepared: Any) -> None:
    seen: list[tuple[int, Any]] = []

    def sample(rows: int, seed: Any) -> Batch:
        seen.append((rows, seed))
        return Copy(span=3, values=4).sample(rows, seed)

    task = SimpleNamespace(batch=2, sample=sample)
    wide = SPEC.replace(ffn=FeedForwardSpec(intermediate_size=24))
    one, again = (study.trained(SPEC, task, OPTIM, 2, 7, prepared) for _ in range(2))
    study.trained(wide, task, OPTIM, 2, 7, prepared)
    assert seen == [(2, (7, 0)), (2, (7, 1))] * 3
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), again.parameters(), strict=True))
    ids, targets = shown(study.Batches(task, 7).next_batch())
    inputs, labels = sample(2, (7, 0))
    assert np.array_equal(ids, inputs) and np.array_equal(targets, labels[:, 1:])


class Guess(nn.Module):
    """Answers with the id before, plus 1, modulo 8."""

    def forward(self, input_ids: Tensor) -> Any:
        assert not self.training and not torch.is_grad_enabled()
        return SimpleNamespace(logits=2.0 * nn.functional.one_hot((input_ids + 1) % 8, 8))


def test_accuracy_counts_answers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = np.array([[1, 2, 3, 5], [0, 1, 2, 3], [7, 0, 2, 1]])
    labels = np.full_like(inputs, IGNORED)
    labels[0, 2:], labels[1, 3], labels[2, 1:] = inputs[0, 2:], inputs[1, 3], inputs[2, 1:]
    # 2 -> 3 and not 3 -> 5; 2 -> 3; 7 -> 0 and neither 0 -> 2 nor 2 -> 1.
    for rows in (32, 1):
        monkeypatch.setattr(study, "ROWS", rows)
        assert study.accuracy(Guess(), Batch(inputs, labels)) == 3 / 6
    labels[:, 0] = inputs[:, 0]  # that nothing comes before
    assert study.accuracy(Guess(), Batch(inputs, labels)) == 3 / 6

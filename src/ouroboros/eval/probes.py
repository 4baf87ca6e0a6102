"""Training a model on a memory probe, and what it then remembers: accuracy at the answers, loss by position.

A model may be scored at other lengths than it was trained at. Shapes: B sequences, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ouroboros.config import ModelSpec, OptimSpec
from ouroboros.data.masks import IGNORED
from ouroboros.errors import check
from ouroboros.eval.score import device_of, evaluating, log_probs
from ouroboros.model.configuration import OuroborosConfig
from ouroboros.model.modeling import OuroborosForCausalLM
from ouroboros.optim import build_optimizers, clip_and_norm, learning_rate, set_learning_rate

CHUNK_TOKENS = 8192
"""Tokens that are scored at a time, about."""


Batch = tuple[np.ndarray, np.ndarray]
"""Ids, int64 (B, T), and labels of the same shape: the id at each answer, :data:`IGNORED` elsewhere."""
Seed = int | Sequence[int]
"""Of one batch: a number >= 0 or several, for example ``(seed, step)``."""


class Task(Protocol):
    """Where batches come from."""

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        ...

    def sample(self, batch_size: int, seed: Seed) -> Batch:
        """A batch; equal for equal seeds."""
        ...


def train_probe(
    spec: ModelSpec, task: Task, optim: OptimSpec, *, steps: int, batch_size: int = 32, seed: int = 0
) -> OuroborosForCausalLM:
    """A new model trained on batches of its own, in evaluation mode.

    The start is drawn from ``seed``, the batch of step s from ``(seed, s)``: models of one seed see the same sequences
    in the same order, whatever they are. A batch that no step sees is that of ``(seed, s, 1)``. Random numbers outside
    are left as they are.

    Args:
        spec: the model; its ``vocab_size`` is at least the task's.
        task: gives the batches.
        optim: optimisers and schedule.
        steps: how many.
        batch_size: B.
        seed: of the start and of the batches, >= 0.

    Raises:
        OuroborosError: a vocabulary too small, no step, a negative seed, a gradient that is not finite.
    """
    check(
        spec.vocab_size >= task.vocab_size,
        f"vocab_size must be >= {task.vocab_size}, the ids of the task; got {spec.vocab_size}",
    )
    check(steps >= 1, f"steps must be >= 1, got {steps}")
    check(seed >= 0, f"seed must be >= 0, got {seed}")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = OuroborosForCausalLM(OuroborosConfig.from_spec(spec)).train()
        optimizers = build_optimizers(model, optim)
        for step in range(steps):
            set_learning_rate(optimizers, learning_rate((step + 0.5) / steps, optim, steps))
            inputs, labels = map(torch.from_numpy, task.sample(batch_size, (seed, step)))
            for optimizer in optimizers:
                optimizer.zero_grad()
            model(input_ids=inputs, labels=labels, use_cache=False).loss.backward()
            norm = clip_and_norm(model.parameters(), optim.clip_norm)
            check(math.isfinite(norm), f"step {step + 1}: the gradient is not finite; a lower optim.lr may help")
            for optimizer in optimizers:
                optimizer.step()
    return model.eval()


def score_probe(model: Any, batch: Batch) -> float:
    """Share of the answers that the model gives: the likeliest id at the position before each label.

    Raises:
        OuroborosError: no answer in the batch.
    """
    hits, answers = 0, 0
    with evaluating(model):
        for inputs, labels in _chunks(model, *batch):
            asked = labels[:, 1:] != IGNORED
            hits += int((log_probs(model, inputs)[:, :-1].argmax(-1) == labels[:, 1:])[asked].sum())
            answers += int(asked.sum())
    check(answers > 0, "the batch has no answer: every label is ignored")
    return hits / answers


def position_nats(model: Any, ids: np.ndarray) -> np.ndarray:
    """Mean loss at each position, nats, float64 (T - 1,): that of token t + 1 predicted from tokens 0 to t.

    Args:
        model: ``model(input_ids=...).logits`` are those of the token behind each; causal.
        ids: int64 (B, T).
    """
    total = np.zeros(ids.shape[1] - 1)
    with evaluating(model):
        for (inputs,) in _chunks(model, ids):
            found = log_probs(model, inputs)[:, :-1].gather(-1, inputs[:, 1:, None])[..., 0]
            total -= found.to("cpu", torch.float64).sum(0).numpy()
    return total / len(ids)


def _chunks(model: Any, *arrays: np.ndarray) -> Iterator[list[Tensor]]:
    """Some rows of ``arrays`` (B, T) at a time, as tensors where the model is."""
    rows = max(CHUNK_TOKENS // arrays[0].shape[1], 1)
    for start in range(0, len(arrays[0]), rows):
        yield [torch.from_numpy(array[start : start + rows]).to(device_of(model)) for array in arrays]

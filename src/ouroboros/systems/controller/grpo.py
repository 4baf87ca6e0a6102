"""Training by the reward of answers: group relative policy optimisation (Shao et al. 2024, arXiv 2402.03300).

Of each problem a group of completions is sampled; those with a better answer than the group's mean become more
probable, and the others less. No network estimates values.

Shapes: B completions of a problem, C tokens of the longest.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ouroboros.config import OptimSpec
from ouroboros.errors import check
from ouroboros.optim import build_optimizers, clip_and_norm, learning_rate, set_learning_rate
from ouroboros.systems.controller.completions import Completion, Problem, Writer, written
from ouroboros.systems.controller.pipeline import answer, reward
from ouroboros.train import checkpoint as checkpoints
from ouroboros.train.checkpoint import Checkpoint
from ouroboros.train.log import MetricsLog
from ouroboros.train.rundir import STATE, WEIGHTS, RunDirectory
from ouroboros.train.session import GROUPS, OPTIMIZER
from ouroboros.train.state import copy_tensors, model_tensors, pack_optimizers, unpack_optimizers


@dataclass(frozen=True, kw_only=True)
class RewardSpec:
    """How a model is trained by rewards."""

    steps: int
    """Batches of problems; the published set-up has 5,000."""
    prompts: int = 4
    """Problems of a step."""
    group: int = 4
    """Completions of each problem; 4 as in the published set-up."""
    temperature: float = 1.0
    """Of sampling. Probabilities in the objective are of the same distribution."""
    updates: int = 1
    """Optimiser steps on the completions of one step. With 1 no ratio leaves 1, and nothing is clipped."""
    clip: float = 0.2
    """How far from 1 the ratio of new and sampling probabilities of a token has an effect."""
    kl: float = 0.04
    """Weight of the divergence from the model that training began with; 0 is off, and saves its copy."""
    plain: bool = False
    """Whether the last number counts where a completion marks no answer."""
    seed: int = 0
    """Of the order of problems and of sampling."""

    def __post_init__(self) -> None:
        for name, least in {"steps": 1, "prompts": 1, "group": 2, "updates": 1, "kl": 0, "clip": 0}.items():
            check(getattr(self, name) >= least, f"{name} must be >= {least}, got {getattr(self, name)}")
        check(self.temperature > 0, f"temperature must be > 0, got {self.temperature}")


def advantages(rewards: Sequence[float]) -> list[float]:
    """``(r - mean) / std`` within a group, by the standard deviation of the group itself; 0 where all agree."""
    if len(set(rewards)) == 1:
        return [0.0] * len(rewards)
    mean, deviation = statistics.fmean(rewards), statistics.pstdev(rewards)
    return [(value - mean) / deviation for value in rewards]


def divergence(new_BC: Tensor, start_BC: Tensor) -> Tensor:
    """The estimate of KL(new || start) of each token, ``q - log q - 1`` with q = start / new: unbiased, and never
    negative (equation 4). Arguments are log-probabilities."""
    gap = start_BC - new_BC
    return gap.exp() - gap - 1


def objective(
    new_BC: Tensor,
    old_BC: Tensor,
    start_BC: Tensor | None,
    mask_BC: Tensor,
    advantages_B: Tensor,
    *,
    clip: float,
    kl: float,
) -> Tensor:
    """The loss of one group, equation 3 with its sign changed: the mean over tokens of each completion, then over
    completions.

    Args:
        new_BC, old_BC: log-probabilities by the model as it is and as it sampled; 0 where there is no token.
        start_BC: those by the model that training began with; None without a divergence.
        mask_BC: where there is a token.
        advantages_B: see :func:`advantages`.
        clip, kl: see :class:`RewardSpec`.
    """
    ratio, gain_B1 = (new_BC - old_BC).exp(), advantages_B[:, None]
    gained = torch.minimum(ratio * gain_B1, ratio.clamp(1 - clip, 1 + clip) * gain_B1)
    if start_BC is not None:
        gained = gained - kl * divergence(new_BC, start_BC)
    return -((gained * mask_BC).sum(1) / mask_BC.sum(1)).mean()


@dataclass
class _Group:
    """The completions of one problem, and what an update needs of them."""

    prompt: Tensor
    completions: list[Completion]
    rewards: list[float]
    old: Tensor | None = None
    start: Tensor | None = None


class RewardTrainer:
    """Model, optimiser and position of one run, which depends on its arguments and the seed alone.

    Dropout stays off, so that the probabilities of a step are those that sampled.

    Args:
        writer: with the model, which is trained in place.
        problems: what is drawn from, in an order that the seed decides, each once before any comes again.
        spec: how it is trained.
        optim: rates by parameter role, and what is left out.
    """

    def __init__(self, writer: Writer, problems: Sequence[Problem], spec: RewardSpec, optim: OptimSpec) -> None:
        self.writer, self.problems, self.spec, self.optim = writer, problems, spec, optim
        check(bool(problems), "there is no problem to train on")
        self.start = copy.deepcopy(writer.model).requires_grad_(False) if spec.kl else None
        self.optimizers = build_optimizers(writer.model, optim)
        held = {p for optimizer in self.optimizers for group in optimizer.param_groups for p in group["params"]}
        self.names = {p: name for name, p in writer.model.named_parameters()}
        self.optimized = [p for p in self.names if p in held]
        self.taken = 0
        """Steps that were taken."""

    @property
    def done(self) -> bool:
        return self.taken >= self.spec.steps

    def step(self) -> dict[str, Any]:
        """Sample, reward and update once; returns the record of the step."""
        began = time.perf_counter()
        spec, model = self.spec, self.writer.model
        # Draws depend on seed and step alone, so a resumed run needs no state of the generator.
        torch.manual_seed((spec.seed * 10_000_019 + self.taken) % 2**63)
        factor = learning_rate((self.taken + 0.5) / spec.steps, self.optim, spec.steps)
        set_learning_rate(self.optimizers, factor)
        groups = self._sampled()
        norms = []
        for _ in range(spec.updates):
            parts = [self._learn(group) for group in groups]
            norms.append(clip_and_norm(self.optimized, self.optim.clip_norm))
            if math.isfinite(norms[-1]):
                for optimizer in self.optimizers:
                    optimizer.step()
            model.zero_grad(set_to_none=True)
        self.taken += 1
        every = [completion for group in groups for completion in group.completions]
        return {
            "kind": "reward",
            "step": self.taken,
            "reward": statistics.fmean(value for group in groups for value in group.rewards),
            "answered": statistics.fmean(answer(c.text, plain=spec.plain) is not None for c in every),
            "mixed_groups": statistics.fmean(len(set(group.rewards)) > 1 for group in groups),
            "tokens": statistics.fmean(len(c.ids) for c in every),
            "kl": statistics.fmean(parts) if spec.kl else None,
            "grad_norm": norms[-1],
            "lr": factor * self.optim.lr,
            "seconds": time.perf_counter() - began,
        }

    def _sampled(self) -> list[_Group]:
        """The next problems with their completions and rewards."""
        spec, total = self.spec, len(self.problems)
        numbers = range(self.taken * spec.prompts, (self.taken + 1) * spec.prompts)
        orders = {n // total: np.random.default_rng((spec.seed, n // total)).permutation(total) for n in numbers}
        chosen = [self.problems[orders[n // total][n % total]] for n in numbers]
        made = self.writer.write([p.prompt for p in chosen], each=spec.group, temperature=spec.temperature)
        groups = []
        for problem, completions in zip(chosen, made, strict=True):
            rewards = [reward(c.text, problem.reference, plain=spec.plain) for c in completions]
            groups.append(_Group(self.writer.ids(problem.prompt), completions, rewards))
        return groups

    def _learn(self, group: _Group) -> float:
        """Add the gradient of a group; returns its mean divergence from the start, in nats for each token."""
        spec, gains = self.spec, advantages(group.rewards)
        if not any(gains) and self.start is None:
            return 0.0  # its loss is a constant
        ids = [completion.ids for completion in group.completions]
        mask = written(ids)
        if self.start is not None and group.start is None:
            with torch.no_grad():
                beginning = Writer(self.start, self.writer.tokenizer, dtype=self.writer.dtype)
                group.start = beginning.log_probs(group.prompt, ids, spec.temperature)
        new = self.writer.log_probs(group.prompt, ids, spec.temperature)
        # The first update is of the model that sampled: its probabilities in this pass are the old ones, exactly.
        group.old = new.detach() if group.old is None else group.old
        gain = torch.tensor(gains, device=new.device)
        loss = objective(new, group.old, group.start, mask, gain, clip=spec.clip, kl=spec.kl)
        (loss / spec.prompts).backward()
        return 0.0 if group.start is None else float(divergence(new.detach(), group.start)[mask].mean())

    def save(self, run: RunDirectory) -> None:
        """Write a checkpoint, which every command opens as a model; the one before it is removed."""
        model = self.writer.model
        tensors, groups = pack_optimizers(self.optimizers, self.names)
        files = {WEIGHTS: model_tensors(model), OPTIMIZER: tensors}

        def extra(directory: Path) -> None:
            model.config.save_pretrained(directory)
            model.generation_config.save_pretrained(directory)
            self.writer.tokenizer.save(directory)

        documents = {STATE: {"taken": self.taken}, GROUPS: groups}
        checkpoints.save(run.checkpoints, self.taken, files=files, documents=documents, extra=extra)
        checkpoints.retain(run.checkpoints, 1)

    def restore(self, saved: Checkpoint) -> None:
        """Go on from a checkpoint of the same run; the trainer was made with the model that training began with.

        Raises:
            OuroborosError: the checkpoint is of another model or of other trained parameters.
        """
        weights = saved.tensors(WEIGHTS, self.writer.model.device)
        copy_tensors(model_tensors(self.writer.model), weights, f"{saved.path}: its weights belong to another model")
        unpack_optimizers(self.optimizers, self.names, saved.tensors(OPTIMIZER), saved.documents[GROUPS])
        self.taken = saved.documents[STATE]["taken"]


def train(
    trainer: RewardTrainer, path: Path, *, every: int, told: Callable[[dict[str, Any]], None] = lambda record: None
) -> None:
    """Train to the end in the directory ``path``, going on from its newest checkpoint; one is saved after ``every``
    steps, and a line of ``metrics.jsonl`` is written for each step, of which ``told`` is told.

    Raises:
        OuroborosError: the checkpoint is of another model, or the disk is full.
    """
    run = RunDirectory(path)
    newest = run.newest()
    if newest is not None:
        trainer.restore(newest)
    run.path.mkdir(parents=True, exist_ok=True)
    metrics = MetricsLog(run.metrics_file, resume_step=trainer.taken)
    while not trainer.done:
        record = trainer.step()
        metrics.write(record)
        told(record)
        if trainer.done or trainer.taken % every == 0:
            trainer.save(run)

"""Is a procedure fair? Four criteria of a score that a text cannot have been used for before it was scored.

Those of OpenAI's Parameter Golf challenge (its issue 1017), tried on a short stream of ids:

1. *past only*: the distribution of a target depends on the model and on the ids before it. Changing all later ids, or
   the target, leaves every earlier distribution as it was.
2. *distribution*: what a target is scored by sums to 1 over the vocabulary, and is fixed before the target is looked
   at: changing the target leaves it as it was.
3. *score first*: what is learned from a target is learned after its score. Changing a target leaves its own
   distribution as it was, and a second pass gives the same scores, so nothing of the first is left in the model.
4. *one pass*: every target is scored exactly once.

Distributions are compared as log-probabilities; inputs have one shape, so they should be identical bit for bit.
Shapes: N targets, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ouroboros.errors import check
from ouroboros.eval.finding import Finding, Mismatch, find, require
from ouroboros.eval.windows import Procedure, evaluating

SUM_TOLERANCE = 1e-4
CHANGE_TOLERANCE = 1e-5
"""Largest change of a log-probability that counts as none."""
PLACES = 5
"""Targets at which ids are changed; at random, one in each fifth of the stream."""


@dataclasses.dataclass(frozen=True)
class _Trial:
    model: Any
    procedure: Procedure
    ids: Tensor
    vocabulary: int
    seed: int

    weights: dict[str, Tensor]
    """The model's own."""

    def distributions(self, ids: Tensor, *, goes_on: bool = False) -> tuple[Tensor, Tensor]:
        """Log-probabilities (N, V), NaN where there are none, and how often each target was scored, (N,).

        With ``goes_on`` the model is as the last pass has left it.
        """
        if not goes_on:
            self.model.load_state_dict(self.weights)
        found = torch.full((len(ids) - 1, self.vocabulary), math.nan)
        times = torch.zeros(len(ids) - 1, dtype=torch.long)
        with evaluating(self.model):
            for scored in self.procedure(self.model, [ids]):
                here = slice(scored.first, scored.first + len(scored.log_probs))
                found[here] = scored.log_probs.detach().float().cpu()
                times[here] += 1
        return found, times

    @functools.cached_property
    def plain(self) -> tuple[Tensor, Tensor]:
        """What the stream itself gives."""
        return self.distributions(self.ids)

    @functools.cached_property
    def again(self) -> Tensor:
        """The distributions of a second pass."""
        self.distributions(self.ids)
        return self.distributions(self.ids, goes_on=True)[0]

    @functools.cached_property
    def changes(self) -> list[tuple[int, Tensor, Tensor]]:
        """For some targets: its number, the distributions when all later ids are changed, and when it itself is."""
        generator = torch.Generator().manual_seed(self.seed)
        edges = [part * (len(self.ids) - 1) // PLACES for part in range(PLACES + 1)]
        places = {
            int(torch.randint(low, max(low + 1, high), (1,), generator=generator)) for low, high in pairwise(edges)
        }
        found = []
        for target in sorted(places):
            shift = torch.randint(1, self.vocabulary, self.ids.shape, generator=generator)
            other = (self.ids + shift) % self.vocabulary
            later, itself = self.ids.clone(), self.ids.clone()
            later[target + 2 :] = other[target + 2 :]
            itself[target + 1] = other[target + 1]
            found.append((target, self.distributions(later)[0], self.distributions(itself)[0]))
        return found

    def change(self, found: Tensor) -> Tensor:
        """The largest change of each distribution, (N,); that of a target not scored is 0."""
        before = self.plain[0]
        gaps = torch.where((found == before) | (found.isnan() & before.isnan()), 0.0, (found - before).abs())
        return gaps.nan_to_num(nan=math.inf).amax(-1)


def check_procedure(model: Any, procedure: Procedure, ids: Tensor, *, seed: int = 0) -> list[Finding]:
    """One finding for each criterion; the module's docstring lists them.

    Args:
        model: its weights are its own again afterwards, whatever ``procedure`` does to them.
        procedure: see :data:`ouroboros.eval.windows.Procedure`.
        ids: int64 (N + 1,), long enough that the procedure does all that it ever does: where windows are adapted
            together, several such batches.
        seed: of the changes.

    Raises:
        OuroborosError: fewer than two targets.
    """
    check(len(ids) >= 3, f"the criteria are tried on at least 3 ids, got {len(ids)}")
    weights = {name: weight.detach().clone() for name, weight in model.state_dict().items()}
    trial = _Trial(model, procedure, ids, int(model.config.vocab_size), seed, weights)
    findings = [find(name, criterion, trial) for name, criterion in CRITERIA.items()]
    model.load_state_dict(weights)
    return findings


def _past_only(trial: _Trial) -> str:
    for target, later, itself in trial.changes:
        _unchanged(trial, later, slice(target + 1), f"changing the ids after target {target}")
        _unchanged(trial, itself, slice(target), f"changing target {target}")
    return f"later ids changed at {len(trial.changes)} places of {len(trial.ids) - 1} targets"


def _unchanged(trial: _Trial, found: Tensor, targets: slice, what: str) -> None:
    gaps = trial.change(found)[targets]
    worst = float(gaps.max()) if len(gaps) else 0.0
    if worst > CHANGE_TOLERANCE:
        place = int(gaps.argmax()) + (targets.start or 0)
        raise Mismatch(f"{what} changes the log-probabilities of target {place} by {worst:.3g}")


def _own_change(trial: _Trial) -> None:
    for target, _, itself in trial.changes:
        _unchanged(trial, itself, slice(target, target + 1), f"changing target {target}")


def _distribution(trial: _Trial) -> str:
    found, times = trial.plain
    gaps = (found[times > 0].double().exp().sum(-1) - 1).abs().nan_to_num(nan=math.inf)
    worst = float(gaps.max()) if len(gaps) else math.inf
    require(worst <= SUM_TOLERANCE, f"probabilities of a target miss the sum 1 by {worst:.3g}")
    _own_change(trial)
    return f"{len(gaps)} distributions, largest |sum - 1| {worst:.1e}"


def _score_first(trial: _Trial) -> str:
    _unchanged(trial, trial.again, slice(0, None), "a first pass over the same ids, which left something in the model,")
    _own_change(trial)
    return "targets are looked at after their score, and nothing of them stays in the model"


def _one_pass(trial: _Trial) -> str:
    times = trial.plain[1]
    for target, count in enumerate(times.tolist()):
        require(count == 1, f"target {target} of {len(times)} is scored {count} times")
    return f"{len(times)} targets, each scored once"


CRITERIA: dict[str, Callable[[_Trial], str]] = {
    "1 past only": _past_only,
    "2 distribution": _distribution,
    "3 score first": _score_first,
    "4 one pass": _one_pass,
}
"""By the name of the finding, in order."""

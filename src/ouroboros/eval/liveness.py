"""The liveness proof: whether every parameter and every switch of a recipe does something.

A parameter is *alive* if changing it changes logits, a gradient reaches it, an optimiser group holds it, and training
moves it. Many parts start neutral, with a factor at zero, so one state does not tell: the function is judged where
every parameter has noise on it, little or much, and at the start; gradient and movement are judged from the recipe's
own start on. A factor whose partner starts at zero wakes up at the second step, while two factors that both start at
zero never move. What a module declares in ``untrained`` (:func:`ouroboros.optim.untrained_parameters`) may be dead.
Switches are options: see :mod:`ouroboros.eval.switches`.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ouroboros.config import Recipe
from ouroboros.errors import check
from ouroboros.eval.stats import Record
from ouroboros.eval.subject import NOISE, changed_beyond, logits_of, perturb
from ouroboros.eval.switches import Switch, model_switches
from ouroboros.model.configuration import OuroborosConfig
from ouroboros.model.modeling import OuroborosForCausalLM
from ouroboros.optim import build_optimizers, clip_and_norm, learning_rate, set_learning_rate, untrained_parameters

STEPS = 10
"""Training steps within which a parameter has to move."""
NOISES = (NOISE, 6 * NOISE, 0.0)
"""Standard deviations of the noise on all parameters, where it is looked for what the function depends on."""
TOKENS = 24
"""Tokens of each of the two sequences that are computed and trained on, where the context allows it."""


@dataclass(frozen=True, kw_only=True)
class ParameterLife(Record):
    """What was found about one parameter."""

    name: str
    numbers: int
    """Numbers that it holds."""
    function: bool
    """Whether another value changes a logit."""
    gradient: bool
    """Whether a gradient other than zero reached it within the steps of training."""
    group: str | None
    """The role of the optimiser group that holds it, None if none does."""
    moves: bool
    """Whether training changed it; weight decay alone does not count."""
    declared: bool
    """Whether its module declares that it is never trained."""
    why: str = ""
    """What is wrong with it; empty if nothing is."""

    @property
    def dead(self) -> bool:
        """Whether something is wrong that its module does not declare."""
        return bool(self.why) and not self.declared

    @property
    def pattern(self) -> str:
        """The name with ``*`` for the numbers of blocks, loops and the like."""
        return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", self.name)


@dataclass(frozen=True)
class Report:
    """What was found about a recipe."""

    parameters: tuple[ParameterLife, ...]
    switches: tuple[Switch, ...]

    @property
    def dead_parameters(self) -> tuple[ParameterLife, ...]:
        """Those that are dead and not declared so."""
        return tuple(life for life in self.parameters if life.dead)

    @property
    def dead_switches(self) -> tuple[Switch, ...]:
        """Those whose other values change nothing."""
        return tuple(switch for switch in self.switches if switch.dead)

    @property
    def ok(self) -> bool:
        """Whether nothing is dead."""
        return not self.dead_parameters and not self.dead_switches


def liveness(recipe: Recipe, model: OuroborosForCausalLM | None = None, *, seed: int = 0) -> Report:
    """Prove every parameter, and every switch of the model, alive or name it.

    The switches of optimiser and training need the trainer: :func:`ouroboros.train.switches.training_switches`.

    Args:
        recipe: its model, and the optimiser and truncation it is trained with.
        model: trained weights to start from; they are left as they are. By default the recipe's own start.
        seed: of the start, noise and inputs. The global random state is restored.
    """
    parameters = parameter_lives(recipe, model, seed=seed)
    with torch.random.fork_rng():
        return Report(parameters, tuple(model_switches(recipe.model, context=recipe.data.sequence_length)))


def parameter_lives(
    recipe: Recipe, model: OuroborosForCausalLM | None = None, *, seed: int = 0
) -> tuple[ParameterLife, ...]:
    """The part of :func:`liveness` about parameters, in the order of the model; arguments as there."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if model is None:
            model = OuroborosForCausalLM(OuroborosConfig.from_spec(recipe.model))
        else:
            model = copy.deepcopy(model).float()
        return tuple(_lives(model, recipe))


def _lives(model: OuroborosForCausalLM, recipe: Recipe) -> Iterable[ParameterLife]:
    declared = untrained_parameters(model)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trained = _train(model, recipe, start)
    _restore(model, start)
    acting: set[str] = set()
    for noise in NOISES:
        _restore(model, start)
        perturb(model, noise)
        acting |= _acting(model, [name for name in start if name not in acting])
    for name, parameter in model.named_parameters():
        faults = [
            "no logit depends on it" if name not in acting else "",
            trained.why_no_gradient(name),
            "no optimiser group holds it" if name not in trained.groups else "",
            f"{STEPS} steps do not move it" if name in trained.groups and name not in trained.moved else "",
        ]
        yield ParameterLife(
            name=name,
            numbers=parameter.numel(),
            function=name in acting,
            gradient=name in trained.reached,
            group=trained.groups.get(name),
            moves=name in trained.moved,
            declared=name in declared,
            why=", ".join(fault for fault in faults if fault),
        )


class _Trained(NamedTuple):
    """What some steps of training showed, by the names of parameters."""

    groups: dict[str, str]
    connected: set[str]
    """Those that the loss was differentiated for."""
    reached: set[str]
    """Those of them whose gradient was once not all zero."""
    moved: set[str]

    def why_no_gradient(self, name: str) -> str:
        if name in self.reached:
            return ""
        if name not in self.connected:
            return "no gradient reaches it"
        return "its gradient is zero from its start on"


def _train(model: OuroborosForCausalLM, recipe: Recipe, start: dict[str, Tensor]) -> _Trained:
    """Train on random tokens as the recipe says, until everything that can move has moved.

    Weights are not decayed: decay moves what nothing trains. Muon computes in float32, which every processor can.
    """
    optim, parameters = recipe.optim, dict(model.named_parameters())
    optimizers = build_optimizers(model, optim, muon_dtype=torch.float32)
    names = {parameter: name for name, parameter in parameters.items()}
    found = _Trained({}, set(), set(), set())
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["weight_decay"] = 0.0
        found.groups.update({names[parameter]: group["role"] for parameter in group["params"]})
    model.train()
    for step in range(STEPS):
        set_learning_rate(optimizers, learning_rate((step + 0.5) / STEPS, optim))
        ids = _random_ids(model, extra=1)
        backprop = recipe.train.loops.backprop
        loss = model(ids[:, :-1], targets=ids[:, 1:], use_cache=False, backprop_loops=backprop).loss
        check(math.isfinite(float(loss.detach())), f"liveness: the loss of training step {step} is not finite")
        loss.backward()
        gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
        found.connected.update(gradients)
        found.reached.update(n for n, grad in gradients.items() if n not in found.reached and grad.any())
        clip_and_norm([parameters[name] for name in found.groups], optim.clip_norm)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)
        waiting = found.groups.keys() - found.moved
        found.moved.update(name for name in waiting if not torch.equal(parameters[name], start[name]))
        # More steps connect nothing: only what has a gradient, if one of zeros, may still wake up.
        if found.connected & found.groups.keys() <= found.moved & found.reached:
            break
    model.eval()
    return found


def _random_ids(model: OuroborosForCausalLM, extra: int = 0) -> Tensor:
    """Two sequences of random tokens, with ``extra`` more tokens than the model is given."""
    spec = model.model.spec
    length = min(TOKENS, spec.max_position_embeddings) + extra
    return torch.randint(0, spec.vocab_size, (2, length)).to(model.device)


@torch.no_grad()
def _restore(model: nn.Module, start: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        parameter.copy_(start[name])


@torch.no_grad()
def _acting(model: OuroborosForCausalLM, names: Iterable[str]) -> set[str]:
    """Those of ``names`` that change logits if a random sign of their own size is added to them, one after the other.

    What counts as a change is more than rounding, which is measured: the same logits are computed again, and for each
    sequence by itself.
    """
    ids = _random_ids(model)
    logits = logits_of(model, ids)
    alone = torch.cat([logits_of(model, row) for row in ids.split(1)])
    limit = changed_beyond(logits, logits_of(model, ids), alone)
    acting, parameters = set(), dict(model.named_parameters())
    for name in names:
        parameter = parameters[name]
        kept = parameter.clone()
        size = NOISE + float(parameter.square().mean().sqrt())
        parameter.add_(torch.randn_like(parameter).sign_(), alpha=size)  # never almost nothing, as a single draw can be
        if limit(logits_of(model, ids)):
            acting.add(name)
        parameter.copy_(kept)
    return acting

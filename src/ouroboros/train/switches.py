"""Whether every switch of optimiser and training does something: the trainer itself takes some steps with each option
at another value. See :mod:`ouroboros.eval.switches`."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ouroboros.config import DataSpec, Recipe
from ouroboros.config.needs import idle
from ouroboros.data.prepared import PreparedData
from ouroboros.data.shards import prepare
from ouroboros.eval.subject import changed_beyond
from ouroboros.eval.switches import Switch, narrow, switches
from ouroboros.model.configuration import OuroborosConfig
from ouroboros.model.modeling import OuroborosForCausalLM
from ouroboros.optim import ROLES, first_beta, learning_rate, muon_momentum, parameter_roles
from ouroboros.train.distributed import Workers
from ouroboros.train.trainer import Trainer

STEPS = 8
"""So many that averaged weights, which begin at four fifths of a run, are of more than one step."""
TOKENS = 16
LONG_RUN = 100
FEW_STEPS_RATE = 1e-2
SECTIONS = ("optim", "train")
OTHERS: Mapping[str, tuple[Any, ...]] = {
    "average_start": (0.9,),
    "backprop": (1,),
    "betas": ((0.5, 0.95), (0.9, 0.5)),
    "bits_of": (("*o_proj*=3",),),
    "clip": (0.9,),
    "clip_norm": (1e-3,),
    "compile": ("auto",),
    "curriculum": (((0.0, 1), (0.5, 3)),),
    "ema_decay": (0.5,),
    "left_out": (("*o_proj.weight",),),
    "max": (2, 4),
    "min": (3, 6),
    "momentum_cycle": ((0.5, 0.9),),
    "muon_precision": ("bf16",),
    "precision": ("bf16",),
    "where": (("*o_proj*",),),
}
"""Values that a guess would not find, or that show an effect within few steps."""


def training_switches(recipe: Recipe) -> tuple[Switch, ...]:
    """Every option of optimiser and training with what it changes.

    The recipe is trained at a small width on a text of its own, for a few steps of few tokens. The global random state
    is restored.
    """
    with tempfile.TemporaryDirectory() as directory, torch.random.fork_rng(), _quiet():
        data = _text(Path(directory))
        small = _small(recipe, data)
        before, again = _trained(small, data), _trained(small, data)
        changed = [changed_beyond(*repeats) for repeats in zip(before, again, strict=True)]
        found: list[Switch] = []
        for section in SECTIONS:

            def effect(spec: Any, section: str = section) -> str | None:
                after = _trained(dataclasses.replace(small, **{section: spec}), data)
                return "training" if any(differs(one) for differs, one in zip(changed, after, strict=True)) else None

            spec = getattr(small, section)
            needed = dict(idle(spec, recipe=small)) | (_rates_of_nothing(small) if section == "optim" else {})
            found += switches(spec, effect, idle=needed, others=OTHERS, prefix=f"{section}.", trusting=True)
        return tuple(found)


def _text(directory: Path) -> PreparedData:
    """Some sums in words, as bytes."""
    path = directory / "text.jsonl"
    path.write_text("".join(json.dumps({"text": f"{n} times {n % 7} is {n * (n % 7)}"}) + "\n" for n in range(400)))
    spec = DataSpec(sources=(str(path),), tokenizer="bytes", sequence_length=TOKENS)
    return prepare(spec, directory / "data")


def _small(recipe: Recipe, data: PreparedData) -> Recipe:
    model = dataclasses.replace(narrow(recipe.model), vocab_size=data.tokenizer.vocab_size)
    train = dataclasses.replace(
        recipe.train,
        steps=STEPS,
        tokens=None,
        minutes=None,
        batch_size=4,
        accumulation=1,
        threads=1,
        compile="off",
        activation_checkpointing=False,
        precision="fp32",
    )
    # A rate for long runs moves weights so little in a few steps that what averages do would look like rounding.
    optim = dataclasses.replace(recipe.optim, lr=max(recipe.optim.lr, FEW_STEPS_RATE))
    if optim.matrix_optimizer == "muon":  # without it, that precision is set and idle
        optim = dataclasses.replace(optim, muon_precision="fp32")
    if optim.decay_steps is not None:  # of a long run; in a short one nearly all of the rate would be gone
        optim = dataclasses.replace(optim, decay_steps=min(optim.decay_steps, STEPS // 2))
    return dataclasses.replace(recipe, model=model, data=data.spec, optim=optim, train=train)


def _trained(recipe: Recipe, data: PreparedData) -> tuple[Tensor, Tensor, Tensor]:
    """The losses of some steps, the weights that would be exported behind them as one list, and the schedules of a run
    that is long enough to show all of their phases."""
    torch.manual_seed(recipe.train.seed)
    model = OuroborosForCausalLM(OuroborosConfig.from_spec(recipe.model))
    trainer = Trainer(recipe, model, data, Workers())
    losses = torch.tensor([trainer.step().loss for _ in range(STEPS)])
    with trainer.evaluation_weights() as exported:
        weights = torch.cat([parameter.detach().flatten() for parameter in exported.parameters()])
    middles = [(step + 0.5) / LONG_RUN for step in range(LONG_RUN)]
    schedules = [schedule(at, recipe.optim, LONG_RUN) for schedule in (learning_rate, first_beta) for at in middles]
    schedules += [muon_momentum(step, recipe.optim) for step in range(0, LONG_RUN**2, LONG_RUN)]
    return losses, weights, torch.tensor(schedules)


def _rates_of_nothing(recipe: Recipe) -> dict[str, str]:
    """The rates of roles that no parameter of the model has, and what they need."""
    with torch.device("meta"):
        present = set(parameter_roles(OuroborosForCausalLM(OuroborosConfig.from_spec(recipe.model))).values())
    return {f"{role}_lr": f"a parameter of role {role}" for role in ROLES if role not in present}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Warnings about a model would be repeated for every trial."""
    logger = logging.getLogger("ouroboros")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)

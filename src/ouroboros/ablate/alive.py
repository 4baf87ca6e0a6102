"""Whether an arm does what it is for, before it costs a study's hours: all of its parameters act and learn, and the
model computes something else than the control.

An arm can differ from its control in its recipe and still be the same function, because another option makes the
change idle. So both are trained for the same few steps, and their losses and predictions are compared.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ouroboros.ablate.changes import fingerprint_of
from ouroboros.ablate.record import code_version
from ouroboros.ablate.study import Study
from ouroboros.api import build
from ouroboros.config import Recipe, to_dict
from ouroboros.data.prepared import PreparedData
from ouroboros.errors import check
from ouroboros.eval.liveness import parameter_lives
from ouroboros.eval.subject import logits_of
from ouroboros.files import read_object, write_whole
from ouroboros.train.distributed import Workers
from ouroboros.train.run import resolve
from ouroboros.train.trainer import Trainer

STEPS = 4
"""Of a run that is as long, so that what belongs to its end takes part in the last one."""
TOLERANCE = 1e-6
"""Differences that rounding may make, as a share of the largest value."""


def dead_arms(
    study: Study, texts: Mapping[str, PreparedData], kept: Path, tell: Callable[[str], None]
) -> dict[str, str]:
    """The arms that would answer nothing, each with the reason in one line.

    Args:
        study: whose arms are judged; repeats of the control are what they are.
        texts: the prepared text by the name of an arm.
        kept: a JSON file of what was found before, by the recipes and the code, which is not computed again.
        tell: receives a line for each arm that is dead.

    Raises:
        OuroborosError: something in the control is dead.
    """
    known = read_object(kept) if kept.is_file() else {}
    found: dict[str, str] = {}
    control: list[Tensor] | None = None
    for arm in (study.control, *study.arms):
        if arm.repeat:
            continue
        key = _key(to_dict(study.control), to_dict(arm), code_version())
        if key not in known:
            lines = faults(arm.recipe, texts[arm.name])
            if not lines and arm is not study.control and not arm.late:
                if control is None:
                    control = behaviour(study.control.recipe, texts[study.control.name])
                if same(control, behaviour(arm.recipe, texts[arm.name])):
                    lines = (_SAME.format(control=study.control.name),)
            known[key] = "; ".join(lines)
            write_whole(kept, (json.dumps(known, indent=2) + "\n").encode())
        if known[key]:
            check(arm is not study.control, f"control {arm.name!r}: is dead in part: {known[key]}")
            found[arm.name] = known[key]
            tell(f"arm {arm.name!r} is left out: {known[key]}")
    return found


def _key(control: Mapping[str, Any], arm: Mapping[str, Any], code: str) -> str:
    return f"{code} {fingerprint_of(control['recipe'])} {fingerprint_of(arm['recipe'])} {arm['late']}"


def found_dead(study: Mapping[str, Any], known: Mapping[str, str], code: str) -> dict[str, str]:
    """What :func:`dead_arms` returned, from what it keeps.

    Args:
        study: its values as they were then: those that a later release reads from them may have more fields.
        known: what is in the file.
        code: the version of the code then.
    """
    reasons = {arm["name"]: known.get(_key(study["control"], arm, code)) for arm in study["arms"]}
    return {name: why for name, why in reasons.items() if why}


_SAME = (
    "this arm equals the control {control!r}: losses, gradients and predictions are the same, so its change has no"
    " effect here; if it acts only later in a run, say late=True"
)


def faults(recipe: Recipe, data: PreparedData) -> tuple[str, ...]:
    """What is dead in a recipe and not declared so, one line for each pattern of parameter names."""
    lives = [life for life in parameter_lives(resolve(recipe, data)) if life.dead]
    return tuple(dict.fromkeys(f"parameter {life.pattern}: {life.why}" for life in lives))


def behaviour(recipe: Recipe, data: PreparedData) -> list[Tensor]:
    """What a recipe computes on the study's text: predictions at its start, the loss and the norm of the gradient of
    each of :data:`STEPS` steps, and predictions behind them.

    Precision and threads are the same for all, unless the recipe says otherwise. The global random state is restored.
    """
    train = dataclasses.replace(recipe.train, steps=STEPS, tokens=None, minutes=None, compile="off")
    if train.precision == "auto":
        train = dataclasses.replace(train, precision="fp32")
    optim = recipe.optim
    if optim.muon_precision == "auto":
        optim = dataclasses.replace(optim, muon_precision="fp32")
    train = dataclasses.replace(train, threads=train.threads or torch.get_num_threads())
    recipe = resolve(dataclasses.replace(recipe, train=train, optim=optim), data)
    with torch.random.fork_rng():
        torch.manual_seed(train.seed)
        trainer = Trainer(recipe, build(recipe), data, Workers())
        ids = torch.arange(2 * 16).reshape(2, 16) % recipe.model.vocab_size
        found = [logits_of(trainer.model.eval(), ids)]
        for _ in range(STEPS):
            step = trainer.step()
            found.append(torch.tensor([step.loss, step.grad_norm], dtype=torch.float64))
        with trainer.evaluation_weights() as model:
            found.append(logits_of(model.eval(), ids))
    return found


def same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    """Whether two behaviours are equal but for rounding."""
    return all(
        a.shape == b.shape and float((a - b).abs().max()) <= TOLERANCE * max(1.0, float(a.abs().max()))
        for a, b in zip(one, other, strict=True)
    )

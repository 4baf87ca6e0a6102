"""Every option of every part changes the function, the cost or the training of a model, or is refused."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator
from typing import Any, Literal

import pytest
import torch

from ouroboros.accounting import cost
from ouroboros.config import ModelSpec
from ouroboros.config.needs import idle
from ouroboros.config.codec import type_hints
from ouroboros.config.part import (
    FeedForwardPart,
    HeadPart,
    LoopPart,
    MixerPart,
    NormPart,
    ResidualPart,
    StemPart,
    kinds,
)
from ouroboros.errors import OuroborosError
from ouroboros.model.configuration import OuroborosConfig
from ouroboros.model.modeling import OuroborosForCausalLM
from ouroboros.optim import untrained_parameters
from ouroboros.config.parts.feed_forward import FeedForwardSpec

BASE = ModelSpec(layout="1 (1)x3", vocab_size=19, hidden_size=16, max_position_embeddings=40).replace(
    ffn=FeedForwardSpec(intermediate_size=24)
)
IN_BLOCK = {MixerPart: "mixer", FeedForwardPart: "ffn", NormPart: "norm", ResidualPart: "residual"}
LISTED = {StemPart: "stem", LoopPart: "loop"}
TRAINING_ONLY = {"dropout"}


def placed(part: Any) -> ModelSpec:
    """The base with this part in it."""
    for family, name in IN_BLOCK.items():
        if isinstance(part, family):
            return BASE.replace(**{name: part})
    for family, name in LISTED.items():
        if isinstance(part, family):
            return BASE.replace(**{name: (part,)})
    return BASE.replace(head=part)


def another(hint: Any, value: Any) -> Iterator[Any]:
    """Other values that a field might take."""
    choices = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        yield from (choice for choice in choices if choice != value)
    elif hint is bool:
        yield not value
    elif isinstance(value, tuple):
        yield tuple(2 * item for item in value)
    elif value is None:
        wanted = float if float in choices else int
        yield wanted(2)
    elif isinstance(value, int):
        yield from (value + 1, 2 * value)
    elif isinstance(value, float):
        yield from (value / 2 + 0.01, value + 0.25)


def options(spec: Any) -> Iterator[tuple[str, Any]]:
    """Every option and the specifications in which it alone is another."""
    for field in dataclasses.fields(spec):
        value, hint = getattr(spec, field.name), type_hints(type(spec))[field.name]
        if dataclasses.is_dataclass(value):
            for name, inner in options(value):
                yield f"{field.name}.{name}", dataclasses.replace(spec, **{field.name: inner})
            continue
        for other in another(hint, value):
            try:
                yield field.name, dataclasses.replace(spec, **{field.name: other})
            except OuroborosError:
                continue


def function(spec: ModelSpec) -> tuple[Any, ...]:
    """What a model computes in training and evaluation, what it costs, and what of it is trained, as values."""
    torch.manual_seed(0)
    model = OuroborosForCausalLM(OuroborosConfig.from_spec(spec))
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    ids = torch.randint(0, spec.vocab_size, (2, 13), generator=generator)
    torch.manual_seed(2)
    trained = model.train()(input_ids=ids, use_cache=False).logits.detach()
    again = model(input_ids=ids, use_cache=False).logits.detach()
    evaluated = model.eval()(input_ids=ids, use_cache=False).logits.detach()
    random = not torch.equal(trained, again)
    return evaluated.tolist(), trained.tolist(), random, cost(spec), sorted(untrained_parameters(model))


CASES = {
    f"{member.__name__}.{name}": None
    for family in (*IN_BLOCK, *LISTED, HeadPart)
    for member in dict.fromkeys(kinds(family).values())
    for name in [field.name for field in dataclasses.fields(member)]
}


@pytest.mark.parametrize("member", [
    member for family in (*IN_BLOCK, *LISTED, HeadPart) for member in dict.fromkeys(kinds(family).values())
    if not member.__module__.startswith("test_")
], ids=lambda member: member.__name__)
def test_every_option_of_a_part_acts_or_is_refused(member: Any) -> None:
    starts = [member(kind=kind) for kind in typing.get_args(type_hints(member)["kind"])]
    seen: dict[str, bool] = {}
    for start in starts:
        before = function(placed(start))
        refused = {path.rpartition(f"{start.kind}.")[2].rpartition("block.")[2] for path, _ in idle(placed(start))}
        for name, changed in options(start):
            if any(path.endswith(name) for path in refused):
                continue
            acts = function(placed(changed)) != before
            seen[name] = seen.get(name, False) or acts
    assert [name for name, acts in seen.items() if not acts] == []

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
from ouroboros.config.codec import type_hints
from ouroboros.config.needs import idle
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
from ouroboros.config.parts.delta import DeltaSpec
from ouroboros.config.parts.feed_forward import FeedForwardSpec
from ouroboros.config.parts.loop import RecurrenceGateSpec
from ouroboros.errors import OuroborosError
from ouroboros.model.configuration import OuroborosConfig
from ouroboros.model.modeling import OuroborosForCausalLM
from ouroboros.optim import untrained_parameters

BASE = ModelSpec(layout="1 (1)x3", vocab_size=19, hidden_size=16, max_position_embeddings=40).replace(
    ffn=FeedForwardSpec(intermediate_size=24)
)
IN_BLOCK = {MixerPart: "mixer", FeedForwardPart: "ffn", NormPart: "norm", ResidualPart: "residual"}
LISTED = {StemPart: "stem", LoopPart: "loop"}


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
        yield from (wanted(2), wanted(6))
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


SWITCHED: dict[str, list[dict[str, Any]]] = {
    "AttentionSpec": [{"num_heads": 2, "num_kv_heads": 1}],
    "LatentAttentionSpec": [{"rope_dim": 4}],
    "BottleneckAttentionSpec": [{"num_heads": 2}],
    "OsamSpec": [{"decay": True, "buckets": 40, "frequencies": 4, "detach_state": False}],
    "DeltaSpec": [
        {"eps": 0.5, "value": "constant", "gate": "two_layer"},
        {"values": 2, "embedding_conv": True},
        {"values": 2, "compressor": "token"},
    ],
}
"""Settings in which options act that do nothing by default."""
MEMBERS = [member for family in (*IN_BLOCK, *LISTED, HeadPart) for member in dict.fromkeys(kinds(family).values())]


@pytest.mark.parametrize("member", MEMBERS, ids=lambda member: member.__name__)
def test_every_option_of_a_part_acts_or_is_refused(member: Any) -> None:
    starts = [member(kind=kind) for kind in typing.get_args(type_hints(member)["kind"])]
    starts += [member(**settings) for settings in SWITCHED.get(member.__name__, ())]
    acts: dict[str, bool] = {}
    for start in starts:
        before = function(placed(start))
        refused = {path for path, _ in idle(start)}
        for name, changed in options(start):
            try:
                model = placed(changed)
            except OuroborosError:
                continue
            here = function(model) != before
            assert not (name in refused and here), f"{name} acts, but is refused in {start}"
            acts[name] = acts.get(name, False) or here
    assert [name for name, some in acts.items() if not some] == []
    assert acts.keys() | {"kind"} >= {field.name for field in dataclasses.fields(member) if field.name != "rope"}


def test_what_is_refused_is_named_with_what_it_needs() -> None:
    model = BASE.replace(residual=DeltaSpec(values=1), layout="2", loop=(RecurrenceGateSpec(),), register_std=0.5)
    found = dict(idle(model))
    assert found["block.residual.kernel"] == "block.residual.values = more than 1"
    assert found["block.ffn.negative_slope"] == "block.ffn.kind = leaky_relu2"
    assert found["loop"].startswith("a layout with a loop") and found["register_std"] == "registers = more than 0"

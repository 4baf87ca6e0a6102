"""The averaged weights."""

import pytest
import torch
from torch import nn

from ouroboros.errors import OuroborosError
from ouroboros.train.ema import Ema


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(3, 2)
        self.head = nn.Linear(2, 3, bias=False)
        self.head.weight = self.embed.weight
        self.frozen = nn.Parameter(torch.ones(1), requires_grad=False)


def shift(model: nn.Module, amount: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(amount)


def test_average_follows_the_formula():
    model = Tied()
    ema = Ema(model, 0.5)
    expected = model.embed.weight.detach().clone()
    for n in range(20):
        shift(model, 0.125)
        ema.update_parameters(model)
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * model.embed.weight.detach()
    assert ema.updates == 20
    assert ema.state_tensors().keys() == {"embed.weight"}  # tied once, frozen not at all
    torch.testing.assert_close(ema.state_tensors()["embed.weight"], expected)


def test_the_average_is_a_model_of_its_own_that_starts_at_the_weights():
    model = Tied()
    ema = Ema(model, 0.9)
    average = ema.state_tensors()["embed.weight"].clone()
    assert torch.equal(average, model.embed.weight) and ema.updates == 0
    shift(model, 0.1)
    assert torch.equal(ema.module.head.weight, average) and ema.module.head.weight is ema.module.embed.weight
    ema.update_parameters(model)
    torch.testing.assert_close(ema.module.embed.weight, average + 0.09)  # no copy of the first update


def test_resumed_average_continues_exactly():
    model = Tied()
    ema = Ema(model, 0.9)
    for _ in range(3):
        shift(model, 0.1)
        ema.update_parameters(model)
    other = Ema(Tied(), 0.9)
    other.load(model, {name: tensor.clone() for name, tensor in ema.state_tensors().items()}, ema.updates)
    for average in (ema, other):
        average.update_parameters(model)
    assert torch.equal(ema.state_tensors()["embed.weight"], other.state_tensors()["embed.weight"])
    assert torch.equal(other.module.frozen, model.frozen)  # what is not averaged comes from the model


def test_foreign_averages_are_refused():
    model = Tied()
    ema = Ema(model, 0.9)
    with pytest.raises(OuroborosError, match=r"missing \['embed\.weight'\], unexpected \['x'\]"):
        ema.load(model, {"x": torch.zeros(1)}, 1)
    with pytest.raises(OuroborosError, match=r"embed\.weight has shape \(1,\), the model has \(3, 2\)"):
        ema.load(model, {"embed.weight": torch.zeros(1)}, 1)

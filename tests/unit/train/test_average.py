"""The averaged weights."""

import pytest
import torch
from torch import nn

from ouroboros.config import TrainSpec
from ouroboros.errors import OuroborosError
from ouroboros.train.average import Average


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


def follow(average: Average, model: nn.Module, steps: int, first: int = 1) -> list[torch.Tensor]:
    """Weights after each of so many steps of a run of 20, all shown to ``average``."""
    seen = []
    for step in range(first, first + steps):
        shift(model, 0.125 * step)
        average.follow(model, step, (step - 0.5) / 20)
        seen.append(model.embed.weight.detach().clone())
    return seen


def test_the_exponential_average_is_that_of_the_weights_alone():
    model = Tied()
    average = Average(model, TrainSpec(ema_decay=0.5))
    seen = follow(average, model, 20)
    expected = seen[0]  # the start has no share
    for n, weights in enumerate(seen[1:], 1):
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * weights
    assert average.updates == 20
    assert average.state_tensors().keys() == {"embed.weight"}  # tied once, frozen not at all
    torch.testing.assert_close(average.state_tensors()["embed.weight"], expected)


def test_the_plain_average_is_the_mean_of_every_so_many_weights_at_the_end():
    model = Tied()
    average = Average(model, TrainSpec(average_every=3, average_start=0.5))
    seen = follow(average, model, 20)
    assert average.updates == 3  # steps 12, 15 and 18 of 20
    torch.testing.assert_close(average.module.embed.weight, torch.stack([seen[11], seen[14], seen[17]]).mean(0))


@pytest.mark.parametrize(
    ("settings", "updates"),
    [
        ({"ema_decay": 0.5}, 20),
        ({"ema_decay": 0.5, "average_start": 0.5}, 10),
        ({"average_every": 1}, 4),
        ({"average_every": 1, "average_start": 0.0}, 20),
        ({"average_every": 21}, 0),
    ],
)
def test_when_averaging_begins(settings, updates):
    model = Tied()
    average = Average(model, TrainSpec(**settings))
    follow(average, model, 20)
    assert average.updates == updates


def test_the_average_is_a_model_of_its_own():
    model = Tied()
    average = Average(model, TrainSpec(ema_decay=0.5))
    average.follow(model, 1, 0.0)
    before = model.embed.weight.detach().clone()
    shift(model, 0.3)
    assert torch.equal(average.module.head.weight, before) and average.module.head.weight is average.module.embed.weight
    average.follow(model, 2, 0.5)
    torch.testing.assert_close(average.module.embed.weight, before + 0.3 * 9 / 11)


@pytest.mark.parametrize("settings", [{"ema_decay": 0.9}, {"average_every": 2, "average_start": 0.0}])
def test_resumed_average_continues_exactly(settings):
    model, spec = Tied(), TrainSpec(**settings)
    average = Average(model, spec)
    follow(average, model, 4)
    other = Average(Tied(), spec)
    other.load(model, {name: tensor.clone() for name, tensor in average.state_tensors().items()}, average.updates)
    with torch.no_grad():
        model.embed.weight.add_(0.1)
    for one in (average, other):
        one.follow(model, 6, 0.5)
    assert torch.equal(average.state_tensors()["embed.weight"], other.state_tensors()["embed.weight"])
    assert torch.equal(other.module.frozen, model.frozen)  # what is not averaged comes from the model


def test_foreign_averages_are_refused():
    model = Tied()
    average = Average(model, TrainSpec(ema_decay=0.9))
    with pytest.raises(OuroborosError, match=r"missing \['embed\.weight'\], unexpected \['x'\]"):
        average.load(model, {"x": torch.zeros(1)}, 1)
    with pytest.raises(OuroborosError, match=r"embed\.weight has shape \(1,\), the model has \(3, 2\)"):
        average.load(model, {"embed.weight": torch.zeros(1)}, 1)

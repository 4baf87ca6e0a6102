"""The averaged weights."""

import pytest
import torch
from torch import nn

from ouroboros.errors import OuroborosError
from ouroboros.train.ema import Ema


class Tied(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embed = nn.Embedding(3, 2, dtype=dtype)
        self.head = nn.Linear(2, 3, bias=False, dtype=dtype)
        self.head.weight = self.embed.weight
        self.frozen = nn.Parameter(torch.ones(1), requires_grad=False)


def shift(model: nn.Module, amount: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(amount)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_average_follows_the_formula_in_float32(dtype):
    model = Tied(dtype)
    ema = Ema(model, 0.5)
    expected = model.embed.weight.detach().float().clone()
    for n in range(20):
        shift(model, 0.125)
        ema.update()
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * model.embed.weight.detach().float()
    assert ema.updates == 20
    assert ema.state_tensors().keys() == {"embed.weight"}  # tied once, frozen not at all
    torch.testing.assert_close(ema.state_tensors()["embed.weight"], expected)
    assert ema.state_tensors()["embed.weight"].dtype == torch.float32


def test_swap_evaluates_the_average_and_restores_bit_for_bit():
    model = Tied()
    ema = Ema(model, 0.9)
    average = ema.state_tensors()["embed.weight"].clone()
    shift(model, 0.1)
    own, storage = model.embed.weight.detach().clone(), model.embed.weight.data_ptr()
    with ema.swap():
        assert torch.equal(model.head.weight, average)
        assert model.embed.weight.requires_grad and model.embed.weight.data_ptr() == storage
    assert torch.equal(model.embed.weight, own)
    with pytest.raises(KeyError), ema.swap():
        raise KeyError
    assert torch.equal(model.embed.weight, own) and torch.equal(ema.state_tensors()["embed.weight"], average)


def test_resumed_average_continues_exactly():
    model = Tied()
    ema = Ema(model, 0.9)
    for _ in range(3):
        shift(model, 0.1)
        ema.update()
    other = Ema(Tied(), 0.9)
    other.load({name: tensor.clone() for name, tensor in ema.state_tensors().items()}, ema.updates)
    other._parameters["embed.weight"].data.copy_(model.embed.weight)
    for average in (ema, other):
        average.update()
    assert torch.equal(ema.state_tensors()["embed.weight"], other.state_tensors()["embed.weight"])


def test_foreign_averages_are_refused():
    ema = Ema(Tied(), 0.9)
    with pytest.raises(OuroborosError, match=r"missing \['embed\.weight'\], unexpected \['x'\]"):
        ema.load({"x": torch.zeros(1)}, 1)
    with pytest.raises(OuroborosError, match=r"embed\.weight has shape \(1,\), the model has \(3, 2\)"):
        ema.load({"embed.weight": torch.zeros(1)}, 1)
    with pytest.raises(OuroborosError, match="ema_decay"):
        Ema(Tied(), 1.0)

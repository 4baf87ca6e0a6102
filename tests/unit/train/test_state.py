"""Optimiser state: exact, and refused when it belongs to something else."""

import json

import pytest
import torch
from torch import nn

from ouroboros.config import OptimSpec
from ouroboros.errors import OuroborosError
from ouroboros.optim import build_optimizers, set_learning_rate
from ouroboros.train.checkpoint import load_newest, save
from ouroboros.train.state import pack_optimizers, unpack_optimizers


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 8), nn.Linear(8, 4), nn.Linear(4, 4))


def names(net: nn.Module) -> dict[torch.Tensor, str]:
    return {parameter: name for name, parameter in net.named_parameters()}


def train(net: nn.Module, optimizers: list[torch.optim.Optimizer], steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        set_learning_rate(optimizers, 1.0 / (1 + step))
        for name, parameter in net.named_parameters():
            if name == "3.bias" and step < 2:
                parameter.grad = None  # its step counter lags behind the others'
            else:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("kind", ["muon", "adamw"])
@pytest.mark.parametrize("fused", [True, False])
def test_interrupted_equals_uninterrupted_bit_for_bit(tmp_path, kind, fused):
    spec = OptimSpec(matrix_optimizer=kind, lr=0.1, muon_precision="fp32")  # both choose alike
    straight = model()
    optimizers = build_optimizers(straight, spec, fused=fused)
    train(straight, optimizers, range(3))
    tensors, documents = pack_optimizers(optimizers, names(straight))
    save(
        tmp_path,
        3,
        files={"optimizer.safetensors": tensors, "model.safetensors": straight.state_dict()},
        documents={"optimizer.json": documents},
    )
    train(straight, optimizers, range(3, 6))

    found = load_newest(tmp_path)
    resumed = model(seed=1)
    resumed.load_state_dict(found.tensors("model.safetensors"))
    others = build_optimizers(resumed, spec, fused=fused)
    saved = found.documents["optimizer.json"]
    unpack_optimizers(others, names(resumed), found.tensors("optimizer.safetensors"), saved)
    rates = [group["lr"] for optimizer in others for group in optimizer.param_groups]
    assert rates == [pytest.approx(0.1 / 3)] * 3
    train(resumed, others, range(3, 6))
    for (name, a), (_, b) in zip(straight.named_parameters(), resumed.named_parameters()):
        assert torch.equal(a, b), name
    again, documents_again = pack_optimizers(others, names(resumed))
    expected, _ = pack_optimizers(optimizers, names(straight))
    assert again.keys() == expected.keys() and len(again) > 0
    assert all(torch.equal(again[key], expected[key]) and again[key].dtype == expected[key].dtype for key in again)
    assert json.loads(json.dumps(documents_again)) == documents_again


def test_a_fresh_optimizer_packs_to_nothing():
    net = model()
    optimizers = [torch.optim.AdamW(net.parameters())]
    tensors, documents = pack_optimizers(optimizers, names(net))
    assert tensors == {} and documents[0]["state"] == {}
    unpack_optimizers(optimizers, names(net), tensors, documents)
    assert optimizers[0].state_dict()["state"] == {}


def step(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def packed() -> tuple[nn.Module, torch.optim.Optimizer, dict, list]:
    net = model()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    step(net, optimizer)
    return net, optimizer, *pack_optimizers([optimizer], names(net))


def test_restored_state_does_not_share_memory_with_the_given_tensors():
    net, optimizer, tensors, documents = packed()
    tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    unpack_optimizers([optimizer], names(net), tensors, documents)
    before = {key: tensor.clone() for key, tensor in tensors.items()}
    step(net, optimizer)
    assert all(torch.equal(before[key], tensors[key]) for key in before)


def test_settings_stay_as_built_besides_the_rate():
    net, _, tensors, documents = packed()
    other = torch.optim.AdamW(net.parameters(), lr=0.7, weight_decay=0.5)
    unpack_optimizers([other], names(net), tensors, documents)
    assert other.param_groups[0]["weight_decay"] == 0.5 and other.param_groups[0]["lr"] == 0.1


def test_foreign_state_is_refused_and_changes_nothing():
    net, optimizer, tensors, documents = packed()
    mine = names(net)
    kept = optimizer.state[net[1].weight]["step"]

    def refused(words: str, *optimizers: torch.optim.Optimizer, **changed: torch.Tensor | None) -> None:
        given = {key: tensor for key, tensor in {**tensors, **changed}.items() if tensor is not None}
        with pytest.raises(OuroborosError, match=words):
            unpack_optimizers(optimizers or [optimizer], mine, given, documents)

    refused(r"optimiser state 1\.weight/exp_avg is missing", **{"1.weight/exp_avg": None})
    refused(r"has shape \(3,\), the parameter \(8, 4\)", **{"1.weight/exp_avg": torch.zeros(3)})
    refused(r"belong to nothing: \['other'\]", other=torch.zeros(1))
    refused("is of AdamW; the run uses SGD", torch.optim.SGD(net.parameters()))
    refused("is of AdamW; the run uses AdamW, SGD", optimizer, torch.optim.SGD(net.parameters()))
    groups = [{"params": [net[0].weight]}, {"params": [net[1].weight]}]
    refused("has 1 parameter groups, the run has 2", torch.optim.AdamW(groups))
    fewer = torch.optim.AdamW(list(net.parameters())[:-1])
    refused(r"other parameters: \['3\.bias'\]", fewer)
    assert optimizer.state[net[1].weight]["step"] is kept


def test_what_cannot_be_packed_is_named():
    net, optimizer, _, _ = packed()
    with pytest.raises(OuroborosError, match=r"shape \(7, 4\) has no name"):
        pack_optimizers([optimizer], {})
    optimizer.param_groups[0]["lr"] = torch.tensor(0.1)
    with pytest.raises(OuroborosError, match="setting 'lr' is a Tensor"):
        pack_optimizers([optimizer], names(net))
    optimizer.state[net[1].weight]["count"] = 3
    with pytest.raises(OuroborosError, match=r"state 'count' of 1\.weight is no tensor"):
        pack_optimizers([optimizer], names(net))

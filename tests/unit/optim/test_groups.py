"""Parameter groups, what is left out of them, clipping."""

import math
import time
from collections import Counter

import pytest
import torch
from torch import nn

from ouroboros.config import OptimSpec
from ouroboros.errors import OuroborosError
from ouroboros.optim import (
    ROLES,
    BatchedMuon,
    build_optimizers,
    clip_and_norm,
    left_out_parameters,
    parameter_roles,
    set_first_beta,
    set_learning_rate,
    untrained_parameters,
)


class Table(nn.Module):
    PARAMETER_ROLES = {"rows": "vector"}

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.zeros(3, 8))


class Toy(nn.Module):
    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(11, 8)
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8, bias=False)
        self.square = nn.Linear(8, 8, bias=False)
        self.norm = nn.LayerNorm(8)
        self.table = Table()
        self.lm_head = nn.Linear(8, 11, bias=False)
        if tied:
            self.lm_head.weight = self.embed_tokens.weight


def test_roles_follow_the_rules():
    assert parameter_roles(Toy(tied=False)) == {
        "embed_tokens.weight": "embedding",
        "up.weight": "matrix",
        "up.bias": "vector",
        "down.weight": "matrix",
        "square.weight": "matrix",
        "norm.weight": "vector",
        "norm.bias": "vector",
        "table.rows": "vector",
        "lm_head.weight": "embedding",
    }


def test_a_tied_parameter_has_one_role_under_its_first_name():
    roles = parameter_roles(Toy(tied=True))
    assert "lm_head.weight" not in roles and roles["embed_tokens.weight"] == "embedding"


def test_tied_parameters_of_different_roles_are_refused():
    model = Toy(tied=False)
    model.square.weight = model.up.weight  # both matrices: fine
    parameter_roles(model)
    model.down.weight = model.embed_tokens.weight
    with pytest.raises(OuroborosError, match=r"embed_tokens\.weight \(embedding\) is tied to down\.weight \(matrix\)"):
        parameter_roles(model)


def test_a_parameter_without_a_role_is_named():
    model = Toy()
    model.table.other = nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(OuroborosError, match=r"table\.other .*belongs to no group.*PARAMETER_ROLES.*on Table"):
        build_optimizers(model, OptimSpec())


@pytest.mark.parametrize(
    ("role", "shape", "message"),
    [
        ("vectr", (2, 2), "did you mean 'vector'"),
        ("matrix", (2, 2, 2), "not 2-D"),
        ("scalar", (2, 2), r"w has shape \(2, 2\), not one number or a list"),
    ],
)
def test_wrong_declarations_are_refused(role, shape, message):
    class Wrong(nn.Module):
        PARAMETER_ROLES = {"w": role}

        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(shape))

    with pytest.raises(OuroborosError, match=message):
        parameter_roles(nn.Sequential(Wrong()))


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_groups_carry_roles_rates_and_decay(kind):
    model = Toy()
    model.square.weight.requires_grad_(False)
    spec = OptimSpec(matrix_optimizer=kind, lr=0.1, embedding_lr=0.2, vector_lr=0.3, weight_decay=0.4)
    optimizers = build_optimizers(model, spec)
    groups = {group["role"]: group for optimizer in optimizers for group in optimizer.param_groups}
    assert {role: len(g["params"]) for role, g in groups.items()} == {"matrix": 2, "embedding": 1, "vector": 4}
    assert {role: g["peak_lr"] for role, g in groups.items()} == {"matrix": 0.1, "embedding": 0.2, "vector": 0.3}
    assert {role: g["weight_decay"] for role, g in groups.items()} == {"matrix": 0.4, "embedding": 0.0, "vector": 0.0}
    assert [type(o) for o in optimizers] == (
        [BatchedMuon, torch.optim.AdamW] if kind == "muon" else [torch.optim.AdamW]
    )
    set_learning_rate(optimizers, 0.5)
    assert {role: g["lr"] for role, g in groups.items()} == {"matrix": 0.05, "embedding": 0.1, "vector": 0.15}


class Memory(nn.Module):
    """As a memory of constant size whose keys are fixed: two maps, a number that is trained and one that is not."""

    PARAMETER_ROLES = {"omega_raw": "scalar", "theta_k_raw": "scalar"}

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj = (nn.Linear(8, 8, bias=False) for _ in range(2))
        self.omega_raw, self.theta_k_raw = (nn.Parameter(torch.tensor(0.02)) for _ in range(2))
        self.untrained = frozenset({"k_proj.weight", "theta_k_raw"})


@pytest.mark.parametrize("decay", ["matrices", "all"])
@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ({}, 0.1),
        ({"vector_lr": 0.3}, 0.3),
        ({"scalar_lr": 1.0}, 1.0),
        ({"scalar_lr": 1.0, "vector_lr": 0.3}, 1.0),
    ],
)
@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_scalars_are_a_role_of_their_own(kind, rates, expected, decay):
    model = nn.Sequential(Toy(), Memory())
    assert parameter_roles(model)["1.omega_raw"] == parameter_roles(model)["1.theta_k_raw"] == "scalar"
    spec = OptimSpec(matrix_optimizer=kind, lr=0.1, weight_decay=0.4, decay=decay, **rates)
    optimizers = build_optimizers(model, spec)
    (found,) = [(o, g) for o in optimizers for g in o.param_groups if g["role"] == "scalar"]
    assert isinstance(found[0], torch.optim.AdamW) and found[1]["params"] == [model[1].omega_raw]
    assert found[1]["peak_lr"] == expected and found[1]["weight_decay"] == (0.4 if decay == "all" else 0.0)
    vectors = [g["peak_lr"] for o in optimizers for g in o.param_groups if g["role"] == "vector"]
    assert vectors == [rates.get("vector_lr", 0.1)]


def test_what_is_declared_untrained_is_in_no_group_and_never_moves():
    model = nn.Sequential(Toy(), Memory())
    assert untrained_parameters(model) == {"1.k_proj.weight", "1.theta_k_raw"}
    assert untrained_parameters(Toy()) == set()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizers = build_optimizers(model, OptimSpec(decay="all"))  # all of them require a gradient
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    for optimizer in optimizers:
        optimizer.step()
    same = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
    assert same == untrained_parameters(model)


def test_what_is_left_out_is_in_no_group():
    model = nn.Sequential(Toy(), Memory())
    spec = OptimSpec(left_out=("*.bias", "1.?_proj.weight"))
    out = {"0.up.bias", "0.norm.bias", "1.q_proj.weight", "1.k_proj.weight"}
    assert left_out_parameters(model, spec) == out and left_out_parameters(model, OptimSpec()) == set()
    held = {
        p for optimizer in build_optimizers(model, spec) for group in optimizer.param_groups for p in group["params"]
    }
    names = {name for name, p in model.named_parameters() if p in held}
    assert names == {name for name, _ in model.named_parameters()} - out - {"1.theta_k_raw"}
    with pytest.raises(
        OuroborosError, match=r"optim\.left_out: '0\.up\.bia' is the name of no such parameter; .*example, 0\.emb"
    ):
        build_optimizers(model, OptimSpec(left_out=("0.up.bia",)))
    with pytest.raises(OuroborosError, match=r"that optim\.left_out does not name: nothing to train"):
        build_optimizers(model, OptimSpec(left_out=("*",)))


def test_untrained_names_are_checked_and_tied_ones_known_by_their_first_name():
    model = nn.Sequential(nn.Linear(8, 8, bias=False), Memory())
    model[1].k_proj.weight = model[0].weight
    assert untrained_parameters(model) == {"0.weight", "1.theta_k_raw"}
    model[1].untrained = frozenset({"theta_raw"})
    with pytest.raises(OuroborosError, match=r"Memory\.untrained of 1: 'theta_raw' is no parameter; did you mean"):
        build_optimizers(model, OptimSpec())


def test_adamw_takes_one_fused_step():
    assert all(group["fused"] is True for group in build_optimizers(Toy(), OptimSpec())[-1].param_groups)


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_every_trainable_parameter_is_in_exactly_one_group(kind):
    model = nn.Sequential(Toy(), Memory())
    optimizers = build_optimizers(model, OptimSpec(matrix_optimizer=kind))
    members = Counter(p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"])
    untrained = untrained_parameters(model)
    assert members == Counter(p for name, p in model.named_parameters() if name not in untrained)


def test_a_frozen_model_is_refused():
    with pytest.raises(OuroborosError, match="nothing to train"):
        build_optimizers(Toy().requires_grad_(False), OptimSpec())


def test_models_of_matrices_alone_or_vectors_alone_build():
    assert len(build_optimizers(nn.Linear(4, 4, bias=False), OptimSpec())) == 1
    assert len(build_optimizers(nn.LayerNorm(4), OptimSpec())) == 1


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_muon_takes_the_precision_that_is_asked_for(precision, dtype):
    optimizer = build_optimizers(nn.Linear(4, 8), OptimSpec(muon_precision=precision))[0]
    assert isinstance(optimizer, BatchedMuon) and optimizer.dtype == dtype


@pytest.mark.parametrize(("slow", "chosen"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_muon_takes_the_precision_that_is_measured_to_be_faster(slow, chosen, monkeypatch):
    asked = []

    def timed(x, *_):
        asked.append(x)
        time.sleep(0.02 if x.dtype == slow else 0.001)
        return x

    monkeypatch.setattr("ouroboros.optim.muon.orthogonalize", timed)
    layers = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(6, 8))
    optimizer = build_optimizers(layers, OptimSpec())[0]
    assert isinstance(optimizer, BatchedMuon) and optimizer.dtype == chosen
    assert {tuple(x.shape[1:]) for x in asked} == {(128, 128)}  # tiny shapes are timed at this size
    assert sum(x.dtype == slow for x in asked) == 2  # a hopeless precision is not tried again and again


def test_decay_of_all_parameters_and_the_first_coefficient_of_adamw_alone():
    model = nn.Sequential(nn.Embedding(4, 6), nn.Linear(6, 8), nn.LayerNorm(8), Memory())
    for kind in ("muon", "adamw"):
        spec = OptimSpec(matrix_optimizer=kind, weight_decay=0.2, decay="all")
        optimizers = build_optimizers(model, spec)
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        assert {group["role"]: group["weight_decay"] for group in groups} == dict.fromkeys(ROLES, 0.2)
        momenta = [group.get("momentum") for group in groups]
        set_first_beta(optimizers, 0.5)
        assert {group["betas"] for group in groups if "betas" in group} == {(0.5, 0.95)}
        assert [group.get("momentum") for group in groups] == momenta
    parts = [group for optimizer in build_optimizers(model, OptimSpec()) for group in optimizer.param_groups]
    others = {"embedding": 0.0, "vector": 0.0, "scalar": 0.0}
    assert {group["role"]: group["weight_decay"] for group in parts} == {"matrix": 0.1, **others}


def test_clipping_returns_the_norm_before_and_scales_to_the_limit():
    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])
    assert clip_and_norm(parameters, 0.0) == 5.0
    assert clip_and_norm(parameters, 10.0) == 5.0
    assert torch.equal(parameters[0].grad, torch.tensor([3.0, 0.0]))
    assert clip_and_norm(iter(parameters), 1.0) == 5.0
    assert clip_and_norm(parameters, 0.0) == pytest.approx(1.0)
    assert clip_and_norm([parameters[2]], 1.0) == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_gradients_that_are_not_finite_are_left_alone(bad):
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([100.0, bad])
    assert not math.isfinite(clip_and_norm([parameter], 1.0))
    assert parameter.grad[0] == 100.0

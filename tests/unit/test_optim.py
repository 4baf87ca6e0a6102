"""Parameter groups, the batched Muon, schedules, clipping."""

import dataclasses
import math
import time
from collections import Counter

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from ouroboros.config import OptimSpec
from ouroboros.errors import OuroborosError
from ouroboros.optim import (
    ROLES,
    BatchedMuon,
    build_optimizers,
    clip_and_norm,
    first_beta,
    learning_rate,
    left_out_parameters,
    muon_coefficients,
    muon_momentum,
    orthogonalize,
    parameter_roles,
    set_first_beta,
    set_learning_rate,
    set_muon_momentum,
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
    with pytest.raises(OuroborosError, match=r"optim\.left_out: '0\.up\.bia' is the name of no.*mean '0\.up\.bias'"):
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


def matrices(seed: int) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(16, 24)] * 7 + [(24, 16)] * 3 + [(16, 16)] * 2 + [(1, 5), (5, 1)]
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_batched_muon_equals_torch_muon(dtype, monkeypatch):
    # Stacks of five: the seven matrices need two.
    monkeypatch.setattr(BatchedMuon, "CHUNK_BYTES", 2000 * dtype.itemsize)
    ours, theirs = matrices(0), matrices(0)
    batched = BatchedMuon(ours, lr=0.1, weight_decay=0.2, momentum=0.9, dtype=dtype)
    single = torch.optim.Muon(theirs, lr=0.1, weight_decay=0.2, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        for index, (a, b) in enumerate(zip(ours, theirs)):
            gradient = torch.randn(a.shape, generator=generator)
            a.grad, b.grad = (None, None) if index == 4 else (gradient, gradient.clone())
        batched.step()
        single.step()
    for a, b in zip(ours, theirs):
        # The update's RMS is 0.2 lr; torch's has the 8 bits of bfloat16, in which five iterations lose half of them.
        torch.testing.assert_close(a, b, atol=3 * 0.02 * (2**-6 if dtype == torch.bfloat16 else 2**-5), rtol=0)
        if "momentum_buffer" in single.state[b]:
            assert torch.equal(batched.state[a]["momentum_buffer"], single.state[b]["momentum_buffer"])
    assert torch.equal(ours[4], matrices(0)[4]) and not batched.state.get(ours[4])


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 16, 24), (3, 16, 32), (1, 8, 72), (2, 1, 5)])
@pytest.mark.parametrize("smallest", [1e-1, 1e-6])
@pytest.mark.parametrize(("kind", "fused"), [("quintic", True), ("quintic", False), ("polar_express", True)])
def test_wide_matrices_are_orthogonalised_as_the_definition_says(shape, smallest, kind, fused):
    x, coefficients = of_condition(shape, smallest), muon_coefficients(OptimSpec(muon_coefficients=kind))
    expected = x.double() / x.double().norm(dim=(1, 2), keepdim=True)
    for a, b, c in coefficients:
        gram = expected @ expected.mT
        expected = a * expected + (b * gram + c * gram @ gram) @ expected
    found = orthogonalize(x, coefficients, 1e-7, fused=fused)
    torch.testing.assert_close(found.double(), expected, atol=2e-3 if kind == "polar_express" else 5e-4, rtol=0)


def of_condition(shape, smallest):
    """Matrices with singular values from 1 to ``smallest``."""
    generator = torch.Generator().manual_seed(0)
    left, _, right = torch.linalg.svd(torch.randn(shape, generator=generator), full_matrices=False)
    values = torch.logspace(0, math.log10(smallest), shape[1])
    return left @ torch.diag_embed(values.expand(shape[0], -1)) @ right


@pytest.mark.parametrize(("kind", "steps", "far"), [("quintic", 9, 0.4), ("polar_express", 9, 1e-3)])
def test_polar_express_converges_where_one_polynomial_does_not(kind, steps, far):
    coefficients = muon_coefficients(OptimSpec(muon_coefficients=kind, muon_steps=steps))
    assert len(coefficients) == steps
    values = torch.linalg.svdvals(orthogonalize(of_condition((2, 16, 16), 1e-2), coefficients, 1e-7))
    error = (values - 1).abs().max().item()
    assert error < far and (kind == "polar_express" or error > 0.1)


def test_each_iteration_of_polar_express_is_as_published():
    """As in the paper: the norm times 1.01 divides first, and every polynomial but the last is of ``x / 1.01``."""
    first, second, *rest = muon_coefficients(OptimSpec(muon_coefficients="polar_express", muon_steps=10))
    for x in (0.001, 0.3, 1.0):
        y = x / 1.01 / 1.01
        value = first[0] * x + first[1] * x**3 + first[2] * x**5
        assert value == pytest.approx(8.28721201814563 * y - 23.595886519098837 * y**3 + 17.300387312530933 * y**5)
    assert second[0] == pytest.approx(4.107059111542203 / 1.01)
    assert rest[5:] == [(1.875, -1.25, 0.375)] * 3
    assert muon_coefficients(OptimSpec(muon_steps=3)) == ((3.4445, -4.775, 2.0315),) * 3


def test_rows_of_the_gradient_count_alike_where_that_is_asked_for():
    gradient = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    lengths = torch.logspace(0, 4, 6)[:, None]

    def update(gradient: torch.Tensor, rows: bool) -> torch.Tensor:
        parameter = nn.Parameter(torch.zeros(6, 9))
        parameter.grad = gradient.clone()
        BatchedMuon([parameter], lr=1.0, weight_decay=0.0, rows=rows, dtype=torch.float32).step()
        return parameter.detach()

    torch.testing.assert_close(update(lengths * gradient, True), update(gradient, True), atol=1e-4, rtol=0)
    assert (update(lengths * gradient, False) - update(gradient, False)).abs().max() > 0.1
    tall = update(gradient, True)
    normal = gradient / gradient.norm(dim=1, keepdim=True)
    torch.testing.assert_close(tall, update(normal, False), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("shape", "factor"), [((8, 32), 1.0), ((32, 8), 2.0), ((16, 16), 1.0)])
def test_the_form_first_published_sums_gradients_and_scales_by_rows_to_columns(shape, factor):
    """At a constant momentum the sum has the direction of the average."""
    found = {}
    for original in (True, False):
        parameter = nn.Parameter(torch.zeros(shape))
        muon = BatchedMuon([parameter], lr=1.0, weight_decay=0.0, original=original, dtype=torch.float32)
        for seed in range(3):
            parameter.grad = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
            muon.step()
        found[original] = parameter.detach(), muon.state[parameter]["momentum_buffer"]
    torch.testing.assert_close(found[True][0] / factor, found[False][0] / (0.2 * max(shape) ** 0.5), atol=1e-4, rtol=0)
    torch.testing.assert_close(found[True][1], found[False][1] / 0.05)


def test_the_momentum_of_muon_rises_over_its_steps_and_adamw_has_none():
    spec = OptimSpec(muon_momentum=0.99, muon_momentum_warmup=4, muon_momentum_start=0.91)
    found = [muon_momentum(step, spec) for step in range(6)]
    assert found == pytest.approx([0.91, 0.93, 0.95, 0.97, 0.99, 0.99])
    assert muon_momentum(0, OptimSpec(muon_momentum=0.9)) == 0.9
    muon, adamw = build_optimizers(Toy(), spec)
    assert muon.param_groups[0]["momentum"] == 0.99
    set_muon_momentum([muon, adamw], 0.5)
    assert muon.param_groups[0]["momentum"] == 0.5 and all("momentum" not in group for group in adamw.param_groups)


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

    monkeypatch.setattr("ouroboros.optim.orthogonalize", timed)
    layers = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(6, 8))
    optimizer = build_optimizers(layers, OptimSpec())[0]
    assert isinstance(optimizer, BatchedMuon) and optimizer.dtype == chosen
    assert {tuple(x.shape[1:]) for x in asked} == {(128, 128)}  # tiny shapes are timed at this size
    assert sum(x.dtype == slow for x in asked) == 2  # a hopeless precision is not tried again and again


def test_muon_update_has_the_rms_of_adamw():
    parameter = nn.Parameter(torch.zeros(64, 256))
    parameter.grad = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    BatchedMuon([parameter], lr=1.0, weight_decay=0.0).step()
    assert parameter.detach().square().mean().sqrt().item() == pytest.approx(0.2, rel=0.2)


def test_muon_of_a_zero_gradient_moves_nothing():
    parameter = nn.Parameter(torch.ones(4, 8))
    parameter.grad = torch.zeros(4, 8)
    BatchedMuon([parameter], lr=0.1, weight_decay=0.0).step()
    assert torch.equal(parameter, torch.ones(4, 8))


def test_muon_step_runs_a_closure():
    parameter = nn.Parameter(torch.ones(4, 8))
    optimizer = BatchedMuon([parameter])

    def closure() -> torch.Tensor:
        loss = parameter.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 32
    assert not torch.equal(parameter, torch.ones(4, 8))


specs = st.builds(
    OptimSpec,
    schedule=st.sampled_from(["wsd", "cosine", "constant", "one_cycle"]),
    warmup_fraction=st.floats(0, 0.5),
    decay_fraction=st.floats(0, 0.5),
    final_lr=st.floats(0, 1),
)


@given(specs, st.floats(-0.5, 1.5), st.floats(-0.5, 1.5))
def test_schedules_stay_in_range_rise_then_fall(spec, p, q):
    low, high = sorted((p, q))
    a, b = learning_rate(low, spec), learning_rate(high, spec)
    assert 0 <= a <= 1 and 0 <= b <= 1
    if high < spec.warmup_fraction:
        assert a <= b
    if low >= spec.warmup_fraction:
        assert a >= b - 1e-12


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("wsd", {0.0: 0.0, 0.1: 0.5, 0.2: 1.0, 0.6: 1.0, 0.8: 0.55, 1.0: 0.1, 2.0: 0.1}),
        ("cosine", {0.0: 0.0, 0.1: 0.5, 0.2: 1.0, 0.4: 0.55 + 0.45 * math.sqrt(0.5), 0.6: 0.55, 1.0: 0.1, 2.0: 0.1}),
        ("constant", {-1.0: 0.0, 0.1: 0.5, 0.2: 1.0, 1.0: 1.0}),
    ],
)
def test_schedule_values(schedule, expected):
    spec = OptimSpec(schedule=schedule, warmup_fraction=0.2, decay_fraction=0.4, final_lr=0.1)
    assert {progress: learning_rate(progress, spec) for progress in expected} == pytest.approx(expected)


@given(
    steps=st.integers(2, 60),
    warmup=st.floats(0, 1),
    start=st.floats(2, 50),
    end=st.floats(2, 1e5),
    low=st.floats(0, 0.9),
)
def test_one_cycle_is_that_of_torch(steps, warmup, start, end, low):
    assume(abs(warmup * steps - 1) > 1e-6 and warmup < 1 - 1e-6)  # torch divides by zero there
    high = low + 0.09
    spec = OptimSpec(
        schedule="one_cycle",
        warmup_fraction=warmup,
        decay_fraction=0.0,
        start_lr=1 / start,
        final_lr=1 / start / end,
        momentum_cycle=(low, high),
    )
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        1.0,
        steps,
        pct_start=warmup,
        div_factor=start,
        final_div_factor=end,
        base_momentum=low,
        max_momentum=high,
    )
    for step in range(steps):
        group = optimizer.param_groups[0]
        middle = (step + 0.5) / steps
        assert learning_rate(middle, spec, steps) == pytest.approx(group["lr"], abs=1e-12)
        assert first_beta(middle, spec, steps) == pytest.approx(group["betas"][0], abs=1e-12)
        if step + 1 < steps:
            optimizer.step()
            scheduler.step()


def test_one_cycle_of_many_steps_or_of_few():
    spec = OptimSpec(schedule="one_cycle", warmup_fraction=0.25, start_lr=0.1, final_lr=0.2, momentum_cycle=(0.8, 0.9))
    found = {progress: learning_rate(progress, spec) for progress in (-1.0, 0.0, 0.125, 0.25, 0.625, 1.0, 2.0)}
    assert list(found.values()) == pytest.approx([0.1, 0.1, 0.55, 1.0, 0.6, 0.2, 0.2])
    assert learning_rate(0.3, spec, 10**9) == pytest.approx(learning_rate(0.3, spec), abs=1e-8)
    assert first_beta(0.0, spec) == 0.9 and first_beta(0.25, spec) == pytest.approx(0.8)
    assert learning_rate(0.5, spec, 1) == 0.2  # one step is the last
    rise = dataclasses.replace(spec, warmup_fraction=1.0, decay_fraction=0.0)
    for steps in (1, 3, 7, 49):
        assert learning_rate((steps - 0.5) / steps, rise, steps) == pytest.approx(1.0)


@pytest.mark.parametrize("schedule", ["wsd", "cosine", "constant"])
@pytest.mark.parametrize("steps", [1, 7, math.inf])
def test_other_schedules_do_not_ask_for_the_steps_and_leave_momentum_alone(schedule, steps):
    spec = OptimSpec(schedule=schedule, betas=(0.7, 0.9))
    for index in range(21):
        assert learning_rate(index / 20, spec, steps) == learning_rate(index / 20, spec)
        assert first_beta(index / 20, spec, steps) == 0.7


@given(st.integers(1, 50), st.integers(0, 50), st.floats(0, 1), st.floats(0, 0.5))
def test_a_decay_counted_in_steps_is_that_of_their_share(steps, decay, final, warmup):
    share = decay / steps
    assume(warmup + share <= 1)
    counted = OptimSpec(decay_steps=decay, final_lr=final, warmup_fraction=warmup)
    shared = OptimSpec(decay_fraction=share, final_lr=final, warmup_fraction=warmup)
    for step in range(steps):
        here = (step + 0.5) / steps
        assert learning_rate(here, counted, steps) == pytest.approx(learning_rate(here, shared))


def test_a_decay_longer_than_the_run_begins_at_once_and_meets_the_warm_up():
    spec = OptimSpec(decay_steps=200, warmup_fraction=0.1)
    found = [learning_rate(progress, spec, 100) for progress in (0.0, 0.05, 0.2, 0.6, 1.0)]
    assert found == pytest.approx([0.0, 0.475, 0.4, 0.2, 0.0])
    assert learning_rate(0.3, spec) == 1.0  # no step taken yet: the run seems endless


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


@pytest.mark.parametrize("schedule", ["wsd", "cosine", "constant"])
def test_schedules_without_warmup_or_decay(schedule):
    spec = OptimSpec(schedule=schedule, warmup_fraction=0.0, decay_fraction=0.0)
    assert learning_rate(0.0, spec) == 1.0
    whole = OptimSpec(schedule=schedule, warmup_fraction=1.0, decay_fraction=0.0)
    assert learning_rate(0.5, whole) == 0.5


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

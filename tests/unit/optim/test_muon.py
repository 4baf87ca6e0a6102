"""The batched Muon and its forms."""

import math

import pytest
import torch
from torch import nn

from ouroboros.config import OptimSpec
from ouroboros.optim import (
    BatchedMuon,
    build_optimizers,
    muon_coefficients,
    muon_momentum,
    orthogonalize,
    set_muon_momentum,
)


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
    muon, adamw = build_optimizers(nn.Linear(4, 8), spec)
    assert muon.param_groups[0]["momentum"] == 0.99
    set_muon_momentum([muon, adamw], 0.5)
    assert muon.param_groups[0]["momentum"] == 0.5 and all("momentum" not in group for group in adamw.param_groups)


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

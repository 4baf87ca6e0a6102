"""GPTQ against a slow reference, and against rounding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ouroboros.pack.gptq import objective, solve
from ouroboros.pack.quantize import Clip, choose_steps, rounded


def correlated(columns: int, positions: int, seed: int) -> Tensor:
    """Inputs (positions, columns) whose spectrum falls geometrically, always in the same directions."""
    basis, _ = torch.linalg.qr(torch.randn(columns, columns, generator=torch.Generator().manual_seed(99)).double())
    x = torch.randn(positions, columns, generator=torch.Generator().manual_seed(seed)).double()
    return x * 0.9 ** torch.arange(columns) @ basis


def moment(x: Tensor) -> Tensor:
    return x.T @ x / len(x)


def dense(codes: Tensor, steps: Tensor) -> Tensor:
    return codes * steps.float().repeat_interleave(codes.shape[1] // steps.shape[1], dim=1)


def slow(w: Tensor, h: Tensor, steps: Tensor, bits: int, order: str, damping: float) -> Tensor:
    """Every row by itself, and after each column the inverse without it (Frantar et al. 2023, section 3.1)."""
    h = h + damping * h.diagonal().mean() * torch.eye(len(h))
    columns = h.diagonal().argsort(descending=True, stable=True) if order == "descending" else torch.arange(len(h))
    steps = steps.double().repeat_interleave(w.shape[1] // steps.shape[1], dim=1)
    found = torch.zeros_like(w)
    for row in range(len(w)):
        rest, left = w[row].double().clone(), columns.tolist()
        while left:
            inverse = torch.linalg.inv(h[left][:, left])
            column = left[0]
            code = (rest[column] / steps[row, column]).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
            found[row, column] = code
            error = (rest[column] - code * steps[row, column]) / inverse[0, 0]
            rest[left] -= error * inverse[0]
            left = left[1:]
    return found.to(torch.int8)


@pytest.mark.parametrize("order", ["descending", "none"])
@pytest.mark.parametrize(("group", "block"), [(0, 128), (4, 5), (0, 1)])
def test_equals_the_slow_reference(order, group, block):
    w, h = torch.randn(5, 12, generator=torch.Generator().manual_seed(0)), moment(correlated(12, 40, 1))
    steps = choose_steps(w, 3, group=group)
    found = solve(w, h, steps, 3, order=order, block=block)
    assert torch.equal(found.codes_RC, slow(w, h, steps, 3, order, 0.01))
    assert found.damping == 0.01 and not found.escalations and not found.fallback


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_beats_rounding_on_inputs_it_has_not_seen(bits):
    w, h = torch.randn(24, 64, generator=torch.Generator().manual_seed(2)), moment(correlated(64, 2000, 3))
    held_out = moment(correlated(64, 2000, 4))
    steps = choose_steps(w, bits)
    with_help = objective(w, dense(solve(w, h, steps, bits).codes_RC, steps), held_out)
    assert with_help < 0.6 * objective(w, dense(rounded(w, steps, bits), steps), held_out)


def test_white_inputs_leave_rounding():
    w = torch.randn(6, 20, generator=torch.Generator().manual_seed(5))
    steps = choose_steps(w, 4)
    assert torch.equal(solve(w, torch.eye(20), steps, 4).codes_RC, rounded(w, steps, 4))


def test_dead_columns_are_rounded_and_change_nothing_else():
    w, x = torch.randn(4, 10, generator=torch.Generator().manual_seed(6)), correlated(10, 50, 7)
    x[:, [2, 7]] = 0
    steps = choose_steps(w, 4, clip=Clip(by="quantile", value=1.0))
    alive = [0, 1, 3, 4, 5, 6, 8, 9]
    h = moment(x)
    # Damping is a share of the mean diagonal, which has two columns more.
    few = solve(w[:, alive], h[alive][:, alive], steps, 4, damping=0.01 * 8 / 10)
    found = solve(w, h, steps, 4)
    assert torch.equal(found.codes_RC[:, alive], few.codes_RC)
    assert torch.equal(found.codes_RC[:, [2, 7]], rounded(w, steps, 4)[:, [2, 7]])


def test_input_that_is_always_zero():
    w = torch.randn(3, 5)
    steps = choose_steps(w, 4)
    found = solve(w, torch.zeros(5, 5), steps, 4)
    assert torch.equal(found.codes_RC, rounded(w, steps, 4)) and not found.fallback


def test_damping_escalates_and_says_so():
    w, h = torch.randn(3, 6, generator=torch.Generator().manual_seed(8)), moment(correlated(6, 30, 9))
    h = h - (torch.linalg.eigvalsh(h)[0] + 0.03 * h.diagonal().mean()) * torch.eye(6)
    found = solve(w, h, choose_steps(w, 4), 4)
    assert found.escalations == ("damping raised to 0.1",) and found.damping == 0.1 and not found.fallback


def test_rank_deficient_moments_need_no_more_damping():
    w = torch.randn(3, 30, generator=torch.Generator().manual_seed(8))
    found = solve(w, moment(correlated(30, 4, 9)), choose_steps(w, 4), 4)
    assert not found.escalations and not found.fallback


@pytest.mark.parametrize(
    ("h", "why"),
    [(torch.eye(4) * torch.tensor([1.0, 1, 1, -50]), "no Cholesky"), (torch.full((4, 4), float("nan")), "not finite")],
)
def test_moments_that_are_none_fall_back_to_rounding_and_say_so(h, why):
    h = h.clone()
    h[0, 1] = h[1, 0] = 30.0 if h.isfinite().all() else float("nan")
    w = torch.randn(3, 4, generator=torch.Generator().manual_seed(8))
    steps = choose_steps(w, 4)
    found = solve(w, h, steps, 4)
    assert why in found.fallback
    assert torch.equal(found.codes_RC, rounded(w, steps, 4))


def test_objective_is_the_mean_squared_error_of_outputs():
    w, q, x = torch.randn(3, 5).double(), torch.randn(3, 5).double(), torch.randn(20, 5).double()
    direct = (x @ (w - q).T).square().sum(dim=1).mean()
    assert objective(w, q, moment(x)) == pytest.approx(float(direct))

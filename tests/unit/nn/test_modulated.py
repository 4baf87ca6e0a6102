"""Modulated maps against their formula, the Controller's start, and what each pooling sees."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ouroboros.config.parts.modulated import (
    TARGETS,
    ControllerSpec,
    ModulatedFeedForwardSpec,
    StaticCoresSpec,
    StaticDiagonalsSpec,
)
from ouroboros.nn.ffn import FeedForward
from ouroboros.nn.modulated import Controller, LowRank, ModulatedFeedForward, StaticCores
from ouroboros.nn.part import Init
from ouroboros.nn.visit import VisitContext
from ouroboros.schedule import Visit

B, T, D, R, S = 2, 7, 6, 3, 4
NOWHERE = VisitContext(rotary=(torch.empty(0), torch.empty(0)))


def controller(**options: Any) -> Controller:
    """A Controller with random heads."""
    made = Controller(ControllerSpec(rank=R, style=S, **options), D, 3, 1e-6)
    for head in made.heads.values():
        nn.init.normal_(head.weight)  # pyrefly: ignore
    return made


@pytest.mark.parametrize("frozen", [True, False])
def test_addition_is_its_formula(frozen: bool) -> None:
    linear = nn.Linear(5, 4)
    addition = LowRank(linear, R, 0.25, frozen=frozen)
    x, m = torch.randn(B, T, 5, requires_grad=True), torch.randn(B, T, R, requires_grad=True)
    found = addition(x, m)
    expected = torch.stack(
        [
            torch.stack([0.25 * addition.B @ torch.diag(m[b, t]) @ addition.A @ x[b, t] for t in range(T)])
            for b in range(B)
        ]
    )
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    assert m.grad is not None and x.grad is not None
    assert (addition.A.grad is None) == (addition.B.grad is None) == frozen
    assert addition.untrained == (frozenset({"A", "B"}) if frozen else frozenset())


@pytest.mark.parametrize("leading", [(), (B, T), (B, 1)])
def test_a_full_core_is_a_matrix_between_the_bases(leading: tuple[int, ...]) -> None:
    addition = LowRank(nn.Linear(5, 4), R, 0.25, frozen=True, full=True)
    x, core = torch.randn(B, T, 5), torch.randn(*leading, R, R)
    found, every = addition(x, core), core.expand(B, T, R, R)
    for b in range(B):
        for t in range(T):
            expected = 0.25 * addition.B @ every[b, t] @ addition.A @ x[b, t]
            torch.testing.assert_close(found[b, t], expected)


def test_a_full_core_with_the_diagonal_alone_is_the_diagonal() -> None:
    linear = nn.Linear(5, 4)
    full, diagonal = (LowRank(linear, R, 0.5, frozen=True, full=full) for full in (True, False))
    diagonal.load_state_dict(full.state_dict())
    x, m = torch.randn(B, T, 5), torch.randn(B, T, R)
    torch.testing.assert_close(full(x, torch.diag_embed(m)), diagonal(x, m))


@pytest.mark.parametrize("gate", ["swiglu", "geglu"])
def test_each_loop_has_its_bases_and_later_loops_the_last(gate: Any) -> None:
    spec = ModulatedFeedForwardSpec(kind=f"modulated_{gate}", intermediate_size=8, rank=R, rows=2)  # pyrefly: ignore
    made, x = ModulatedFeedForward(spec, D), torch.randn(B, T, D)

    def output(loop: int, size: float = 1.0) -> Tensor:
        handed = {name: torch.full((R,), size) for name in TARGETS}
        return made(x, NOWHERE._replace(visit=Visit(loop, 0, loop), handed=handed))

    first, last, later = (output(loop) for loop in (0, 1, 5))
    assert torch.equal(last, later) and not torch.allclose(first, last)
    plain = FeedForward(spec.plain, D)
    assert not plain.load_state_dict(made.state_dict(), strict=False).missing_keys
    assert plain.spec.kind == gate and torch.equal(output(1, 0.0), plain(x))
    first.sum().backward()
    assert all(low.A.grad is None for low in made.bases["up_proj"]), "frozen bases have no gradient"  # pyrefly: ignore


def test_bases_start_with_rows_of_unit_length_and_the_deviation_of_the_model() -> None:
    addition = LowRank(nn.Linear(400, 300), 50, 1.0, frozen=True)
    addition.reset_parameters(Init(std=0.03))
    assert float(addition.A.norm(dim=1).mean()) == pytest.approx(1, abs=0.05)
    assert float(addition.B.std()) == pytest.approx(0.03, rel=0.1)


def test_diagonals_are_zero_at_the_start() -> None:
    made = Controller(ControllerSpec(rank=R, style=S), D, 3, 1e-6)
    handed = made.hand(torch.randn(B, T, D), NOWHERE, 0)
    assert tuple(handed) == TARGETS and not any(diagonal.any() for diagonal in handed.values())
    static = StaticCores(StaticDiagonalsSpec(rank=R, rows=2), D, 3, 1e-6)
    assert not any(diagonal.any() for diagonal in static.hand(torch.randn(B, T, D), NOWHERE, 0).values())


def test_full_cores_are_zero_at_the_start_and_learn() -> None:
    made = Controller(ControllerSpec(rank=R, style=S, core="full"), D, 3, 1e-6)
    static = StaticCores(StaticCoresSpec(rank=R), D, 3, 1e-6)
    for part, shape in ((made, (B, T, R, R)), (static, (R, R))):
        core = part.hand(torch.randn(B, T, D), NOWHERE, 2)["o_proj"]
        assert core.shape == shape and not core.any()
        LowRank(nn.Linear(5, 4), R, 1.0, frozen=True, full=True)(torch.randn(B, T, 5), core).sum().backward()
    assert static.weight.grad is not None and static.weight.grad[2].any() and not static.weight.grad[:2].any()
    gradient = made.heads["o_proj"].weight.grad
    assert gradient is not None and gradient.any()


def test_later_loops_use_the_last_row() -> None:
    made, static = controller(rows=2), StaticCores(StaticDiagonalsSpec(rank=R, rows=2), D, 3, 1e-6)
    nn.init.normal_(static.weight)
    x = torch.randn(B, T, D)
    for part in (made, static):
        first, last, later = (part.hand(x, NOWHERE, loop)["q_proj"] for loop in (0, 1, 5))
        assert torch.equal(last, later) and not torch.equal(first, last)


def seen(pooling: Any, x: Tensor, visit: VisitContext = NOWHERE, **options: Any) -> Tensor:
    """The q diagonal of the first loop."""
    torch.manual_seed(0)
    return controller(pooling=pooling, **options).hand(x, visit, 0)["q_proj"].detach()


@pytest.mark.parametrize(
    ("pooling", "changed"),
    [
        ("token", [False] * 4 + [True] + [False] * 2),
        ("prefix", [False] * 4 + [True] * 3),
        ("prompt", [False] * 7),
        ("all", [True]),
    ],
)
def test_what_a_pooling_sees_of_the_fifth_token(pooling: str, changed: list[bool]) -> None:
    x = torch.randn(1, T, D)
    other = x.clone()
    other[:, 4] += 1.0
    difference = (seen(pooling, other, prompt=3) - seen(pooling, x, prompt=3)).abs().amax((0, 2))
    assert [bool(gap > 1e-6) for gap in difference] == changed


def test_the_mean_of_the_prompt_is_held() -> None:
    x = torch.randn(1, T, D)
    prompt, prefix = seen("prompt", x, prompt=3), seen("prefix", x)
    torch.testing.assert_close(prompt[:, :3], prefix[:, :3])
    torch.testing.assert_close(prompt[:, 3:], prefix[:, 2:3].expand(-1, T - 3, -1))


@pytest.mark.parametrize("pooling", ["prefix", "prompt", "all"])
def test_padding_does_not_count(pooling: str) -> None:
    x = torch.randn(1, T, D)
    padding, positions = torch.ones(1, T), torch.arange(T)[None] - 2
    padding[:, :2] = 0
    padded = seen(pooling, x, NOWHERE._replace(padding=padding, positions=positions.clamp(min=0)), prompt=3)
    alone = seen(pooling, x[:, 2:], prompt=3)
    torch.testing.assert_close(padded[:, -alone.shape[1] :], alone)


def test_the_norm_makes_the_size_of_the_state_indifferent() -> None:
    x = torch.randn(B, T, D)
    torch.testing.assert_close(seen("token", x), seen("token", 10 * x), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(seen("token", x, norm=False), seen("token", 10 * x, norm=False), atol=1e-2)

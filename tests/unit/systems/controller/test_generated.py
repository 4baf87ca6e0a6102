"""Generated maps against their formula, and from which start they learn."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ouroboros.api import build
from ouroboros.config import Recipe
from ouroboros.config.parts.modulated import TARGETS
from ouroboros.eval.liveness import parameter_lives
from ouroboros.nn.visit import VisitContext
from ouroboros.pack.statistics import gather, maps_of
from ouroboros.recipes import recipe
from ouroboros.systems.controller.generated import Generated, GeneratedAttention, MatrixController
from ouroboros.systems.controller.parts import GeneratedAttentionSpec, MatrixControllerSpec

B, T, D, N = 2, 5, 8, 3
NOWHERE = VisitContext(rotary=(torch.ones(1, 1, T, 4), torch.zeros(1, 1, T, 4)))
SIZES: Any = {"bases": N, "state": 5, "steps": 4, "hidden": 6, "style": 3}


def test_addition_is_its_formula() -> None:
    spec = GeneratedAttentionSpec(rank=2, alpha=3.0, bases=N, divisor=3)
    addition = Generated(nn.Linear(D, 7), spec)
    assert addition.A1.shape == (N, 2, 2) and addition.B1.shape == (N, 7, 2)
    x, c = torch.randn(B, T, D), torch.randn(B, T, 2 * N)
    found = addition(x, c)
    for b in range(B):
        for t in range(T):
            A = sum(c[b, t, n] * addition.A1[n] @ addition.A2[n] for n in range(N))
            whole = sum(c[b, t, N + n] * addition.B1[n] @ addition.B2[n] for n in range(N)) @ A
            torch.testing.assert_close(found[b, t], 1.5 * whole @ x[b, t], rtol=1e-4, atol=1e-5)


def test_matrices_one_by_one_add_the_same() -> None:
    addition = Generated(nn.Linear(D, 7), GeneratedAttentionSpec(rank=2, bases=N, divisor=3))
    x, c = torch.randn(B, T, D), torch.randn(B, 1, 2 * N)
    together, addition.folds = addition(x, c), False
    torch.testing.assert_close(addition(x, c), together, rtol=1e-4, atol=1e-5)


def test_packing_knows_what_each_matrix_reads() -> None:
    spec = recipe("controller-first", "tiny").model
    model = build(Recipe(name="first", model=spec))
    found = gather(model, list(torch.randint(spec.vocab_size, (2, 9))))
    maps = [m for name, p in model.named_parameters() if ".bases." in name for m in maps_of(name, p)]
    assert len(maps) > 40 and all(found.moment(name) is not None for name in maps)


def test_bases_start_within_the_root_of_their_last_size() -> None:
    addition = Generated(nn.Linear(400, 300), GeneratedAttentionSpec(divisor=10))
    for parameter in addition.parameters():
        bound = 1 / math.sqrt(parameter.shape[-1])
        assert 0.9 * bound < float(parameter.detach().abs().max()) < 1.001 * bound


def test_a_visit_without_coefficients_is_plain() -> None:
    attention = GeneratedAttention(GeneratedAttentionSpec(num_heads=2, bases=N), D, 1e-6)
    x = torch.randn(B, T, D)
    handed = dict.fromkeys(TARGETS, torch.zeros(B, T, 2 * N))
    plain = attention(x, NOWHERE)
    assert torch.equal(plain, attention(x, NOWHERE._replace(handed=handed)))
    changed = dict.fromkeys(TARGETS, torch.ones(B, T, 2 * N))
    assert not torch.allclose(plain, attention(x, NOWHERE._replace(handed=changed)), atol=1e-3)


def controller(**options: Any) -> MatrixController:
    """A Controller with random heads."""
    torch.manual_seed(0)
    made = MatrixController(MatrixControllerSpec(**SIZES, **options), D, 3, 1e-6)
    for head in made.heads_B.values():
        nn.init.normal_(head.weight)  # pyrefly: ignore
    return made


@pytest.mark.parametrize(("start", "zero"), [("b_zero", [False, True]), ("saddle", [True, True])])
def test_start(start: Any, zero: list[bool]) -> None:
    made = MatrixController(MatrixControllerSpec(**SIZES, start=start), D, 3, 1e-6)
    handed = made.hand(torch.randn(B, T, D), NOWHERE, 0)
    assert tuple(handed) == TARGETS
    for coefficients in handed.values():
        assert coefficients.shape == (B, T, 2 * N)
        assert [not half.any() for half in coefficients.chunk(2, dim=-1)] == zero


def test_later_loops_use_the_last_row() -> None:
    made, x = controller(rows=2), torch.randn(B, T, D)
    first, last, later = (made.hand(x, NOWHERE, loop)["q_proj"] for loop in (0, 1, 5))
    assert torch.equal(last, later) and not torch.equal(first, last)


@pytest.mark.parametrize("pooling", ["token", "all"])
def test_it_sees_the_probability_of_having_halted(pooling: str) -> None:
    made, x = controller(pooling=pooling, confidence=2), torch.randn(1, T, D)

    def seen(halted: Tensor) -> Tensor:
        return made.hand(x, NOWHERE._replace(looped={"halt.total": halted}), 0)["q_proj"].detach()

    none = torch.zeros(1, T, 1)
    assert torch.equal(made.hand(x, NOWHERE, 0)["q_proj"], seen(none)), "before the first loop"
    one = none.clone()
    one[:, 2] = 1
    changed = (seen(one) - seen(none)).abs().amax((0, 2)) > 1e-6
    assert changed.tolist() == ([True] if pooling == "all" else [False, False, True, False, False])


def lives(name: str) -> dict[str, bool]:
    """Whether each parameter of a recipe in its tiny size is dead."""
    chosen: Recipe = recipe(name, "tiny")
    return {life.name: life.dead for life in parameter_lives(chosen)}


def test_one_zero_factor_learns_and_two_do_not() -> None:
    assert not any(lives("controller-first").values())
    dead = {name for name, is_dead in lives("controller-first-published").items() if is_dead}
    steering = {name for name in lives("controller-first-published") if ".loops." in name or ".bases." in name}
    assert dead == steering

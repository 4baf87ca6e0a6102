"""Halting against a loop over tokens that is written down as the paper says it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ouroboros.config.parts.halt import HaltSpec
from ouroboros.nn.halt import Halt, weigh

D = 5


def test_weights_of_a_token() -> None:
    """0.3 and 0.4 count, 0.5 gets the rest of 0.3, and what comes later nothing."""
    total, weights = torch.zeros(1), []
    for p in (0.3, 0.4, 0.5, 0.9):
        weight, total = weigh(torch.tensor([p]), total)
        weights.append(float(weight))
    assert weights == pytest.approx([0.3, 0.4, 0.3, 0.0]) and float(total) == 1


@pytest.mark.parametrize("bias", [-4.0, -2.0, 3.0])
def test_a_constant_probability_gives_a_mean_with_weights_that_add_up_to_one(bias: float) -> None:
    halt, states = Halt(HaltSpec(hidden=3, bias=bias), D, 12, 1e-6), torch.randn(12, 2, 4, D)
    carried: dict[str, torch.Tensor] = {}
    for loop, state in enumerate(states):
        assert halt.leave(states[0], state, carried, loop) is state
    p, weights = 1 / (1 + 2.718281828**-bias), []
    while sum(weights) + p < 1 and len(weights) < 12:
        weights.append(p)
    index = min(len(weights), 11)
    expected = torch.einsum("l,lbtd->btd", torch.tensor(weights), states[: len(weights)])
    expected = expected + (1 - sum(weights)) * states[index]
    torch.testing.assert_close(halt.finish(states[-1], carried), expected, rtol=1e-4, atol=1e-5)


def test_gradients_reach_the_probability() -> None:
    halt = Halt(HaltSpec(hidden=3), D, 2, 1e-6)
    carried: dict[str, torch.Tensor] = {}
    for loop in range(2):
        z = halt.leave(torch.randn(1, 3, D), torch.randn(1, 3, D), carried, loop)
    halt.finish(z, carried).sum().backward()
    assert halt.last.weight.grad is not None and halt.last.weight.grad.any()


def carried_after(
    spec: HaltSpec, probabilities: list[Tensor], *, training: bool = True
) -> tuple[Halt, dict[str, Tensor]]:
    """What is carried behind loops in which states (B, T, 1) have these probabilities."""
    halt = Halt(spec, D, len(probabilities), 1e-6).train(training)
    left = iter(probabilities)
    halt.probability = lambda z: next(left)  # type: ignore[method-assign]
    carried: dict[str, Tensor] = {}
    for loop in range(len(probabilities)):
        halt.leave(torch.zeros(1, 1, D), torch.zeros(1, 1, D), carried, loop)
    return halt, carried


def given(*tokens: tuple[float, ...]) -> list[Tensor]:
    """Probabilities of some tokens, a tuple for each, by loop; they can be differentiated."""
    table = torch.tensor(tokens, requires_grad=True)
    return [p[None, :, None] for p in table.unbind(1)]


TOKENS = ((0.9, 0.5, 0.5, 0.5), (0.3, 0.4, 0.5, 0.9), (0.1, 0.1, 0.1, 0.1), (0.6, 0.2, 0.2, 0.7))
STEPS, LAST_WEIGHTS = [2, 3, 4, 3], [0.1, 0.3, 0.7, 0.2]


def test_a_token_is_told_of_and_goes_on_until_it_halts() -> None:
    for loops in (1, 2, 3, 4):
        halt, carried = carried_after(HaltSpec(), given(*TOKENS)[:loops], training=False)
        # The third token never halts: the last loop ends it.
        assert halt.goes_on(carried)[0, :3].tolist() == [loops < 2, loops < 3, True]
        told = halt.tell(carried)
        assert told["halted"][0, :3].tolist() == [loops >= 2, loops >= 3, False]
        assert told["ran"][0, :3].tolist() == [steps >= loops for steps in STEPS[:3]]
        assert told["probability"][0, 1] == torch.tensor(TOKENS[1][loops - 1])
    assert Halt(HaltSpec(), D, 2, 1e-6).stops and not Halt(HaltSpec(freeze=False), D, 2, 1e-6).stops


def test_the_cost_of_steps_is_steps_and_remainder_and_falls_with_the_probability() -> None:
    """Graves 2016, equation 5. What is published, the sum of probabilities, has a gradient of the other sign."""
    probabilities = given(*TOKENS)
    halt, carried = carried_after(HaltSpec(cost="steps", cost_weight=0.5), probabilities)
    loss = halt.auxiliary_loss(carried)
    assert loss is not None and loss.shape == (1, 4)
    expected = [0.5 * (n + w) for n, w in zip(STEPS, LAST_WEIGHTS, strict=True)]
    torch.testing.assert_close(loss[0], torch.tensor(expected))
    gradients = torch.stack(torch.autograd.grad(loss.sum(), probabilities))[..., 0, :, 0].T
    for gradient, steps in zip(gradients.tolist(), STEPS, strict=True):
        assert gradient == [-0.5] * (steps - 1) + [0.0] * (5 - steps), "halting earlier costs less"


def test_halting_later_costs_more() -> None:
    found = []
    for p in (0.9, 0.5, 0.3, 0.12, 0.01):
        halt, carried = carried_after(HaltSpec(cost="steps"), [torch.full((1, 1, 1), p)] * 12)
        found.append(float(halt.auxiliary_loss(carried)))
    assert found == sorted(found) and found[0] < 0.5 * found[-1]


def test_the_geometric_cost_is_the_divergence_from_the_cut_distribution() -> None:
    """Banino et al. 2021: KL(w || q); nothing where the weights are the prior's, with a finite gradient everywhere."""
    a, loops = 0.4, 4
    prior = [a * (1 - a) ** loop / (1 - (1 - a) ** loops) for loop in range(loops)]
    assert sum(prior) == pytest.approx(1)
    probabilities = given(tuple(prior), *TOKENS)
    halt, carried = carried_after(HaltSpec(cost="geometric", cost_weight=2.0, prior=a), probabilities)
    loss = halt.auxiliary_loss(carried)
    assert loss is not None
    weights = [[0.9, 0.1], [0.3, 0.4, 0.3], [0.1, 0.1, 0.1, 0.7], [0.6, 0.2, 0.2]]
    expected = [2 * sum(w * math.log(w / q) for w, q in zip(row, prior, strict=False)) for row in weights]
    torch.testing.assert_close(loss[0], torch.tensor([0.0, *expected]), rtol=1e-4, atol=1e-5)
    gradients = torch.stack(torch.autograd.grad(loss.sum(), probabilities))
    assert gradients.isfinite().all() and gradients[:, 0, 1:].any()


def test_no_cost_without_one_or_outside_training() -> None:
    halt, carried = carried_after(HaltSpec(), given(*TOKENS))
    assert halt.auxiliary_loss(carried) is None and "halt.weights" not in carried
    _, carried = carried_after(HaltSpec(cost="steps"), given(*TOKENS), training=False)
    assert "halt.weights" not in carried, "what is carried has one shape in all loops"


def test_value_channels_halt_by_themselves_and_the_token_with_the_last() -> None:
    """(B, T, V, 1) probabilities; the cost is the mean over channels."""
    table = [torch.tensor([[[[a], [b]]]]) for a, b in zip(*TOKENS[:2], strict=True)]
    halt, carried = carried_after(HaltSpec(cost="steps", cost_weight=1.0), table)
    loss = halt.auxiliary_loss(carried)
    torch.testing.assert_close(loss, torch.tensor([[(2.1 + 3.3) / 2]]))
    halt, carried = carried_after(HaltSpec(), table[:2])
    assert halt.goes_on(carried).tolist() == [[True]]

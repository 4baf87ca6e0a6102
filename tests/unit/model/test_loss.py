"""A model that is given targets returns the loss of its logits, and no logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ouroboros.config.parts.halt import HaltSpec
from ouroboros.config.parts.head import LinearHeadSpec
from ouroboros.model.modeling import OuroborosForCausalLM
from ouroboros.nn.halt import Halt


class Squared(nn.Module):
    """A head that needs all logits at once."""

    def forward(self, logits: Tensor) -> Tensor:
        return logits - 0.1 * logits.square().mean(-1, keepdim=True)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(
    ("changes", "head"),
    [
        ({}, None),
        ({"head": LinearHeadSpec(logit_softcap=2.0, logit_scale=0.5), "tie_embeddings": False}, None),
        ({}, Squared()),
    ],
    ids=["plain", "scaled and capped", "another head"],
)
def test_the_loss_is_that_of_the_logits_and_has_their_gradients(
    build: Callable[..., OuroborosForCausalLM], ids: Tensor, changes: dict[str, Any], head: Any, smoothing: float
) -> None:
    model, targets = build(**changes).train(), torch.randint(0, 30, (2, 9))
    model.head = head or model.head
    targets[0, 3] = -100
    found = model(input_ids=ids, use_cache=False, targets=targets, label_smoothing=smoothing)
    logits = model(input_ids=ids, use_cache=False).logits.flatten(0, 1)
    expected = F.cross_entropy(logits, targets.flatten(), label_smoothing=smoothing)
    assert found.logits is None and not found.unsmoothed_loss.requires_grad
    torch.testing.assert_close(found.loss, expected)
    torch.testing.assert_close(found.unsmoothed_loss, F.cross_entropy(logits, targets.flatten()))
    weights = list(model.parameters())
    torch.testing.assert_close(torch.autograd.grad(found.loss, weights), torch.autograd.grad(expected, weights))


COSTLY = HaltSpec(bias=-1.0, hidden=8, cost="steps", cost_weight=0.5)


@pytest.fixture
def costs(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What the part says of each position, call by call."""
    found: list[Tensor] = []
    original = Halt.auxiliary_loss

    def noted(self: Halt, carried: dict[str, Tensor]) -> Tensor | None:
        loss = original(self, carried)
        assert loss is not None
        found.append(loss.detach())
        return loss

    monkeypatch.setattr(Halt, "auxiliary_loss", noted)
    return found


def test_what_parts_add_is_minimised_in_training_and_reported_apart(
    build: Callable[..., OuroborosForCausalLM], ids: Tensor, costs: list[Tensor]
) -> None:
    model = build(loop=(COSTLY,), layout="1 (1)x2 1 (1)x3").train()
    output = model(ids, use_cache=False, labels=ids)
    assert len(costs) == 2, "of two loops"
    torch.testing.assert_close(output.auxiliary_loss, costs[0].mean() + costs[1].mean())
    given = model(ids, use_cache=False, targets=ids)
    torch.testing.assert_close(given.loss - given.unsmoothed_loss, output.auxiliary_loss)
    output.auxiliary_loss.backward()
    gradient = model.model.decoder.loops[0]["halt"].last.bias.grad
    assert gradient is not None and float(gradient) < 0, "a higher probability costs less"
    text = model.eval()(ids, use_cache=False, labels=ids)
    assert text.auxiliary_loss is None and len(costs) == 4
    torch.testing.assert_close(output.loss - output.auxiliary_loss, text.loss)
    assert build().train()(ids, use_cache=False).auxiliary_loss is None


def test_padding_and_registers_add_nothing(
    build: Callable[..., OuroborosForCausalLM], ids: Tensor, costs: list[Tensor]
) -> None:
    model, mask = build(loop=(COSTLY,), registers=2).train(), torch.ones_like(ids)
    mask[0, :4] = 0
    found = model(ids, use_cache=False, attention_mask=mask).auxiliary_loss
    torch.testing.assert_close(found, costs[-1][mask.bool()].mean())
    found = model(ids, use_cache=False).auxiliary_loss
    assert costs[-1].shape == (2, 11)
    torch.testing.assert_close(found, costs[-1][:, 2:].mean())


def test_packed_documents_add_what_they_do_alone(build: Callable[..., OuroborosForCausalLM], ids: Tensor) -> None:
    model = build(loop=(COSTLY,)).train()
    sizes = [1, 5, 3]
    positions = torch.cat([torch.arange(size) for size in sizes])[None]
    found = model(ids[:1], position_ids=positions, use_cache=False).auxiliary_loss
    alone = [model(part, use_cache=False).auxiliary_loss for part in ids[:1].split(sizes, dim=1)]
    expected = sum(size * loss for size, loss in zip(sizes, alone, strict=True)) / sum(sizes)
    torch.testing.assert_close(found, expected)
    assert not torch.isclose(alone[0], alone[1])

"""SLOT against a slow reference; what the shared vector leaks."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from ouroboros.config import AttentionSpec, FeedForwardSpec, ModelSpec
from ouroboros.errors import OuroborosError
from ouroboros.eval.subject import build_perturbed
from ouroboros.eval.windows import Procedure, Windows, evaluating, target_nats
from ouroboros.model.modeling import OuroborosForCausalLM
from ouroboros.systems.crawler.slot import Slot


@pytest.fixture(scope="module")
def model() -> OuroborosForCausalLM:
    torch.manual_seed(0)
    spec = ModelSpec(layout="(1)x2", vocab_size=16, hidden_size=12)
    return build_perturbed(
        spec.replace(mixer=AttentionSpec(num_heads=2), ffn=FeedForwardSpec(intermediate_size=16))
    ).eval()


def nats_of(model: OuroborosForCausalLM, ids: Tensor, procedure: Procedure) -> Tensor:
    with evaluating(model):
        return torch.cat([target_nats(found, [ids]) for found in procedure(model, [ids])])


def one_window(model: OuroborosForCausalLM, ids: Tensor, context: int, steps: int, lr: float) -> list[float]:
    """A vector fitted to the first ``context`` targets of ``ids``, and the losses of the others with it."""
    h = model.model(ids[None, :-1]).last_hidden_state[0].detach()
    delta = torch.zeros(h.shape[-1], requires_grad=True)
    optimizer = torch.optim.AdamW([delta], lr=lr, weight_decay=1e-8, eps=1e-5)
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model.logits(h[:context] + delta), ids[1 : context + 1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    losses = nn.functional.cross_entropy(model.logits(h + delta), ids[1:], reduction="none")
    return losses[context:].tolist()


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_each_window_is_fitted_alone(model: OuroborosForCausalLM, batch_size: int) -> None:
    ids = torch.randint(0, 16, (40,), generator=torch.Generator().manual_seed(0))
    found = nats_of(model, ids, Slot(16, 4, steps=3, lr=0.1, batch_size=batch_size)).tolist()
    plain = nats_of(model, ids, Windows(16, 4)).tolist()
    assert len(found) == 39 and found[:16] == pytest.approx(plain[:16], abs=1e-5)
    for start in range(4, 24, 4):
        context = 12
        expected = one_window(model, ids[start : start + 17], context, 3, 0.1)
        here = slice(start + context, start + context + len(expected))
        assert found[here] == pytest.approx(expected, abs=1e-4)
        assert max(abs(a - b) for a, b in zip(found[here], plain[here], strict=True)) > 1e-3


def test_only_the_shared_vector_beats_the_entropy_of_noise(model: OuroborosForCausalLM) -> None:
    """Of ids drawn uniformly nobody can know more than log V nats each."""
    uniform = OuroborosForCausalLM(model.config).eval()  # weights at their start: all tokens are about as likely
    ids = torch.randint(0, 16, (1500,), generator=torch.Generator().manual_seed(3))
    options = {"steps": 24, "lr": 1.0}
    off = float(nats_of(uniform, ids, Windows(16, 1)).mean())
    apart = float(nats_of(uniform, ids, Slot(16, 1, **options)).mean())
    shared = float(nats_of(uniform, ids, Slot(16, 1, shared=True, **options)).mean())
    assert shared < 0.995 * math.log(16) < off + 0.01 and apart > off


def test_other_models_are_refused() -> None:
    with pytest.raises(OuroborosError, match="SimpleNamespace is no model of this library"):
        list(Slot(8, 4)(SimpleNamespace(), []))

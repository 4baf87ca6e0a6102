"""How many loops tokens take, of models whose probabilities are known."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from ouroboros.config import AttentionSpec, FeedForwardSpec, LoopPart, ModelSpec
from ouroboros.config.parts.halt import HaltSpec
from ouroboros.errors import OuroborosError
from ouroboros.eval.depth import depths
from ouroboros.eval.subject import build_perturbed
from ouroboros.model.modeling import OuroborosForCausalLM
from ouroboros.nn.halt import Halt

IDS = torch.tensor([3, 1, 4, 1, 5])


def model(*loop: LoopPart, layout: str = "1 (1)x4 1", registers: int = 0) -> OuroborosForCausalLM:
    spec = ModelSpec(layout=layout, vocab_size=9, hidden_size=8, max_position_embeddings=16, loop=loop)
    torch.manual_seed(0)
    return build_perturbed(
        spec.replace(mixer=AttentionSpec(num_heads=2), ffn=FeedForwardSpec(intermediate_size=8), registers=registers)
    )


def halts_of(found: OuroborosForCausalLM) -> list[Halt]:
    return [module for module in found.modules() if isinstance(module, Halt)]


def constant(halt: Halt, bias: float) -> None:
    """The same probability for every state."""
    nn.init.zeros_(halt.last.weight)
    nn.init.constant_(halt.last.bias, bias)


@pytest.mark.parametrize("freeze", [True, False])
def test_a_constant_probability(freeze: bool) -> None:
    """0.4 halts in the third of four loops, and 0.2 in none."""
    both = model(HaltSpec(hidden=4, freeze=freeze), layout="1 (1)x4 1 (2)x3", registers=2)
    for halt, p in zip(halts_of(both), (0.4, 0.2), strict=True):
        constant(halt, float(torch.logit(torch.tensor(p))))
    first, second = depths(both, IDS)
    assert (first.segment, second.segment) == (1, 3)
    assert first.steps == (3,) * 5 and first.halted == (0, 0, 1, 1) and first.mean == 3
    assert first.probability[:3] == pytest.approx([0.4] * 3) and first.probability[3] is None
    assert second.steps == (3,) * 5 and second.halted == (0, 0, 0)
    assert second.probability == pytest.approx([0.2] * 3)
    assert json.loads(json.dumps(first.to_dict()))["halted"] == [0, 0, 1, 1]


def test_tokens_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    table = torch.tensor([[0.9, 0.2], [0.3, 0.8], [1.0, 0.0], [0.1, 0.2], [0.6, 0.1]])
    calls = iter((0, 1, 1, 1))
    monkeypatch.setattr(Halt, "probability", lambda self, z: table[None, :, next(calls)].unsqueeze(-1))
    (found,) = depths(model(HaltSpec(hidden=4)), IDS[None])
    assert found.steps == (2, 2, 1, 4, 4)
    assert found.halted == pytest.approx((0.2, 0.6, 0.6, 0.6))
    assert found.probability == pytest.approx((2.9 / 5, (0.2 + 0.8 + 0.2 + 0.1) / 4, 0.15, 0.15))


def test_what_is_refused() -> None:
    with pytest.raises(OuroborosError, match=r"no part of the model halts tokens.*--model\.loop\.halt"):
        depths(model(), IDS)
    with pytest.raises(OuroborosError, match="one text at a time, got 2"):
        depths(model(HaltSpec()), IDS.repeat(2, 1))

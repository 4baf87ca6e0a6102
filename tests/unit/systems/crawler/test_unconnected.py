"""The published table without a use: it changes nothing and is never trained."""

from __future__ import annotations

import torch

from ouroboros.config import AttentionSpec, FeedForwardSpec, ModelSpec
from ouroboros.model.configuration import OuroborosConfig
from ouroboros.model.modeling import OuroborosForCausalLM
from ouroboros.systems.crawler.parts import UnconnectedValuesSpec

SPEC = ModelSpec(layout="1", vocab_size=11, hidden_size=8).replace(
    mixer=AttentionSpec(num_heads=2), ffn=FeedForwardSpec(intermediate_size=8)
)


def test_nothing_depends_on_it() -> None:
    torch.manual_seed(0)
    with_it = SPEC.replace(stem=(UnconnectedValuesSpec(width=3, factors=4),))
    model, plain = (OuroborosForCausalLM(OuroborosConfig.from_spec(spec)) for spec in (with_it, SPEC))
    plain.load_state_dict({n: t for n, t in model.state_dict().items() if "unconnected" not in n})
    ids = torch.arange(11)[None]
    logits = model(ids).logits
    assert torch.equal(logits, plain(ids).logits)
    logits.sum().backward()
    own = {name: p for name, p in model.named_parameters() if "unconnected" in name}
    assert sum(p.numel() for p in own.values()) == with_it.stem[0].parameters(with_it) == 11 * 3 + 3 * 8 + 1 + 4
    assert all(parameter.grad is None for parameter in own.values())


def test_starts_as_published() -> None:
    part = OuroborosForCausalLM(OuroborosConfig.from_spec(SPEC.replace(stem=(UnconnectedValuesSpec(),))))
    values = part.model.stem["unconnected_values"]
    torch.nn.init.zeros_(values.factors)
    values.reset_parameters()
    assert values.factors.tolist() == [1.0, 1.0] and round(values.scale.item(), 6) == 0.1

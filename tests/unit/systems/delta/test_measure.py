"""Recording what residuals do."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ouroboros.config import AttentionSpec, FeedForwardSpec, ModelSpec, ResidualPart
from ouroboros.config.parts.delta import DeltaSpec
from ouroboros.config.parts.residual import AdditiveResidualSpec
from ouroboros.errors import OuroborosError
from ouroboros.model.configuration import OuroborosConfig
from ouroboros.model.modeling import OuroborosForCausalLM
from ouroboros.schedule import Visit
from ouroboros.systems.delta.measure import ResidualRecord, record, watching

IDS = torch.randint(61, (3, 8), generator=torch.Generator().manual_seed(3))


def build(layout: str = "1 (1)x2 1", **changes: Any) -> OuroborosForCausalLM:
    """A tiny model whose gates are all over (0, 2)."""
    torch.manual_seed(0)
    spec = ModelSpec().replace(
        layout=layout,
        vocab_size=61,
        hidden_size=32,
        mixer=AttentionSpec(num_heads=2, qk_norm="after_rope"),
        ffn=FeedForwardSpec(intermediate_size=85),
        **{"residual": DeltaSpec(), **changes},
    )
    model = OuroborosForCausalLM(OuroborosConfig.from_spec(spec))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".gate." in name:
                parameter.normal_(std=0.5)
    return model


def one(**changes: Any) -> ResidualRecord:
    """A record of 2 tokens, with unit directions."""
    given: dict[str, Any] = {
        "visit": Visit(3, 1, 2),
        "sublayer": "mlp",
        "spec": DeltaSpec(),
        "beta": torch.tensor([[0.5, 2.0]]),
        "direction": torch.eye(4)[None, :2],
        "projection": torch.tensor([[[3.0], [1.0]]]),
        "value": torch.tensor([[[2.0], [3.95]]]),
    }
    return ResidualRecord(**{**given, **changes})


def hooks(model: OuroborosForCausalLM) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("values", [1, 4])
def test_one_record_per_use_in_order(values: int) -> None:
    model = build(residual=DeltaSpec(values=values))
    records = record(model, IDS)
    assert [(r.visit, r.sublayer) for r in records] == [
        (Visit(slot, block, loop), sublayer)
        for slot, (block, loop) in enumerate([(0, 0), (1, 0), (1, 1), (2, 0)])
        for sublayer in ("mixer", "mlp")
    ]
    for r in records:
        assert r.beta.shape == r.eigenvalue.shape == r.erased.shape == r.written.shape == (3, 8)
        assert r.direction.shape == (3, 8, 32)
        assert r.projection.shape == r.value.shape == (3, 8, values)
    gates = torch.stack([r.beta for r in records])
    assert gates.min() < 0.3 and gates.max() > 1.7


def test_the_model_is_left_as_it_was() -> None:
    model = build(registers=2).train()
    model.model.decoder.layers[0].eval()
    modes = [module.training for module in model.modules()]
    with torch.no_grad():
        before = model.eval()(IDS).logits
        for module, training in zip(model.modules(), modes):
            module.training = training
    record(model, IDS)
    assert hooks(model) == 0
    assert [module.training for module in model.modules()] == modes
    with torch.no_grad():
        assert torch.equal(model.eval()(IDS).logits, before)


def test_a_view_with_other_loops_is_recorded() -> None:
    model = build()
    records = record(model.with_loops(3), IDS)
    assert [r.visit.loop for r in records[2:8]] == [0, 0, 1, 1, 2, 2]
    slots: list[int] = []
    with torch.no_grad(), watching(model, lambda visit, *use: slots.append(visit.slot)):
        model.eval()(IDS, loops=3, use_cache=False)
    assert slots == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_registers_are_not_in_the_record() -> None:
    model = build(registers=2)
    records = record(model, IDS)
    assert len(records) == 8 and all(r.beta.shape == (3, 8) for r in records)


def test_a_model_without_gates_is_refused() -> None:
    with pytest.raises(OuroborosError, match="no delta residual"):
        record(build(residual=AdditiveResidualSpec()), IDS)


@pytest.mark.parametrize("residual", [DeltaSpec(), AdditiveResidualSpec()], ids=lambda spec: spec.kind)
def test_any_residual_can_be_watched(residual: ResidualPart) -> None:
    model, outputs = build(residual=residual), []
    with torch.no_grad(), watching(model, lambda visit, sublayer, module, given, output: outputs.append(output)):
        last = model.eval().model(IDS, use_cache=False).last_hidden_state
    assert [output.shape for output in outputs] == [(3, 8, 32)] * 8
    torch.testing.assert_close(model.model.norm(outputs[-1]), last)


def test_amounts_of_one_record() -> None:
    r = one()
    torch.testing.assert_close(r.eigenvalue, torch.tensor([[0.5, -1.0]]))
    torch.testing.assert_close(r.erased, torch.tensor([[1.5, 2.0]]))
    torch.testing.assert_close(r.written, torch.tensor([[1.0, 7.9]]))
    control = one(spec=DeltaSpec(erase=False))
    assert (control.eigenvalue == 1).all() and (control.erased == 0).all()
    torch.testing.assert_close(one(direction=0.5 * torch.eye(4)[None, :2]).eigenvalue, torch.tensor([[0.875, 0.5]]))

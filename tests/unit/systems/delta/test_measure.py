"""Recording what residuals do, and forcing their gates."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ouroboros.config import AttentionSpec, FeedForwardSpec, ModelSpec, ResidualPart
from ouroboros.config.parts.delta import DeltaSpec
from ouroboros.config.parts.residual import AdditiveResidualSpec
from ouroboros.errors import OuroborosError
from ouroboros.model.configuration import OuroborosConfig
from ouroboros.model.modeling import OuroborosForCausalLM
from ouroboros.schedule import Visit
from ouroboros.systems.delta.measure import (
    ResidualRecord,
    ablate,
    forced,
    quantiles,
    record,
    shares,
    watching,
)

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
        "h_norm": torch.tensor([[1.0, 5e-5]]),
        "direction": torch.eye(4)[None, :2],
        "projection": torch.tensor([[[3.0], [1.0]]]),
        "projection_after": torch.tensor([[[2.5], [3.0]]]),
        "value": torch.tensor([[[2.0], [3.95]]]),
        "state_norm_after": torch.ones(1, 2),
        "gram": torch.ones(1, 2, 1, 1),
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
        assert r.beta.shape == r.h_norm.shape == r.state_norm_after.shape == r.eigenvalue.shape == (3, 8)
        assert r.direction.shape == (3, 8, 32)
        assert r.projection.shape == r.projection_after.shape == r.value.shape == (3, 8, values)
        assert r.gram.shape == (3, 8, values, values)
        channels = r.gram.diagonal(dim1=-2, dim2=-1).sum(-1).sqrt()
        torch.testing.assert_close(channels, r.state_norm_after)
        torch.testing.assert_close(r.discrepancy_after, r.discrepancy * r.eigenvalue.abs(), atol=1e-5, rtol=1e-3)
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
    ablate(model, IDS, betas=(0.0,))
    with pytest.raises(ZeroDivisionError), forced(model, 0, "mlp", 0.0):
        raise ZeroDivisionError
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
    model = build(residual=AdditiveResidualSpec())
    for call in (
        lambda: record(model, IDS),
        lambda: ablate(model, IDS),
        lambda: forced(model, 0, "mlp", 0).__enter__(),
    ):
        with pytest.raises(OuroborosError, match="no delta residual"):
            call()


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
    torch.testing.assert_close(r.discrepancy, torch.tensor([[1.0, 2.95]]))
    torch.testing.assert_close(r.discrepancy_after, torch.tensor([[0.5, 0.95]]))
    torch.testing.assert_close(r.erased, torch.tensor([[1.5, 2.0]]))
    torch.testing.assert_close(r.written, torch.tensor([[1.0, 7.9]]))
    control = one(spec=DeltaSpec(erase=False))
    assert (control.eigenvalue == 1).all() and (control.erased == 0).all()
    torch.testing.assert_close(one(direction=0.5 * torch.eye(4)[None, :2]).eigenvalue, torch.tensor([[0.875, 0.5]]))


def test_shares_and_quantiles() -> None:
    values = torch.tensor([0.1, 0.5, 1.4, 1.5, 1.9])
    assert shares(values, (0.5, 1.5)) == pytest.approx([0.2, 0.4, 0.4])
    assert shares(values, (0.3, 0.7, 1.3, 1.7)) == pytest.approx([0.2, 0.2, 0.0, 0.4, 0.2])
    draws = torch.rand(101)
    expected = torch.quantile(draws.double(), torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95]).double())
    assert quantiles(draws) == pytest.approx(expected.tolist())


def loss(model: OuroborosForCausalLM, ids: Tensor = IDS) -> float:
    with torch.no_grad():
        return model.eval()(ids, labels=ids, use_cache=False).loss.item()


@pytest.mark.parametrize("values", [1, 4])
def test_ablation_is_the_loss_with_that_gate(values: int) -> None:
    """Against a layer whose gate has been set by its weights."""
    model = build("2", residual=DeltaSpec(values=values))
    plain, found = loss(model), ablate(model, IDS)
    assert [(a.slot, a.sublayer, a.beta) for a in found] == [
        (slot, sublayer, beta) for slot in (0, 1) for sublayer in ("mixer", "mlp") for beta in (0.0, 1.0, 2.0)
    ]
    for a in found:
        twin = build("2", residual=DeltaSpec(values=values))
        gate = getattr(twin.model.decoder.layers[a.slot], f"{a.sublayer}_residual").gate.proj
        with torch.no_grad():
            gate.weight.zero_()
            gate.bias.fill_({0.0: -200.0, 1.0: 0.0, 2.0: 200.0}[a.beta])
        assert a.loss == pytest.approx(loss(twin), abs=1e-5)
        assert a.change == pytest.approx(a.loss - plain, abs=1e-5)
        assert a.stderr is not None and a.stderr > 0
    assert max(abs(a.change) for a in found) > 1e-3


def test_a_gate_is_forced_in_one_loop_alone() -> None:
    """Visits 1 and 2 are two loops of one block, and a gate of 0 leaves the state as it is."""
    model = build()

    def norms() -> list[Tensor]:
        found: list[Tensor] = []
        with torch.no_grad(), watching(model, lambda *use: found.append(use[-1].norm(dim=-1))):
            model.eval()(IDS, use_cache=False)
        return found

    with forced(model, 2, "mlp", 0.0):
        changed = norms()
    plain = norms()
    assert all(torch.equal(a, b) for a, b in zip(changed[:5], plain[:5]))
    assert torch.equal(changed[5], changed[4]) and not torch.equal(changed[3], changed[2])


def test_registers_pass_through_the_forced_gate() -> None:
    model = build("2", registers=2)
    loss(model)  # keeps the registers' keys and values
    with forced(model, 0, "mixer", 0.0):
        kept = loss(model)
    with forced(model, 0, "mixer", 0.0), torch.enable_grad():  # never keeps them
        fresh = model.eval()(IDS, labels=IDS, use_cache=False).loss.item()
    assert kept == pytest.approx(fresh, abs=1e-6)


def test_standard_error_needs_two_sequences() -> None:
    model = build("1")
    (a,) = [a for a in ablate(model, IDS[:1], betas=(0.0,)) if a.sublayer == "mlp"]
    assert a.stderr is None and math.isfinite(a.change)
    one_by_one = [ablate(model, IDS[i : i + 1], betas=(0.0,))[1].change for i in range(3)]
    spread = torch.tensor(one_by_one).double().std().item() / 3**0.5
    assert ablate(model, IDS, betas=(0.0,))[1].stderr == pytest.approx(spread, rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((9, "mlp", 1.0), "slot must be in 0..3"), ((0, "ffn", 1.0), "mixer or mlp"), ((0, "mlp", 2.5), "beta must be")],
)
def test_bad_ablations_are_named(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(OuroborosError, match=message), forced(build(), *arguments):
        pass
    with pytest.raises(OuroborosError, match="at least two tokens"):
        ablate(build(), IDS[:, :1])

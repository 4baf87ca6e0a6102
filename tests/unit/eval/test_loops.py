"""What is recorded of loops, on models whose numbers are known."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from ouroboros.config import AttentionSpec, FeedForwardSpec, LoopPart, ModelSpec
from ouroboros.config.parts.halt import HaltSpec
from ouroboros.config.parts.loop import BridgeSpec, LoopGainSpec, RecurrenceGateSpec
from ouroboros.config.parts.modulated import ControllerSpec, StaticCoresSpec, StaticDiagonalsSpec, modulated
from ouroboros.errors import OuroborosError
from ouroboros.eval.loops import LoopRecord, loop_records, spread
from ouroboros.eval.subject import build_perturbed
from ouroboros.model.executor import observe
from ouroboros.model.modeling import OuroborosForCausalLM

IDS = torch.tensor([3, 1, 4, 1, 5])
PLAIN = ModelSpec(layout="1 loop:(2)x3 1", vocab_size=9, hidden_size=8, max_position_embeddings=16).replace(
    mixer=AttentionSpec(num_heads=2), ffn=FeedForwardSpec(intermediate_size=8)
)


def model(*loop: LoopPart, **changes: object) -> OuroborosForCausalLM:
    torch.manual_seed(0)
    return build_perturbed(modulated(dataclasses.replace(PLAIN, **changes), loop, rank=2, alpha=2.0))


@pytest.mark.parametrize("registers", [0, 3])
def test_cores_are_those_that_visits_are_given(registers: int) -> None:
    """Of each loop and token; registers are no tokens of the text."""
    made = model(ControllerSpec(rank=2, style=4), registers=registers)
    controller = made.model.decoder.loops[0].controller  # pyrefly: ignore
    seen: list[Tensor] = []
    hand = controller.hand
    controller.hand = lambda *given: seen.append(hand(*given)["k_proj"]) or hand(*given)
    records = loop_records(made, IDS)
    assert [(one.segment, one.loop) for one in records] == [(1, 0), (1, 1), (1, 2)]
    for record, core in zip(records, seen[-3:], strict=True):  # registers may be read before the text
        assert list(record.handed) == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        assert torch.equal(record.handed["k_proj"], core[0, -5:]) and core.any()


@pytest.mark.parametrize(("part", "numbers"), [(StaticDiagonalsSpec(rank=2), 2), (StaticCoresSpec(rank=2), 4)])
def test_static_cores_are_the_same_for_all_tokens(part: StaticDiagonalsSpec, numbers: int) -> None:
    made = model(part)
    table = made.model.decoder.loops[0][part.kind].weight  # pyrefly: ignore
    for loop, record in enumerate(loop_records(made, IDS)):
        assert torch.equal(record.handed["v_proj"], table[loop, 2].reshape(1, numbers))


def test_gates_and_gains_are_the_trained_ones() -> None:
    """Their means over the channels; a part that is asked acts as before."""
    made = model(RecurrenceGateSpec(), LoopGainSpec(form="channel"), HaltSpec(hidden=4))
    parts = made.model.decoder.loops[0]
    parts.gate.proj.weight.data.zero_()  # pyrefly: ignore
    parts.gate.proj.bias.data = torch.linspace(-1, 1, 8)  # pyrefly: ignore
    before = made(IDS[None]).logits
    for loop, record in enumerate(loop_records(made, IDS)):
        assert record.told["gate"].tolist() == pytest.approx([float(torch.linspace(-1, 1, 8).sigmoid().mean())] * 5)
        gain = parts.gain.weight[loop].mean().item()  # pyrefly: ignore
        assert record.told["gain"].tolist() == pytest.approx([gain] * 5)
        assert record.told["ran"].dtype == torch.bool and record.told["probability"].shape == (5,)
    torch.testing.assert_close(made(IDS[None]).logits, before)


def test_the_change_of_the_state() -> None:
    """A gain of zero leaves the state as it is, and one of three makes three times the change."""
    made = model(LoopGainSpec(form="scalar"), layout="1 (1)x2 1")
    gain = made.model.decoder.loops[0].gain  # pyrefly: ignore
    gain.weight.data = torch.tensor([[1.0], [0.0]])
    states: list[tuple[Tensor, Tensor]] = []
    first, second = loop_records(made, IDS)
    assert float(second.update.max()) < 1e-6 and second.cosine.tolist() == pytest.approx([1.0] * 5)
    gain.weight.data[0] = 3.0
    again = loop_records(made, IDS)[0]
    assert again.update.tolist() == pytest.approx((3 * first.update).tolist(), rel=1e-4)
    with observe(made, on_loop=lambda segment, loop, before, after: states.append((before, after))):
        made(IDS[None])
    before, after = states[0]
    torch.testing.assert_close(again.update, ((after - before).norm(dim=-1) / before.norm(dim=-1))[0])
    products = (before * after).sum(-1) / (before.norm(dim=-1) * after.norm(dim=-1))
    torch.testing.assert_close(again.cosine, products[0])


def test_what_is_done_behind_the_last_loop_counts_with_it() -> None:
    made = model(BridgeSpec())
    bridge = made.model.decoder.loops[0].bridge  # pyrefly: ignore
    with_it = loop_records(made, IDS)
    bridge.proj.weight.data.zero_()
    bridge.proj.bias.data.zero_()
    without = loop_records(made, IDS)
    assert torch.equal(with_it[1].update, without[1].update) and not torch.equal(with_it[2].update, without[2].update)


def test_depth_is_the_models_own() -> None:
    assert len(loop_records(model(LoopGainSpec()).with_loops(5), IDS[None])) == 5
    with pytest.raises(OuroborosError, match="one text at a time, got 2"):
        loop_records(model(LoopGainSpec()), IDS.repeat(2, 1))


def record(loop: int, *rows: list[float]) -> LoopRecord:
    nothing = torch.zeros(len(rows))
    return LoopRecord(segment=0, loop=loop, update=nothing, cosine=nothing, handed={"a": torch.tensor(rows)})


def test_distances() -> None:
    """Two texts of two loops and two tokens."""
    one = [record(0, [3.0, 4.0], [3.0, 4.0]), record(1, [0.0, 0.0], [0.0, 2.0])]
    two = [record(0, [0.0, 0.0], [0.0, 0.0]), record(1, [0.0, 1.0], [0.0, 1.0])]
    found = spread([one, two], ["a"])
    assert found.norm == pytest.approx((5 + 5 + 0 + 2 + 0 + 0 + 1 + 1) / 8)
    assert found.loops == pytest.approx((5 + math.hypot(3, 2) + 1 + 1) / 4)
    assert found.tokens == pytest.approx(2 / 4)
    assert found.texts == pytest.approx((5 + 0) / 2)
    alone = spread([[record(0, [3.0, 4.0])]], ["a"])
    assert alone == (5.0, None, 0.0, None)

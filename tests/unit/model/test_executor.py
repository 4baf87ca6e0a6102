"""The executor: order of visits, loop boundaries, truncated backpropagation, and who watches: observers, hidden states.

The harness checks shapes of hidden states, and caches with them, on every model.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ouroboros.config import AttentionSpec, BlockOverride, LoopPart, ModelSpec
from ouroboros.config.parts.delta import DeltaSpec
from ouroboros.config.parts.loop import (
    ContractiveStepSpec,
    InjectionSpec,
    LoopEmbeddingSpec,
    LoopNormSpec,
    RecurrenceGateSpec,
)
from ouroboros.config.parts.stem import LearnedPositionsSpec
from ouroboros.errors import OuroborosError
from ouroboros.model.executor import Decoder, observe
from ouroboros.model.modeling import OuroborosForCausalLM
from ouroboros.nn.part import LoopModule
from ouroboros.nn.visit import VisitContext
from ouroboros.schedule import Visit, parse

Build = Callable[..., OuroborosForCausalLM]
NOWHERE: Any = None


class Recording(nn.Module):
    """A block that doubles the state, adds its own vector and notes what it is given."""

    def __init__(self, block: int, seen: list[VisitContext]) -> None:
        super().__init__()
        self.seen = seen
        self.shift = nn.Parameter(torch.full((4,), float(10**block)))

    def forward(self, x: Tensor, visit: VisitContext) -> Tensor:
        self.seen.append(visit)
        return 2 * x + self.shift


def recording(layout: str, *loop: LoopPart) -> tuple[Decoder, list[VisitContext]]:
    """A decoder of recording blocks, and the list they write to."""
    spec = ModelSpec(layout=layout, hidden_size=4, loop=loop).replace(mixer=AttentionSpec(num_heads=1))
    decoder, seen = Decoder(spec), []
    decoder.layers = nn.ModuleList(Recording(block, seen) for block in range(len(decoder.layers)))
    return decoder, seen


def named(visit: Visit, last: bool) -> VisitContext:
    """What a visit is given here: its name."""
    return VisitContext(NOWHERE, visit=visit, last=last)


def run(decoder: Decoder, layout: str, x: Tensor | None = None, **options: Any) -> Tensor:
    return decoder(torch.ones(1, 1, 4) if x is None else x, parse(layout), named, **options)


@pytest.mark.parametrize("layout", ["3", "(2)x2", "1 (1)x2 1 (2)x3 1"])
def test_every_visit_gets_what_is_made_for_it(layout: str) -> None:
    decoder, seen = recording(layout)
    called: list[nn.Module] = []

    def call(block: nn.Module, x: Tensor, visit: VisitContext) -> Tensor:
        called.append(block)
        return block(x, visit)

    expected = run(decoder, layout)
    assert torch.equal(run(decoder, layout, call=call), expected)
    visits = parse(layout).visits
    last = {visit.block: visit.slot for visit in visits}
    assert seen == [named(visit, last[visit.block] == visit.slot) for visit in visits] * 2
    assert called == [decoder.layers[visit.block] for visit in visits]


def test_blocks_and_loop_parts_are_stored_once() -> None:
    override = BlockOverride(where="wide", set={"ffn.intermediate_size": 7})
    spec = ModelSpec(layout="2 wide:(2)x4 1 (1)x9", loop=(LoopEmbeddingSpec(),), overrides=(override,))
    decoder = Decoder(spec)
    assert [block.mlp.up_proj.out_features for block in decoder.layers] == [512, 512, 7, 7, 512, 512]
    assert [parts["embedding"].weight.shape[0] for parts in decoder.loops] == [4, 9]


def test_loop_parts_at_boundaries() -> None:
    """x0 is the state before the first loop, also in later loops; parts belong to their segment."""
    layout = "1 (1)x2 (1)x2"
    decoder, _ = recording(layout, InjectionSpec(), LoopEmbeddingSpec(), ContractiveStepSpec())
    for index, parts in enumerate(decoder.loops):
        nn.init.constant_(parts["inject"].scale, 0.5 + index)
        parts["embedding"].weight.data = torch.tensor([[1.0], [2.0]]).expand(2, 4) * (index + 1)
    state = 2 * torch.ones(1, 1, 4) + 1
    for index, shift in ((0, 10.0), (1, 100.0)):
        start = state
        for loop in range(2):
            entered = state + (0.5 + index) * start + (loop + 1) * (index + 1)
            state = 0.5 * state + 0.5 * (2 * entered + shift)
    torch.testing.assert_close(run(decoder, layout), state)


class Handing(LoopModule):
    """Hands the state that begins a loop and the loop's number, and adds a thousand to what leaves the last."""

    def hand(self, x: Tensor, visit: VisitContext, loop: int) -> dict[str, Tensor]:
        assert visit.visit is not None and visit.visit.block == 1
        return {"state": x, "loop": torch.tensor(loop)}

    def finish(self, z: Tensor, carried: dict[str, Tensor]) -> Tensor:
        return z + 1000


def test_what_loop_parts_hand_to_visits_and_what_leaves_the_last_loop() -> None:
    """Every block of a loop is handed the same, which is made once the other parts have entered; the rest nothing."""
    decoder, seen = recording("1 (2)x2 1", InjectionSpec())
    decoder.loops[0]["handing"] = Handing()
    nn.init.ones_(decoder.loops[0]["inject"].scale)
    out = run(decoder, "1 (2)x2 1")
    first, *looped, last = seen
    assert not first.handed and not last.handed
    assert [int(visit.handed["loop"]) for visit in looped] == [0, 0, 1, 1]
    for one, two in (looped[:2], looped[2:]):
        assert one.handed["state"] is two.handed["state"]
    x0 = torch.tensor(3.0)
    assert (looped[0].handed["state"] == 2 * x0).all(), "with the injection"
    states = [2 * (2 * (2 * x0) + 10) + 100]
    states.append(2 * (2 * (states[0] + x0) + 10) + 100)
    assert (looped[2].handed["state"] == states[0] + x0).all()
    assert (out == 2 * (states[1] + 1000) + 1000).all(), "finished once, before the block behind the loop"


def test_loop_parts_act_in_their_order() -> None:
    """Norm, then gate, then contractive step; and the other way about."""
    specs = (LoopNormSpec(), RecurrenceGateSpec(), ContractiveStepSpec(step=0.5))
    x, gate, outputs = torch.randn(1, 3, 4), torch.sigmoid(torch.tensor(-2.0)), []
    steps = {
        "norm": lambda z: z / torch.sqrt(z.square().mean(-1, keepdim=True) + 1e-6),
        "gate": lambda z: gate * z + (1 - gate) * x,
        "contractive": lambda z: 0.5 * x + 0.5 * z,
    }
    for order in (specs, specs[::-1]):
        decoder, _ = recording("(1)x1", *order)
        expected = 2 * x + 1
        for part in order:
            expected = steps[part.kind](expected)
        assert list(decoder.loops[0]) == [part.kind for part in order]
        outputs.append(run(decoder, "(1)x1", x))
        torch.testing.assert_close(outputs[-1], expected)
    assert not torch.allclose(*outputs)


class TestTruncatedBackpropagation:
    def gradients(self, window: int | None) -> tuple[Tensor, list[Tensor | None]]:
        """Gradients of the input and of each block's vector."""
        decoder, _ = recording("1 (1)x3 1")
        x = torch.ones(1, 1, 4, requires_grad=True)
        run(decoder, "1 (1)x3 1", x, backprop_loops=window).sum().backward()
        return x.grad if x.grad is not None else torch.zeros(1), [block.shift.grad for block in decoder.layers]

    @pytest.mark.parametrize("window", [3, 4, 100])
    def test_a_window_of_all_loops_is_full_backpropagation(self, window: int) -> None:
        full, cut = self.gradients(None), self.gradients(window)
        assert torch.equal(full[0], cut[0])
        assert all(torch.equal(a, b) for a, b in zip(full[1], cut[1], strict=True))  # pyrefly: ignore

    def test_stops_before_the_window(self) -> None:
        # Each visit doubles the state, so the shift of the visit k visits before the end has gradient 2^k.
        _, (prelude, looped, coda) = self.gradients(None)
        assert (prelude[0], looped[0], coda[0]) == (16, 8 + 4 + 2, 1)  # pyrefly: ignore
        at_input, (prelude, looped, coda) = self.gradients(2)
        assert prelude is None and torch.equal(at_input, torch.zeros(1))
        assert (looped[0], coda[0]) == (4 + 2, 1)  # pyrefly: ignore

    def test_loop_parts_before_the_window_have_no_gradient(self) -> None:
        decoder, _ = recording("(1)x3", LoopEmbeddingSpec(), LoopNormSpec())
        run(decoder, "(1)x3", torch.randn(1, 2, 4), backprop_loops=2).square().sum().backward()
        for part in decoder.loops[0].values():
            assert [bool(row.any()) for row in part.weight.grad] == [False, True, True]

    def test_changes_no_value(self) -> None:
        decoder, _ = recording("1 (1)x3 1")
        outputs = [run(decoder, "1 (1)x3 1", backprop_loops=window) for window in (None, 1, 2)]
        assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


class TestObservers:
    def test_see_every_loop_boundary(self) -> None:
        layout = "1 (1)x2 1 (1)x3"
        decoder, _ = recording(layout)
        seen: list[tuple[int, int, Tensor, Tensor]] = []
        with observe(decoder, on_loop=lambda *boundary: seen.append(boundary)):
            output = run(decoder, layout)
        assert [(segment, loop) for segment, loop, _, _ in seen] == [(1, 0), (1, 1), (3, 0), (3, 1), (3, 2)]
        for (segment, loop, before, after), block in zip(seen, (1, 1, 3, 3, 3), strict=True):
            torch.testing.assert_close(after, 2 * before + 10.0**block, msg=f"segment {segment}, loop {loop}")
        assert seen[1][2] is seen[0][3] and seen[-1][3] is output

    def test_see_what_loop_parts_make(self) -> None:
        """A loop is shown with its parts, a visit without."""
        decoder, _ = recording("(1)x1", InjectionSpec(), ContractiveStepSpec(step=0.25))
        nn.init.ones_(decoder.loops[0]["inject"].scale)
        shown: list[tuple[Tensor, Tensor]] = []
        with observe(
            decoder,
            lambda block, visit, before, after: shown.append((before, after)),
            lambda segment, loop, before, after: shown.append((before, after)),
        ):
            run(decoder, "(1)x1")
        assert [(before[0, 0, 0].item(), after[0, 0, 0].item()) for before, after in shown] == [(2, 5), (1, 2)]

    def test_see_every_visit(self) -> None:
        decoder, given = recording("1 (1)x2")
        seen: list[tuple[nn.Module, VisitContext, Tensor, Tensor]] = []
        with observe(decoder, lambda *visit: seen.append(visit)):
            output = run(decoder, "1 (1)x2", torch.ones(1, 3, 4), hidden=1)
        assert [visit for _, visit, _, _ in seen] == given
        assert [block for block, _, _, _ in seen] == [decoder.layers[at] for at in (0, 1, 1)]
        assert {x.shape for _, _, before, after in seen for x in (before, after)} == {(1, 2, 4)}
        assert torch.equal(seen[-1][3], output[:, 1:])
        assert all(torch.equal(one[3], two[2]) for one, two in itertools.pairwise(seen))

    def test_end_with_their_context_and_may_be_several(self) -> None:
        decoder, _ = recording("(1)x2")
        first, second = [], []
        with observe(decoder, on_loop=lambda *seen: first.append(seen)):
            with observe(nn.Sequential(decoder), lambda *seen: second.append(seen)):
                run(decoder, "(1)x2")
            run(decoder, "(1)x2")
            run(decoder, "(1)x2", observers=[])
            with pytest.raises(ZeroDivisionError), observe(decoder, lambda *seen: 1 / 0):
                run(decoder, "(1)x2")
        assert (len(first), len(second)) == (4, 2) and decoder.observers == []


class TestHiddenStates:
    def outputs_of_blocks(self, model: OuroborosForCausalLM, ids: Tensor) -> tuple[list[Tensor], Any]:
        """What blocks return, and the model's own answer."""
        seen: list[Tensor] = []
        with observe(model, lambda block, visit, before, after: seen.append(after)):
            return seen, model(ids, use_cache=False, output_hidden_states=True)

    @pytest.mark.parametrize("loop", [(), (LoopNormSpec(), RecurrenceGateSpec(), ContractiveStepSpec())], ids=len)
    def test_embeddings_then_what_every_visit_returns_then_the_output(
        self, build: Build, ids: Tensor, loop: tuple[LoopPart, ...]
    ) -> None:
        model = build(loop=loop)
        seen, output = self.outputs_of_blocks(model, ids)
        states = output.hidden_states
        assert len(states) == model.schedule.num_visits + 1 == len(seen) + 1 == 5
        assert torch.equal(states[0], model.model.embed_tokens(ids))
        assert all(torch.equal(state, expected) for state, expected in zip(states[1:-1], seen[:-1], strict=True))
        assert torch.equal(states[-1], model.model.norm(seen[-1]))
        assert torch.equal(states[-1], model.model(ids).last_hidden_state)

    def test_an_expanded_state_counts_as_the_mean_of_its_channels(self, build: Build, ids: Tensor) -> None:
        model = build(residual=DeltaSpec(values=3))
        seen, output = self.outputs_of_blocks(model, ids)
        torch.testing.assert_close(output.hidden_states[0], model.model.embed_tokens(ids))
        assert seen[0].shape == (2, 9, 3, 16)
        torch.testing.assert_close(output.hidden_states[1], seen[0].mean(2))

    def test_learned_positions_belong_to_the_first(self, build: Build, ids: Tensor) -> None:
        model = build(stem=(LearnedPositionsSpec(),))
        first = model(ids, output_hidden_states=True).hidden_states[0]
        expected = model.model.embed_tokens(ids) + model.model.stem["positions"].weight[:9]
        torch.testing.assert_close(first, expected)

    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_training_with_registers_leaves_them_out(self, build: Build, ids: Tensor, checkpointing: bool) -> None:
        model = build(registers=3)
        apart = model(ids, output_hidden_states=True).hidden_states
        if checkpointing:
            model.model.gradient_checkpointing = True
        together = model.train()(ids, output_hidden_states=True).hidden_states
        for one, other in zip(together, apart, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        together[1].sum().backward()
        assert model.model.registers.grad is not None

    def test_every_way_to_ask(self, build: Build, ids: Tensor) -> None:
        model = build()
        expected = model(ids, output_hidden_states=True).hidden_states
        assert model(ids).hidden_states is None and model.model(ids).hidden_states is None
        assert model(ids, use_cache=False, output_hidden_states=True, return_dict=False)[-1][0].shape == (2, 9, 16)
        logits, *_, states = model(ids, output_hidden_states=True, return_dict=False)
        assert logits.shape == (2, 9, 31) and torch.equal(states[-1], expected[-1])
        last, states = model.model(ids, use_cache=False, output_hidden_states=True, return_dict=False)
        assert torch.equal(last, states[-1])
        assert len(model(ids, loops=4, use_cache=False, output_hidden_states=True).hidden_states) == 7
        model.config.output_hidden_states = True
        assert len(model(ids).hidden_states) == 5 and model(ids, output_hidden_states=False).hidden_states is None
        model.config.return_dict = False
        assert isinstance(model(ids), tuple)

    @pytest.mark.parametrize(
        "options", [{}, {"num_beams": 2}, {"cache_implementation": "static"}, {"use_cache": False}]
    )
    def test_generate(self, build: Build, ids: Tensor, options: dict[str, Any]) -> None:
        model = build(registers=2)
        asked = {"output_hidden_states": True, "return_dict_in_generate": True}
        length = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
        found = model.generate(ids, attention_mask=torch.ones_like(ids), **length, **asked, **options)
        assert len(found.hidden_states) == 3 and {len(states) for states in found.hidden_states} == {5}
        rows = 2 * options.get("num_beams", 1)
        assert found.hidden_states[0][0].shape == (rows, 9, 16)
        later = 10 if options.get("use_cache") is False else 1
        assert found.hidden_states[1][0].shape == (rows, later, 16)

    def test_off_collects_nothing(self, build: Build, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("ouroboros.model.modeling.Observer", lambda *given: pytest.fail("collected"))
        build()(ids)

    @pytest.mark.parametrize("where", ["call", "generate", "model"])
    def test_attention_weights_are_refused_with_the_reason(self, build: Build, ids: Tensor, where: str) -> None:
        model = build()
        with pytest.raises(OuroborosError, match="output_attentions: attention weights are never formed here"):
            if where == "generate":
                model.generate(ids, output_attentions=True, return_dict_in_generate=True, max_new_tokens=2)
            else:
                (model if where == "call" else model.model)(ids, output_attentions=True)

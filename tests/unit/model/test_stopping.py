"""Positions that stop before the last loop, against a loop over tokens, and the work that they save."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, StaticCache

from ouroboros.config import AttentionSpec, ModelSpec, RopeSpec
from ouroboros.config.parts.loop import InjectionSpec
from ouroboros.config.parts.modulated import ControllerSpec, ModulatedAttentionSpec, ModulatedFeedForwardSpec
from ouroboros.config.parts.osam import OsamSpec
from ouroboros.model.executor import observe
from ouroboros.model.modeling import OuroborosForCausalLM
from ouroboros.model.stopping import Going, separable
from ouroboros.nn.part import LoopModule
from ouroboros.nn.topology import Event, RunBlock
from ouroboros.nn.visit import VisitContext

Build = Callable[..., OuroborosForCausalLM]
LOOPS = 4
STEPS = torch.tensor([[4, 1, 2, 4, 3, 1, 1, 2, 1], [1, 1, 3, 1, 1, 1, 1, 1, 1]])
"""Loops that each of two texts' tokens takes."""


class Until(LoopModule):
    """Stops every position after the number of loops that is told for it."""

    stops = True

    def __init__(self, steps_BT: Tensor) -> None:
        super().__init__()
        self.steps_BT = steps_BT

    def leave(self, x: Tensor, z: Tensor, carried: dict[str, Tensor], loop: int) -> Tensor:
        carried["left"] = (carried["left"] if loop else self.steps_BT[..., None]) - 1
        return z

    def goes_on(self, carried: dict[str, Tensor]) -> Tensor:
        return carried["left"][..., 0] > 0

    def tell(self, carried: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"left": carried["left"][..., 0]}


@pytest.fixture
def make(build: Build) -> Build:
    """A model of four loops whose positions stop after ``steps``."""

    def made(steps_BT: Tensor, **changes: Any) -> OuroborosForCausalLM:
        plain = AttentionSpec(num_heads=1, rope=RopeSpec(fraction=0.0))
        options = {"layout": f"1 (1)x{LOOPS} 1", "mixer": plain, "loop": (InjectionSpec(),)} | changes
        model = build(**options)
        model.model.decoder.loops[0]["until"] = Until(steps_BT)
        return model

    return made


def rows(model: OuroborosForCausalLM, run: Callable[[], Any], block: int = 1) -> list[int]:
    """How many positions each visit of a block computes."""
    seen: list[int] = []
    handle = model.model.decoder.layers[block].register_forward_pre_hook(
        lambda _, given: seen.append(given[0].shape[1])
    )
    run()
    handle.remove()
    return seen


def one_by_one(model: OuroborosForCausalLM, start_TD: Tensor, steps: list[int]) -> Tensor:
    """The loops as the docstring says them, one token after the other, without a rotation and with one head."""
    block: Any = model.model.decoder.layers[1]
    attention, scale = block.self_attn, model.model.decoder.loops[0]["inject"].scale
    keys: list[list[Tensor]] = []
    values: list[list[Tensor]] = []
    ends = []
    for x0_D, most in zip(start_TD, steps, strict=True):
        keys.append([]), values.append([])
        x_D = x0_D
        for loop in range(most):
            x_D = x_D + scale * x0_D
            context_D = block.input_layernorm(x_D)
            keys[-1].append(attention.k_proj(context_D)), values[-1].append(attention.v_proj(context_D))
            # Every earlier token has an entry of this loop: if it has stopped, that of its last one.
            k_SC, v_SC = (torch.stack([each[min(loop, len(each) - 1)] for each in all_]) for all_ in (keys, values))
            weights_S = torch.softmax(k_SC @ attention.q_proj(context_D) / k_SC.shape[1] ** 0.5, dim=0)
            x_D = x_D + attention.o_proj(weights_S @ v_SC)
            update = block.mlp(block.post_attention_layernorm(x_D)[None, None], VisitContext((x_D, x_D)))
            x_D = x_D + update[0, 0]
        ends.append(x_D)
    return torch.stack(ends)


def around(model: OuroborosForCausalLM, run: Callable[[], Any]) -> tuple[Tensor, Tensor]:
    """The state before the loops and the one behind them, of all positions."""
    found: list[Tensor] = []
    layers = model.model.decoder.layers
    handles = [
        layers[0].register_forward_hook(lambda _, given, out: found.append(out)),
        layers[2].register_forward_pre_hook(lambda _, given: found.append(given[0])),
    ]
    run()
    for handle in handles:
        handle.remove()
    return found[0], found[1]


def test_every_way_of_computing_is_the_loop_over_tokens(make: Build, ids: Tensor) -> None:
    model = make(STEPS)

    def without_gradient() -> None:
        with torch.no_grad():
            model(ids, use_cache=False)

    def watched() -> None:
        with torch.no_grad(), observe(model):
            model(ids, use_cache=False)

    start_BTD, _ = around(model, without_gradient)
    expected = torch.stack([one_by_one(model, x, n) for x, n in zip(start_BTD, STEPS.tolist(), strict=True)])
    ways = {"alone": without_gradient, "watched": watched, "with gradient": lambda: model(ids, use_cache=False)}
    for name, way in ways.items():
        torch.testing.assert_close(around(model, way)[1], expected, rtol=1e-4, atol=1e-5, msg=name)
    model.train()
    torch.testing.assert_close(around(model, without_gradient)[1], expected, rtol=1e-4, atol=1e-5)
    later = make(torch.full_like(STEPS, LOOPS))
    assert (around(later, lambda: later(ids, use_cache=False))[1] - expected).abs().max() > 1e-2, "stopping acts"


@torch.no_grad()
def test_only_positions_that_go_on_are_computed(make: Build, ids: Tensor) -> None:
    for row, expected in enumerate([[9, 5, 3, 2], [9, 1, 1]]):
        model = make(STEPS[row : row + 1])
        assert rows(model, lambda one=ids[row : row + 1], model=model: model(one, use_cache=False)) == expected
    model = make(STEPS)
    assert rows(model, lambda: model(ids, use_cache=False)) == [9, 5, 3, 2], "filled up to the longest of the batch"
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    assert rows(model, lambda: model(ids, attention_mask=mask, use_cache=False)) == [9, 2, 1], "no padding"
    with observe(model):
        assert rows(model, lambda: model(ids, use_cache=False)) == [9] * LOOPS


@torch.no_grad()
@pytest.mark.parametrize("kind", ["growing", "preallocated"])
def test_a_cache_has_an_entry_of_every_token_in_every_loop(make: Build, ids: Tensor, kind: str) -> None:
    """Prefill of some tokens, then one after the other; the work of each is that of its own steps."""
    model = make(STEPS)
    expected, until = model(ids, use_cache=False).logits, model.model.decoder.loops[0]["until"]
    for row in range(2):
        one, steps = ids[row : row + 1], STEPS[row : row + 1]
        store: Any = DynamicCache(config=model.config)
        if kind == "preallocated":
            store = StaticCache(config=model.config, max_cache_len=12)
        found: list[Tensor] = []
        for start, end in ((0, 4), *((at, at + 1) for at in range(4, 9))):
            until.steps_BT = steps[:, start:end]

            def run(chunk: Tensor = one[:, start:end], store: Any = store, found: list[Tensor] = found) -> None:
                found.append(model(chunk, past_key_values=store, use_cache=True).logits)

            assert len(rows(model, run)) == int(steps[:, start:end].max())
        torch.testing.assert_close(torch.cat(found, dim=1), expected[row : row + 1], rtol=1e-4, atol=1e-5)
        assert {int(layer.get_seq_length()) for layer in store.layers} == {9} and len(store.layers) == LOOPS + 2


@torch.no_grad()
def test_operations_fall_with_the_number_of_steps(make: Build, ids: Tensor) -> None:
    one = ids[:1]

    def operations(steps_BT: Tensor) -> int:
        model = make(steps_BT).requires_grad_(False)  # the counter's hooks fail on parameters passed as inputs
        with FlopCounterMode(display=False) as counter:
            model(one, use_cache=False)
        return counter.get_total_flops()

    found = [operations(torch.full_like(STEPS[:1], steps)) for steps in range(1, LOOPS + 1)]
    loop = found[1] - found[0]
    assert [later - earlier for earlier, later in itertools.pairwise(found)] == [loop] * (LOOPS - 1) and loop
    mean = float(STEPS[0].float().mean())
    expected = found[0] + (mean - 1) * loop
    assert operations(STEPS[:1]) == pytest.approx(expected, rel=0.05) and expected < 0.7 * found[-1]


def test_gradients_are_those_of_the_loop_over_tokens(make: Build, ids: Tensor) -> None:
    model = make(STEPS).train()
    weight = model.model.decoder.layers[1].self_attn.k_proj.weight
    start_BTD, end_BTD = around(model, lambda: model(ids, use_cache=False))
    expected = torch.stack([one_by_one(model, x, n) for x, n in zip(start_BTD, STEPS.tolist(), strict=True)])
    grads = [torch.autograd.grad(end.square().sum(), weight, retain_graph=True)[0] for end in (end_BTD, expected)]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-3, atol=1e-4)
    model.activation_checkpointing_enable()
    _, again = around(model, lambda: model(ids, use_cache=False))
    torch.testing.assert_close(torch.autograd.grad(again.square().sum(), weight)[0], grads[0], rtol=1e-4, atol=1e-4)


def test_who_watches_positions_is_told_of_them_without_registers(make: Build, ids: Tensor) -> None:
    model = make(torch.cat((torch.full((2, 3), 2), STEPS), dim=1), registers=3)
    told: list[tuple[int, int, Tensor]] = []
    with observe(model, on_positions=lambda segment, loop, found: told.append((segment, loop, found["left"]))):
        model.train()(ids, use_cache=False)
    assert [(segment, loop) for segment, loop, _ in told] == [(1, loop) for loop in range(LOOPS)]
    assert all(torch.equal(left, STEPS - 1 - loop) for _, loop, left in told)


MODULATED = {"mixer": ModulatedAttentionSpec(num_heads=2, rank=2), "ffn": ModulatedFeedForwardSpec(rank=2)}
TOGETHER: dict[str, dict[str, Any]] = {
    "a state": {"mixer": OsamSpec(buckets=40, readout_hidden=4)},
    "a filter over tokens": {"mixer": AttentionSpec(num_heads=2, k_shift=True)},
    "a mean over tokens": {**MODULATED, "layout": "(1)x4", "loop": (ControllerSpec(rank=2, pooling="prefix"),)},
    "a mean over all tokens": {**MODULATED, "layout": "(1)x4", "loop": (ControllerSpec(rank=2, pooling="all"),)},
}


@pytest.mark.parametrize("changes", TOGETHER.values(), ids=list(TOGETHER))
def test_what_mixes_positions_is_computed_together(base: ModelSpec, changes: dict[str, Any]) -> None:
    spec = base.replace(**changes)
    assert separable(spec, _steps(spec), set()) == set()


def test_each_loop_is_judged_by_itself(base: ModelSpec) -> None:
    spec = base.replace(layout="1 (1)x2 1 (1)x3")
    steps = _steps(spec)
    assert separable(spec, steps, set()) == {0, 1}
    assert separable(spec, steps, {3}) == {0}, "what reads a block's output wants that of all positions"
    last = max(index for index, step in enumerate(steps) if isinstance(step, RunBlock) and step.visit.block == 1)
    event = Event(lambda streams: None)
    assert separable(spec, [*steps[:last], event, *steps[last:]], set()) == {1}, "who knows what it does"
    assert separable(spec, [event, *steps, event], set()) == {0, 1}
    other = steps[last]._replace(other="second")
    assert separable(spec, [*steps[:last], other, *steps[last + 1 :]], set()) == {1}


def _steps(spec: ModelSpec) -> list[Any]:
    from ouroboros.config.part import build as build_part

    topology: nn.Module = build_part(spec.topology, spec)
    return list(topology.steps(spec.schedule))  # pyrefly: ignore


def test_narrowing_and_widening() -> None:
    going_BT = torch.tensor([[True, False, True, True], [False, False, False, True]])
    going, x = Going.of(going_BT, narrows=True), torch.arange(8.0).view(2, 4)
    assert going.narrow(x)[0].tolist() == [0, 2, 3] and going.narrow(x)[1, 0] == 7 and not going.none
    assert going.widen(x, -going.narrow(x)).tolist() == [[0, 1, -2, -3], [4, 5, 6, -7]]
    assert going.narrow(x[:1])[1].tolist()[0] == 3, "of one row for all"
    together = Going.of(going_BT, narrows=False)
    assert together.narrow(x) is x and together.widen(x, -x).tolist() == [[0, 1, -2, -3], [4, 5, 6, -7]]
    over = Going.of(torch.zeros(2, 4, dtype=torch.bool), narrows=True)
    assert over.none and over.narrow(x).shape == (2, 0) and torch.equal(over.widen(x, over.narrow(x)), x)


@torch.no_grad()
def test_a_compiled_program_computes_every_loop_and_the_same(make: Build, ids: Tensor) -> None:
    """What it does cannot depend on how many positions go on, so it is one graph."""
    model = make(STEPS)
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    found = compiled(ids, use_cache=False).logits
    torch.testing.assert_close(found, model(ids, use_cache=False).logits, rtol=1e-4, atol=1e-5)

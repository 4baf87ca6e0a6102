"""Two streams: the exchange against the published program's loop, with functions in place of blocks; the second stream
as nothing."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ouroboros.config import AttentionSpec, BlockOverride, FeedForwardSpec, ModelSpec
from ouroboros.config.part import build
from ouroboros.config.parts.helix import HelixSpec
from ouroboros.config.parts.topology import ChainSpec, UNetSpec
from ouroboros.model.configuration import OuroborosConfig
from ouroboros.model.modeling import OuroborosForCausalLM
from ouroboros.nn.helix import Helix
from ouroboros.nn.topology import MAIN, RunBlock
from ouroboros.schedule import parse

D = 4
CROSSED = {"mixer": {"kind": "cross", "width": 8}, "ffn": "none", "residual": "none", "norm.placement": "final"}


class Executor:
    """Runs steps on streams; a block is a function of its number and of the other stream, if it is shown one."""

    def __init__(self, x: Tensor) -> None:
        self.streams = {MAIN: x}

    def block(self, step: RunBlock) -> None:
        other = None if step.other is None else self.streams[step.other]
        self.streams[step.stream] = run(step.visit.block, self.streams[step.stream], other)

    def enter(self, step: Any) -> None:
        """No loop parts."""

    leave = enter


def run(block: int, x: Tensor, other: Tensor | None = None) -> Tensor:
    """What stands for a block."""
    y = torch.sin((block + 1) * x) + x
    return y if other is None else y + torch.cos(other)


def built(layout: str, spec: HelixSpec, *crossed: str) -> Helix:
    """The topology with all weights random, those that start at zero too."""
    overrides = tuple(BlockOverride(where=name, set=CROSSED) for name in crossed)
    topology = build(spec, ModelSpec(layout=layout, hidden_size=D, topology=spec, overrides=overrides))
    for parameter in topology.parameters():
        torch.nn.init.normal_(parameter)
    return topology.double()


def published(
    topology: Helix, flats: list[int], shared: list[int], stride: int, x: Tensor, bridges: tuple[int, int] | None
) -> Tensor:
    """Sections 4.1 and 4.4 of the description of the published program: N flat blocks, stride, caps, embedding, gate.

    ``bridges`` are the blocks of hints by attention.
    """
    spec, exchange, weights = topology.helix, topology.exchange, topology.skips.weight
    N, y, k, skips, index = len(flats), x, 0, [], 0
    saved: Tensor | None = None
    for i, block in enumerate(flats):
        if spec.skip_after_hint and saved is not None:  # the revision keeps what the hint has changed already
            skips, saved = [*skips, x], None
        if i >= N // 2 and skips:
            skip = skips.pop()
            if spec.skip_gate:
                gate = topology.skips.gate
                skip = skip * torch.sigmoid(y @ gate.weight.T + gate.bias)
            x = x + weights[i - N // 2] * skip
        x = run(block, x)
        if i < N // 2:
            saved = x
            skips = skips if spec.skip_after_hint else [*skips, x]
        k += 1
        if k % stride:
            continue
        if bridges is None:
            up, down = exchange.up, exchange.down
            hint_y = x @ up.down_proj.weight.T @ up.up_proj.weight.T
            hint_x = y @ down.down_proj.weight.T @ down.up_proj.weight.T
        else:
            hint_y, hint_x = run(bridges[0], y, x), run(bridges[1], x, y)
        if spec.hint_cap:
            hint_y, hint_x = (spec.hint_cap * torch.tanh(hint / spec.hint_cap) for hint in (hint_y, hint_x))
        y = y + hint_y
        if spec.visit_embedding != "none":
            y = y + exchange.embedding[index]
            index += spec.visit_embedding == "each" or i < N // 2
        for block in shared:
            y = run(block, y, x if block in topology.reading else None)
        x = x + hint_x
    factor = exchange.merge
    if spec.merge == "sigmoid":
        factor = torch.sigmoid(factor).clamp(max=spec.merge_cap or 1.0)
    return x + factor * y


@pytest.mark.parametrize(
    "spec",
    [
        HelixSpec(bridge_width=2),
        HelixSpec(bridge_width=2, merge="sigmoid", merge_cap=0.4),
        HelixSpec(bridge_width=2, hint_cap=0.5, skip_gate=True),
        HelixSpec(bridge_width=2, visit_embedding="each", skip_after_hint=True),
        HelixSpec(bridge_width=2, visit_embedding="halves", skip_after_hint=True, skip_gate=True, merge="sigmoid"),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("layout", "flats", "shared", "stride"),
    [
        ("1 second:1 1 second 1 second", [0, 2, 3], [1], 1),
        ("1 second:2 1 second 1 second 1 second", [0, 3, 4, 5], [1, 2], 1),
        ("2 second:1 2 second 1", [0, 1, 3, 4, 5], [2], 2),
        ("3 second:1 1", [0, 1, 2, 4], [3], 3),
    ],
    ids=str,
)
def test_the_published_loop(layout: str, flats: list[int], shared: list[int], stride: int, spec: HelixSpec) -> None:
    topology, x = built(layout, spec), torch.randn(2, 3, D, dtype=torch.float64)
    on = Executor(x)
    for step in topology.steps(parse(layout)):
        step.run(on)
    torch.testing.assert_close(on.streams.pop(MAIN), published(topology, flats, shared, stride, x, None))
    assert on.streams == {}, "nothing is left over"


@pytest.mark.parametrize("cap", [None, 0.7])
def test_hints_by_attention(cap: float | None) -> None:
    layout, spec = "1 up:1 down:1 second:1 1 up down second", HelixSpec(bridges="attention", hint_cap=cap)
    topology, x = built(layout, spec, "up", "down"), torch.randn(2, 3, D, dtype=torch.float64)
    on = Executor(x)
    for step in topology.steps(parse(layout)):
        step.run(on)
    torch.testing.assert_close(on.streams[MAIN], published(topology, [0, 4], [3], 1, x, (1, 2)))


def test_split_heads_look_at_the_first_stream() -> None:
    mixer = {"kind": "split", "num_heads": 2, "cross_heads": 1}
    spec, layout = HelixSpec(bridge_width=2), "1 second:1 1 second"
    overrides = (BlockOverride(where="second", set={"mixer": mixer}),)
    model = ModelSpec(layout=layout, hidden_size=D, topology=spec, overrides=overrides)
    topology, x = build(spec, model).double(), torch.randn(2, 3, D, dtype=torch.float64)
    topology.exchange.merge.data.fill_(0.5)
    on = Executor(x)
    for step in topology.steps(parse(layout)):
        step.run(on)
    assert topology.reading == {1}
    torch.testing.assert_close(on.streams[MAIN], published(topology, [0, 2], [1], 1, x, None))


def test_beside_a_loop_of_the_same_blocks() -> None:
    """The first stream loops over them, outside of the skips; the second one runs them when their name is called."""
    layout, spec = "1 second:(1)x2 1 second", HelixSpec(bridge_width=2)
    topology, x = built(layout, spec), torch.randn(2, 3, D, dtype=torch.float64)
    on = Executor(x)
    for step in topology.steps(parse(layout)):
        step.run(on)
    up, down, start = topology.exchange.up, topology.exchange.down, x
    first = x = run(0, x)
    x = run(2, run(1, run(1, x)) + topology.skips.weight[0] * first)
    y = run(1, start + up(x))
    torch.testing.assert_close(on.streams[MAIN], x + down(start) + topology.exchange.merge * y)


def lm(spec: ModelSpec) -> OuroborosForCausalLM:
    return OuroborosForCausalLM(OuroborosConfig.from_spec(spec)).eval()


def without_the_second(model: OuroborosForCausalLM, topology: Any) -> OuroborosForCausalLM:
    """A model of the same blocks in a row, whose topology has no second stream."""
    spec = model.model.spec
    kept = [b for segment in spec.schedule.stored if not segment.name for b in segment.blocks]
    plain = lm(spec.replace(layout=str(len(kept)), topology=topology, overrides=()))
    for ours, theirs in zip(plain.model.decoder.layers, kept, strict=True):
        ours.load_state_dict(model.model.decoder.layers[theirs].state_dict())
    others = {name: t for name, t in model.state_dict().items() if ".layers." not in name and ".exchange." not in name}
    missing = plain.load_state_dict(others, strict=False).missing_keys
    assert all(".layers." in name for name in missing)
    return plain


SMALL = ModelSpec(vocab_size=19, hidden_size=16, max_position_embeddings=32).replace(
    mixer=AttentionSpec(num_heads=2), ffn=FeedForwardSpec(intermediate_size=24)
)
LINEAR = "1 second:1 1 second 1 second 1"
ATTENTION = "1 up:1 down:1 second:1 1 up down second 1"
IDS = torch.arange(18).view(2, 9)


def two_streams(spec: HelixSpec) -> OuroborosForCausalLM:
    bridges = tuple(BlockOverride(where=name, set=CROSSED) for name in spec.bridge_names)
    return lm(SMALL.replace(layout=ATTENTION if bridges else LINEAR, topology=spec, overrides=bridges))


@pytest.mark.parametrize("bridges", ["linear", "attention"])
def test_identity_at_the_start(bridges: Any) -> None:
    """Bit for bit what the U-net of the same blocks computes."""
    model = two_streams(HelixSpec(bridges=bridges, visit_embedding="each"))
    plain = without_the_second(model, UNetSpec())
    assert torch.equal(model(IDS).logits, plain(IDS).logits)
    model(IDS, labels=IDS).loss.backward()
    assert model.model.decoder.topology.exchange.merge.grad.any(), "the way out of nothing"


def test_the_published_form_adds_half_of_the_second_stream_at_the_start() -> None:
    model = two_streams(HelixSpec(merge="sigmoid"))
    plain = without_the_second(model, UNetSpec())
    assert (model(IDS).logits - plain(IDS).logits).abs().max() > 0.01
    model.model.decoder.topology.exchange.merge.data.fill_(-math.inf)
    torch.testing.assert_close(model(IDS).logits, plain(IDS).logits)


def test_without_skips_it_is_the_plain_stack() -> None:
    model = two_streams(HelixSpec(skips=0))
    assert torch.equal(model(IDS).logits, without_the_second(model, ChainSpec())(IDS).logits)


@pytest.mark.parametrize(
    "spec",
    [
        HelixSpec(visit_embedding="halves", skip_after_hint=True, skip_gate=True, hint_cap=0.5, merge="sigmoid"),
        HelixSpec(bridges="attention"),
    ],
    ids=str,
)
def test_no_logit_sees_a_later_token(spec: HelixSpec) -> None:
    model = two_streams(spec)
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape))
    changed = IDS.clone()
    changed[:, -1] = 18
    before, after = model(IDS).logits, model(changed).logits
    torch.testing.assert_close(after[:, :-1], before[:, :-1], rtol=0, atol=1e-5)
    assert (after[:, -1] - before[:, -1]).abs().max() > 1e-3


def test_start() -> None:
    topology = built(LINEAR, HelixSpec(visit_embedding="each", skip_gate=True))
    for module in topology.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert not topology.exchange.merge.any() and not topology.exchange.embedding.any()
    assert not any(bridge.up_proj.weight.any() for bridge in (topology.exchange.up, topology.exchange.down))
    gate = torch.sigmoid(topology.skips.gate(torch.randn(3, D, dtype=torch.float64)))
    torch.testing.assert_close(gate, torch.full((3, 1), 0.8808, dtype=torch.float64), rtol=0, atol=1e-4)

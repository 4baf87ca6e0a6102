"""The encoder tap against its formula."""

from __future__ import annotations

import pytest
import torch

from ouroboros.config import AttentionSpec, FeedForwardSpec, ModelSpec
from ouroboros.config.part import Place
from ouroboros.config.part import build as build_part
from ouroboros.config.parts.tap import TapSpec
from ouroboros.model.configuration import OuroborosConfig
from ouroboros.model.executor import observe
from ouroboros.model.modeling import OuroborosForCausalLM
from ouroboros.nn.tap import Tap
from ouroboros.schedule import parse

D, W, LOOPS = 6, 2, 3
PLACE = Place(parse(f"3 (1)x{LOOPS} 1").segments[1])


def build(spec: TapSpec) -> Tap:
    """The part behind three blocks, with random weights."""
    part = build_part(spec.at(PLACE), D, LOOPS, 1e-6)
    for parameter in part.parameters():
        torch.nn.init.normal_(parameter)
    return part


@pytest.mark.parametrize("per_loop", [True, False])
@pytest.mark.parametrize(
    ("chosen", "blocks"),
    [({}, (0, 1, 2)), ({"layers": "first"}, (0,)), ({"layers": "deepest"}, (2,)), ({"blocks": (2, 0)}, (2, 0))],
    ids=str,
)
def test_formula(chosen: dict, blocks: tuple[int, ...], per_loop: bool) -> None:
    part = build(TapSpec(width=W, per_loop=per_loop, **chosen))
    outputs = {f"block.{block}": torch.randn(2, 4, D) for block in range(3)}
    carried, x = dict(outputs), torch.randn(2, 4, D)
    taps = [outputs[f"block.{block}"] @ part.down[at].weight.T for at, block in enumerate(blocks)]
    for loop in (0, 1, 2, 3, 6):
        weight = part.up[min(loop, LOOPS - 1) if per_loop else 0].weight
        torch.testing.assert_close(part.enter(x, carried, loop), x + torch.cat(taps, dim=-1) @ weight.T)
    assert len(part.up) == (LOOPS if per_loop else 1) and part.leave(x, taps[0], carried, 0) is taps[0]
    assert sum(p.numel() for p in part.parameters()) == TapSpec(width=W, per_loop=per_loop, **chosen).at(
        PLACE
    ).parameters(D, LOOPS)


def test_neutral_at_the_start_and_then_alive() -> None:
    part = build_part(TapSpec(width=W).at(PLACE), D, LOOPS, 1e-6)
    for up in part.up:
        up.reset_parameters()
    x, carried = torch.randn(2, 4, D), {f"block.{block}": torch.randn(2, 4, D) for block in range(3)}
    assert torch.equal(part.enter(x, carried, 0), x)
    part.enter(x, carried, 0).square().sum().backward()
    assert part.up[0].weight.grad.any(), "the way out of zero"


def test_what_is_tapped_is_what_blocks_returned() -> None:
    """In a model with two loops, the second of which sees the block between them too; gradients reach the blocks."""
    spec = ModelSpec(layout="2 (1)x2 1 (1)x2", vocab_size=11, hidden_size=8, loop=(TapSpec(width=W),)).replace(
        mixer=AttentionSpec(num_heads=2), ffn=FeedForwardSpec(intermediate_size=8)
    )
    assert [part.watches for parts in spec.loop_parts for part in parts] == [(0, 1), (0, 1, 2, 3)]
    model = OuroborosForCausalLM(OuroborosConfig.from_spec(spec)).eval()
    for loop in model.model.decoder.loops:
        torch.nn.init.normal_(loop["tap"].up[0].weight)
    returned, entered = {}, {}

    def keep(block: object, context: object, before: torch.Tensor, after: torch.Tensor) -> None:
        visit = context.visit  # pyrefly: ignore
        returned[visit.block, visit.loop], entered[visit.block, visit.loop] = after, before

    with observe(model, keep):
        model(torch.randint(0, 11, (1, 5)), use_cache=False)
    tap = model.model.decoder.loops[1]["tap"]
    last = {0: 0, 1: 0, 2: 1, 3: 0}
    taps = [returned[block, loop] @ tap.down[block].weight.T for block, loop in last.items()]
    expected = returned[3, 0] + torch.cat(taps, dim=-1) @ tap.up[0].weight.T
    torch.testing.assert_close(entered[4, 0], expected)
    returned[0, 0].retain_grad()
    entered[4, 0].square().sum().backward()
    assert returned[0, 0].grad.any()

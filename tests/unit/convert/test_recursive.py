"""A donor in a layout with a loop, with and without parts that steer it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ouroboros.config import LoopPart, ModelSpec
from ouroboros.config.parts.loop import BridgeSpec, LoopGainSpec, LoopNormSpec, UpdateGateSpec
from ouroboros.config.parts.modulated import ControllerSpec, StaticCoresSpec, StaticDiagonalsSpec
from ouroboros.convert.bases import Bases, best_core, mean_residual, truncated
from ouroboros.convert.donors import find, tensors_of
from ouroboros.convert.families import spec_of
from ouroboros.convert.layers import Layers, chosen, cut
from ouroboros.convert.recursive import recursive
from ouroboros.convert.tensors import model_of
from ouroboros.errors import OuroborosError
from ouroboros.eval.equivalence import (
    check_cached,
    check_causal,
    check_chunked,
    check_left_padding,
    check_static_cache,
)
from ouroboros.eval.subject import perturb, prepare
from ouroboros.model.modeling import OuroborosForCausalLM

Make = Callable[..., Path]
KEPT: Layers = ((0,), (2,), (5,))
LAYOUT = "1 loop:(1)x3 1"


def read(make: Make, name: str = "llama") -> tuple[dict[str, Tensor], ModelSpec]:
    """A donor of six layers."""
    donor = find(make(name, num_hidden_layers=6))
    assert donor is not None
    return tensors_of(donor.family, donor.model()), spec_of(donor.config)


def logits(model: OuroborosForCausalLM) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(40)[None] * 6, use_cache=False).logits


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "gemma3_text"])
@pytest.mark.parametrize(("layout", "kept"), [(LAYOUT, KEPT), ("(1)x2 1 (2)x3", ((0,), (1,), (4,), (5,)))])
def test_starts_as_the_plain_loop(name: str, layout: str, kept: Layers, make: Make) -> None:
    """Of every family: modulation that is zero changes no bit of what the layout computes without it."""
    tensors, spec = read(make, name)
    plain = model_of(cut(spec, layout, kept), chosen(tensors, kept))
    parts = (ControllerSpec(rank=3, style=4), UpdateGateSpec())
    steered = recursive(tensors, spec, layout, kept, parts, rank=3, bases="stepwise")
    assert not steered.training and torch.equal(logits(steered), logits(plain))
    assert torch.equal(logits(recursive(tensors, spec, layout, kept)), logits(plain))
    windows = [block.mixer.looks_back for block in steered.config.model_spec.blocks]
    assert windows == [spec.blocks[layers[0]].mixer.looks_back for layers in kept]


def test_without_parts_that_hand_cores_blocks_are_plain(make: Make) -> None:
    tensors, spec = read(make)
    made = recursive(tensors, spec, LAYOUT, KEPT, (LoopNormSpec(),))
    assert {block.mixer.kind for block in made.config.model_spec.blocks} == {"attention"}
    assert not any(".bases." in name for name in made.state_dict())


def test_bases_are_of_the_removed_layers(make: Make) -> None:
    tensors, spec = read(make)
    weight = [tensors[f"model.decoder.layers.{n}.mlp.up_proj.weight"] for n in range(6)]
    prefix = "model.decoder.layers.1.mlp.bases.up_proj."

    def product(made: OuroborosForCausalLM, loop: str = "") -> Tensor:
        state = made.state_dict()
        return state[f"{prefix}{loop}B"] @ state[f"{prefix}{loop}A"]

    def mean(layers: list[int]) -> Tensor:
        expected = truncated(mean_residual([weight[n] for n in layers], weight[2]), 3)
        return expected.B @ expected.A

    parts = (StaticDiagonalsSpec(rank=3),)
    made = recursive(tensors, spec, LAYOUT, KEPT, parts, rank=3, alpha=6.0)
    torch.testing.assert_close(product(made), mean([1, 3, 4]))
    mixer: Any = made.config.model_spec.blocks[1].mixer
    assert (mixer.rank, mixer.alpha, mixer.bases, mixer.core) == (3, 6.0, "frozen", "diagonal")
    stepwise = recursive(tensors, spec, LAYOUT, KEPT, parts, rank=3, bases="stepwise", trained=True)
    for loop, layer in enumerate((1, 3, 4)):
        torch.testing.assert_close(product(stepwise, f"{loop}."), mean([layer]))
    trained: Any = stepwise.config.model_spec.blocks[1].mixer
    assert (trained.rows, trained.bases) == (3, "trained")


def test_cores_stand_between_joint_bases(make: Make) -> None:
    """With the best cores of enough rank, the looped layer is each removed one in turn, norms apart."""
    tensors, spec = read(make)
    for name in tensors:
        if "layers." in name and "_proj" not in name:
            tensors[name] = torch.ones_like(tensors[name])
    rank = 40
    made = recursive(
        tensors, spec, LAYOUT, KEPT, (StaticCoresSpec(rank=rank),), rank=rank, alpha=float(rank), bases="joint"
    )
    static: Any = made.model.decoder.loops[0].static_cores  # pyrefly: ignore
    block: Any = made.model.decoder.layers[1]
    order: Layers = ((0,), (1,), (3,), (4,), (5,))
    targets = [(block.self_attn, "self_attn", name) for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
    targets += [(block.mlp, "mlp", name) for name in ("gate_proj", "up_proj", "down_proj")]
    with torch.no_grad():
        for index, (part, where, name) in enumerate(targets):
            low = part.bases[name]
            for loop, layer in enumerate((1, 3, 4)):
                other = tensors[f"model.decoder.layers.{layer}.{where}.{name}.weight"]
                static.weight[loop, index] = best_core(Bases(low.A, low.B), other - getattr(part, name).weight)
    expected = model_of(cut(spec, "5", order), chosen(tensors, order))
    torch.testing.assert_close(logits(made), logits(expected), atol=1e-4, rtol=1e-3)


def test_every_trained_number_learns(make: Make) -> None:
    tensors, spec = read(make)
    parts: tuple[LoopPart, ...] = (ControllerSpec(rank=3, style=4, core="full"), UpdateGateSpec())
    made = recursive(tensors, spec, LAYOUT, KEPT, parts, rank=3, bases="stepwise").train()
    ids = torch.randint(0, 257, (2, 20))
    made(ids, labels=ids).loss.backward()
    heads: Any = made.model.decoder.loops[0].controller.heads  # pyrefly: ignore
    assert all(head.weight.grad.any() for head in heads.values())
    frozen = [p for name, p in made.named_parameters() if ".bases." in name]
    assert frozen and all(p.grad is None and p.dtype == torch.float32 for p in frozen)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layout": "3"}, "layout '3' has no loop: write for example '8 loop"),
        ({"kept": ((0,), (5,), (5,))}, "layer 5 of looped block 1 is inside prelude or coda"),
        ({"kept": ((0,), (0, 3), (5,))}, "layer 0 of looped block 1 is inside prelude or coda"),
        (
            {"loop_parts": (StaticDiagonalsSpec(rank=3, rows=2),)},
            "static_diagonals.rows is 2, and .* has 3 loops: later",
        ),
        ({"rank": 4}, "loop.controller.rank is 3, and mixer.rank of block 1 4: they must agree"),
        ({"kept": ((0,), (1, 2, 3, 4), (5,))}, "block 1 is the mean of all removed layers"),
    ],
)
def test_what_does_not_fit(changes: dict[str, Any], message: str, make: Make) -> None:
    tensors, spec = read(make)
    given: dict[str, Any] = {"layout": LAYOUT, "kept": KEPT, "loop_parts": (ControllerSpec(rank=3, style=4),)}
    with pytest.raises(OuroborosError, match=message):
        recursive(tensors, spec, **{**given, "rank": 3, **changes})


@pytest.mark.parametrize("pooling", ["token", "prefix", "prompt"])
def test_decoding_is_the_same_function_at_every_depth(pooling: Any, make: Make) -> None:
    """With a cache and without, in chunks, padded on the left; fewer loops than the layout has, and more."""
    tensors, spec = read(make)
    tensors = {name: 0.25 * t if "_proj" in name else t for name, t in tensors.items()}  # or rounding grows by loops
    controller = ControllerSpec(rank=3, style=4, pooling=pooling, **({"prompt": 5} if pooling == "prompt" else {}))
    parts: tuple[LoopPart, ...] = (controller, LoopGainSpec(form="channel"), BridgeSpec())
    made = recursive(tensors, spec, "1 loop:(2)x2 1", ((0,), (2,), (3,), (5,)), parts, rank=3, bases="stepwise")
    perturb(made.model.decoder.loops, 0.15)
    outputs = []
    for loops in (1, 2, 4):
        subject = prepare(made.with_loops(loops))
        outputs.append(subject.logits)
        for check in (check_causal, check_cached, check_chunked, check_static_cache, check_left_padding):
            check(subject)
    assert all((one - other).abs().max() > 1e-2 for one, other in itertools.pairwise(outputs)), "depth matters"
    controls: Any = made.model.decoder.loops[0].controller  # pyrefly: ignore
    for head in controls.heads.values():
        nn.init.zeros_(head.weight)
    assert (prepare(made.with_loops(2)).logits - outputs[1]).abs().max() > 1e-3, "and so does the Controller"

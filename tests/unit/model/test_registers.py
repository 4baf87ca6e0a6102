"""Registers: learned tokens in front of the text. The harness checks them with every kind of part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ouroboros.config import AttentionSpec
from ouroboros.config.parts.delta import DeltaSpec
from ouroboros.config.parts.stem import LearnedPositionsSpec
from ouroboros.model.executor import observe
from ouroboros.model.modeling import OuroborosForCausalLM, OuroborosModel

Build = Callable[..., OuroborosForCausalLM]
FILTERS: dict[str, Any] = {
    "mixer": AttentionSpec(num_heads=2, k_shift=True, v_shift=True),
    "residual": DeltaSpec(values=2, compressor="token", embedding_conv=True),
}


def test_are_seen_and_do_not_see(build: Build, ids: Tensor) -> None:
    model = build(registers=3)
    before = model(ids).logits
    store = model(ids, use_cache=True).past_key_values
    _, prefix = store.register_prefix
    other = model((ids + 1) % 30, use_cache=True).past_key_values
    assert all(
        torch.equal(a, b) for one, two in zip(prefix, other.register_prefix[1]) for a, b in zip(one[:2], two[:2])
    )
    assert [layer.get_seq_length() for layer in store.layers] == [9] * 4
    with torch.no_grad():
        model.model.registers.mul_(2)
    gap = (model(ids).logits - before).abs().amax(-1)
    assert (gap > 1e-4).all()


def test_run_once_per_checkpoint(build: Build, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without gradients their states are kept until a weight they meet, or the precision, changes."""
    model, runs = build(registers=3), []
    compute = OuroborosModel._compute_prefix
    monkeypatch.setattr(OuroborosModel, "_compute_prefix", lambda self, run: runs.append(run) or compute(self, run))
    with torch.no_grad():
        first = model(ids).logits
        model(ids + 1, use_cache=True)
        assert len(runs) == 1
        model.model.norm.weight.mul_(2)  # the registers never meet it
        model(ids)
        assert len(runs) == 1
        model.model.decoder.layers[0].mlp.down_proj.weight.mul_(1.5)
        changed = model(ids).logits
        assert len(runs) == 2
        fresh = OuroborosForCausalLM(model.config).eval()
        fresh.load_state_dict(model.state_dict())
        assert torch.equal(fresh(ids).logits, changed) and not torch.equal(first, changed)
        with torch.autocast("cpu", torch.bfloat16):
            model(ids)
        assert len(runs) == 4
        model.with_loops(3)(ids)
        assert len(runs) == 5
    model(ids)
    assert len(runs) == 6


@pytest.mark.parametrize("stem", [(), (LearnedPositionsSpec(),)], ids=["rope", "learned positions"])
def test_train_with_the_text_as_one_sequence(build: Build, ids: Tensor, stem: Any) -> None:
    """Training without padding takes another way to the same numbers and gradients."""
    model, found = build(registers=3, stem=stem), []
    for training in (False, True):
        states: list[Tensor] = []
        model.train(training)
        model.zero_grad()
        with observe(model, on_loop=lambda segment, loop, before, after, kept=states: kept.append(after)):
            loss = model(ids, labels=ids, use_cache=False).loss
        assert [state.shape for state in states] == [(2, 9, 16)] * 2, "of the text alone"
        loss.backward()
        gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
        found.append((loss, *states, *gradients))
    for apart, together in zip(*found, strict=True):
        torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-6)


def test_meet_the_expansion(build: Build, ids: Tensor) -> None:
    """Its weights decide what the registers leave, so a change of them is noticed; and training takes another way."""
    model = build(**FILTERS, registers=2)
    with torch.no_grad():
        model(ids)
        model.model.expansion.weight.mul_(1.5)
        changed = model(ids).logits
    torch.testing.assert_close(model(ids).logits, changed)
    torch.testing.assert_close(model.train()(ids).logits, changed, rtol=1e-5, atol=1e-5)

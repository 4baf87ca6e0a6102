"""Sliding windows against a slow reading of what they mean, and through every way that keys are kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ouroboros.config import AttentionSpec, BlockOverride, FeedForwardSpec, ModelSpec
from ouroboros.errors import OuroborosError
from ouroboros.model.configuration import OuroborosConfig
from ouroboros.model.modeling import OuroborosForCausalLM
from ouroboros.model.window import key_positions, within
from ouroboros.serve.fast import FastDecoder


def sharp(**options: Any) -> OuroborosForCausalLM:
    """A model whose attention is far from uniform; its blocks see 3 tokens, 5, and all."""
    mixer = AttentionSpec(num_heads=4, num_kv_heads=2, window=3)
    overrides = tuple(BlockOverride(where=where, set={"mixer.window": w}) for where, w in (("1", 5), ("2", None)))
    spec = ModelSpec(layout="3", hidden_size=32, vocab_size=50, overrides=overrides, **options)
    spec = spec.replace(mixer=mixer, ffn=FeedForwardSpec(intermediate_size=32))
    torch.manual_seed(0)
    model = OuroborosForCausalLM(OuroborosConfig.from_spec(spec)).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.4)
    return model


def first_differences(model: OuroborosForCausalLM) -> list[int]:
    """How far behind token 2 the last state is that depends on it."""
    ids = torch.arange(2, 22)[None]
    other = ids.clone()
    other[0, 2] = 40
    with torch.no_grad():
        change = (model(ids).logits - model(other).logits).abs().amax(-1)[0]
    return [at - 2 for at in range(20) if change[at] > 0]


def test_a_token_sees_a_window() -> None:
    """Three blocks of window 3 reach 2 tokens further each; itself is one of the three."""
    spec = ModelSpec(layout="3", hidden_size=32, vocab_size=50).replace(mixer=AttentionSpec(num_heads=2, window=3))
    torch.manual_seed(0)
    model = OuroborosForCausalLM(OuroborosConfig.from_spec(spec)).eval()
    assert first_differences(model) == list(range(7))
    assert first_differences(sharp()) == list(range(18))


@pytest.mark.parametrize("registers", [0, 2])
@pytest.mark.parametrize("sizes", [[1] * 20, [9, 1, 1, 6, 3], [20]])
def test_cached_equals_uncached(registers: int, sizes: list[int]) -> None:
    model = sharp(registers=registers)
    ids = torch.randint(0, 50, (2, 20))
    with torch.no_grad():
        whole, cache, found = model(ids).logits, None, []
        for part in ids.split(sizes, dim=1):
            out = model(part, past_key_values=cache, use_cache=True)
            cache, found = out.past_key_values, [*found, out.logits]
    torch.testing.assert_close(torch.cat(found, dim=1), whole, rtol=1e-4, atol=1e-4)


def test_left_padding_does_not_count() -> None:
    model = sharp()
    ids, pad = torch.randint(1, 50, (1, 12)), torch.zeros(1, 5, dtype=torch.long)
    mask = torch.cat((pad, torch.ones_like(ids)), dim=1)
    with torch.no_grad():
        padded = model(torch.cat((pad, ids), dim=1), attention_mask=mask).logits[:, 5:]
        torch.testing.assert_close(padded, model(ids).logits, rtol=1e-4, atol=1e-4)


def test_registers_are_always_seen_in_training_too() -> None:
    model, ids = sharp(registers=2), torch.randint(0, 50, (1, 15))
    with torch.no_grad():
        torch.testing.assert_close(model.train()(ids).logits, model.eval()(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["none", "boolean", "additive"])
def test_mask_against_a_loop(form: str) -> None:
    T, R, window = 6, 2, 3
    causal = torch.ones(1, 1, T, R + T, dtype=torch.bool).tril(R)
    mask: Any = {"none": None, "boolean": causal, "additive": torch.zeros(causal.shape).masked_fill(~causal, -1e9)}
    at = torch.arange(R, R + T)[None]
    keys_at = key_positions(torch.arange(T)[None], T, 0, R)
    found = within(mask[form], window, at, keys_at, R)
    assert found is not None and keys_at.tolist() == [list(range(R + T))]
    seen = found if found.dtype == torch.bool else found > -1
    for query in range(T):
        expected = [key < R or query - window < key - R <= query for key in range(R + T)]
        assert seen[0, 0, query].tolist() == expected
    assert within(mask[form], None, at, keys_at, R) is mask[form]


def test_a_text_within_the_window_stays_on_the_fast_path() -> None:
    at = torch.arange(6)[None]
    assert within(None, 6, at, at, 0) is None and within(None, 5, at, at, 0) is not None


def test_ranges() -> None:
    with pytest.raises(OuroborosError, match=r"mixer.window must be >= 1 or null, got 0"):
        AttentionSpec(window=0)
    with pytest.raises(OuroborosError, match=r"mixer.score_channels must be > 0 or null, got 0"):
        AttentionSpec(score_channels=0.0)


@pytest.mark.parametrize("registers", [0, 2])
def test_fast_decoding_has_windows(registers: int) -> None:
    model, ids = sharp(registers=registers), torch.randint(0, 50, (1, 9))
    options: dict[str, Any] = {"max_new_tokens": 15, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert FastDecoder(compile=False).generate(model, ids, **options).equal(model.generate(ids, **options))

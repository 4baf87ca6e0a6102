"""The fast loop writes what ``generate`` writes, compiled or not, and says what it does not serve."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import pytest
import torch

from ouroboros.api import build
from ouroboros.config import (
    AttentionSpec,
    BlockOverride,
    FeedForwardSpec,
    LayerNormSpec,
    ModelSpec,
    NoFeedForwardSpec,
    Recipe,
    RMSNormSpec,
    RopeSpec,
)
from ouroboros.config.parts.delta import DeltaSpec
from ouroboros.config.parts.halt import HaltSpec
from ouroboros.config.parts.head import LinearHeadSpec
from ouroboros.config.parts.loop import (
    ContractiveStepSpec,
    InjectionSpec,
    LoopEmbeddingSpec,
    LoopNormSpec,
    RecurrenceGateSpec,
)
from ouroboros.config.parts.osam import OsamSpec
from ouroboros.config.parts.stem import EmbeddingNormSpec, NgramSpec, SmearSpec
from ouroboros.errors import OuroborosError
from ouroboros.model.modeling import OuroborosForCausalLM
from ouroboros.serve import fast
from ouroboros.serve.fast import FastDecoder
from ouroboros.serve.sampling import Sampling
from ouroboros.serve.stream import Continuation

BASE = ModelSpec(layout="1 (2)x2 1", hidden_size=32, init_std=0.2).replace(  # far from ties
    mixer=AttentionSpec(num_heads=4, num_kv_heads=2), ffn=FeedForwardSpec(intermediate_size=48)
)
EVERY_LOOP_PART = (
    InjectionSpec(mode="concat"),
    LoopEmbeddingSpec(),
    LoopNormSpec(),
    RecurrenceGateSpec(),
    ContractiveStepSpec(step=0.7),
)
FILTERS: dict[str, Any] = {
    "residual": DeltaSpec(values=2, compressor="token", embedding_conv=True),
    "mixer": AttentionSpec(num_heads=4, num_kv_heads=2, k_shift=True, v_shift=True),
}
PUBLISHED_STATE = BASE.replace(
    layout="1",
    mixer=OsamSpec(buckets=64, readout_hidden=24, gate_cap=4.0),
    ffn=NoFeedForwardSpec(),
    norm=LayerNormSpec(placement="final", eps=1e-5),
    tie_embeddings=False,
)
"""A memory of constant size and nothing else; its gates are wide open, so that what it remembers tells."""
STATE = OsamSpec(
    buckets=64,
    readout_hidden=24,
    detach_state=False,
    gate_cap=4.0,
    frequencies=2,
    decay=True,
    normalisation="rms",
)
SPECS = {
    "state as published": PUBLISHED_STATE,
    "state, read now and then": PUBLISHED_STATE.replace(
        mixer=dataclasses.replace(PUBLISHED_STATE.block.mixer, kupdate=3)
    ),
    "state, loop, registers": BASE.replace(mixer=STATE, registers=3),
    "state, share_last_kv": BASE.replace(mixer=STATE, share_last_kv=True),
    "state, filters over tokens": BASE.replace(
        layout="2", mixer=STATE, residual=DeltaSpec(values=2, compressor="token")
    ),
    "loop": BASE,
    "plain": BASE.replace(layout="3", norm=RMSNormSpec(placement="sandwich"), tie_embeddings=False),
    "halting": BASE.replace(layout="1 (1)x4", loop=(HaltSpec(hidden=48, bias=0.0),), registers=2),
    "registers": BASE.replace(registers=3, head=LinearHeadSpec(logit_softcap=20.0), stem=(EmbeddingNormSpec(),)),
    "share_last_kv": BASE.replace(loop=EVERY_LOOP_PART, share_last_kv=True),
    "registers, share_last_kv": BASE.replace(registers=2, share_last_kv=True),
    "filters over tokens": BASE.replace(registers=2, **FILTERS),
    "filters, share_last_kv": BASE.replace(share_last_kv=True, **FILTERS),
    "tokens before": BASE.replace(stem=(NgramSpec(trigram=True), SmearSpec(boundary=5)), registers=2),
    "blocks that differ": BASE.replace(
        overrides=(
            BlockOverride(where="0", set={"mixer": {"kind": "osam", "buckets": 64, "gate_cap": 4.0}}),
            BlockOverride(where="1", set={"mixer": {"kind": "bottleneck_attention", "cache": "latent"}}),
        )
    ),
    "attention options": BASE.replace(
        mixer=AttentionSpec(
            num_heads=4, qk_norm="after_rope", query_gain=1.5, qkv_bias=True, rope=RopeSpec(fraction=0.5)
        ),
    ),
}
GREEDY: dict[str, Any] = {
    "do_sample": False,
    "repetition_penalty": 1.2,
}  # without a penalty it would soon go in circles
SAMPLED: dict[str, Any] = {
    "do_sample": True,
    "temperature": 1.3,
    "top_p": 0.9,
    "top_k": 40,
    "repetition_penalty": 1.1,
    "no_repeat_ngram_size": 3,
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def model_of(spec: ModelSpec) -> OuroborosForCausalLM:
    torch.manual_seed(0)
    return build(Recipe(name="test", model=spec)).eval()


def prompt(length: int = 7) -> torch.Tensor:
    return torch.randint(0, 256, (1, length), generator=torch.Generator().manual_seed(1))


def both(decoder: FastDecoder, model: OuroborosForCausalLM, ids: torch.Tensor, **options: Any) -> list[list[int]]:
    """Tokens of ``generate`` and of the decoder, from the same random numbers."""
    found = []
    for generate in (model.generate, lambda *a, **k: decoder.generate(model, *a, **k)):
        torch.manual_seed(3)
        found.append(generate(ids, **options)[0].tolist())
    return found


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", SPECS)
def test_same_tokens_as_generate(name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast, "SMALLEST", 8)  # so that the buffers grow on the way
    model = model_of(SPECS[name])
    decoder = FastDecoder(compile=False)
    views = [model, model.with_loops(3)] if model.schedule.is_looped else [model]
    for view in views:
        expected, found = both(decoder, view, prompt(), max_new_tokens=30, **options)
        assert found == expected
        assert len(set(found[7:])) > 3, "too uniform to tell anything"


@pytest.mark.parametrize("length", [1, 7, 8, 9])
def test_prompts_around_the_size_of_a_buffer(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast, "SMALLEST", 8)
    expected, found = both(FastDecoder(compile=False), model_of(BASE), prompt(length), max_new_tokens=10, **GREEDY)
    assert found == expected


def test_ends_at_the_end_of_text() -> None:
    model = model_of(BASE)
    whole = model.generate(prompt(), max_new_tokens=20, **GREEDY)[0].tolist()
    decoder = FastDecoder(compile=False)
    expected, found = both(
        decoder, model, prompt(), max_new_tokens=20, eos_token_id=whole[12], pad_token_id=0, **GREEDY
    )
    assert found == expected == whole[: whole.index(whole[12], 7) + 1]


def test_a_state_stays_where_it_is_and_does_not_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is written: the same tensors at the same addresses, and no room for tokens besides."""
    model, seen = model_of(SPECS["state, loop, registers"]), []
    real = fast.next_logits

    def noting(model: Any, token: torch.Tensor, at: torch.Tensor, held: Any, *rest: Any) -> torch.Tensor:
        seen.append([(name, x.data_ptr(), tuple(x.shape)) for entry in held for name, x in entry.items()])
        return real(model, token, at, held, *rest)

    monkeypatch.setattr(fast, "next_logits", noting)
    FastDecoder(compile=False).generate(model, prompt(), max_new_tokens=40, **GREEDY)
    assert len(seen) == 39 and all(entries == seen[0] for entries in seen)
    assert [name for name, _, _ in seen[0]] == ["state"] * 6
    assert {shape for _, _, shape in seen[0]} == {(1, 2 * 32, 32 + 1)}


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    "spec", [dataclasses.replace(BASE, layout="(1)x2", registers=2), PUBLISHED_STATE], ids=["keys and values", "state"]
)
def test_compiled(spec: ModelSpec, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """One program serves every buffer size, other weights, and greedy and sampled choice."""
    if fast.missing_compiler(torch.device("cpu")):
        pytest.skip("no compiler on this machine")
    monkeypatch.setattr(fast, "SMALLEST", 8)
    model, decoder = model_of(spec), FastDecoder()
    for options in (GREEDY, SAMPLED):
        expected, found = both(decoder, model, prompt(), max_new_tokens=30, **options)
        assert found == expected
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.neg_()
    expected, found = both(decoder, model, prompt(), max_new_tokens=30, **GREEDY)
    assert found == expected
    assert len(decoder._steps) == 1 and decoder.compile
    assert [r.message for r in caplog.records if r.name.startswith("ouroboros")] == []


def broken_compiler(*arguments: Any) -> None:
    raise torch._dynamo.exc.TorchRuntimeError("no luck\nmore")


@pytest.mark.parametrize("reason", ["missing", "failed"])
def test_without_a_compiler(reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A missing or broken compiler is reported once; the tokens are the same."""
    if reason == "missing":
        monkeypatch.setattr(fast, "missing_compiler", lambda device: "no compiler")
    else:
        monkeypatch.setattr(fast, "compiled_step", lambda: broken_compiler)
    decoder = FastDecoder()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            expected, found = both(decoder, model_of(BASE), prompt(), max_new_tokens=5, **GREEDY)
            assert found == expected
    (record,) = caplog.records
    assert {"missing": "no compiler", "failed": "no luck"}[reason] in record.message
    assert "\n" not in record.message and "uncompiled" in record.message


def test_errors_of_the_model_are_not_the_compilers(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*arguments: Any) -> None:
        raise KeyError("a defect")

    monkeypatch.setattr(fast, "compiled_step", lambda: wrong)
    monkeypatch.setattr(fast, "missing_compiler", lambda device: None)
    with pytest.raises(KeyError, match="a defect"):
        FastDecoder().generate(model_of(BASE), prompt(), max_new_tokens=5, **GREEDY)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"num_beams": 2}, "several sequences, beams"),
        ({"return_dict_in_generate": True}, "return_dict_in_generate"),
        ({"use_cache": False}, "use_cache=False"),
        ({"attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1, 1]])}, "padding"),
    ],
)
def test_refuses_what_it_does_not_serve(options: dict[str, Any], names: str) -> None:
    with pytest.raises(OuroborosError, match=f"does not serve {names}: use model.generate"):
        FastDecoder(compile=False).generate(model_of(BASE), prompt(), max_new_tokens=5, do_sample=False, **options)


def test_refuses_several_sequences_and_filled_caches() -> None:
    model = model_of(BASE)
    decoder = FastDecoder(compile=False)
    with pytest.raises(OuroborosError, match="several sequences"):
        decoder.generate(model, prompt().repeat(2, 1), max_new_tokens=5, do_sample=False)
    with torch.no_grad():
        filled = model(prompt()[:, :3], use_cache=True).past_key_values
    with pytest.raises(OuroborosError, match="a cache that holds tokens"):
        decoder.generate(model, prompt(), past_key_values=filled, max_new_tokens=5, do_sample=False)


def test_continuation_is_the_same_text(model, tokenizer) -> None:
    """Streaming, stop strings and the room in the context are those of the slow way."""
    for sampling in (Sampling(max_new_tokens=40), Sampling(max_new_tokens=100, temperature=0.0), Sampling(stop=("e",))):
        texts = []
        for decoder in (None, FastDecoder(compile=False)):
            torch.manual_seed(5)
            continuation = Continuation(model, tokenizer, b"abc", sampling, decoder)
            pieces = "".join(continuation)
            assert pieces == continuation.text.decode("utf-8", "replace")
            texts.append(continuation.text)
        assert texts[0] == texts[1] and texts[0]

"""Scores against closed forms and a position-by-position computation; windows, units, records and refusals."""

from __future__ import annotations

import hashlib
import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ouroboros.data.tokenize import character_tokenizer
from ouroboros.errors import OuroborosError
from ouroboros.eval.score import (
    data_hash,
    first_bytes,
    next_token_nats,
    score,
    score_loops,
)
from ouroboros.eval.stats import paired_difference
from ouroboros.eval.windows import evaluating, log_probs


def test_a_uniform_model_has_log2_of_the_vocabulary(fakes: SimpleNamespace, texts: list[bytes]) -> None:
    found = score(fakes.Uniform(), fakes.ByteTokenizer(), texts, window=64, model_name="uniform")
    assert found.bits_per_byte == pytest.approx(math.log2(257), rel=1e-6)
    assert found.nats_per_token == pytest.approx(math.log(257), rel=1e-6)
    assert found.bytes == found.tokens == sum(map(len, texts))
    assert (found.documents, found.empty_documents, found.window, found.stride) == (8, 1, 64, 64)
    assert found.unit_bytes.tolist() == [700, 1, 64, 65, 63, 128, 4500, 4500, 333] and found.units == 9
    assert found.stderr == pytest.approx(0, abs=1e-6) == found.nats_per_token_stderr


def naive_nats(model: Any, document: bytes, window: int, stride: int) -> float:
    """One forward pass per byte."""
    sequence, total = [256, *document], 0.0
    for target in range(len(document)):
        start = 0 if target < window else ((target - window) // stride + 1) * stride
        inputs = torch.tensor([sequence[start : target + 1]])
        with evaluating(model):
            total -= float(log_probs(model, inputs)[0, -1, document[target]])
    return total


@pytest.mark.parametrize(("window", "stride"), [(64, None), (64, 16), (64, 1), (7, 5), (1, 1), (512, 512)])
def test_scores_equal_one_forward_pass_per_byte(
    fakes: SimpleNamespace, texts: list[bytes], window: int, stride: int | None
) -> None:
    model, short = fakes.Bigram(), [text[:200] for text in texts]
    found = score(model, fakes.ByteTokenizer(), short, window=window, stride=stride)
    expected = [naive_nats(model, text, window, stride or window) for text in short if text]
    assert found.unit_nats == pytest.approx(expected, rel=1e-6)
    assert found.nats == pytest.approx(sum(expected), rel=1e-6)
    assert found.nats_per_token_stderr == pytest.approx(found.stderr * math.log(2))  # a token is a byte
    assert found.bits_per_byte == pytest.approx(sum(expected) / math.log(2) / sum(map(len, short)), rel=1e-6)


@pytest.mark.parametrize("batch_size", [1, 3, 1000])
def test_batching_changes_nothing(fakes: SimpleNamespace, texts: list[bytes], batch_size: int) -> None:
    model, tokenizer = fakes.Bigram(), fakes.ByteTokenizer()
    base = score(model, tokenizer, texts, window=64, stride=48)
    found = score(model, tokenizer, texts, window=64, stride=48, batch_size=batch_size)
    assert found.bits_per_byte == pytest.approx(base.bits_per_byte, abs=1e-9)
    assert found.unit_nats == pytest.approx(base.unit_nats, rel=1e-9)


def test_batches_are_bounded_and_waste_little(fakes: SimpleNamespace, texts: list[bytes]) -> None:
    model = fakes.Uniform()
    score(model, fakes.ByteTokenizer(), texts * 20, window=64)
    assert max(rows * length for rows, length in model.shapes) <= 1024
    assert max(length for _, length in model.shapes) == 64
    assert sum(rows * length for rows, length in model.shapes) < 1.1 * 20 * sum(map(len, texts))


def test_a_large_vocabulary_makes_small_batches(fakes: SimpleNamespace, texts: list[bytes]) -> None:
    model = fakes.Uniform(vocabulary=2**17)
    score(model, fakes.ByteTokenizer(), texts[:1], window=64)
    assert max(rows * length for rows, length in model.shapes) <= 256


def test_modes_and_gradients_are_restored_even_after_an_error(fakes: SimpleNamespace) -> None:
    model = fakes.Uniform()
    model.train()
    model.inner.eval()
    score(model, fakes.ByteTokenizer(), [b"abc"], window=8)
    with pytest.raises(RuntimeError, match="boom"), evaluating(model):
        assert not model.training
        raise RuntimeError("boom")
    assert model.training and not model.inner.training and torch.is_grad_enabled()


def test_units_and_interval(fakes: SimpleNamespace, texts: list[bytes]) -> None:
    model, tokenizer = fakes.Bigram(), fakes.ByteTokenizer()
    whole = score(model, tokenizer, [texts[6]], window=64)
    assert (
        whole.units == 2
        and whole.unit == "pieces of at least 4096 bytes"
        and whole.stderr is not None
        and whole.interval is not None
    )
    assert whole.interval[0] < whole.bits_per_byte < whole.interval[1]
    many = score(model, tokenizer, [texts[6][at : at + 900] for at in range(0, 9000, 900)], window=64)
    assert many.units == 10 and many.unit == "whole documents" and many.interval is not None
    alone = score(model, tokenizer, [texts[0]], window=64)
    assert alone.units == 1 and alone.stderr is None and alone.interval is None


def test_the_record_is_json(fakes: SimpleNamespace) -> None:
    found = score(fakes.Uniform(), fakes.ByteTokenizer(), [b"abc"], window=8, stride=4, model_name="m").to_dict()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    wanted = "bits_per_byte nats_per_token bytes tokens stderr loops window stride data_sha256 model bos_rule units"
    assert set(wanted.split()) <= set(found) and not {"unit_nats", "unit_bytes"} & set(found)
    assert (
        found["stderr"] is None is found["nats_per_token_stderr"]
        and found["interval"] is None
        and found["loops"] is None
    )
    assert found["data_sha256"] == hashlib.sha256(b"abc").hexdigest()


def test_data_hash_knows_boundaries_and_ignores_empty_documents() -> None:
    assert data_hash([b"ab", b"c"]) != data_hash([b"a", b"bc"]) != data_hash([b"abc"])
    assert data_hash([b"", b"abc"]) == data_hash([b"abc"])


def test_bytes_are_those_of_the_text_whatever_the_tokens(fakes: SimpleNamespace) -> None:
    text = b"the cloth of the moth " * 500
    by_bytes = score(fakes.Uniform(), fakes.ByteTokenizer(), [text], window=64)
    by_pairs = score(fakes.Uniform(), fakes.PairTokenizer(), [text], window=64)
    assert by_pairs.bytes == by_bytes.bytes == len(text)
    assert by_pairs.tokens == len(text) - text.count(b"th")
    assert by_pairs.bits_per_byte == pytest.approx(by_pairs.tokens * math.log2(257) / len(text), rel=1e-6)
    assert by_pairs.unit_bytes.tolist() == by_bytes.unit_bytes.tolist()
    assert paired_difference(by_pairs, by_bytes).verdict == "better"


def test_tokens_without_bytes_of_their_own_still_score(fakes: SimpleNamespace, monkeypatch: Any) -> None:
    tokenizer, text = fakes.PairTokenizer(), b"the cloth of the moth " * 500
    base = score(fakes.Uniform(), tokenizer, [text], window=64)

    def refuse() -> None:
        raise OuroborosError("no bytes of its own")

    monkeypatch.setattr(tokenizer, "token_bytes", refuse)
    found = score(fakes.Uniform(), tokenizer, [text], window=64)
    assert found.bits_per_byte == base.bits_per_byte and found.unit_nats == pytest.approx(base.unit_nats, rel=0.01)


def test_max_bytes_cuts_the_text_but_no_character(fakes: SimpleNamespace) -> None:
    documents = ["h\u00e9llo".encode(), "w\u00f6rld".encode(), b"never"]
    model = fakes.Bigram()
    for tokenizer in (fakes.ByteTokenizer(), fakes.PairTokenizer()):
        found = score(model, tokenizer, documents, window=8, max_bytes=8)
        assert found.bytes == 7 and found.documents == 2
        assert found.data_sha256 == data_hash([documents[0], b"w"])
    assert first_bytes(b"\x80" * 9, 6) == b"\x80" * 3 and first_bytes(b"abc", 9) == b"abc"


def test_loops_make_views_and_are_recorded_and_the_text_is_prepared_once(
    fakes: SimpleNamespace, texts: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = fakes.Looped(loops=2), fakes.ByteTokenizer()
    encoded: list[bytes] = []
    encode = tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda text: encoded.append(text) or encode(text))
    found = score_loops(model, tokenizer, texts, [1, 2, 4, None], window=64)
    assert [one.loops for one in found] == [1, 2, 4, 2] and encoded == [text for text in texts if text]
    assert len({one.bits_per_byte for one in found}) == 3
    assert found[3].nats == found[1].nats == score(model, tokenizer, texts, window=64).nats
    with pytest.raises(OuroborosError, match="has no loops"):
        score(fakes.Uniform(), tokenizer, texts, window=64, loops=2)


def test_predict_and_autocast_reach_the_model(fakes: SimpleNamespace) -> None:
    states = []

    def predict(model: Any, ids: torch.Tensor) -> torch.Tensor:
        states.append(torch.is_autocast_enabled("cpu"))
        return torch.full((*ids.shape, 257), -math.log(2.0))

    for amp in (None, torch.bfloat16):
        found = score(fakes.Uniform(), fakes.ByteTokenizer(), [b"abcd"], window=8, predict=predict, amp=amp)
        assert found.bits_per_byte == pytest.approx(1.0)
    assert states == [False, True]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 513}, "give 512 or less"),
        ({"window": 0}, "window must be >= 1"),
        ({"window": 8, "stride": 9}, "stride must be between 1 and the window"),
        ({"window": 8, "stride": 0}, "stride must be between"),
        ({"window": 8, "max_bytes": 0}, "max_bytes must be >= 1"),
    ],
)
def test_bad_settings_are_named(fakes: SimpleNamespace, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OuroborosError, match=message):
        score(fakes.Uniform(), fakes.ByteTokenizer(), [b"abc"], **options)


@pytest.mark.parametrize("documents", [[], [b""], [b"", b""]])
def test_no_data_is_an_error(fakes: SimpleNamespace, documents: list[bytes]) -> None:
    with pytest.raises(OuroborosError, match="no data to score"):
        score(fakes.Uniform(), fakes.ByteTokenizer(), documents, window=8)


def test_an_unknown_character_costs_which_of_all_others_it_is(
    fakes: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = character_tokenizer([b"abc \n"])
    model = fakes.Uniform(vocabulary=tokenizer.vocab_size)
    text = "ab\u00e9 c\U0001f642".encode()
    found = score(model, tokenizer, [b"abc", text], window=4)
    known = score(model, tokenizer, [b"abc", b"abc ca"], window=4)
    assert (found.bytes, found.tokens, found.unknown_tokens, known.unknown_tokens) == (3 + len(text), 9, 2, 0)
    assert found.nats == pytest.approx(9 * math.log(7) + 2 * math.log(0x110000 - 0x800 - 5), rel=1e-6)
    assert found.unit_nats[0] == known.unit_nats[0] and known.nats == pytest.approx(9 * math.log(7), rel=1e-6)
    assert found.bits_per_byte == pytest.approx(found.nats / math.log(2) / (3 + len(text)))
    assert "2 of 6 characters are unknown" in caplog.text


def test_an_unknown_character_excuses_no_other_change(fakes: SimpleNamespace) -> None:
    tokenizer = character_tokenizer([b"abc"])
    encode = tokenizer.encode
    tokenizer.encode = lambda text: encode(text)[::-1]
    with pytest.raises(OuroborosError, match="not lossless"):
        score(fakes.Uniform(), tokenizer, [b"ab?"], window=8)


def test_a_lossy_tokenizer_is_refused(fakes: SimpleNamespace) -> None:
    tokenizer = fakes.ByteTokenizer()
    tokenizer.encode = lambda text: fakes.ByteTokenizer().encode(text.lower())
    score(fakes.Uniform(), tokenizer, [b"fine"], window=8)
    with pytest.raises(OuroborosError, match=r"document 1: .*not lossless"):
        score(fakes.Uniform(), tokenizer, [b"fine", b"Not"], window=8)


def test_another_models_tokenizer_is_refused(fakes: SimpleNamespace) -> None:
    with pytest.raises(OuroborosError, match="vocab_size 200"):
        score(fakes.Uniform(vocabulary=200), fakes.ByteTokenizer(), [b"abc"], window=8)


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_scores_that_are_not_finite_are_refused(fakes: SimpleNamespace, value: float) -> None:
    def predict(model: Any, ids: torch.Tensor) -> torch.Tensor:
        table = log_probs(model, ids)
        table[0, 2] = value
        return table

    with pytest.raises(OuroborosError, match="document 0: the score of token 2"):
        score(fakes.Uniform(), fakes.ByteTokenizer(), [b"abcd"], window=8, predict=predict)


def test_losses_by_position(fakes: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = fakes.Bigram(), torch.randint(257, (5, 12), generator=torch.Generator().manual_seed(0))
    model.train()
    found = next_token_nats(model, ids)
    logits = model.eval().logits(ids)
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    assert found.dtype == torch.float64 and torch.allclose(found, expected.double(), atol=1e-5)
    monkeypatch.setattr("ouroboros.eval.windows.CPU_BATCH_TOKENS", 24)
    model.shapes.clear()
    assert torch.allclose(next_token_nats(model, ids), found, atol=1e-6) and model.shapes == [(2, 11), (2, 11), (1, 11)]

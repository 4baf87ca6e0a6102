from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from ouroboros.config import DataSpec
from ouroboros.data.masks import IGNORED, Masks, ends_answered, hide, micro_divisors, shown
from ouroboros.data.shards import prepare
from ouroboros.data.stream import open_loader
from ouroboros.data.tokenize import TextTokenizer, byte_tokenizer, character_tokenizer, train_bpe
from ouroboros.errors import OuroborosError

TEXT = "Q: h\u00e9 \u4e16\nA: \u00e9\u4e16 yes\n".encode()
ANSWER = (TEXT.index(b"A:") + 2, len(TEXT))
TOKENIZERS = {
    "bytes": byte_tokenizer(),
    "bpe": train_bpe([TEXT * 20], 300),
    "chars": character_tokenizer([TEXT.replace("\u4e16".encode(), b"")]),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_token_with_a_byte_of_an_answer_is_learned(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode(TEXT)
    mask = Masks(tokenizer).mask(ids, TEXT, (ANSWER,), "t")
    pieces = [len(tokenizer.decode(ids[i : i + 1])) for i in range(len(ids))]
    ends = np.cumsum(pieces)
    assert ends[-1] == len(TEXT)
    np.testing.assert_array_equal(mask, ends > ANSWER[0])
    assert 0 < mask.sum() < len(ids)


def test_several_answers_none_and_no_answer() -> None:
    masks, ids = Masks(TOKENIZERS["bytes"]), np.frombuffer(b"abcdef", np.uint8)
    assert masks.mask(ids, b"abcdef", ((1, 2), (4, 6)), "t").tolist() == [False, True, False, False, True, True]
    assert masks.mask(ids, b"abcdef", (), "t").tolist() == [False] * 6
    assert masks.mask(ids, b"abcdef", None, "t").tolist() == [True] * 6
    assert masks.mask(ids[:0], b"", ((0, 0),), "t").tolist() == []


def test_the_end_of_a_document() -> None:
    assert ends_answered(b"abc", None) and ends_answered(b"abc", ((0, 1), (2, 3)))
    assert not ends_answered(b"abc", ()) and not ends_answered(b"abc", ((1, 2),))


def test_hidden_ids_come_back_without_a_target() -> None:
    ids = np.array([[0, 5, 6, 65_535]], dtype=np.uint16)
    windows = hide(ids, np.array([[False, True, False, True]]))
    assert windows.tolist() == [[-1, 5, -7, 65_535]]
    back, targets = shown(windows)
    assert back.tolist() == ids.tolist() and targets.tolist() == [[5, IGNORED, 65_535]]


def test_tokens_that_have_no_bytes_or_other_ones_are_refused() -> None:
    bpe = TOKENIZERS["bpe"]
    with pytest.raises(OuroborosError, match=r"^notes: the tokenizer changes this text, .* 'answers'"):
        Masks(bpe).mask(bpe.encode(TEXT)[:-1], TEXT, (ANSWER,), "notes")
    words = TextTokenizer(Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?")), eos_id=1)
    with pytest.raises(OuroborosError, match="has no bytes of its own"):
        Masks(words)


def conversations(path: Path, count: int = 300) -> Path:
    turns = [("user", "What is {}?"), ("assistant", "It is {}."), ("user", "Sure?"), ("assistant", "Yes, {}.")]
    rows = [{"messages": [{"role": r, "content": c.format(n)} for r, c in turns[: 2 + n % 3]]} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_streams_learn_the_same_tokens_as_stored_text(tokenizer, tmp_path):
    """Ids and what is learned of them, also after a restart: masks.hide keeps both in one number."""
    parts = {"valid_fraction": 0.0, "test_fraction": 0.0, "tokenizer": tokenizer, "loss": "answers"}
    source = f"{conversations(tmp_path / 'c.jsonl')}@messages"
    stored = prepare(DataSpec(sources=(source,), **parts), tmp_path / "stored")
    streamed = prepare(DataSpec(sources=(source,), stream=True, **parts), tmp_path / "streamed")
    learned = stored.learned(0)
    assert learned is not None and streamed.learned(0) is None
    expected = hide(np.asarray(stored.tokens("train", 0)), learned)
    assert 0.2 < learned.mean() < 0.8
    first = open_loader(streamed, batch_size=2, sequence_length=30, seed=0)
    windows = [first.next_batch() for _ in range(10)]
    second = open_loader(streamed, batch_size=2, sequence_length=30, seed=0)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    windows += [second.next_batch() for _ in range(10)]
    found = np.concatenate([window[:, 1:].flatten() for window in windows])
    np.testing.assert_array_equal(found, expected[1 : len(found) + 1])
    with pytest.raises(OuroborosError, match="lacks loss"):
        plain = dataclasses.replace(streamed.spec, loss="all")
        streamed.spec = plain
        state = open_loader(streamed, batch_size=2, sequence_length=30, seed=0).state_dict()
        streamed.spec = dataclasses.replace(plain, loss="answers")
        open_loader(streamed, batch_size=2, sequence_length=30, seed=0).load_state_dict(state)


def test_parts_of_a_step_weigh_what_they_learn() -> None:
    """The mean losses of the parts, divided so, add up to the mean over all tokens that all processes learn."""
    mask = np.zeros((4, 6), dtype=bool)
    mask[0, 1:], mask[1, 3] = True, True  # six tokens in the first part, none in the second
    windows = hide(np.arange(24).reshape(4, 6), mask)
    parts, divisors = micro_divisors(windows, 2, lambda own: (own + 2) / 2)
    assert divisors == [4 / 6, np.inf]
    assert np.array_equal(parts[:2], windows[:2]) and (parts[2:, 1:] >= 0).sum() == 1
    assert (windows[2:, 1:] < 0).all(), "the windows of the caller stay"
    losses = np.array([0.0, 1.0, 2.0, 3.0, 4.0, 7.0])  # of the first process; another one has two tokens of loss 1
    own = losses.mean() / divisors[0]
    assert (own + 1.0 / (4 / 2)) / 2 == pytest.approx((losses.sum() + 2) / 8)

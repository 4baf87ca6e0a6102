from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from ouroboros.data import tokenize
from ouroboros.data.tokenize import (
    END_OF_TEXT,
    TextTokenizer,
    byte_tokenizer,
    character_tokenizer,
    is_made_of_text,
    load_tokenizer,
    resolve_tokenizer,
    train_bpe,
)
from ouroboros.errors import OuroborosError

CODE = (
    b'def f(x):\n    """Doc."""\n    if x > 10:\n        return {"a": x, "b": [1, 2, 345678]}\n\n\nclass A:\r\n\tpass\n'
)
PROSE = "It's 1838 \u2013 na\u00efve caf\u00e9s, \u65e5\u672c\u8a9e \U0001f600!\n\n  The end.  ".encode()
NASTY = ["", END_OF_TEXT, f"a {END_OF_TEXT}b", "\ufeffx\r\n\0\r", " , don't .", "\U0001f469\u200d\U0001f469", "e\u0301"]

texts = st.one_of(st.sampled_from(NASTY), st.text(max_size=40), st.text(alphabet=" \n\r\t a.(1<|>", max_size=30))


MAKERS = {
    "bytes": byte_tokenizer,
    "bpe": lambda: train_bpe([CODE * 20, PROSE * 20], 340),
    "chars": lambda: character_tokenizer([CODE, PROSE, END_OF_TEXT.encode()]),
}


@pytest.fixture(scope="module")
def bpe() -> TextTokenizer:
    return MAKERS["bpe"]()


@pytest.fixture(scope="module", params=MAKERS)
def reloaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[TextTokenizer, Any]:
    """A tokenizer, and what transformers reads of the directory that it was saved to."""
    own, path = MAKERS[request.param](), tmp_path_factory.mktemp(request.param)
    own.save(path)
    return own, AutoTokenizer.from_pretrained(path, local_files_only=True)


@given(st.binary(max_size=64))
def test_byte_ids_are_the_bytes(data: bytes) -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode(data)
    assert ids.dtype == np.int32
    assert ids.tolist() == list(data)
    assert tokenizer.decode([tokenizer.eos_id, *ids, tokenizer.eos_id]) == data


def test_byte_tokenizer_sizes() -> None:
    tokenizer = byte_tokenizer()
    assert (tokenizer.kind, tokenizer.vocab_size, tokenizer.eos_id, tokenizer.is_lossless) == ("bytes", 257, 256, True)
    assert tokenizer.token_bytes().tolist() == [1] * 256 + [0]


@given(texts)
def test_auto_tokenizer_agrees(reloaded: tuple[TextTokenizer, Any], text: str) -> None:
    own, other = reloaded
    ids = other(text)["input_ids"]
    assert ids == own.encode(text.encode()).tolist()
    assert other.decode(ids).encode() == own.decode(ids)
    assert other.decode([own.eos_id, *ids], skip_special_tokens=True) == other.decode(ids)


def test_reloaded_special_tokens(reloaded: tuple[TextTokenizer, Any]) -> None:
    own, other = reloaded
    assert other.eos_token_id == other.bos_token_id == other.pad_token_id == own.eos_id
    assert len(other) == own.vocab_size
    assert set(other("a")) == {"input_ids", "attention_mask"}


@given(texts)
def test_bpe_is_lossless_and_never_makes_a_special(bpe: TextTokenizer, text: str) -> None:
    data = text.encode()
    ids = bpe.encode(data)
    assert bpe.decode(ids) == data
    assert bpe.eos_id not in ids.tolist()
    assert int(bpe.token_bytes()[ids].sum()) == len(data)


def test_using_the_transformers_tokenizer_does_not_open_the_door_to_specials(bpe: TextTokenizer) -> None:
    assert bpe.eos_id in bpe.hf(END_OF_TEXT, split_special_tokens=False)["input_ids"]
    assert bpe.eos_id not in bpe.encode(END_OF_TEXT.encode()).tolist()


@settings(max_examples=30)
@given(st.lists(st.sampled_from(["word", "\n", " ", "\r\n", "):", "    ", "9", "\u00e9", "X\n"]), max_size=60))
def test_long_documents_in_pieces_encode_like_whole_ones(bpe: TextTokenizer, parts: list[str]) -> None:
    data = "".join(parts).encode()
    whole = bpe.encode(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenize, "_PIECE_BYTES", 3)
        patch.setattr(tokenize, "_BATCH", 2)
        assert len(list(tokenize._pieces([data], [], True))) >= data[3:].count(b"X\n") // 3
        assert bpe.encode(data).tolist() == whole.tolist()


def test_training_in_pieces_gives_the_same_merges(bpe: TextTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenize, "_PIECE_BYTES", 10)
    assert train_bpe([CODE * 20, PROSE * 20], 340).fingerprint == bpe.fingerprint


def test_encode_many_keeps_documents_apart(bpe: TextTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [CODE * 3, b"", PROSE, b"x\n" * 50]
    expected = [bpe.encode(document).tolist() for document in documents]
    monkeypatch.setattr(tokenize, "_PIECE_BYTES", 20)
    monkeypatch.setattr(tokenize, "_BATCH", 2)
    assert [ids.tolist() for ids in bpe.encode_many(documents)] == expected


def test_bpe_vocabulary_is_exact_and_deterministic(bpe: TextTokenizer) -> None:
    assert (bpe.kind, bpe.vocab_size, bpe.eos_id, bpe.is_lossless) == ("bpe", 340, 339, True)
    again = train_bpe([CODE * 20, PROSE * 20], 340)
    assert again.fingerprint == bpe.fingerprint
    assert train_bpe([PROSE * 20, CODE * 21], 300).fingerprint != bpe.fingerprint


def test_line_break_and_indentation_can_be_one_token(bpe: TextTokenizer) -> None:
    assert len(bpe.encode(b":\n        ")) == 1


def test_too_little_text_for_the_vocabulary_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        tokenizer = train_bpe([b"abab"], 1000)
    assert 257 < tokenizer.vocab_size < 270
    assert tokenizer.eos_id == tokenizer.vocab_size - 1
    assert f"{tokenizer.vocab_size} entries only" in caplog.text


def test_invalid_utf8_names_the_offset(bpe: TextTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenize, "_PIECE_BYTES", 4)
    with pytest.raises(OuroborosError, match=r"notes: invalid UTF-8 at byte 22; the byte tokenizer accepts binary"):
        bpe.encode(b"line\n" * 4 + b"ab\xff", name="notes")
    with pytest.raises(OuroborosError, match="document 2: invalid UTF-8 at byte 0"):
        train_bpe([b"fine", b"\xff"], 300)


def test_load_keeps_everything(tmp_path: Path, bpe: TextTokenizer) -> None:
    for tokenizer in (bpe, byte_tokenizer(), character_tokenizer([CODE, PROSE])):
        tokenizer.save(tmp_path / tokenizer.kind)
        loaded = load_tokenizer(tmp_path / tokenizer.kind)
        assert (loaded.kind, loaded.eos_id, loaded.vocab_size) == (
            tokenizer.kind,
            tokenizer.eos_id,
            tokenizer.vocab_size,
        )
        assert loaded.fingerprint == tokenizer.fingerprint
        loaded.save(tmp_path / "again")
        assert (tmp_path / "again/tokenizer.json").read_bytes() == (
            tmp_path / tokenizer.kind / "tokenizer.json"
        ).read_bytes()


def save_foreign(path: Path, **change: object) -> None:
    """A byte-level tokenizer as others save it, with parts of its definition replaced."""
    train_bpe([CODE * 20], 300).hf.save_pretrained(path)
    state = json.loads((path / "tokenizer.json").read_text())
    (path / "tokenizer.json").write_text(json.dumps(state | change))


def test_foreign_directory(tmp_path: Path) -> None:
    save_foreign(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert (loaded.kind, loaded.vocab_size, loaded.eos_id) == ("bpe", 300, 299)
    assert loaded.decode(loaded.encode(PROSE)) == PROSE
    loaded.save(tmp_path / "copy")
    assert load_tokenizer(tmp_path / "copy").encode(CODE).tolist() == loaded.encode(CODE).tolist()


@pytest.mark.parametrize("foreign", [False, True])
def test_padding_adds_ids_that_no_text_has(foreign: bool, tmp_path: Path) -> None:
    if foreign:
        save_foreign(tmp_path)
    tokenizer = load_tokenizer(tmp_path) if foreign else tokenize.byte_tokenizer()
    size, text = tokenizer.vocab_size, b"some text <|unused300|> <|unused%d|>" % tokenizer.vocab_size
    padded = tokenizer.padded(size + 9)
    assert (padded.vocab_size, padded.eos_id, tokenizer.vocab_size) == (size + 9, tokenizer.eos_id, size)
    padded.save(tmp_path / "padded")
    for found in (padded, load_tokenizer(tmp_path / "padded")):
        assert found.vocab_size == size + 9
        assert found.encode(text).tolist() == tokenizer.encode(text).tolist()
        assert found.decode([*found.encode(text), *range(size, size + 9)]) == text
        assert found.token_bytes()[size:].tolist() == [0] * 9
    assert len(AutoTokenizer.from_pretrained(tmp_path / "padded", local_files_only=True)) == size + 9


def test_normalising_tokenizer_is_not_lossless(tmp_path: Path) -> None:
    save_foreign(tmp_path, normalizer={"type": "Lowercase"})
    loaded = load_tokenizer(tmp_path)
    assert (loaded.kind, loaded.is_lossless) == ("other", False)
    assert loaded.decode(loaded.encode(b"ABC")) == b"abc"


def test_tokens_without_bytes_of_their_own_are_refused(tmp_path: Path) -> None:
    save_foreign(tmp_path, decoder=None)
    with pytest.raises(OuroborosError, match="not a byte-level tokenizer"):
        load_tokenizer(tmp_path).token_bytes()


def test_saved_truncation_is_switched_off(tmp_path: Path) -> None:
    truncation = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    save_foreign(tmp_path, truncation=truncation)
    loaded = load_tokenizer(tmp_path)
    assert loaded.decode(loaded.encode(CODE)) == CODE


def test_unloadable_directories(tmp_path: Path) -> None:
    with pytest.raises(OuroborosError, match="no such directory"):
        load_tokenizer(tmp_path / "none")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(OuroborosError, match="cannot be loaded"):
        load_tokenizer(tmp_path)


def test_directory_without_end_token(tmp_path: Path) -> None:
    save_foreign(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(OuroborosError, match="has no eos_token"):
        load_tokenizer(tmp_path)


def test_resolve(tmp_path: Path) -> None:
    assert resolve_tokenizer("bytes", []).kind == "bytes"
    assert resolve_tokenizer("bpe:300", iter([CODE * 20])).vocab_size == 300
    assert resolve_tokenizer("chars", iter([b"abc", b"cd"])).vocab_size == 4 + 2
    with pytest.raises(OuroborosError, match="did you mean 'chars'"):
        resolve_tokenizer("char", [])
    assert [is_made_of_text(name) for name in ("chars", "bpe:300", "bytes", "dir")] == [True, True, False, False]
    byte_tokenizer().save(tmp_path)
    assert resolve_tokenizer(str(tmp_path), []).kind == "bytes"
    with pytest.raises(OuroborosError, match="did you mean 'bytes'"):
        resolve_tokenizer("byte", [])
    for bad in ("bpe:", "bpe:12", "bpe:4k", "bpe:-300"):
        with pytest.raises(OuroborosError, match="write 'bpe:N'"):
            resolve_tokenizer(bad, [])
    with pytest.raises(OuroborosError, match="at least 257"):
        train_bpe([CODE], 256)


def test_character_tokenizer_sizes() -> None:
    tokenizer = character_tokenizer(["b\u00e9".encode(), b"a\n b"])
    assert (tokenizer.kind, tokenizer.vocab_size, tokenizer.unknown_id, tokenizer.eos_id) == ("chars", 7, 5, 6)
    assert tokenizer.encode("\n ab\u00e9".encode()).tolist() == [0, 1, 2, 3, 4]
    assert tokenizer.token_bytes().tolist() == [1, 1, 1, 1, 2, 0, 0]
    assert tokenizer.decode([6, 2, 5, 4, 6]) == "a\ufffd\u00e9".encode()
    assert not tokenizer.is_lossless
    assert byte_tokenizer().unknown_id is None and byte_tokenizer().unknown(b"\xff") == {}


@given(texts)
def test_characters_are_lossless_where_known(text: str) -> None:
    tokenizer = character_tokenizer([text.encode(), b"x"])
    ids = tokenizer.encode(text.encode())
    assert ids.dtype == np.int32 and len(ids) == len(text)
    assert tokenizer.decode(ids) == text.encode() and not tokenizer.unknown(text.encode())
    assert not {tokenizer.eos_id, tokenizer.unknown_id} & set(ids.tolist())
    assert int(tokenizer.token_bytes()[ids].sum()) == len(text.encode())


def test_unknown_characters_are_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = character_tokenizer([b"abc"])
    data = "a$b$\u00e9".encode()
    assert tokenizer.unknown(data) == {"$": 2, "\u00e9": 1}
    with caplog.at_level(logging.WARNING):
        assert tokenizer.encode(data, name="prompt").tolist() == [0, 3, 1, 3, 3]
        assert "prompt: 3 of 5 characters are unknown to this tokenizer ('$' x 2, '\u00e9' x 1)" in caplog.text
        assert tokenizer.encode(b"$ab", name="prompt").tolist() == [3, 0, 1]
        assert len(caplog.records) == 1
        list(tokenizer.encode_many([b"abc", b"$", b"?a", b"b!"], names=["w", "x", "y", "z"]))
        assert "x: 3 of 8 characters are unknown to this tokenizer ('!' x 1, '$' x 1, '?' x 1)" in caplog.text
        assert len(caplog.records) == 2
        tokenizer.encode(b"abccba")
    assert len(caplog.records) == 2


def test_characters_of_data_that_is_no_text() -> None:
    with pytest.raises(OuroborosError, match="document 2: invalid UTF-8 at byte 1; the byte tokenizer accepts binary"):
        character_tokenizer([b"fine", b"a\xff"])
    tokenizer = character_tokenizer([b"fine"])
    with pytest.raises(OuroborosError, match="notes: invalid UTF-8 at byte 2"):
        tokenizer.encode(b"ab\xff", name="notes")
    with pytest.raises(OuroborosError, match="text: invalid UTF-8 at byte 2"):
        tokenizer.unknown(b"ab\xff")
    with pytest.raises(OuroborosError, match="has no character"):
        character_tokenizer([])

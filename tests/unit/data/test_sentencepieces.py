"""Tokenizers of SentencePiece: the format of the file, ids worked out by hand, and what is refused."""

from __future__ import annotations

import dataclasses
import struct
from pathlib import Path

import pytest

from ouroboros.data.sentencepieces import KINDS, Piece, SentencePieces, read_sentencepieces
from ouroboros.data.tokenize import load_tokenizer
from ouroboros.errors import OuroborosError

S = "\u2581"
BYTES = [Piece(f"<0x{byte:02X}>", "byte") for byte in range(256)]
PIECES = [
    *(Piece("<unk>", "unknown"), Piece("<s>", "control"), Piece("</s>", "control")),
    *(
        Piece(text, "normal", -float(rank))
        for rank, text in enumerate(["th", f"{S}th", "he", f"{S}the", f"{S}", *"theca"])
    ),
]
MODEL = SentencePieces(pieces=PIECES + BYTES, model_type=2, characters=b"", prefix=True, collapses=False)


def varint(value: int) -> bytes:
    return bytes([value]) if value < 0x80 else bytes([value & 0x7F | 0x80]) + varint(value >> 7)


def field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def written(model: SentencePieces) -> bytes:
    """The file, with fields that readers pass over."""
    types, data = {name: number for number, name in KINDS.items()}, b""
    for text, kind, score in model.pieces:
        entry = field(1, text.encode()) + varint(2 << 3 | 5) + struct.pack("<f", score)
        data += field(1, entry + (b"" if kind == "normal" else field(3, types[kind])))
    normalizer = field(1, b"identity") + field(2, model.characters)
    normalizer += field(3, int(model.prefix)) + field(4, int(model.collapses))
    trainer = field(1, b"text.txt") + field(3, model.model_type) + varint(10 << 3 | 5) + struct.pack("<f", 0.5)
    return data + field(2, trainer) + field(3, normalizer) + field(9, 1 << 40)


def saved(model: SentencePieces, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(written(model))
    return folder


@pytest.mark.parametrize("model", [MODEL, dataclasses.replace(MODEL, model_type=1, prefix=False, collapses=True)])
def test_a_file_says_what_was_written(model: SentencePieces, tmp_path: Path) -> None:
    assert read_sentencepieces(saved(model, tmp_path) / "tokenizer.model") == model


@pytest.mark.parametrize("data", [b"", b"text", bytes(range(256)), written(MODEL)[:-2], field(1, field(3, 1))])
def test_what_is_no_file_of_sentencepiece_is_refused(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.model"
    path.write_bytes(data)
    with pytest.raises(OuroborosError, match="x.model': is no SentencePiece model"):
        read_sentencepieces(path)
    with pytest.raises(OuroborosError, match="x.model': is no SentencePiece model"):
        load_tokenizer(tmp_path)
    with pytest.raises(OuroborosError, match="nothing.model': cannot be read: No such file"):
        read_sentencepieces(tmp_path / "nothing.model")


def test_bpe_merges_by_score(tmp_path: Path) -> None:
    """ " th" is formed before "he" could be, so that "the" is one piece, and "he" stays where no t precedes."""
    tokenizer = load_tokenizer(saved(MODEL, tmp_path))
    names = [piece.text for piece in MODEL.pieces]
    shown = [names[index] for index in tokenizer.encode("the heca th\u00e9".encode())]
    assert shown == [f"{S}the", S, "he", "c", "a", f"{S}th", "<0xC3>", "<0xA9>"]
    assert (tokenizer.eos_id, tokenizer.vocab_size) == (1, len(names))
    for text in ("the cat", " the", "", "a  b \U0001f642\n the <s> "):
        assert tokenizer.decode(tokenizer.encode(text.encode())) == text.encode()
    tokenizer.save(tmp_path / "copy")
    again = load_tokenizer(tmp_path / "copy")
    assert (again.fingerprint, again.eos_id) == (tokenizer.fingerprint, tokenizer.eos_id)


def test_unigram_takes_the_best_division(tmp_path: Path) -> None:
    pieces = [Piece("<unk>", "unknown"), Piece("<s>", "control"), Piece(S, "normal", -1.0)]
    pieces += [
        Piece("ab", "normal", -3.0),
        Piece("a", "normal", -1.0),
        Piece("b", "normal", -1.5),
        Piece("abb", "normal", -3.2),
    ]
    model = SentencePieces(pieces=pieces, model_type=1, characters=b"", prefix=True, collapses=True)
    tokenizer = load_tokenizer(saved(model, tmp_path))
    names = [piece.text for piece in pieces]
    assert [names[index] for index in tokenizer.encode(b"  ab  abb\n a ")] == [S, "a", "b", S, "abb", "<unk>", S, "a"]


def test_other_types_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OuroborosError, match="model of type 4: only unigram"):
        load_tokenizer(saved(dataclasses.replace(MODEL, model_type=4), tmp_path))
    with pytest.raises(OuroborosError, match="has no control piece"):
        load_tokenizer(saved(dataclasses.replace(MODEL, pieces=PIECES[3:]), tmp_path))

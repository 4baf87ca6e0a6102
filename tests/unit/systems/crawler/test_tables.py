"""Byte tables: the format of SentencePiece, the rule of the leading space, what is refused."""

from __future__ import annotations

import re

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from ouroboros.data.sentencepieces import Piece
from ouroboros.data.tokenize import TextTokenizer, byte_tokenizer, train_bpe
from ouroboros.errors import OuroborosError
from ouroboros.systems.crawler.tables import (
    ByteTables,
    check_byte_counts,
    pieces_of,
    tables_for,
    tables_of,
)

PIECES = [
    *(Piece("<unk>", "unknown"), Piece("<s>", "control"), Piece("<0xC3>", "byte"), Piece("\u2581a", "normal")),
    *(Piece("\u00fc", "normal"), Piece("\u2581", "normal"), Piece("\u2581b\u2581c", "user_defined")),
    *(Piece("\u2581x", "unused"), Piece("a", "normal")),
]


def test_a_space_is_charged_behind_text_alone() -> None:
    tables = tables_of(PIECES, 11)
    assert tables.size.tolist() == [0, 0, 1, 1, 2, 0, 3, 0, 1, 0, 0]
    assert tables_of(PIECES, published=True).size.tolist() == [0, 0, 1, 1, 2, 0, 5, 0, 1]
    assert tables.boundary.tolist() == [True, True] + [False] * 5 + [True, False, True, True]
    stream = np.array([1, 3, 3, 0, 3, 5, 5, 10, 4, 6])  # <s> a, then " a", unknown, "a", " ", " ", padding, u, " b c"
    assert tables.target_bytes(stream).tolist() == [1, 2, 0, 1, 1, 1, 0, 2, 4]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(OuroborosError, match="the model has 5 ids,? but the tokenizer 9"):
        tables_of(PIECES, 5)
    with pytest.raises(OuroborosError, match="'xyz' is of the type byte"):
        tables_of([Piece("xyz", "byte")])


def converted(pieces: dict[str, int], merges: list[tuple[str, str]], normalizer: normalizers.Normalizer) -> Tokenizer:
    backend = Tokenizer(models.BPE(vocab=pieces, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    steps = [normalizer, normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    backend.normalizer = normalizers.Sequence(steps)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken("<s>", special=True)])
    return backend


VOCABULARY = {"<unk>": 0, "<s>": 1, "a": 2, "b": 3, "\u2581": 4, "\u2581a": 5, "\n": 6}
BYTES = {f"<0x{byte:02X}>": 7 + byte for byte in range(256)}
SAME = normalizers.Replace("\0", "\0")


def test_a_converted_tokenizer_counts_all_bytes() -> None:
    tokenizer = TextTokenizer(converted(VOCABULARY | BYTES, [("\u2581", "a")], SAME), eos_id=1)
    kinds = [piece.type for piece in pieces_of(tokenizer)]
    assert kinds[:8] == ["unknown", "control", "normal", "normal", "normal", "normal", "normal", "byte"]
    tables = tables_for(tokenizer, tokenizer.vocab_size + 3)
    texts = [b"a ab  a\nbb", "caf\u00e9 \u4e16".encode(), b"", b" a"]
    check_byte_counts(tables, tokenizer.encode, texts, boundary=1)
    assert len(tables.size) == tokenizer.vocab_size + 3 and tables.boundary[-3:].all()


@pytest.mark.parametrize(
    ("vocabulary", "normalizer", "shown"),
    [
        (VOCABULARY, SAME, "counts 2 bytes for 5: b'b c"),
        (VOCABULARY | BYTES, normalizers.Replace("b", "ab"), "counts 6 bytes for 5"),
        ({**VOCABULARY, "c": 263} | BYTES, normalizers.Strip(), "counts 3 bytes for 6: b' a b  '"),
    ],
)
def test_lost_bytes_are_shown(vocabulary: dict[str, int], normalizer: normalizers.Normalizer, shown: str) -> None:
    tokenizer = TextTokenizer(converted(vocabulary, [("\u2581", "a")], normalizer), eos_id=1)
    tables = tables_for(tokenizer, tokenizer.vocab_size)
    with pytest.raises(OuroborosError, match=re.escape(shown)):
        check_byte_counts(tables, tokenizer.encode, [b"a a", b"a a\nb c\xc3\xa9", b" a b  "], boundary=1)


def test_ids_of_bytes_need_no_pieces() -> None:
    text = "the cat \u00fc the cat the " * 30
    for tokenizer in (byte_tokenizer(), train_bpe([text.encode()], 280)):
        tables = tables_for(tokenizer, tokenizer.vocab_size + 1)
        assert isinstance(tables, ByteTables) and not tables.lead.any()
        check_byte_counts(tables, tokenizer.encode, [text.encode()], boundary=tokenizer.eos_id)

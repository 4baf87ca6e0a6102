from __future__ import annotations

import re

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from ouroboros.data import lossless
from ouroboros.data.lossless import check_round_trip
from ouroboros.data.tokenize import TextTokenizer, byte_tokenizer, character_tokenizer, train_bpe
from ouroboros.errors import OuroborosError

TEXT = b"the old map hides a letter"
LETTERS = sorted(set(TEXT.decode()))


def word_pieces() -> Tokenizer:
    vocabulary = ["[UNK]", *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    backend = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(vocabulary)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return backend


def unigram() -> Tokenizer:
    backend = Tokenizer(
        models.Unigram([("<unk>", 0.0), ("\u2581", -2.0), *((c, -3.0) for c in LETTERS if c != " ")], 0)
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return backend


def lower() -> Tokenizer:
    backend = Tokenizer.from_str(train_bpe([TEXT * 20], 260).backend.to_str())
    backend.normalizer = normalizers.Lowercase()
    return backend


@pytest.mark.parametrize(
    ("backend", "document", "message"),
    [
        (word_pieces(), b"the  map", "gives back 'the map' for 'the  map' (character 5 of notes)"),
        (word_pieces(), b"the fog", "(character 5 of notes)"),
        (unigram(), TEXT + b", 7", "for 's a letter, 7' (character 27 of notes)"),
        (
            lower(),
            b"the old Map hides",
            "gives back 'the old map hides' for 'the old Map hides' (character 9 of notes)",
        ),
        (lower(), b"x" * 50 + b"Map" + b"y" * 50, f"gives back {'x' * 10 + 'map' + 'y' * 7!r}"),
    ],
)
def test_lost_text_is_shown(backend: Tokenizer, document: bytes, message: str) -> None:
    tokenizer = TextTokenizer(backend, eos_id=0)
    documents = [("fine", b"the old map"), ("notes", document), ("never", b"\xff")]
    with pytest.raises(OuroborosError, match=f"^data.tokenizer 'tok': loses text: .*{re.escape(message)}.*'bpe:4096'"):
        check_round_trip(tokenizer, documents, what="data.tokenizer 'tok'")


def test_text_that_comes_back_is_fine_whatever_the_tokenizer() -> None:
    for backend in (word_pieces(), unigram(), lower()):
        check_round_trip(TextTokenizer(backend, eos_id=0), [("a", TEXT), ("b", b"a map")], what="")


def test_no_more_than_the_sample_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [("a", TEXT), ("b", b"LOST")]
    tokenizer = TextTokenizer(lower(), eos_id=0)
    monkeypatch.setattr(lossless, "SAMPLE_BYTES", len(TEXT))
    check_round_trip(tokenizer, documents, what="")
    monkeypatch.setattr(lossless, "SAMPLE_BYTES", len(TEXT) + 1)
    with pytest.raises(OuroborosError, match="of b"):
        check_round_trip(tokenizer, documents, what="")


def test_tokenizers_that_lose_nothing_unsaid_are_not_tried() -> None:
    for tokenizer in (byte_tokenizer(), train_bpe([TEXT * 20], 260), character_tokenizer([b"abc"])):
        check_round_trip(tokenizer, [("a", b"\xff")], what="")


def test_text_that_is_not_utf8_is_named() -> None:
    with pytest.raises(OuroborosError, match="^notes: invalid UTF-8 at byte 1"):
        check_round_trip(TextTokenizer(lower(), eos_id=0), [("notes", b"a\xff")], what="")

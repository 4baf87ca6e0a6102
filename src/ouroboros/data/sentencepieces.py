"""Tokenizers of SentencePiece (``NAME.model``), read without its library.

The file is a protocol buffer (sentencepiece_model.proto): the pieces with their scores, and how text is normalised. BPE
and unigram models become tokenizers of the library that all others are of; whether one gives text back unchanged is
tried on the text, as for every tokenizer.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers

from ouroboros.errors import OuroborosError, check

SPACE = "\u2581"
"""Stands for a space in pieces."""
KINDS = {1: "normal", 2: "unknown", 3: "control", 4: "user_defined", 5: "unused", 6: "byte"}
"""Types of pieces."""
_UNIGRAM, _BPE = 1, 2


class Piece(NamedTuple):
    """An entry of the vocabulary."""

    text: str
    type: str
    """One of :data:`KINDS`; ``normal`` and ``user_defined`` ones are text."""
    score: float = 0.0


@dataclass(frozen=True)
class SentencePieces:
    """What a file says."""

    pieces: list[Piece]
    """By id."""
    model_type: int
    characters: bytes
    """The compiled map of characters to normal ones; empty: none."""
    prefix: bool
    """Whether a space is put before a text."""
    collapses: bool
    """Whether spaces at the ends, and repeated ones, are removed."""

    @property
    def separator(self) -> str | None:
        """The control piece that stands before a document: ``<s>``, else the first one."""
        controls = [piece.text for piece in self.pieces if piece.type == "control"]
        return "<s>" if "<s>" in controls else next(iter(controls), None)

    def backend(self) -> Tokenizer:
        """The tokenizer.

        Raises:
            OuroborosError: it is of a type other than BPE or unigram.
        """
        check(
            self.model_type in (_UNIGRAM, _BPE),
            f"SentencePiece model of type {self.model_type}: only unigram (1) and BPE (2) can be read",
        )
        unknown = next((index for index, piece in enumerate(self.pieces) if piece.type == "unknown"), None)
        fallback = any(piece.type == "byte" for piece in self.pieces)
        backend = Tokenizer(
            self._bpe(unknown, fallback) if self.model_type == _BPE else self._unigram(unknown, fallback)
        )
        steps: list[Any] = [normalizers.Precompiled(self.characters)] if self.characters else []
        if self.collapses:
            steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
        steps += [normalizers.Prepend(SPACE)] if self.prefix else []
        backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
        strip = [decoders.Strip(" ", 1, 0)] if self.prefix else []
        backend.decoder = decoders.Sequence(
            [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
        )
        for piece in self.pieces:
            if piece.type in ("control", "user_defined"):
                is_control = piece.type == "control"
                backend.add_tokens([AddedToken(piece.text, special=is_control, normalized=False)])
        return backend

    def _unigram(self, unknown: int | None, fallback: bool) -> models.Model:
        vocabulary = [(piece.text, piece.score) for piece in self.pieces]
        return models.Unigram(vocabulary, unk_id=unknown, byte_fallback=fallback)

    def _bpe(self, unknown: int | None, fallback: bool) -> models.Model:
        """Pieces are merged in the order of their scores; a piece may come of several pairs."""
        ids = {piece.text: index for index, piece in enumerate(self.pieces)}
        merges = []
        for text, kind, score in self.pieces:
            if kind == "normal":
                pairs = ((text[:cut], text[cut:]) for cut in range(1, len(text)))
                merges += [(-score, ids[a], ids[b], (a, b)) for a, b in pairs if a in ids and b in ids]
        return models.BPE(
            vocab=ids,
            merges=[pair for *_, pair in sorted(merges)],
            unk_token=None if unknown is None else self.pieces[unknown].text,
            byte_fallback=fallback,
            fuse_unk=True,
        )


def read_sentencepieces(path: Path) -> SentencePieces:
    """Read a file of SentencePiece.

    Raises:
        OuroborosError: the file is missing or is no SentencePiece model; names it.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise OuroborosError(f"file {str(path)!r}: cannot be read: {error.strerror or error}") from error
    try:
        top = list(_fields(data))
        pieces = [_piece(dict(_fields(value))) for number, value in top if number == 1]
        trainer, normalizer = (dict(_fields(dict(top).get(number, b""))) for number in (2, 3))
        found = SentencePieces(
            pieces=pieces,
            model_type=int(trainer.get(3, _UNIGRAM)),
            characters=bytes(normalizer.get(2, b"")),
            prefix=bool(normalizer.get(3, 1)),
            collapses=bool(normalizer.get(4, 1)),
        )
    except (ValueError, KeyError, IndexError, TypeError, struct.error):
        found = None
    if found is None or not found.pieces:
        raise OuroborosError(f"file {str(path)!r}: is no SentencePiece model; name the tokenizer.model of the data")
    return found


def _piece(fields: dict[int, Any]) -> Piece:
    (score,) = struct.unpack("<f", fields[2]) if 2 in fields else (0.0,)
    return Piece(fields[1].decode(), KINDS[fields.get(3, 1)], score)


def _fields(data: Any) -> Iterator[tuple[int, Any]]:
    """Number and value of each field of a protocol buffer: a whole number, or bytes (of fixed size or delimited)."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(data):
        number, form = divmod(varint(), 8)
        if form == 0:
            yield number, varint()
            continue
        size = {1: 8, 5: 4}[form] if form != 2 else varint()
        if at + size > len(data):
            raise ValueError("a field goes beyond the end")
        yield number, data[at : at + size]
        at += size

"""How many bytes a token id stands for, from the pieces of a SentencePiece model, as the challenge counts them.

A piece may begin with U+2581, which stands for a space. That space is charged to a token only if it follows a real one:
the first space of a document is not part of it. With the previous id p and the target t of a scored pair,
``bytes = size[t] + (lead[t] and not boundary[p])``.

Our own scores count the bytes of the original text instead (:mod:`ouroboros.eval.score`); both agree where a tokenizer
loses nothing, which :func:`check_byte_counts` tries.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ouroboros.data.lossless import is_byte_level
from ouroboros.data.sentencepieces import SPACE, Piece
from ouroboros.data.tokenize import TextTokenizer
from ouroboros.errors import OuroborosError, check

_SHOWN = 40


@dataclass(frozen=True)
class ByteTables:
    """What :meth:`target_bytes` needs to know of each id."""

    size: np.ndarray
    """int64 (V,): bytes without a leading space."""
    lead: np.ndarray
    """bool (V,): whether the piece begins with a space."""
    boundary: np.ndarray
    """bool (V,): whether the id is no text: control, unknown, unused, or none of the tokenizer's."""

    def target_bytes(self, ids: np.ndarray) -> np.ndarray:
        """Bytes of each target of a stream, int64 (N,) of ids (N + 1,)."""
        before, targets = ids[:-1], ids[1:]
        return self.size[targets] + (self.lead[targets] & ~self.boundary[before])


def tables_of(pieces: Sequence[Piece], vocab_size: int | None = None, *, published: bool = False) -> ByteTables:
    """The tables of a list of pieces, by id.

    Args:
        pieces: all of them.
        vocab_size: ids of the model; those beyond the pieces are padding.
        published: as in the published program, a space inside a piece has the three bytes of its mark.

    Raises:
        OuroborosError: fewer ids than pieces; a byte piece that is called otherwise than ``<0xHH>``.
    """
    total = vocab_size or len(pieces)
    check(
        total >= len(pieces), f"the model has {total} ids, but the tokenizer {len(pieces)}: it is not the model's own"
    )
    size, lead, boundary = np.zeros(total, np.int64), np.zeros(total, bool), np.ones(total, bool)
    for index, (text, kind, _) in enumerate(pieces):
        if kind == "byte":
            check(
                re.fullmatch("<0x[0-9A-F]{2}>", text) is not None,
                f"piece {index}: {text!r} is of the type byte, but no byte is called so; use another tokenizer",
            )
            size[index], boundary[index] = 1, False
        elif kind not in ("control", "unknown", "unused"):
            lead[index], boundary[index] = text.startswith(SPACE), False
            rest = text.removeprefix(SPACE)
            size[index] = len((rest if published else rest.replace(SPACE, " ")).encode())
    return ByteTables(size, lead, boundary)


def pieces_of(tokenizer: TextTokenizer) -> list[Piece]:
    """The pieces of a tokenizer that was converted from SentencePiece, or whose ids stand for bytes."""
    state = json.loads(tokenizer.backend.to_str())
    special = {token["id"] for token in state["added_tokens"] if token["special"]}
    model = state["model"]
    unknown = model.get("unk_token") if model.get("unk_id") is None else model["vocab"][model["unk_id"]][0]
    found = [Piece("", "unused")] * tokenizer.vocab_size
    for text, index in tokenizer.backend.get_vocab(with_added_tokens=True).items():
        kind = "control" if index in special else "normal"
        if text == unknown:
            kind = "unknown"
        elif model.get("byte_fallback") and re.fullmatch("<0x[0-9A-F]{2}>", text):
            kind = "byte"
        found[index] = Piece(text, kind)
    return found


def tables_for(tokenizer: TextTokenizer, vocab_size: int, *, published: bool = False) -> ByteTables:
    """The tables of a model's tokenizer, see :func:`tables_of`.

    Raises:
        OuroborosError: an id has no bytes of its own; the tokenizer has more ids than the model.
    """
    if not is_byte_level(json.loads(tokenizer.backend.to_str())) and tokenizer.unknown_id is None:
        return tables_of(pieces_of(tokenizer), vocab_size, published=published)
    sizes = np.asarray(tokenizer.token_bytes(), np.int64)
    check(
        len(sizes) <= vocab_size, f"the model has {vocab_size} ids, but the tokenizer {len(sizes)}: it is not its own"
    )
    sizes = np.pad(sizes, (0, vocab_size - len(sizes)))
    return ByteTables(sizes, np.zeros(vocab_size, bool), sizes == 0)


def check_known(tokenizer: TextTokenizer, ids: np.ndarray) -> None:
    """Refuse a stream with a token that stands for text which the tokenizer does not know.

    Raises:
        OuroborosError: names the first one.
    """
    unknown = [index for index, piece in enumerate(pieces_of(tokenizer)) if piece.type == "unknown"]
    places = np.flatnonzero(np.isin(ids, unknown))
    if len(places):
        before = tokenizer.decode(ids[max(0, places[0] - 10) : places[0]])
        raise OuroborosError(
            f"id {ids[places[0]]} at place {places[0]} of the stream, behind {before.decode(errors='replace')!r},"
            " stands for text that the tokenizer does not know, whose bytes nobody can count; use a tokenizer with byte"
            " fallback"
        )


def check_byte_counts(
    tables: ByteTables, encode: Callable[[bytes], np.ndarray], texts: Iterable[bytes], *, boundary: int
) -> None:
    """Refuse a tokenizer whose tables do not count the bytes of texts: it knows not all of them, or changes some.

    Args:
        tables: of the tokenizer.
        encode: a text as ids, without special ones.
        texts: some text of the kind that is to be scored.
        boundary: an id that is no text, which precedes each document.

    Raises:
        OuroborosError: shows the first line of a text that is counted wrongly.
    """

    def counted(text: bytes) -> int:
        return int(tables.target_bytes(np.concatenate(([boundary], encode(text)))).sum())

    for text in texts:
        if counted(text) != len(text):
            lines = text.splitlines(keepends=True)
            shown = next((line for line in lines if counted(line) != len(line)), text)
            raise OuroborosError(
                f"this tokenizer's table counts {counted(shown)} bytes for {len(shown)}: {shown[:_SHOWN]!r}; it does"
                " not know all of the text or changes it, so bits per byte by the table mean nothing; use a tokenizer"
                " with byte fallback and without normalisation"
            )

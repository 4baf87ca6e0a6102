"""Tokenizers: bytes, byte-level BPE and characters of the training text, and any existing tokenizer directory.

Data can never inject a special token: text that spells ``<|endoftext|>`` is encoded as ordinary text (but for the marks
of a chat template: :mod:`ouroboros.data.templates`). The tokenizers made here are lossless (``decode(encode(data)) ==
data`` for every input they accept; characters: for known ones, see :mod:`ouroboros.data.characters`), have no
normaliser, no prefix space and no post-processor, and reload through ``AutoTokenizer`` without remote code.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import itertools
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from ouroboros.data import bpe
from ouroboros.data.characters import REPLACEMENT, character_model, describe_unknown, known_characters, unknown_nats
from ouroboros.data.lossless import byte_alphabet, is_byte_level, is_byte_model, is_lossless, steps_of
from ouroboros.data.sentencepieces import read_sentencepieces
from ouroboros.errors import OuroborosError, check, first_line, nearest

logger = logging.getLogger(__name__)

END_OF_TEXT = "<|endoftext|>"
UNITS = {"bpe": bpe.OWN, "bpe-qwen": bpe.QWEN}
"""Kinds of vocabularies that are trained, with the units inside which entries merge."""

_PIECE_BYTES = 1 << 16
_BATCH = 64
"""Pieces that are encoded in parallel."""

_HF_CONFIG: dict[str, Any] = {
    "bos_token": END_OF_TEXT,
    "clean_up_tokenization_spaces": False,
    "eos_token": END_OF_TEXT,
    "model_input_names": ["input_ids", "attention_mask"],
    "pad_token": END_OF_TEXT,
    "padding_side": "left",
    "split_special_tokens": True,
}
_READS_SPECIALS = "reads_special_tokens"
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model", "spiece.model", "vocab.txt")
"""Files one of which a directory with a tokenizer holds."""
_SAVED_CONFIG = {**_HF_CONFIG, "tokenizer_class": "PreTrainedTokenizerFast"}


class TextTokenizer:
    """Bytes to ids and back: byte-level BPE, characters, and every existing tokenizer.

    Attributes:
        vocab_size: number of ids, the special tokens included.
        unknown_id: what every unknown character becomes; None where there is none (or the tokenizer does not tell).
        unknown_nats: what a score adds for each such id, in nats.
        reads_specials: whether special tokens that a text spells are read as such, for texts that a chat template made.
        eos_id: the end-of-text token: before every document, after it, and padding.
    """

    def __init__(self, backend: Tokenizer, *, eos_id: int, hf: Any = None) -> None:
        """Of a definition; ``hf`` is the transformers tokenizer that it comes from, if it was not made here."""
        backend.no_truncation()
        backend.no_padding()
        self.backend, self.eos_id = backend, eos_id
        self._state = state = json.loads(backend.to_str())
        self._foreign = hf is not None
        self.reads_specials = False
        if hf is not None:
            self.hf = hf
            self.reads_specials = bool(hf.init_kwargs.get(_READS_SPECIALS))
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        self.is_lossless = is_lossless(state)
        self._known = known_characters(state)
        self.unknown_id = None if self._known is None else len(self._known)
        self.unknown_nats = 0.0 if self._known is None else unknown_nats(len(self._known))
        self._reported: set[str] = set()
        splits = [step.get("pattern", {}) for step in steps_of(state["pre_tokenizer"], "pretokenizers")]
        cuts = any({"Regex": pattern} in splits for pattern in UNITS.values())
        self._may_cut = self._known is not None or (self.is_lossless and cuts)

    @functools.cached_property
    def kind(self) -> str:
        """What manifests call it: ``bytes``, ``bpe`` (lossless byte-level BPE), ``chars`` or ``other``."""
        if is_byte_model(self._state):
            return "bytes"
        return "chars" if self._known is not None else "bpe" if self.is_lossless else "other"

    @functools.cached_property
    def hf(self) -> Any:
        """The same tokenizer as a transformers ``PreTrainedTokenizerFast``."""
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast(tokenizer_object=self.backend, **_HF_CONFIG)

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of the tokenizer's definition."""
        return hashlib.sha256(json.dumps(self._state, sort_keys=True).encode()).hexdigest()

    def encode(self, data: bytes, *, name: str = "text") -> np.ndarray:
        """The ids of ``data``, int32 (n,), without special tokens; only the byte tokenizer takes what is not UTF-8.

        Unknown characters are counted and named in a warning, unless all of them have been named before.
        """
        (ids,) = self.encode_many([data], names=[name])
        return ids

    def encode_many(self, documents: Iterable[bytes], *, names: Sequence[str] = ()) -> Iterator[np.ndarray]:
        """:meth:`encode` for many documents in parallel; ``names`` (same order) are used in messages only, and unknown
        characters are reported once, after the last document."""
        kind = self.kind
        if kind == "bytes":
            yield from (np.frombuffer(document, dtype=np.uint8).astype(np.int32) for document in documents)
            return
        done: list[np.ndarray] = []
        unknown: Counter[str] = Counter()
        total, index, place = 0, 0, ""
        pieces = _pieces(documents, names, self._may_cut)
        while batch := list(itertools.islice(pieces, _BATCH)):
            for ids, (text, is_last) in zip(self._encode_batch([text for text, _ in batch]), batch, strict=True):
                done.append(ids)
                total += len(ids)
                if self._known is not None and (ids == self.unknown_id).any():
                    place = place or _name_of(names, index)
                    unknown += self._unknown_in(text)
                if is_last:
                    yield np.concatenate(done)
                    done, index = [], index + 1
        if unknown.keys() - self._reported:
            self._reported |= unknown.keys()
            logger.warning(
                "%s: %d of %d characters are unknown to this tokenizer (%s); each is read as the unknown token",
                *(place, unknown.total(), total, describe_unknown(unknown)),
            )

    def _encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        if self._known is not None:
            return [self._code_points[np.frombuffer(text.encode("utf-32-le"), dtype="<u4")] for text in texts]
        # transformers resets this flag on the shared backend whenever its own tokenizer is called.
        self.backend.encode_special_tokens = not self.reads_specials
        found = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in found]

    @functools.cached_property
    def _code_points(self) -> np.ndarray:
        """The id of each Unicode code point, for a tokenizer of characters."""
        known = [ord(character) for character in self._known or ()]
        ids = np.full(0x110000, self.unknown_id, dtype=np.int32)
        ids[known] = np.arange(len(known))
        return ids

    def unknown(self, data: bytes) -> Counter[str]:
        """How often each character that becomes :attr:`unknown_id` occurs in ``data``; empty where there is none."""
        return Counter() if self._known is None else self._unknown_in(decode_utf8(data, "text"))

    def _unknown_in(self, text: str) -> Counter[str]:
        found = Counter(text)
        return Counter({character: found[character] for character in found.keys() - set(self._known or ())})

    def decode(self, ids: Iterable[int] | np.ndarray) -> bytes:
        """The bytes of ``ids``; special tokens become nothing, unknown characters U+FFFD. The exact inverse of
        :meth:`encode` if the tokenizer is lossless or no character was unknown."""
        values = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids)).reshape(-1)
        if self.is_lossless or self.unknown_id is not None:
            return b"".join([self._byte_table[i] for i in values.tolist() if i < self.vocab_size])
        return str(self.backend.decode(values.tolist(), skip_special_tokens=not self.reads_specials)).encode()

    def token_bytes(self) -> np.ndarray:
        """Number of bytes each id stands for, int32 (vocab_size,); 0 for special tokens and unknown characters. Refused
        where the tokenizer is neither byte-level nor of characters, so that an id has no bytes of its own."""
        sizes = np.array([len(piece) for piece in self._byte_table], dtype=np.int32)
        if self.unknown_id is not None:
            sizes[self.unknown_id] = 0
        return sizes

    @functools.cached_property
    def _byte_table(self) -> list[bytes]:
        """What each id stands for."""
        if self._known is not None:
            known = [character.encode() for character in [*self._known, REPLACEMENT]]
            return known + [b""] * (self.vocab_size - len(known))
        values = {char: byte for byte, char in enumerate(byte_alphabet())}
        table = [b""] * self.vocab_size
        added = {token["id"]: token for token in self._state["added_tokens"]}
        for piece, index in self.backend.get_vocab(with_added_tokens=True).items():
            if index in added:
                is_mark = added[index]["special"] and not self.reads_specials
                table[index] = b"" if is_mark else added[index]["content"].encode()
                continue
            check(
                is_byte_level(self._state) and all(char in values for char in piece),
                f"tokenizer: entry {piece!r} has no bytes of its own (not a byte-level tokenizer);"
                " use 'bytes', 'chars', 'bpe:N' or a byte-level tokenizer directory",
            )
            table[index] = bytes(values[char] for char in piece)
        return table

    def reading_specials(self) -> TextTokenizer:
        """This tokenizer as it reads texts that its chat template made; kept when it is saved."""
        hf = copy.deepcopy(self.hf)
        hf.init_kwargs[_READS_SPECIALS] = True
        return TextTokenizer(hf.backend_tokenizer, eos_id=self.eos_id, hf=hf)

    def padded(self, entries: int) -> TextTokenizer:
        """This tokenizer for a model whose embedding was rounded up: with ids that decode to nothing, up to ``entries``
        of them, for the spare rows."""
        spare = [AddedToken(f"<|unused{i}|>", special=True, normalized=False) for i in range(self.vocab_size, entries)]
        hf = copy.deepcopy(self.hf)
        hf.add_tokens(spare, special_tokens=True)
        return TextTokenizer(hf.backend_tokenizer, eos_id=self.eos_id, hf=hf)

    def save(self, directory: str | Path) -> None:
        """Write ``tokenizer.json`` and ``tokenizer_config.json``, which ``AutoTokenizer`` loads without a network."""
        path = Path(directory)
        path.mkdir(parents=True, exist_ok=True)
        if self._foreign:
            self.hf.save_pretrained(path)
            return
        config = json.dumps(_SAVED_CONFIG, indent=2, sort_keys=True)
        for name, text in (("tokenizer", self.backend.to_str(pretty=True)), ("tokenizer_config", config)):
            (path / f"{name}.json").write_text(f"{text}\n", encoding="utf-8", newline="\n")


def byte_tokenizer() -> TextTokenizer:
    """The default: ids 0..255 are the byte values, 256 is ``<|endoftext|>``. Accepts any bytes."""
    backend = Tokenizer(models.BPE(vocab={char: byte for byte, char in enumerate(byte_alphabet())}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return _finish(backend)


def character_tokenizer(documents: Iterable[bytes]) -> TextTokenizer:
    """One id per character of ``documents``, by rank, then the unknown character, last ``<|endoftext|>``."""
    found: set[str] = set()
    for text, _ in _pieces(documents, (), False):
        found |= set(text)
    return _finish(character_model(found))


def train_bpe(
    documents: Iterable[bytes], vocab_size: int, *, pattern: str = bpe.OWN, shows_progress: bool = False
) -> TextTokenizer:
    """Train byte-level BPE (Sennrich et al. 2016) of ``vocab_size`` entries; the last is ``<|endoftext|>``.

    Deterministic in ``documents``, which must be UTF-8. A text too small for so many merges gives a smaller vocabulary
    and a warning. ``pattern`` finds the units inside which entries merge, see :mod:`ouroboros.data.bpe`. With
    ``shows_progress`` there are bars on standard error if it is a terminal.
    """
    check(vocab_size >= 257, f"tokenizer 'bpe:{vocab_size}': needs at least 257 entries (256 bytes and {END_OF_TEXT})")
    # Pieces train the same merges as whole documents, in parallel and in bounded memory.
    texts = (text for text, _ in _pieces(documents, (), True))
    tokenizer = _finish(bpe.train(texts, vocab_size - 1, pattern=pattern, shows_progress=shows_progress))
    if tokenizer.vocab_size < vocab_size:
        logger.warning(
            "tokenizer bpe:%d: the training text has merges for %d entries only", vocab_size, tokenizer.vocab_size
        )
    return tokenizer


def load_tokenizer(directory: str | Path) -> TextTokenizer:
    """Load a tokenizer from a local directory, never the network: one saved here, any fast Hugging Face tokenizer that
    has an end-of-text token, or one SentencePiece file (``NAME.model``)."""
    path = Path(directory)
    check(path.is_dir(), f"tokenizer {str(directory)!r}: no such directory")
    with contextlib.suppress(Exception):  # tokenizers raises that itself; the general reader below explains or succeeds
        if json.loads((path / "tokenizer_config.json").read_bytes()) == _SAVED_CONFIG:
            backend = Tokenizer.from_file(str(path / "tokenizer.json"))
            return TextTokenizer(backend, eos_id=backend.get_vocab()[END_OF_TEXT])
    pieces = sorted(path.glob("*.model"))
    if len(pieces) == 1 and not (path / "tokenizer.json").exists():
        return _of_sentencepieces(pieces[0])
    from transformers import AutoTokenizer

    try:
        hf: Any = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
        backend = hf.backend_tokenizer
    except Exception as error:  # any reader of any format may fail in its own way; the user needs one line
        raise OuroborosError(f"tokenizer {str(directory)!r}: cannot be loaded: {first_line(error)}") from error
    eos_id = hf.eos_token_id if hf.eos_token_id is not None else hf.bos_token_id
    check(eos_id is not None, f"tokenizer {str(directory)!r}: has no eos_token; set one in its tokenizer_config.json")
    return TextTokenizer(backend, eos_id=int(eos_id), hf=hf)


def _of_sentencepieces(path: Path) -> TextTokenizer:
    """The tokenizer of a SentencePiece file."""
    from transformers import PreTrainedTokenizerFast

    found = read_sentencepieces(path)
    separator, backend = found.separator, found.backend()
    if separator is None:
        raise OuroborosError(
            f"file {str(path)!r}: has no control piece to stand between documents; use another tokenizer"
        )
    config = {**_HF_CONFIG, "bos_token": separator, "eos_token": separator, "pad_token": separator}
    hf = PreTrainedTokenizerFast(tokenizer_object=backend, **config)
    return TextTokenizer(hf.backend_tokenizer, eos_id=int(hf.eos_token_id), hf=hf)


def resolve_tokenizer(name: str, train_documents: Iterable[bytes], *, shows_progress: bool = False) -> TextTokenizer:
    """The tokenizer a ``data.tokenizer`` value means: ``bytes``, ``chars``, ``bpe:N``, ``bpe-qwen:N`` (these three made
    of ``train_documents``) or a directory."""
    if name == "bytes":
        return byte_tokenizer()
    if name == "chars":
        return character_tokenizer(train_documents)
    kind, colon, digits = name.partition(":")
    if colon and kind in UNITS:
        check(
            digits.isascii() and digits.isdigit() and 257 <= int(digits) <= 1_000_000,
            f"data.tokenizer {name!r}: write '{kind}:N' with N from 257 to 1000000, e.g. '{kind}:4096'",
        )
        return train_bpe(train_documents, int(digits), pattern=UNITS[kind], shows_progress=shows_progress)
    if Path(name).expanduser().is_dir():
        return load_tokenizer(Path(name).expanduser())
    raise OuroborosError(
        f"data.tokenizer {name!r}: not a directory{nearest(name, ['bytes', 'chars', 'bpe:4096', 'bpe-qwen:4096'])}"
    )


def is_made_of_text(name: str) -> bool:
    """Whether a ``data.tokenizer`` value means a tokenizer that is made from the training text, which must be UTF-8."""
    return name == "chars" or name.startswith(tuple(f"{kind}:" for kind in UNITS))


def _finish(backend: Tokenizer) -> TextTokenizer:
    backend.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return TextTokenizer(backend, eos_id=backend.get_vocab()[END_OF_TEXT])


def decode_utf8(data: bytes, name: str, base: int = 0) -> str:
    """``data`` as text; an error names ``name`` and the offset of the first bad byte, counted from ``base``."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise OuroborosError(
            f"{name}: invalid UTF-8 at byte {base + error.start}; the byte tokenizer accepts binary data"
            " (data.tokenizer 'bytes')"
        ) from None


def _pieces(documents: Iterable[bytes], names: Sequence[str], may_cut: bool) -> Iterator[tuple[str, bool]]:
    """Documents as text, long ones in pieces if they may be cut: (text, whether it ends its document)."""
    for index, document in enumerate(documents):
        name, start, is_last = _name_of(names, index), 0, False
        while not is_last:
            cut = bpe.SAFE_CUT.search(document, start + _PIECE_BYTES) if may_cut else None
            end, is_last = cut.start() + 1 if cut else len(document), cut is None
            yield decode_utf8(document[start:end], name, start), is_last
            start = end


def _name_of(names: Sequence[str], index: int) -> str:
    return names[index] if index < len(names) else f"document {index + 1}"

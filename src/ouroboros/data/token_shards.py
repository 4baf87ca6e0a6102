"""Token shards: files of ids, as the Parameter Golf challenge and llm.c publish their texts; read and written.

A shard is 256 little-endian int32 words (20240520, version 1, the number of ids, then zeros) and so many little-endian
uint16 ids. Several shards are one stream in the order of their names. Ids of special tokens separate its documents,
which may go on from shard to shard.

``shards:PATH`` names them as a source. Training takes the ids as they are and puts the end-of-text id of the tokenizer
before each document, whichever special id stands there in the shards. What needs text, such as scores in bits per byte,
gets the decoded text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from ouroboros.data.folders import MAGIC as GLOB
from ouroboros.data.folders import Files, glob_files
from ouroboros.data.records import Document
from ouroboros.data.tokenize import TextTokenizer, is_made_of_text, resolve_tokenizer
from ouroboros.errors import OuroborosError, check

PREFIX = "shards:"
MAGIC, VERSION, HEADER_WORDS = 20240520, 1, 256
HEADER_BYTES = 4 * HEADER_WORDS
SHARD_TOKENS = 100_000_000
"""Ids of a shard, as published."""
LARGEST_VOCABULARY = 1 << 16


def read_shard(path: Path) -> np.ndarray:
    """The ids of a shard, uint16 (n,), a read-only memory map.

    Raises:
        OuroborosError: not readable; another format, version or length; names the file.
    """
    where = f"shard {str(path)!r}"
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(HEADER_BYTES)
    except OSError as error:
        raise OuroborosError(f"{where}: cannot be read: {error.strerror or error}") from error
    check(
        len(head) == HEADER_BYTES, f"{where}: has {size} bytes, its header alone needs {HEADER_BYTES}; fetch it again"
    )
    magic, version, count = np.frombuffer(head, "<i4")[:3].tolist()
    check(magic == MAGIC, f"{where}: begins with {magic} instead of {MAGIC}, so it is no token shard; leave it out")
    check(version == VERSION, f"{where}: has version {version}, only {VERSION} is known; convert it")
    expected = HEADER_BYTES + 2 * count
    check(
        count >= 0 and size == expected,
        f"{where}: its header says {count} ids, so {expected} bytes, but it has {size}: it was cut or altered; fetch it"
        " again",
    )
    return np.memmap(path, "<u2", "r", HEADER_BYTES) if count else np.zeros(0, "<u2")


def shard_files(text: str, base: Path | None) -> Files:
    """The shards that ``PATH`` of ``shards:PATH`` means: a file, all ``.bin`` files of a directory, or a glob.

    Raises:
        OuroborosError: there are none.
    """
    path = Path(text).expanduser()
    path = path if base is None else base / path
    if path.is_dir():
        found = sorted(path.glob("*.bin"))
        check(bool(found), f"source '{PREFIX}{text}': no .bin file in {str(path)!r}; name the directory of the shards")
        return [(file.name, file) for file in found]
    if not path.exists() and GLOB & set(text):
        return glob_files(text, base)
    check(path.exists(), f"source '{PREFIX}{text}': no such file or directory")
    return [(path.name, path)]


def shard_tokenizer(name: str) -> TextTokenizer:
    """The tokenizer that shards were made with, ``name`` a value of ``data.tokenizer``.

    Raises:
        OuroborosError: it would be made of the text.
    """
    check(
        not is_made_of_text(name),
        f"data.tokenizer {name!r}: token shards were made with a tokenizer already; name its directory",
    )
    return resolve_tokenizer(name, ())


def read_stream(files: Files, vocab_size: int) -> Iterator[tuple[str, np.ndarray]]:
    """The name and ids of each shard.

    Raises:
        OuroborosError: as :func:`read_shard`; an id that the tokenizer lacks.
    """
    for name, path in files:
        ids = read_shard(path)
        largest = int(ids.max()) if len(ids) else 0
        if largest >= vocab_size:
            raise OuroborosError(
                f"shard {str(path)!r}: has id {largest} (number {int(ids.argmax())} of its ids), but the tokenizer"
                f" {vocab_size} ids; name the one that it was made with, --data.tokenizer DIR"
            )
        yield name, ids


def read_shards(files: Files, tokenizer: TextTokenizer) -> Iterator[Callable[[], Document]]:
    """The documents of shards with their ids, decoded when they are called for; empty ones are passed over.

    Raises:
        OuroborosError: as :func:`read_stream`.
    """
    added = json.loads(tokenizer.backend.to_str())["added_tokens"]
    separates = np.zeros(tokenizer.vocab_size, bool)
    separates[[token["id"] for token in added if token["special"]]] = True
    name, rest = "", np.zeros(0, "<u2")

    def document(name: str, ids: np.ndarray) -> Document:
        return Document(name, tokenizer.decode(ids), ids=ids)

    for shard, ids in read_stream(files, tokenizer.vocab_size):
        start = 0
        for number, end in enumerate([*np.flatnonzero(separates[ids]).tolist(), None]):
            piece = ids[start:end]
            if not len(rest):
                name = f"{shard}:{number}"
            rest = np.concatenate([rest, piece]) if len(rest) else piece
            if end is not None:
                if len(rest):
                    yield partial(document, name, rest)
                start, rest = end + 1, rest[:0]
    if len(rest):
        yield partial(document, name, rest)


def encode_documents(
    tokenizer: TextTokenizer, documents: Sequence[Document], texts: Iterable[bytes], names: Sequence[str]
) -> Iterator[np.ndarray]:
    """The ids of each document, int32: those that it has, else those of its text, which is given in ``texts``; the
    documents may be without it. ``names`` are for messages."""
    if all(document.ids is None for document in documents):
        yield from tokenizer.encode_many(texts, names=names)
        return
    for document, text, name in zip(documents, texts, names, strict=True):
        yield tokenizer.encode(text, name=name) if document.ids is None else document.ids.astype(np.int32)


def write_shards(
    directory: Path, stem: str, parts: Iterable[np.ndarray], *, shard_tokens: int = SHARD_TOKENS
) -> list[Path]:
    """Write ids as shards ``STEM_000000.bin``, ``STEM_000001.bin``, ... of ``shard_tokens`` ids each, the last shorter.

    Raises:
        OuroborosError: an id that does not fit; an empty shard asked for.
    """
    check(shard_tokens >= 1, f"shards: at least one id is needed in each, got {shard_tokens}")
    written: list[Path] = []
    waiting: list[np.ndarray] = []
    count = 0

    def flush(size: int) -> None:
        nonlocal waiting, count
        ids = np.concatenate(waiting)
        head = np.zeros(HEADER_WORDS, "<i4")
        head[:3] = MAGIC, VERSION, size
        path = directory / f"{stem}_{len(written):06d}.bin"
        path.write_bytes(head.tobytes() + ids[:size].astype("<u2").tobytes())
        written.append(path)
        waiting, count = [ids[size:]], count - size

    for part in parts:
        check(
            not len(part) or int(part.max()) < LARGEST_VOCABULARY,
            f"shards: id {int(part.max(initial=0))} does not fit: they hold ids below {LARGEST_VOCABULARY}; use a"
            " smaller vocabulary",
        )
        waiting.append(part)
        count += len(part)
        while count >= shard_tokens:
            flush(shard_tokens)
    if count:
        flush(count)
    return written

"""Sources to shards: read, split, tokenise, write once, atomically.

The directory appears complete or not at all: files are written in a temporary sibling, synced, then renamed.
The same specification and sources give the same bytes. Of a stream only the head is read: its held-out parts, its
statistics and what the tokenizer is trained on; training reads it anew. Documents of one source are in memory at a
time; tokenising works from the files. The layout is in :mod:`ouroboros.data.prepared`.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ouroboros.config import DataSpec, to_dict
from ouroboros.data.documents import describe_counts, read_documents
from ouroboros.data.folders import lies_inside
from ouroboros.data.formats import find_format
from ouroboros.data.lossless import check_round_trip
from ouroboros.data.masks import Masks, ends_answered
from ouroboros.data.prepared import FORMAT_VERSION, MANIFEST, PreparedData, fingerprint_of, open_prepared, raw_documents
from ouroboros.data.records import Document
from ouroboros.data.sources import SourceRef, parse_sources
from ouroboros.data.splits import SPLITS, Splits, check_disjoint, split_documents
from ouroboros.data.templates import TemplateChat, source_format
from ouroboros.data.token_shards import encode_documents
from ouroboros.data.tokenize import TextTokenizer, decode_utf8, is_made_of_text, load_tokenizer, resolve_tokenizer
from ouroboros.errors import OuroborosError, check
from ouroboros.files import remove_leftovers, sha256_of, whole_directory

logger = logging.getLogger(__name__)

MIN_TRAIN_BYTES = 64
_FREE = ("sequence_length", "skip_bad_records")
"""Options that may differ from those of an earlier preparation: windows are cut by the loader, and what was prepared
had no record that could not be read, or has left it out."""


def prepare(spec: DataSpec, out: str | Path, *, resumed: bool = False, shows_progress: bool = False) -> PreparedData:
    """Write the shards of ``spec`` to the directory ``out``, or reuse those that are there and still fit.

    ``resumed`` says that ``out`` belongs to a run that goes on, whose sources may be gone; with ``shows_progress``,
    training a vocabulary is shown on standard error if it is a terminal.

    Raises:
        OuroborosError: a source that cannot be used; ``out`` holds something else; a source changed since ``out``
            was prepared; the disk is full or not writable. Nothing half-written stays.
    """
    path = Path(out)
    if (path / MANIFEST).exists():
        return _reuse(spec, path, resumed)
    refs = parse_sources(spec.sources, base=Path.cwd())
    check(
        not path.exists() or (path.is_dir() and not any(path.iterdir())),
        f"data {str(path)!r}: exists and holds no prepared data; choose another directory",
    )
    for kind, ref in ((ref.kind, ref) for ref in refs):
        # What a run writes would become part of its own source, which then counts as changed.
        check(
            kind != "directory" or not lies_inside(path, ref.path),
            f"data {str(path)!r}: lies inside the source {ref.text!r}; choose a place outside it",
        )
    remove_leftovers(path.parent, path.name)
    try:
        with whole_directory(path, replace=False) as work:
            _write_all(spec, refs, work, shows_progress)
    except OSError as error:
        if (path / MANIFEST).exists():
            return _reuse(spec, path, resumed)  # another process was faster
        raise OuroborosError(f"data {str(path)!r}: cannot be written: {error.strerror or error}") from error
    return open_prepared(path)


def _reuse(spec: DataSpec, path: Path, resumed: bool) -> PreparedData:
    prepared = open_prepared(path)
    wanted, found = to_dict(spec), to_dict(prepared.spec)
    for key in wanted:
        check(
            key in _FREE or wanted[key] == found[key],
            f"data {str(path)!r}: was prepared with data.{key} = {found[key]!r}, not {wanted[key]!r};"
            " choose another directory or remove it",
        )
    if resumed:
        prepared.find_sources()
    else:
        prepared.check_sources(Path.cwd())
    if spec.tokenizer != "bytes" and not is_made_of_text(spec.tokenizer):
        _check_tokenizer(spec, prepared, resumed)
    prepared.spec = dataclasses.replace(prepared.spec, skip_bad_records=spec.skip_bad_records)
    logger.info("data %s: prepared before, reused", path)
    return prepared


def _check_tokenizer(spec: DataSpec, prepared: PreparedData, resumed: bool) -> None:
    """Refuse a tokenizer directory that has changed. A run that goes on has a copy, so the directory may be gone."""
    path = Path(spec.tokenizer).expanduser()
    places = [base / path for base in (prepared.base, Path())] if resumed else [path]
    place = next((place for place in places if place.is_dir()), None)
    if place is None and resumed:
        prepared.verify()
        logger.warning(
            "tokenizer %r: is not at %r any more; the run goes on with its own copy", spec.tokenizer, str(places[0])
        )
        return
    given, kept = load_tokenizer(place or path), prepared.tokenizer
    is_same_chat = getattr(given.hf, "chat_template", None) == getattr(kept.hf, "chat_template", None)
    check(
        given.fingerprint == prepared.manifest["tokenizer"]["fingerprint"] and is_same_chat,
        f"data.tokenizer {spec.tokenizer!r}: has changed since {str(prepared.directory)!r} was prepared",
    )


@dataclasses.dataclass(frozen=True)
class _Source:
    """A source whose text is on disk: its documents without their bytes, what the names of its files begin with, and
    its part of the manifest."""

    ref: SourceRef
    splits: Splits
    stem: str
    entry: dict[str, Any]

    def documents(self, split: str) -> Iterator[tuple[str, Document, bytes]]:
        """The name for messages, the document without its bytes, and these."""
        documents = self.splits.documents(split)
        for document, data in zip(documents, raw_documents(Path(f"{self.stem}-{split}")), strict=True):
            yield f"{self.ref.text}: {document.name}", document, data


def _write_all(spec: DataSpec, refs: Sequence[SourceRef], work: Path, shows_progress: bool) -> None:
    """Everything of one preparation: texts first, then the tokenizer they may train, then ids, the manifest last."""
    sources = [_write_text(ref, spec, str(work / str(index))) for index, ref in enumerate(refs)]
    check_disjoint([source.splits for source in sources], [ref.text for ref in refs])
    train = (data for source in sources for _, _, data in source.documents("train"))
    tokenizer = resolve_tokenizer(spec.tokenizer, train, shows_progress=shows_progress)
    if any(isinstance(source_format(find_format(ref.format), spec), TemplateChat) for ref in refs if ref.format):
        tokenizer = tokenizer.reading_specials()
    for source, split in itertools.product(sources, SPLITS):
        named = ((name, data) for name, _, data in source.documents(split))
        check_round_trip(tokenizer, named, what=f"data.tokenizer {spec.tokenizer!r}")
    tokenizer.save(work / "tokenizer")
    check(
        spec.loss == "all" or any(d.answers is not None for s in sources for d in s.splits.documents("train")),
        "data.loss 'answers' changes nothing: no source has questions and answers; name the format of one, such as"
        " SRC@messages or 'SRC@Q: {question}\\nA: {answer}'",
    )
    masks = None if spec.loss == "all" else Masks(tokenizer)
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 65_536 else "<u4")
    for source in sources:
        for split in SPLITS:
            source.entry["splits"][split]["tokens"] = _write_tokens(tokenizer, source, split, dtype)
        if masks is not None and not spec.stream:
            _write_mask(masks, source, dtype)
    files = {
        file.relative_to(work).as_posix(): {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
        for file in sorted(path for path in work.rglob("*") if path.is_file())
    }
    manifest = {
        "format_version": FORMAT_VERSION,
        "spec": to_dict(spec),
        "base": str(Path.cwd()),
        "dtype": dtype.str,
        "tokenizer": {
            "kind": tokenizer.kind,
            "vocab_size": tokenizer.vocab_size,
            "eos_id": tokenizer.eos_id,
            "fingerprint": tokenizer.fingerprint,
        },
        "sources": [source.entry for source in sources],
        "files": files,
    }
    (work / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8", newline="\n")


def _write_text(ref: SourceRef, spec: DataSpec, stem: str) -> _Source:
    """Read one source, divide it and write the text of its parts."""
    counts: Counter[str] = Counter()
    try:
        documents = list(read_documents(ref, spec, counts=counts))
        for document in documents if is_made_of_text(spec.tokenizer) else ():
            decode_utf8(document.data, document.name)
        splits = split_documents(documents, spec.valid_fraction, spec.test_fraction, allow_cut=not spec.stream)
    except OuroborosError as error:
        text = str(error)
        raise OuroborosError(text if ref.text in text else f"source {ref.text!r}: {text}") from None
    size = sum(len(document.data) for document in splits.documents("train"))
    check(
        size >= MIN_TRAIN_BYTES,
        f"source {ref.text!r}: its training part has {size} bytes; at least {MIN_TRAIN_BYTES} are needed;"
        " use a longer text",
    )
    # Whatever is left out of a user's own source is said.
    level = logging.INFO if counts["kept"] == counts["read"] or ref.is_built_in else logging.WARNING
    is_little = 2 * counts["kept"] < counts["read"]
    hint = "; more than half was dropped: see data.filters and the format of the source" if is_little else ""
    logger.log(level, "source %r: %s%s", ref.text, describe_counts(counts), hint)
    entry = {
        "text": ref.text,
        "weight": ref.weight,
        "format": ref.format,
        "kind": ref.kind,
        "fingerprint": fingerprint_of(documents),
        **{name: counts.pop(name) for name in ("read", "kept")},
        "dropped": dict(sorted(counts.items())),
        "splits": {split: _write_raw(splits.documents(split), f"{stem}-{split}") for split in SPLITS},
    }
    replace, parts = dataclasses.replace, (splits.train, splits.valid, splits.test)
    outline = Splits(*(tuple(replace(s, document=replace(s.document, data=b"")) for s in part) for part in parts))
    return _Source(ref, outline, stem, entry)


def _write_raw(documents: Sequence[Document], stem: str) -> dict[str, int]:
    with Path(f"{stem}.raw").open("wb") as file:
        file.writelines(document.data for document in documents)
    size = _write_starts(f"{stem}.raw.idx.npy", [len(document.data) for document in documents])
    return {"documents": len(documents), "bytes": size}


def _write_tokens(tokenizer: TextTokenizer, source: _Source, split: str, dtype: np.dtype) -> int:
    """The ids of one part, each document after an end-of-text id; how many there are."""
    stem = f"{source.stem}-{split}"
    eos = np.array([tokenizer.eos_id], dtype=dtype).tobytes()
    documents = source.splits.documents(split)
    names = [f"{source.ref.text}: {document.name}" for document in documents]
    sizes = []
    with Path(f"{stem}.bin").open("wb") as file:
        for ids in encode_documents(tokenizer, documents, raw_documents(Path(stem)), names):
            file.write(eos + ids.astype(dtype).tobytes())
            sizes.append(1 + len(ids))
    return _write_starts(f"{stem}.idx.npy", sizes)


def _write_starts(path: str, sizes: Sequence[int]) -> int:
    """Write where each of some parts begins, and where the last one ends, which is returned."""
    starts = list(itertools.accumulate(sizes, initial=0))
    np.save(path, np.array(starts, dtype="<i8"), allow_pickle=False)
    return starts[-1]


def _write_mask(masks: Masks, source: _Source, dtype: np.dtype) -> None:
    """One byte for each training id: whether it is learned."""
    stem = f"{source.stem}-train"
    ids = np.fromfile(f"{stem}.bin", dtype=dtype)
    edges = itertools.pairwise(np.load(f"{stem}.idx.npy", allow_pickle=False).tolist())
    ended = False
    with Path(f"{stem}.loss").open("wb") as file:
        for (start, end), (_, document, data) in zip(edges, source.documents("train"), strict=True):
            # The end-of-text token before a document is the end of the one that precedes it.
            mask = masks.mask(ids[start + 1 : end], data, document.answers, document.name)
            file.write(np.concatenate([[ended], mask]).astype(np.uint8).tobytes())
            ended = ends_answered(data, document.answers)

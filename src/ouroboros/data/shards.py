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
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ouroboros.config import DataSpec, to_dict
from ouroboros.data.folders import lies_inside
from ouroboros.data.formats import find_format
from ouroboros.data.masks import Masks, ends_answered
from ouroboros.data.mixtures import parse_sources
from ouroboros.data.prepared import (
    FORMAT_VERSION,
    MANIFEST,
    Fingerprint,
    PreparedData,
    file_sha256,
    open_prepared,
)
from ouroboros.data.published import published_blocks
from ouroboros.data.roundtrip import check_round_trip
from ouroboros.data.sources import BUILT_IN, Document, SourceRef, describe_counts, read_documents
from ouroboros.data.splits import SPLITS, Span, Splits, check_disjoint, split_documents
from ouroboros.data.templates import TemplateChat, source_format
from ouroboros.data.tokenize import TextTokenizer, decode_utf8, is_made_of_text, load_tokenizer, resolve_tokenizer
from ouroboros.errors import OuroborosError
from ouroboros.files import flush, remove_leftovers, whole_directory

logger = logging.getLogger(__name__)

MIN_TRAIN_BYTES = 64


def prepare(spec: DataSpec, out: str | Path, *, resumed: bool = False, shows_progress: bool = False) -> PreparedData:
    """Write the shards of ``spec`` to the directory ``out``, or reuse those that are there and still fit.

    Args:
        spec: the sources, and what is made of them.
        out: the directory.
        resumed: ``out`` belongs to a run that goes on: its sources are looked for where it was begun, and may be gone
            (:meth:`~ouroboros.data.prepared.PreparedData.find_sources`).
        shows_progress: training a vocabulary is shown on standard error if it is a terminal.

    Raises:
        OuroborosError: a source that cannot be used; ``out`` holds something else; a source changed since ``out``
            was prepared; the disk is full or not writable. Nothing half-written stays.
    """
    path = Path(out)
    if (path / MANIFEST).exists():
        return _reuse(spec, path, resumed)
    refs = parse_sources(spec.sources, base=Path.cwd())
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise OuroborosError(f"data {str(path)!r}: exists and holds no prepared data; choose another directory")
    for ref in refs:
        # What a run writes would become part of its own source, which then counts as changed.
        if ref.kind == "directory" and lies_inside(path, ref.path):
            raise OuroborosError(f"data {str(path)!r}: lies inside the source {ref.text!r}; choose a place outside it")
    remove_leftovers(path.parent, path.name)
    try:
        with whole_directory(path, replace=False) as work:
            _write_all(spec, refs, work, shows_progress)
    except OSError as error:
        if (path / MANIFEST).exists():
            return _reuse(spec, path, resumed)  # another process was faster
        raise OuroborosError(f"data {str(path)!r}: cannot be written: {error.strerror or error}") from error
    return open_prepared(path)


_FREE = ("sequence_length", "skip_bad_records")
"""Options that may differ: windows are cut by the loader, and what was prepared had no record that could not be read,
or has left it out."""


def _reuse(spec: DataSpec, path: Path, resumed: bool) -> PreparedData:
    prepared = open_prepared(path)
    wanted, found = to_dict(spec), to_dict(prepared.spec)
    for key in wanted:
        if key not in _FREE and wanted[key] != found[key]:
            raise OuroborosError(
                f"data {str(path)!r}: was prepared with data.{key} = {found[key]!r}, not {wanted[key]!r};"
                " choose another directory or remove it"
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
    if resumed:
        places = [base / path for base in (prepared.base, Path())]
        found = next((place for place in places if place.is_dir()), None)
        if found is None:
            prepared.verify()
            logger.warning(
                "tokenizer %r: is not at %r any more; the run goes on with its own copy", spec.tokenizer, str(places[0])
            )
            return
        path = found
    given, kept = load_tokenizer(path), prepared.tokenizer
    is_same_chat = getattr(given.hf, "chat_template", None) == getattr(kept.hf, "chat_template", None)
    if given.fingerprint != prepared.manifest["tokenizer"]["fingerprint"] or not is_same_chat:
        raise OuroborosError(
            f"data.tokenizer {spec.tokenizer!r}: has changed since {str(prepared.directory)!r} was prepared"
        )


def _write_all(spec: DataSpec, refs: Sequence[SourceRef], work: Path, shows_progress: bool) -> None:
    """Everything of one preparation: texts first, then the tokenizer they may train, then ids, the manifest last."""
    entries: list[dict[str, Any]] = []
    outlines: list[Splits] = []
    for index, ref in enumerate(refs):
        documents: Counter[str] = Counter()
        splits, fingerprint = _split_source(ref, spec, documents)
        _report_counts(ref, documents)
        counts = {split: _write_raw(splits.spans(split), work / f"{index}-{split}") for split in SPLITS}
        entries.append(
            {
                "text": ref.text,
                "weight": ref.weight,
                "format": ref.format,
                "kind": ref.kind,
                "fingerprint": fingerprint,
                "cut": splits.is_cut,
                "read": documents.pop("read"),
                "kept": documents.pop("kept"),
                "dropped": dict(sorted(documents.items())),
                "splits": counts,
            }
        )
        outlines.append(_outline(splits))
    check_disjoint(outlines, [ref.text for ref in refs])
    raw_train = (raw for index in range(len(refs)) for raw in _read_raw(work / f"{index}-train"))
    tokenizer = resolve_tokenizer(spec.tokenizer, raw_train, shows_progress=shows_progress)
    if any(isinstance(source_format(find_format(ref.format), spec), TemplateChat) for ref in refs if ref.format):
        tokenizer = tokenizer.reading_specials()
    for index, split in itertools.product(range(len(refs)), SPLITS):
        named = zip(_names(refs[index], outlines[index], split), _read_raw(work / f"{index}-{split}"), strict=True)
        check_round_trip(tokenizer, named, what=f"data.tokenizer {spec.tokenizer!r}")
    tokenizer.save(work / "tokenizer")
    masks = _masks(spec, tokenizer, outlines)
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 65_536 else "<u4")
    for index, entry in enumerate(entries):
        for split in SPLITS:
            names = _names(refs[index], outlines[index], split)
            tokens = _write_tokens(tokenizer, work / f"{index}-{split}", names, dtype)
            entry["splits"][split]["tokens"] = tokens
        if masks is not None and not spec.stream:
            _write_mask(masks, outlines[index].documents("train"), work / f"{index}-train", dtype)
        entry.update(_length_facts(work / f"{index}-train", spec.sequence_length))
    _write_manifest(spec, tokenizer, dtype, entries, work)


def _names(ref: SourceRef, outline: Splits, split: str) -> list[str]:
    """The documents of a part, for messages."""
    return [f"{ref.text}: {document.name}" for document in outline.documents(split)]


def _report_counts(ref: SourceRef, counts: Counter[str]) -> None:
    """Log what was read, kept and dropped; whatever is left out of a user's own source is said."""
    is_little = 2 * counts["kept"] < counts["read"]
    hint = "; more than half was dropped: see data.filters and the format of the source" if is_little else ""
    complete = counts["kept"] == counts["read"] or ref.text in BUILT_IN
    level = logging.INFO if complete else logging.WARNING
    logger.log(level, "source %r: %s%s", ref.text, describe_counts(counts), hint)


def _length_facts(stem: Path, block: int) -> dict[str, Any]:
    """How long the training documents are, and what a cut into blocks that crosses no document would have lost.

    Lengths are in tokens with the end-of-text token: ``lengths[k]`` documents have 2^k to 2^(k+1) - 1 of them.
    """
    lengths = np.diff(np.load(f"{stem}.idx.npy", allow_pickle=False))
    blocks = np.array([len(published_blocks(length, block)) for length in lengths.tolist()], dtype=np.int64)
    return {
        "lengths": np.bincount(np.frexp(lengths)[1] - 1).tolist(),
        "block_cut": {
            "block": block,
            "blocks": int(blocks.sum()),
            "documents_lost": int((blocks == 0).sum()),
            "tokens_lost": int(lengths.sum() - block * blocks.sum()),
        },
    }


def _split_source(ref: SourceRef, spec: DataSpec, counts: Counter[str]) -> tuple[Splits, str]:
    """Read one source: its splits and its fingerprint; ``counts`` is added what was kept and dropped."""
    fingerprint = Fingerprint()

    def documents() -> Iterator[Document]:
        for document in read_documents(ref, spec, counts=counts):
            fingerprint.add(document)
            if is_made_of_text(spec.tokenizer):
                decode_utf8(document.data, document.name)
            yield document

    try:
        splits = split_documents(documents(), spec.valid_fraction, spec.test_fraction, allow_cut=not spec.stream)
    except OuroborosError as error:
        text = str(error)
        raise OuroborosError(text if ref.text in text else f"source {ref.text!r}: {text}") from None
    size = sum(len(span.document.data) for span in splits.train)
    if size < MIN_TRAIN_BYTES:
        raise OuroborosError(
            f"source {ref.text!r}: its training part has {size} bytes; at least {MIN_TRAIN_BYTES} are needed;"
            " use a longer text"
        )
    return splits, fingerprint.hexdigest()


def _outline(splits: Splits) -> Splits:
    """The same splits without the text, which is on disk by now."""

    def bare(spans: tuple[Span, ...]) -> tuple[Span, ...]:
        return tuple(dataclasses.replace(s, document=dataclasses.replace(s.document, data=b"")) for s in spans)

    return Splits(bare(splits.train), bare(splits.valid), bare(splits.test), splits.is_cut)


def _write_raw(spans: Iterable[Span], stem: Path) -> dict[str, int]:
    starts = [0]
    with Path(f"{stem}.raw").open("wb") as file:
        for span in spans:
            file.write(span.document.data)
            starts.append(starts[-1] + len(span.document.data))
    np.save(f"{stem}.raw.idx.npy", np.array(starts, dtype="<i8"), allow_pickle=False)
    return {"documents": len(starts) - 1, "bytes": starts[-1]}


def _read_raw(stem: Path) -> Iterator[bytes]:
    starts = np.load(f"{stem}.raw.idx.npy", allow_pickle=False).tolist()
    with Path(f"{stem}.raw").open("rb") as file:
        for start, end in itertools.pairwise(starts):
            yield file.read(end - start)


def _write_tokens(tokenizer: TextTokenizer, stem: Path, names: list[str], dtype: np.dtype) -> int:
    starts = [0]
    eos = np.array([tokenizer.eos_id], dtype=dtype).tobytes()
    with Path(f"{stem}.bin").open("wb") as file:
        for ids in tokenizer.encode_many(_read_raw(stem), names=names):
            file.write(eos)
            file.write(ids.astype(dtype).tobytes())
            starts.append(starts[-1] + 1 + len(ids))
    np.save(f"{stem}.idx.npy", np.array(starts, dtype="<i8"), allow_pickle=False)
    return starts[-1]


def _masks(spec: DataSpec, tokenizer: TextTokenizer, outlines: Sequence[Splits]) -> Masks | None:
    """What finds the tokens that are learned; None where all of them are."""
    if spec.loss == "all":
        return None
    if all(document.answers is None for splits in outlines for document in splits.documents("train")):
        raise OuroborosError(
            "data.loss 'answers' changes nothing: no source has questions and answers; name the format of one, such as"
            " SRC@messages or 'SRC@Q: {question}\\nA: {answer}'"
        )
    return Masks(tokenizer)


def _write_mask(masks: Masks, documents: Sequence[Document], stem: Path, dtype: np.dtype) -> None:
    """One byte for each id of ``stem``.bin: whether it is learned."""
    ids = np.fromfile(f"{stem}.bin", dtype=dtype)
    edges = itertools.pairwise(np.load(f"{stem}.idx.npy", allow_pickle=False).tolist())
    ended = False
    with Path(f"{stem}.loss").open("wb") as file:
        for (start, end), document, raw in zip(edges, documents, _read_raw(stem), strict=True):
            # The end-of-text token before a document is the end of the one that precedes it.
            mask = masks.mask(ids[start + 1 : end], raw, document.answers, document.name)
            file.write(np.concatenate([[ended], mask]).astype(np.uint8).tobytes())
            ended = ends_answered(raw, document.answers)


def _write_manifest(
    spec: DataSpec, tokenizer: TextTokenizer, dtype: np.dtype, entries: list[dict[str, Any]], work: Path
) -> None:
    files: dict[str, dict[str, Any]] = {}
    for file in sorted(p for p in work.rglob("*") if p.is_file()):
        flush(file)
        name = file.relative_to(work).as_posix()
        files[name] = {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
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
        "sources": entries,
        "files": files,
    }
    path = work / MANIFEST
    path.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8", newline="\n")
    for place in (path, work / "tokenizer", work):
        flush(place)

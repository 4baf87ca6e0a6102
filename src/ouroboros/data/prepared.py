"""Prepared data: the shards of :func:`ouroboros.data.shards.prepare`, opened by memory mapping.

Layout of the directory, for source number ``i`` and each split (``train``, ``valid``, ``test``):

===========================  =====================================================================
``manifest.json``            format version, specification, sources, counts, sha256 of each file
``tokenizer/``               the tokenizer, as transformers writes it
``<i>-<split>.bin``          ids, little-endian uint16 (uint32 if vocab_size > 65536); each document
                             is preceded by the end-of-text id
``<i>-<split>.idx.npy``      int64 (documents + 1,): where each document starts in the ids
``<i>-train.loss``           with ``data.loss`` = ``answers``: for each id a byte, 1 if it is learned
``<i>-<split>.raw``          the original bytes of the documents, joined
``<i>-<split>.raw.idx.npy``  int64 (documents + 1,): where each document starts in the bytes
===========================  =====================================================================
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ouroboros.config import DataSpec, from_dict
from ouroboros.data.documents import read_documents
from ouroboros.data.records import Document
from ouroboros.data.sources import SourceRef
from ouroboros.data.tokenize import TextTokenizer, load_tokenizer
from ouroboros.errors import OuroborosError, check
from ouroboros.files import sha256_of

logger = logging.getLogger(__name__)

FORMAT_VERSION = 2
MANIFEST = "manifest.json"


class PreparedData:
    """Tokenised data on disk. Make one with ``prepare`` or :func:`open_prepared`."""

    def __init__(self, directory: Path, manifest: dict[str, Any]) -> None:
        self.directory = directory
        self.manifest = manifest
        self.spec: DataSpec = from_dict(DataSpec, manifest["spec"], where=f"{directory / MANIFEST}: spec")
        self.base = Path(manifest["base"])
        """The directory that it was prepared from: relative sources start there."""
        self.sources: tuple[SourceRef, ...] = tuple(
            SourceRef(entry["text"], entry["weight"], self.base, entry["format"]) for entry in manifest["sources"]
        )
        """Every source that was read; the parts of a mixture stand in its place."""

    @functools.cached_property
    def tokenizer(self) -> TextTokenizer:
        """The tokenizer the shards were made with."""
        return load_tokenizer(self.directory / "tokenizer")

    @property
    def weights(self) -> tuple[float, ...]:
        """Mixing weight of each source, as given (not normalised)."""
        return tuple(ref.weight for ref in self.sources)

    @property
    def reading_spec(self) -> DataSpec:
        """:attr:`spec` to read the sources again with, by the chat template of the tokenizer that is kept here."""
        return dataclasses.replace(self.spec, tokenizer=str((self.directory / "tokenizer").absolute()))

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) over the tokenizer and all shard files: equal means the same training and held-out data."""
        files = sorted((name, entry["sha256"]) for name, entry in self.manifest["files"].items())
        return hashlib.sha256(json.dumps(files).encode()).hexdigest()

    def count(self, split: str, unit: str) -> int:
        """``documents``, ``bytes`` or ``tokens`` of a split, over all sources."""
        return sum(source["splits"][split][unit] for source in self.manifest["sources"])

    def tokens(self, split: str, source: int) -> np.ndarray:
        """The ids of one source and split, a read-only memory map (n,)."""
        path, dtype = self._file(split, source, ".bin"), np.dtype(self.manifest["dtype"])
        return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.zeros(0, dtype)

    def learned(self, source: int) -> np.ndarray | None:
        """Whether training learns each of the training ids, a read-only memory map (n,); None where it learns all."""
        path = self._file("train", source, ".loss")
        return np.memmap(path, dtype=bool, mode="r") if path.is_file() else None

    def offsets(self, split: str, source: int) -> np.ndarray:
        """Where each document starts in :meth:`tokens`, int64 (documents + 1,)."""
        return np.load(self._file(split, source, ".idx.npy"), allow_pickle=False)

    def documents(self, split: str, source: int | None = None) -> list[bytes]:
        """The original bytes of the documents of a split, of one source or of all."""
        chosen = range(len(self.sources)) if source is None else [source]
        return [document for index in chosen for document in raw_documents(self._file(split, index, ""))]

    def _file(self, split: str, source: int, suffix: str) -> Path:
        return self.directory / f"{source}-{split}{suffix}"

    def check_sources(self, base: Path | None = None) -> None:
        """Read every source again, but for streams, and refuse one that has changed or is gone. Relative sources are
        looked for in ``base``, or where they were prepared."""
        for ref, entry in zip(self.sources, self.manifest["sources"], strict=True):
            self._refuse_changed(ref if base is None else dataclasses.replace(ref, base=base), entry)

    def find_sources(self) -> None:
        """Find every source again for a run that goes on, and refuse if one has changed.

        A source is looked for in the directory it was prepared from. If it is not there any more, the same text is
        taken from the current directory; else the run goes on with the text stored here, once that is verified, and a
        warning says so; a streamed run cannot.
        """
        found = [self._find(ref, entry) for ref, entry in zip(self.sources, self.manifest["sources"], strict=True)]
        lost = [ref for ref, place in zip(self.sources, found, strict=True) if place is None]
        gone = ", ".join(f"source {ref.text!r} at {str(ref.path)!r}" for ref in lost)
        check(
            not gone or not self.spec.stream,
            f"{gone}: not there any more; a streamed run reads its text while it trains: put it back there,"
            " or resume in a directory that has it",
        )
        if gone:
            self.verify()
            logger.warning(
                "%s: not there any more; the run goes on with the text prepared from it, which is intact", gone
            )
        self.sources = tuple(place or ref for ref, place in zip(self.sources, found, strict=True))

    def _find(self, ref: SourceRef, entry: dict[str, Any]) -> SourceRef | None:
        """The source where it was, or the same text in the current directory."""
        if ref.is_there():
            self._refuse_changed(ref, entry)
            return ref
        here = dataclasses.replace(ref, base=Path())
        with contextlib.suppress(OuroborosError):  # something else of that name
            if here.is_there() and self._fingerprint(here) == entry["fingerprint"]:
                return here
        return None

    def _fingerprint(self, ref: SourceRef) -> str:
        return fingerprint_of(read_documents(ref, self.reading_spec))

    def _refuse_changed(self, ref: SourceRef, entry: dict[str, Any]) -> None:
        if ref.is_hub or self.spec.stream:  # it would take too long
            return
        check(
            self._fingerprint(ref) == entry["fingerprint"],
            f"source {ref.text!r}: has changed since {str(self.directory)!r} was prepared from it;"
            " restore it, or prepare the data anew in another directory",
        )

    def verify(self) -> None:
        """Refuse data of which a file's sha256 is not that of the manifest."""
        for name, entry in self.manifest["files"].items():
            check(
                sha256_of(self.directory / name) == entry["sha256"],
                f"data {str(self.directory)!r}: {name} was altered (sha256 differs); prepare the data anew",
            )


def fingerprint_of(documents: Iterable[Document]) -> str:
    """sha256 (hex) over the names, bytes and groups of documents, each with its length."""
    digest = hashlib.sha256()
    for document in documents:
        group = () if document.group is None else (document.group,)
        for part in (document.name.encode("utf-8", "surrogateescape"), document.data, *group):
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
    return digest.hexdigest()


def open_prepared(directory: str | Path) -> PreparedData:
    """Open what ``prepare`` wrote: of this format version, every file of its manifest there with its size."""
    path = Path(directory)
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
    except FileNotFoundError:
        raise OuroborosError(f"data {str(path)!r}: no prepared data there ({MANIFEST} is missing)") from None
    except (OSError, ValueError) as error:
        raise OuroborosError(f"data {str(path)!r}: {MANIFEST} cannot be read: {error}") from error
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    check(
        version == FORMAT_VERSION,
        f"data {str(path)!r}: format version {version}, this release reads {FORMAT_VERSION}; prepare the data anew",
    )
    missing = sorted({"spec", "base", "dtype", "tokenizer", "sources", "files"} - manifest.keys())
    check(not missing, f"data {str(path)!r}: {MANIFEST} lacks {', '.join(missing)}; prepare the data anew")
    for name, entry in manifest["files"].items():
        file = path / name
        size = file.stat().st_size if file.is_file() else None
        found = "is missing" if size is None else f"has {size} bytes, not {entry['bytes']}"
        check(size == entry["bytes"], f"data {str(path)!r}: {name} {found}; prepare the data anew")
    return PreparedData(path, manifest)


def raw_documents(stem: Path) -> Iterator[bytes]:
    """The original bytes of the documents of one source and split, from ``STEM.raw``."""
    starts = np.load(f"{stem}.raw.idx.npy", allow_pickle=False).tolist()
    with Path(f"{stem}.raw").open("rb") as file:
        for start, end in itertools.pairwise(starts):
            yield file.read(end - start)

"""Text into windows of tokens: sources, splits, tokenizers, shards and the loader.

The flow is one direction. :mod:`~ouroboros.data.sources` says what a source means; :mod:`~ouroboros.data.documents`
reads it (:mod:`~ouroboros.data.textfile` opens files, :mod:`~ouroboros.data.records` and
:mod:`~ouroboros.data.formats` make text of records, :mod:`~ouroboros.data.filters` leaves some out);
:mod:`~ouroboros.data.splits` divides the documents, :mod:`~ouroboros.data.tokenize` turns bytes into ids,
:mod:`~ouroboros.data.shards` writes memory-mapped files with a manifest, and :mod:`~ouroboros.data.loader` cuts windows
in a documented, resumable order. :mod:`~ouroboros.data.stream` does both at once for sources that are read while
training runs. Names are imported on first use; nothing here imports torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ouroboros.data.documents import name_formats as name_formats
    from ouroboros.data.documents import read_documents as read_documents
    from ouroboros.data.loader import Loader as Loader
    from ouroboros.data.loader import WindowLoader as WindowLoader
    from ouroboros.data.prepared import PreparedData as PreparedData
    from ouroboros.data.prepared import open_prepared as open_prepared
    from ouroboros.data.records import Document as Document
    from ouroboros.data.shards import prepare as prepare
    from ouroboros.data.sources import SourceRef as SourceRef
    from ouroboros.data.sources import parse_source as parse_source
    from ouroboros.data.sources import parse_sources as parse_sources
    from ouroboros.data.splits import Splits as Splits
    from ouroboros.data.splits import split_documents as split_documents
    from ouroboros.data.stream import StreamLoader as StreamLoader
    from ouroboros.data.stream import open_loader as open_loader
    from ouroboros.data.tokenize import TextTokenizer as TextTokenizer
    from ouroboros.data.tokenize import byte_tokenizer as byte_tokenizer
    from ouroboros.data.tokenize import character_tokenizer as character_tokenizer
    from ouroboros.data.tokenize import load_tokenizer as load_tokenizer
    from ouroboros.data.tokenize import resolve_tokenizer as resolve_tokenizer
    from ouroboros.data.tokenize import train_bpe as train_bpe

_NAMES = {
    "documents": "name_formats read_documents",
    "loader": "Loader WindowLoader",
    "prepared": "PreparedData open_prepared",
    "records": "Document",
    "shards": "prepare",
    "sources": "SourceRef parse_source parse_sources",
    "splits": "Splits split_documents",
    "stream": "StreamLoader open_loader",
    "tokenize": "TextTokenizer byte_tokenizer character_tokenizer load_tokenizer resolve_tokenizer train_bpe",
}
_HOME = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)

"""Text into windows of tokens: sources, splits, tokenizers, shards and the loader.

The flow is one direction. :mod:`~ouroboros.data.sources` says what a source means; :mod:`~ouroboros.data.documents`
reads it (:mod:`~ouroboros.data.textfile` opens files, :mod:`~ouroboros.data.records` and
:mod:`~ouroboros.data.formats` make text of records, :mod:`~ouroboros.data.filters` leaves some out);
:mod:`~ouroboros.data.splits` divides the documents, :mod:`~ouroboros.data.tokenize` turns bytes into ids,
:mod:`~ouroboros.data.shards` writes memory-mapped files with a manifest, and :mod:`~ouroboros.data.loader` cuts windows
in a documented, resumable order. :mod:`~ouroboros.data.stream` does both at once for sources that are read while
training runs. Nothing here imports torch.
"""

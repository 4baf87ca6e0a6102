"""The report's section on the published R-HRM pipeline: what it would have made of the run's data."""

from __future__ import annotations

import numpy as np

from ouroboros.data.prepared import PreparedData
from ouroboros.data.published import published_accepts, published_blocks, published_shares
from ouroboros.report.content import Section, Table
from ouroboros.report.data import document_sizes, heaviest, length_chart, share_chart, short_labels
from ouroboros.report.run import Run
from ouroboros.report.text import percent

MAX_SAMPLED = 2_000
"""Documents of a source that the published filter is tried on; of more, this many at even distances."""
_DECIDING_TOKENS = 50_000
"""The published filter drops texts over 10,000 characters, of which none takes more than four tokens, so this many
tokens of a document decide."""


def section(run: Run) -> Section | None:
    """The section of a run with several sources, or with one of several documents; None for other runs."""
    data = run.data
    if data is None:
        return None
    block, labels = data.spec.sequence_length, short_labels(data)
    shares = shares_of(data) or [None] * len(labels)
    sizes = [document_sizes(data, index) for index in range(len(labels))]
    # The last block of a document begins below size - block, see published_blocks.
    kept = [block * np.maximum(-(-found // block) - 1, 0) for found in sizes]
    charts = []
    if len(labels) > 1:
        weights = [weight / sum(data.weights) for weight in data.weights]
        charts.append(share_chart(labels, {"weight": weights, "published pipeline": shares}))
    charts += [
        length_chart(
            f"What the published cut loses of {labels[index]}", sizes[index], block, 1 - kept[index] / sizes[index]
        )
        for index in heaviest(data.weights)
        if len(sizes[index]) > 1
    ]
    rows = [
        (
            label,
            percent(share),
            f"{(blocks == 0).sum():,} of {len(found):,}",
            f"{(found - blocks).sum():,} of {found.sum():,}",
        )
        for label, share, found, blocks in zip(labels, shares, sizes, kept, strict=True)
    ]
    head = ("Source", "published share", "documents lost", "tokens lost")
    lead = (
        "What the R-HRM pipeline as published would make of these sources. There the weights count documents, before"
        " its filter (which drops a document over 10,000 characters or with 10 symbols in a row; a text file is one"
        f" document) and before its cut into blocks (of {block:,} tokens here) that cross no document, so that short"
        " documents and the end of every other one are lost. In this run nothing is lost."
    )
    title = "The same data in the published R-HRM pipeline"
    tables = [Table(head=head, rows=rows)]
    return Section(ident="rhrm", title=title, lead=lead, charts=charts, tables=tables) if charts else None


def shares_of(data: PreparedData) -> list[float] | None:
    """The share of training tokens each source would have had in the published pipeline, None if no block is left.

    There a weight is of documents drawn, before its filter and its block cut. Both are tried here on the training
    documents that were kept, in this run's tokens; a text file is one document.
    """
    acceptance, blocks = [], []
    for index in range(len(data.sources)):
        starts, ids = data.offsets("train", index), data.train_tokens(index)
        count = min(len(starts) - 1, MAX_SAMPLED)
        found = []
        for document in np.linspace(0, len(starts) - 2, count).astype(np.int64).tolist():
            start, end = int(starts[document]), int(starts[document + 1])
            # The first id is the end-of-text token before the document.
            text = data.tokenizer.decode(ids[start + 1 : min(end, start + 1 + _DECIDING_TOKENS)])
            if published_accepts(text.decode("utf-8", "replace")):
                found.append(len(published_blocks(end - start, data.spec.sequence_length)))
        acceptance.append(len(found) / max(count, 1))
        blocks.append(sum(found) / max(len(found), 1))
    if not any(kept * mean for kept, mean in zip(acceptance, blocks, strict=True)):
        return None
    return published_shares(data.weights, acceptance, blocks)

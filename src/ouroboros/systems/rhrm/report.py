"""The report's section on the published R-HRM pipeline: what it would have made of the run's data."""

from __future__ import annotations

import numpy as np

from ouroboros.report.content import Section, Table
from ouroboros.report.data import document_sizes, heaviest, length_chart, share_chart, short_labels
from ouroboros.report.run import Run
from ouroboros.report.text import percent
from ouroboros.systems.rhrm.data import shares_of


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

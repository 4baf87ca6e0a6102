"""The challenge's score of a stream, by hand with a table of logits; the published windows."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ouroboros.errors import OuroborosError
from ouroboros.eval.windows import Windows
from ouroboros.systems.crawler.score import StreamScore, published_part, published_spans, score_stream
from ouroboros.systems.crawler.tables import ByteTables

V = 4
TABLES = ByteTables(
    np.array([0, 1, 3, 2]), np.array([False, False, True, False]), np.array([True, False, False, False])
)
"""Id 0 is a boundary, and 2 begins with a space."""
IDS = np.array([0, 2, 1, 2, 3, 0, 1, 2])


class Table(nn.Module):
    """Logits by the previous id."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.register_buffer("table", logits)
        self.config = SimpleNamespace(vocab_size=len(logits))

    def forward(self, input_ids: Tensor) -> Any:
        return SimpleNamespace(logits=self.table[input_ids])


def scored(model: nn.Module, ids: np.ndarray = IDS, tables: ByteTables = TABLES, **windows: Any) -> StreamScore:
    facts = {"loops": None, "window": 3, "stride": 3, "reading": ""}
    return score_stream(model, ids, tables, Windows(3, 3, **windows), **facts)


def test_by_hand() -> None:
    """A space counts where it follows something that is no boundary."""
    logits = torch.randn(V, V, generator=torch.Generator().manual_seed(0))
    found = scored(Table(logits))
    pairs = list(itertools.pairwise(IDS.tolist()))
    nats = -sum(logits.log_softmax(-1)[before, target].item() for before, target in pairs)
    assert found.bytes == 3 + 1 + (3 + 1) + 2 + 0 + 1 + (3 + 1)
    assert found.tokens == found.distinct_tokens == 7
    assert found.nats_per_token == pytest.approx(nats / 7)
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / found.bytes)


def test_published_windows_count_the_end_several_times() -> None:
    spans = [(span.start, span.end, span.first) for span in published_spans(10, window=6, stride=2)]
    assert spans == [(0, 6, 0), (2, 8, 6), (4, 10, 8), (6, 10, 8), (8, 10, 8)]
    assert published_part(IDS, 3).tolist() == IDS[:7].tolist()
    with pytest.raises(OuroborosError, match="the stream has 8 ids, but one window needs 9; give a smaller window"):
        published_part(IDS, 8)


def test_refused() -> None:
    table = Table(torch.zeros(V, V))
    with pytest.raises(OuroborosError, match="a stream of at least two ids is needed, got 1"):
        scored(table, IDS[:1])
    with pytest.raises(OuroborosError, match="the stream has id 9, but the model 4 ids"):
        scored(table, np.array([0, 9]))
    with pytest.raises(OuroborosError, match="the targets have no bytes by the table"):
        scored(table, np.array([1, 0, 0]))
    with pytest.raises(OuroborosError, match="the score of the stream is"):
        scored(Table(torch.full((V, V), math.nan)))

"""The score of a stream: every target once, the published over-count as an option, what is refused."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ouroboros.data.sentencepieces import Piece
from ouroboros.data.tokenize import byte_tokenizer
from ouroboros.errors import OuroborosError
from ouroboros.eval.windows import Windows, spans
from ouroboros.systems.crawler.score import CHALLENGE_PUBLISHED, challenge, published_part, published_spans


class Table(nn.Module):
    """Logits by the previous id."""

    def __init__(self, size: int = 257) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(size, size, generator=torch.Generator().manual_seed(0)))
        self.config = SimpleNamespace(vocab_size=size, max_position_embeddings=64)

    def forward(self, input_ids: Tensor) -> Any:
        return SimpleNamespace(logits=self.table[input_ids])


FACTS: dict[str, Any] = {"window": 16, "stride": 4, "loops": None, "reading": "windows"}
IDS = np.concatenate([np.append(256, np.frombuffer(b"abc de" * n, np.uint8)) for n in range(1, 6)])


def nats(ids: np.ndarray) -> np.ndarray:
    table = Table().table.detach().log_softmax(-1).numpy()
    return -table[ids[:-1], ids[1:]].astype(float)


def test_every_target_once_the_tail_too() -> None:
    found = challenge(Table(), byte_tokenizer(), IDS, **FACTS, model_name="table")
    assert (found.tokens, found.distinct_tokens) == (len(IDS) - 1,) * 2
    assert found.bytes == (IDS[1:] < 256).sum() and found.model == "table"
    assert found.nats_per_token == pytest.approx(nats(IDS).mean(), rel=1e-6)
    assert found.bits_per_byte == pytest.approx(nats(IDS).sum() / math.log(2) / found.bytes, rel=1e-6)
    disjoint = challenge(Table(), byte_tokenizer(), IDS, **FACTS, procedure=Windows(5, 5))
    assert disjoint.bits_per_byte == pytest.approx(found.bits_per_byte)  # a table sees one id back


def test_the_published_form_counts_the_tail_several_times() -> None:
    found = CHALLENGE_PUBLISHED(Table(), byte_tokenizer(), IDS, **FACTS)
    whole = published_part(IDS, 16)
    times = np.zeros(len(whole) - 1, int)
    for span in published_spans(len(times), 16, 4):
        times[span.first : span.end] += 1
    assert times.max() == 4 and (times[:-4] == 1).all() and (len(IDS) - 1) % 16
    assert (found.tokens, found.distinct_tokens) == (times.sum(), len(times))
    assert found.bytes == (times * (whole[1:] < 256)).sum()
    assert found.nats_per_token == pytest.approx((times * nats(whole)).sum() / times.sum(), rel=1e-6)


def test_both_plans_agree_but_for_the_end() -> None:
    ours, theirs = list(spans(40, 16, 4)), list(published_spans(40, 16, 4))
    assert theirs[: len(ours)] == ours and len(theirs) == 10
    assert [tuple(span)[1:] for span in theirs[len(ours) :]] == [(28, 40, 36), (32, 40, 36), (36, 40, 36)]


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OuroborosError, match="two ids is needed, got 1"):
        challenge(Table(), byte_tokenizer(), IDS[:1], **FACTS)
    with pytest.raises(OuroborosError, match="the model 300 ids"):
        challenge(Table(300), byte_tokenizer(), np.array([1, 300]), **FACTS)
    with pytest.raises(OuroborosError, match="the model has 200 ids, but the tokenizer 257"):
        challenge(Table(200), byte_tokenizer(), IDS, **FACTS)
    with pytest.raises(OuroborosError, match="the targets have no bytes"):
        challenge(Table(), byte_tokenizer(), np.array([97, 256, 256]), **FACTS)
    with pytest.raises(OuroborosError, match="window 65 is longer than the model's context"):
        challenge(Table(), byte_tokenizer(), IDS, **FACTS | {"window": 65})
    with pytest.raises(OuroborosError, match="one window needs 17"):
        CHALLENGE_PUBLISHED(Table(), byte_tokenizer(), IDS[:16], **FACTS)
    with pytest.raises(OuroborosError, match="leave --rolling and --adapt out"):
        CHALLENGE_PUBLISHED(Table(), byte_tokenizer(), IDS, **FACTS, procedure=Windows(4, 4))
    broken = Table()
    with torch.no_grad():
        broken.table[100] = math.nan
    with pytest.raises(OuroborosError, match="the score of the stream is nan"):
        challenge(broken, byte_tokenizer(), IDS, **FACTS)
    pieces = [Piece(chr(97), "unknown" if index == 98 else "normal") for index in range(257)]
    monkeypatch.setattr("ouroboros.systems.crawler.tables.pieces_of", lambda tokenizer: pieces)
    with pytest.raises(OuroborosError, match="id 98 at place 2 of the stream, behind 'a', stands for text"):
        challenge(Table(), byte_tokenizer(), IDS, **FACTS)

"""Golden cases of the challenge's score: bytes by table, plain and sliding windows, SLOT."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file
from torch import Tensor, nn

from ouroboros.data.sentencepieces import Piece
from ouroboros.eval.windows import Procedure, Windows
from ouroboros.systems.crawler.score import StreamScore, published_part, published_spans, score_stream
from ouroboros.systems.crawler.slot import Slot
from ouroboros.systems.crawler.tables import ByteTables, tables_of

Tensors = dict[str, Tensor]


class Table(nn.Module):
    """Logits by the previous id."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.register_buffer("table", logits)
        self.config = SimpleNamespace(vocab_size=len(logits))

    def forward(self, input_ids: Tensor) -> Any:
        return SimpleNamespace(logits=self.table[input_ids])


def crawler(hyperparameters: dict[str, Any], tensors: Tensors) -> Any:
    """The crawler of a case, by the builder of the golden model cases."""
    place = Path(__file__).with_name("crawler_model.py")
    spec = importlib.util.spec_from_file_location("golden_crawler_model", place)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.build_from_golden(hyperparameters, tensors)


def table_tensors(tensors: Tensors) -> ByteTables:
    names = ("base_bytes", "has_leading_space", "is_boundary")
    size, lead, boundary = (tensors[name].numpy() for name in names)
    return ByteTables(size.astype(np.int64), lead.astype(bool), boundary.astype(bool))


def scored(model: Any, ids: np.ndarray, tables: ByteTables, procedure: Procedure) -> StreamScore:
    return score_stream(model, ids, tables, procedure, loops=None, window=0, stride=0, reading="")


def tolerances(case: dict[str, Any]) -> list[float]:
    return [float(number) for number in re.findall(r"\d+e-\d+", case["tolerance"])]


def agree(found: StreamScore, expected: dict[str, Any], tolerance: float) -> None:
    assert found.nats_per_token == pytest.approx(expected["val_loss"], rel=tolerance)
    assert found.bits_per_byte == pytest.approx(expected["val_bpb"], rel=tolerance)
    fields = {"scored_positions": "tokens", "scored_bytes": "bytes", "distinct_positions": "distinct_tokens"}
    for name, field in fields.items():
        assert name not in expected or getattr(found, field) == expected[name], name


def bpb(case: dict[str, Any], path: Path, work: Path) -> None:
    """Tables of a piece list, then plain and sliding windows of a table of logits and of a crawler."""
    tensors = load_file(path.with_suffix(".safetensors"))
    made = tables_of([Piece(piece["piece"], piece["type"]) for piece in case["pieces"]], published=True)
    given = table_tensors(tensors)
    for name in ("size", "lead", "boundary"):
        assert np.array_equal(getattr(made, name), getattr(given, name)), name
    table_tolerance, model_tolerance = tolerances(case)
    _passes(Table(tensors["table_logits"]), tensors, case["seq_len"], case["table_model"], table_tolerance)
    model = crawler(case["crawler_model"]["hyperparameters"], tensors)
    _passes(model, tensors, case["seq_len"], case["crawler_model"]["results"], model_tolerance)


def _passes(model: Any, tensors: Tensors, window: int, results: dict[str, Any], tolerance: float) -> None:
    assert results
    ids, tables = published_part(tensors["tokens"].numpy(), window), table_tensors(tensors)
    for name, expected in results.items():
        stride = window if name == "full_pass" else int(name.removeprefix("sliding_stride"))
        agree(scored(model, ids, tables, Windows(window, stride, plan=published_spans)), expected, tolerance)


def slot(case: dict[str, Any], path: Path, work: Path) -> None:
    """The published SLOT with one vector for each batch, one for each window, and without."""
    tensors = load_file(path.with_suffix(".safetensors"))
    model, (tolerance,) = crawler(case["hyperparameters"], tensors), tolerances(case)
    window, stride, batch = case["seq_len"], case["stride"], case["batch_windows"]

    def form(**options: Any) -> Procedure:
        return Slot(window, stride, case["steps"], case["lr"], published=True, **options)

    forms = {
        "off": Windows(window, stride, plan=published_spans),
        "shared_delta": form(shared=True, batch_size=batch),
        "per_window_delta": form(batch_size=batch),
        "shared_delta_batch_of_one": form(shared=True, batch_size=1),
    }
    assert case["results"]
    for name, expected in case["results"].items():  # of the whole stream, not of whole windows alone
        found = scored(model, tensors["tokens"].numpy(), table_tensors(tensors), forms[name])
        agree(found, expected, tolerance)


KINDS: dict[str, Callable[[dict[str, Any], Path, Path], None]] = {"bpb": bpb, "slot": slot}
"""Checker of each kind of case."""

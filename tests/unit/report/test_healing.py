"""The page about a healing."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ouroboros.convert.verdict import ArmResult, as_json
from ouroboros.eval.score import Score
from ouroboros.report import healing
from ouroboros.report.content import Section
from ouroboros.report.healing import page_of
from ouroboros.report.page import to_html


def score(bits: float, text: str) -> Score:
    nats = np.full(4, bits * np.log(2) * 1000) + np.arange(4) * bits
    facts: dict[str, Any] = {
        "bits_per_byte": bits,
        "nats_per_token": bits,
        "nats_per_token_stderr": 0.1,
        "bytes": 4000,
        "tokens": 4000,
        "unknown_tokens": 0,
        "nats": float(nats.sum()),
        "stderr": 0.1,
        "interval": (bits - 0.1, bits + 0.1),
        "units": 4,
        "unit": "document",
        "documents": 4,
        "empty_documents": 0,
        "loops": None,
        "window": 64,
        "stride": 64,
        "reading": "windows",
        "bos_rule": "",
        "data_sha256": text,
        "model": "",
    }
    return Score(**facts, unit_nats=nats, unit_bytes=np.full(4, 1000))


def result(name: str, bits: float, **other: Any) -> ArmResult:
    scores = {text: score(bits + more, text) for text, more in (("here", 0.0), ("there", 1.0))}
    return ArmResult(name=name, description=f"about {name}", parameters=1000, scores=scores, **other)


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> Any:
    loops = lambda model, tokenizer, texts, where, name: Section(ident="loops", title=f"{where}: {texts}")  # noqa: E731
    monkeypatch.setattr(healing, "section_of", loops)
    results = [
        result("donor", 1.0, tokens_per_second=50.0),
        result("cut", 3.0, tokens_per_second=90.5),
        result("healed", 1.5, trained={"bridge": 1234, "gain": 7}, minutes=2.5, valid_bits_per_byte=1.6),
    ]
    judge = SimpleNamespace(
        healing=SimpleNamespace(dtype=torch.bfloat16),
        texts={"here": [b"one", b"two", b"three"], "there": [b"four"]},
        model_of=lambda name: name,
        tokenizer=None,
        continued=lambda model, document: (document.decode(), f"{model} goes on with {document.decode()}"),
    )
    plan = SimpleNamespace(source="a/donor", layout="1 loop:(1)x2 1", to_dict=lambda: {"kept": "0,2,5"})
    return page_of(judge, plan, results, as_json(results, "healed"))  # pyrefly: ignore


def test_it_says_what_was_kept_what_it_cost_and_what_was_won(page: Any) -> None:
    assert page.title == "a/donor, made recursive" and "1 loop:(1)x2 1" in page.subtitle and "0,2,5" in page.subtitle
    assert page.headline.startswith("healed closes 75 % of the gap on here")
    assert [(arm.name, arm.bits_per_byte, arm.minutes) for arm in page.arms] == [
        ("donor", 1.0, None),
        ("cut", 3.0, None),
        ("healed", 1.5, 2.5),
    ]
    sections = {section.ident: section for section in page.sections}
    here, there = sections["held-out"].tables
    assert here.head[0] == "here" and there.head[0] == "there"
    rows = {row[0]: row[1:] for row in here.rows}
    assert rows["healed"][:2] == ("1.500", "75.0 %") and rows["donor"][1] == "100.0 %" and rows["cut"][1] == "0.0 %"
    assert rows["healed"][3].startswith("\u22121.5")
    costs = {row[0]: row[1:] for row in sections["cost"].tables[0].rows}
    assert costs["healed"][:2] == ("1,241", "bridge 1,234, gain 7") and costs["healed"][3] == "2.5"
    assert costs["cut"][0] == "0" and costs["cut"][4] == "90.5"
    assert sections["loops"].title == "the arm healed: [b'one', b'two', b'four']"
    lead = sections["elsewhere"].lead
    assert "AutoModelForCausalLM.from_pretrained" in lead and "the arm healed" in lead


def test_samples_stand_side_by_side_for_two_documents_of_every_text(page: Any) -> None:
    shown = [(sample.prompt, sample.arm) for sample in page.samples]
    assert shown == [(text, arm) for text in ("one", "two", "four") for arm in ("donor", "cut", "healed")]
    assert page.samples[2].text == "healed goes on with one"


def test_it_is_drawn(page: Any) -> None:
    html = to_html(page)
    for words in ("Held-out text", "What it cost", "How to load it", "healed goes on with four", "training seeds"):
        assert words in html
    assert "bfloat16" in html

"""Runs and scores every arm: scores by hand, what is written is read again, and what a model writes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ouroboros.convert import judge as module
from ouroboros.convert.arms import Steering
from ouroboros.convert.heal import Healing
from ouroboros.convert.judge import Judge
from ouroboros.train.log import Progress

Make = Callable[..., Healing]
TEXTS = {"a": [b"13 times 6 is 78", b"4 times 4 is 16"], "b": [b"a text of another kind"]}
NAMES = ["donor", "cut", "bridge", "controller", "controller, shuffled", "controller, constant"]


@pytest.fixture
def judge(healing: Make, monkeypatch: pytest.MonkeyPatch) -> Judge:
    monkeypatch.setattr(module, "SPEED_TOKENS", 3)  # writing would take longer than all else
    monkeypatch.setattr(module, "SPEED_TURNS", 1)
    return Judge(healing(arms=("controller",), steering=Steering(rank=3, style=5)), TEXTS, 1000)


def run(judge: Judge) -> dict[str, Any]:
    return {result.name: result for result in judge.run(Progress(quiet=True))}


def bits(judge: Judge, model: Any, documents: list[bytes]) -> float:
    """Bits per byte of documents that are shorter than a window, by the definition."""
    nats = 0.0
    for document in documents:
        ids = [256, *judge.tokenizer.encode(document)]
        for first in range(0, len(ids) - 1, 16):  # windows of the training length, of which each predicts what follows
            piece = torch.tensor([ids[first : first + 17]])
            with torch.no_grad():
                known = model(piece[:, :-1], use_cache=False).logits.double().log_softmax(-1)
            nats -= known.gather(-1, piece[:, 1:, None]).sum().item()
    return nats / math.log(2) / sum(map(len, documents))


def test_every_arm_is_scored_once_and_by_its_definition(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    found = run(judge)
    assert list(found) == NAMES
    models = {name: judge.model_of(name) for name in ("donor", "cut", "controller")}
    models["bridge"] = judge.healing.bridged("healed")[0]
    for name, model in models.items():
        for text, documents in TEXTS.items():
            assert found[name].scores[text].bits_per_byte == pytest.approx(bits(judge, model, documents), rel=1e-5)
        assert found[name].parameters == sum({id(p): p.numel() for p in model.parameters()}.values())
    assert found["controller"].minutes > 0 and found["controller"].valid_bits_per_byte is not None
    assert found["bridge"].trained == {"bridge": 24 * 49}
    for how in ("shuffled", "constant"):
        one = found[f"controller, {how}"]
        assert (one.trained, one.against_donor, one.valid_bits_per_byte) == ({}, None, None)
    monkeypatch.setattr(module, "score", None)
    monkeypatch.setattr("ouroboros.convert.heal.start", None)
    again = run(judge)
    for name, result in found.items():
        assert module._to_json(again[name]) == module._to_json(result)
        for text, score in result.scores.items():
            other = again[name].scores[text]
            assert np.array_equal(score.unit_nats, other.unit_nats) and score.interval == other.interval


def test_controls_are_scored_with_the_controller_misled(judge: Judge) -> None:
    run(judge)
    model = judge.model_of("controller")
    for parameter in model.model.decoder.loops.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(judge.healing.out / "arms" / "controller")
    for path in (judge.healing.out / "scores").glob("controller*"):
        path.unlink()
    found = run(judge)
    right = [found["controller"].scores["b"].bits_per_byte, found["controller"].scores["a"].bits_per_byte]
    assert right[0] == pytest.approx(bits(judge, model, TEXTS["b"]), rel=1e-5)
    for how in ("shuffled", "constant"):
        wrong = [found[f"controller, {how}"].scores[text].bits_per_byte for text in ("b", "a")]
        assert all(abs(a - b) > 1e-3 for a, b in zip(right, wrong, strict=True))


@pytest.mark.parametrize(("texts", "max_bytes"), [({"a": TEXTS["b"]}, 1000), (TEXTS, 8), ({"c": TEXTS["a"]}, 1000)])
def test_scores_of_another_text_are_made_anew(texts: Any, max_bytes: int, judge: Judge, tmp_path: Path) -> None:
    path = tmp_path / "out" / "scores" / "donor.json"
    first = judge._scored("donor", lambda: judge.model_of("donor"))
    content = path.read_bytes()
    judge._scored("donor", lambda: None)
    assert path.read_bytes() == content
    other = Judge(judge.healing, texts, max_bytes)
    assert other._scored("donor", lambda: judge.model_of("donor")).scores.keys() == texts.keys()
    assert path.read_bytes() != content
    values = json.loads(content)
    del values["held_out"]
    path.write_text(json.dumps(values))  # whose text is not known
    assert judge._scored("donor", lambda: judge.model_of("donor")).scores["a"].nats == first.scores["a"].nats


def test_a_model_goes_on_with_the_beginning_of_a_document_greedily(judge: Judge) -> None:
    document = b"13 times 6 is 78, and 14 times 0 is 0"
    prompt, text = judge.continued(judge.healing.donor, document, tokens=5)
    ids = list(judge.tokenizer.encode(document[:24]))
    assert prompt == document[:24].decode()
    for _ in range(5):
        with torch.no_grad():
            logits = judge.healing.donor(torch.tensor([ids]), use_cache=False).logits[0, -1]
        logits[256] = -math.inf  # a text may not end
        ids.append(int(logits.argmax()))
    assert text == bytes(judge.tokenizer.decode(ids[24:])).decode("utf-8", "replace")

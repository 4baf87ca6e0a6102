"""The record of training by rewards: a small study, its resume, and its verdicts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from controller_reward import main, summary

from ouroboros.api import build, recipe
from ouroboros.data.tokenize import byte_tokenizer

FORMAT = "Question: {question}\\nAnswer: {answer}"


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """A study of seconds: the first test problem is one of training."""
    torch.manual_seed(0)
    build(recipe("controller", "tiny")).save_pretrained(tmp_path / "model")
    byte_tokenizer().save(tmp_path / "model")
    for name, numbers in (("train", range(4)), ("test", range(3, 8))):
        rows = [json.dumps({"question": f"{n} + {n}?", "answer": f"#### {2 * n}"}) for n in numbers]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    sources = [x for name in ("train", "test") for x in (f"--{name}", f"{tmp_path}/{name}.jsonl@{FORMAT}")]
    sizes = {
        "seeds": 2,
        "steps": 2,
        "problems": 4,
        "prompts": 1,
        "group": 2,
        "max-new-tokens": 3,
        "batch": 3,
        "every": 1,
    }
    few = [x for name, value in sizes.items() for x in (f"--{name}", str(value))]
    return [str(tmp_path / "model"), *sources, *few, "--answers", "last", "--out", str(tmp_path / "work")]


def printed(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> dict[str, Any]:
    main(arguments)
    (line,) = capsys.readouterr().out.splitlines()
    return json.loads(line)


def test_a_study_and_its_resume(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = printed(capsys, arguments)
    assert found["problems"] == 4 and [row["seed"] for row in found["seeds"]] == [0, 1]
    assert found["verdict"] in ("better", "worse", "cannot tell")
    scores = tmp_path / "work" / "seed-1" / "scores.jsonl"
    lines = scores.read_text().splitlines(keepends=True)
    scores.write_text("".join(lines[:1]) + lines[1][:9])  # as after a kill
    assert printed(capsys, arguments) == found and scores.read_text() == "".join(lines)
    with pytest.raises(SystemExit, match="of another study: --steps is 3, was 2; choose another --out"):
        main([*arguments, "--steps", "3"])


def test_too_few_unseen_problems(arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match="--problems 5: --test has 4 that are not in --train"):
        main([*arguments, "--problems", "5"])


def records(rewards: list[int]) -> list[dict[str, Any]]:
    return [{"reward": float(value), "answered": True} for value in rewards]


@pytest.mark.parametrize(
    ("after", "verdict"),
    [
        ([[1] * 30 + [0] * 70, [1] * 31 + [0] * 69], "better"),
        ([[1] * 30 + [0] * 70, [0] * 100], "cannot tell"),  # the problems say better, the seeds do not
        ([[1] * 10 + [0] * 89 + [1]], "cannot tell"),
        ([[0] * 100], "worse"),
    ],
)
def test_verdicts(after: list[list[int]], verdict: str) -> None:
    start = [1] * 10 + [0] * 90
    found = summary(records(start), {seed: records(rewards) for seed, rewards in enumerate(after)})
    assert found["verdict"] == verdict
    expected = sum(map(sum, after)) / len(after) / 100 - 0.1
    assert found["over_problems"]["gain"] == pytest.approx(expected) == found["over_seeds"]["gain"]

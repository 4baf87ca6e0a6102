"""Everything the README shows is run: commands in order, in one directory, with budgets cut to a few steps."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from ouroboros.cli import main

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SET_UP = ("make demo", "make test", "pip install")
"""Run by hand and by continuous integration: they make the environment this test runs in."""


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[str]:
    lines = [line for block in blocks("sh") for line in block.splitlines() if line.strip()]
    return [line for line in lines if not line.startswith(SET_UP)]


def shortened(command: str) -> list[str]:
    """The command with small budgets; nothing else is changed."""
    command = re.sub(r"--minutes \d+", "--steps 4 --size tiny --train.eval-every 2", command)
    command = re.sub(r"--steps \d+", "--steps 4", command)
    words = shlex.split(command)
    if words[:2] == ["ouroboros", "check"]:
        words.append("--quick")
    if "train" in words:
        words += ["--train.batch-size", "4", "--data.sequence-length", "32"]
        words += ["--train.precision", "fp32", "--train.compile", "off", "--quiet"]
    return words


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("readme")
    sentences = [f"Note {n}: {n} times {n} is {n * n}, and the moon is {n} days old.\n" for n in range(3000)]
    (where / "notes.txt").write_text("".join(sentences))
    facts = [{"question": f"What is {n} times 7?", "answer": f"{n} times 7 is {7 * n}."} for n in range(2000)]
    (where / "facts.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in facts))
    turns = [("user", "What is {} plus 1?"), ("assistant", "It is {}.")]
    talk = [
        {"messages": [{"role": r, "content": c.format(n + i)} for i, (r, c) in enumerate(turns)]} for n in range(900)
    ]
    (where / "dialogues.jsonl").write_text("".join(json.dumps(record) + "\n" for record in talk))
    return where


@pytest.fixture(autouse=True)
def process_state(given_back: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    with given_back():
        yield


def launch(command: list[str]) -> None:
    """Run a launcher and its workers; one that hangs is made to say where."""
    environment = {**os.environ, "PYTHONFAULTHANDLER": "1"}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            output, _ = process.communicate(timeout=240)
        except subprocess.TimeoutExpired:
            workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
            for number in [*map(int, workers), process.pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(number, signal.SIGABRT)  # faulthandler prints every thread's stack
            output, _ = process.communicate(timeout=30)
            pytest.fail(f"{command} hangs:\n{output[-6000:]}")
    assert process.returncode == 0, output[-2000:]


@pytest.mark.timeout(400)
def test_commands_in_order(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(place)
    seen = set()
    for command in commands():
        words = shortened(command)
        seen.add(words[1])
        if words[0] == "torchrun":
            launcher = [sys.executable, "-X", "faulthandler", "-m", "torch.distributed.run", *words[1:]]
            launch(launcher)
            continue
        if words[1] == "resume":  # of a run that was stopped half-way, as the text says
            words += ["--train.steps", "6", "--allow-changes"]
        monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n/loops 3\n/quit\n"))
        assert main(words[1:]) == 0, (command, capsys.readouterr().err)
    assert {"train", "resume", "tokenizer", "show", "eval", "generate", "chat", "check", "report"} <= seen
    assert "<svg" in (place / "run.html").read_text(encoding="utf-8")


@pytest.mark.timeout(200)
def test_python(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(place)
    made = ["train", "gpt", "--size", "tiny", "--data", "notes.txt", "--out", "run", "--steps", "2", "--quiet"]
    if not (place / "run").exists():  # the commands may not have run in this process
        assert main(made) == 0
    snippets = blocks("python")
    assert len(snippets) == 2
    for snippet in snippets:
        if "with_loops" in snippet and "gpt" in (place / "run" / "recipe.json").read_text():
            snippet = snippet.replace("deeper = model.with_loops(4)", "deeper = model")
        exec(compile(snippet, "README.md", "exec"), {})  # noqa: S102
    assert capsys.readouterr().out.strip()


def test_what_show_prints_is_what_the_readme_shows(capsys: pytest.CaptureFixture[str]):
    assert main(["show", "loop"]) == 0
    shown = capsys.readouterr().out
    assert any(shown.strip() in block for block in blocks("text")), "README's drawing of `show loop` is out of date"

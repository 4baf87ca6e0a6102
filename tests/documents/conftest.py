"""Runs what a page of the documentation shows, in order and in one directory, with budgets cut to a few steps.

Commands are the lines of ``sh`` blocks. A ``text`` block directly behind one shows what they print: each of its lines
has to be among the printed ones, numbers aside. Only what a model writes (`FREE`) is not compared.
"""

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
import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ouroboros.cli import main
from ouroboros.config.part import _KINDS, FeedForwardPart, kinds
from ouroboros.data.tokenize import byte_tokenizer

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden" / "data" / "r-hrm" / "model-a.safetensors"
SET_UP = ("make ", "pip install")
"""Run by hand and by continuous integration: they make the environment this test runs in."""
SHOWN = "127.0.0.1:8000"
"""The address of a server on a page; the test takes another one."""
FREE = ("generate", "chat")
"""Verbs that print what a model writes, which no test can know."""
NUMBER = re.compile(r"[-+]?\d[\d,]*(\.\d+)?(e[-+]\d+)?")


class Page:
    """A document and what it shows.

    Args:
        path: of the document, from the project's root.
        place: directory to run its commands in.
        python: what starts the processes of commands.
    """

    def __init__(self, path: str, place: Path, python: str) -> None:
        self.text = (ROOT / path).read_text(encoding="utf-8")
        self.place, self.python = place, python
        self.verbs: set[str] = set()
        self.module = types.ModuleType("page")
        self.server: subprocess.Popen[str] | None = None
        self.address = SHOWN

    def blocks(self, language: str) -> list[str]:
        """The fenced blocks of one language."""
        return [body for kind, body, _ in self._parts() if kind == language]

    def _parts(self) -> Iterator[tuple[str, str, bool]]:
        """Language and content of each fenced block, and whether the next one follows it directly."""
        found = list(re.finditer(r"^```(\w+)\n(.*?)^```\n", self.text, flags=re.DOTALL | re.MULTILINE))
        for index, match in enumerate(found):
            after = self.text[match.end() : found[index + 1].start()] if index + 1 < len(found) else "end"
            yield match[1], match[2], not after.strip()

    def run(self, output: Callable[[], tuple[str, str]]) -> None:
        """Run everything; ``output`` gives what was printed since it was last called, and the errors."""
        printed: str | None = None
        for language, body, followed in self._parts():
            if language == "sh":
                commands = [line for line in body.splitlines() if line.strip() and not line.startswith(SET_UP)]
                texts = [self._command(command, output) for command in commands]
                comparable = commands and not any(shlex.split(line)[1] in FREE for line in commands)
                printed = "".join(texts) if followed and comparable else None
                continue
            if language == "python":
                body = body.replace(SHOWN, self.address)
                exec(compile(body, "page", "exec", dont_inherit=True), vars(self.module))  # noqa: S102
            elif language == "text" and printed is not None:
                missing = {_form(line) for line in body.splitlines()} - {_form(line) for line in printed.splitlines()}
                assert not missing, f"shown and not printed: {sorted(missing)}; printed:\n{printed}"
            printed = None

    def _command(self, command: str, output: Callable[[], tuple[str, str]]) -> str:
        words = shortened(command)
        self.verbs.add(words[1])
        if words[0] == "torchrun":
            launch([self.python, "-m", "torch.distributed.run", *words[1:]])
            return ""
        if words[0] == "python":  # what runs without the library
            made = subprocess.run([sys.executable, "-I", *words[1:]], check=True, capture_output=True, timeout=240)
            return made.stdout.decode(errors="replace")
        assert words[0] == "ouroboros", command
        if words[1] == "serve":
            self._serve(words[1:])
            return ""
        if words[1] == "resume" and "--allow-changes" not in words:  # of a run that was stopped half-way
            words += ["--train.steps", "6", "--allow-changes"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "executable", self.python)
            patch.setattr(sys, "stdin", io.StringIO("hello\n/loops 3\n/quit\n"))
            status = main(words[1:])
        out, err = output()
        assert status == 0, (command, err)
        return out

    def _serve(self, words: list[str]) -> None:
        """Start a server at a free port, where what follows on the page finds it."""
        self.stop()
        command = [self.python, "-m", "ouroboros.cli", *words, "--port", "0"]
        self.server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        assert self.server.stderr is not None
        line = self.server.stderr.readline()
        found = re.search(r"http://([^/]*)/v1", line)
        assert found, (command, line)
        self.address = found[1]

    def stop(self) -> None:
        """Stop the server, if there is one."""
        if self.server is not None:
            self.server.kill()
            self.server.communicate()


def _form(line: str) -> str:
    """A line without its numbers and its spacing."""
    return " ".join(NUMBER.sub("#", line).split())


def shortened(command: str) -> list[str]:
    """The command with small budgets; nothing else is changed."""
    command = re.sub(r"--minutes \d+", "--steps 4 --size tiny --train.eval-every 2", command)
    command = re.sub(r"--steps \d+", "--steps 4", command)
    command = re.sub(r"--seeds \d+", "--seeds 1", command)
    command = re.sub(r"--train\.minutes \d+", "--train.steps 8", command)
    words = shlex.split(command)
    if words[:2] == ["ouroboros", "pack"]:
        given = {"--calibration-tokens": "1024", "--max-bytes": "2000"}
        words += [word for option, value in given.items() if option not in words for word in (option, value)]
    if words[:2] == ["ouroboros", "check"]:
        words.append("--quick")
    if "train" in words:
        words += ["--train.batch-size", "4", "--data.sequence-length", "32"]
        words += ["--train.precision", "fp32", "--train.compile", "off", "--quiet"]
    if words[1] == "generate":
        words += ["--max-new-tokens", "20"]
    return words


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


def write_inputs(where: Path) -> None:
    """The files that the pages take for granted: notes, facts, dialogues, records of tasks, a published checkpoint and
    its tokenizer."""
    sentences = [f"Note {n}: {n} times {n} is {n * n}, and the moon is {n} days old.\n" for n in range(3000)]
    (where / "notes.txt").write_text("".join(sentences))
    facts = [{"question": f"What is {n} times 7?", "answer": f"{n} times 7 is {7 * n}."} for n in range(2000)]
    (where / "facts.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in facts))
    turns = [("user", "What is {} plus 1?"), ("assistant", "It is {}.")]
    talk = [
        {"messages": [{"role": r, "content": c.format(n + i)} for i, (r, c) in enumerate(turns)]} for n in range(900)
    ]
    (where / "dialogues.jsonl").write_text("".join(json.dumps(record) + "\n" for record in talk))
    questions = [
        {"query": f"Question: What is {n} times 7?", "choices": [f"{7 * n}", "red", "a"], "gold": 0} for n in range(3)
    ]
    pairs = [{"sentence_good": f"{n} dogs bark.", "sentence_bad": f"{n} dogs barks.", "UID": "all"} for n in range(2)]
    (where / "tasks").mkdir()
    for name, records in (("arc_easy", questions), ("blimp", pairs)):
        (where / "tasks" / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    golden = load_file(GOLDEN)
    published = {name.removeprefix("param."): value for name, value in golden.items() if name.startswith("param.")}
    words = torch.randn(257, published["token_embedding.weight"].shape[1])
    torch.save({**published, "token_embedding.weight": words, "lm_head.weight": words}, where / "best_model.pth")
    byte_tokenizer().save(where / "gpt2")


@pytest.fixture
def open_page(
    tmp_path: Path, given_back: Callable[[], AbstractContextManager[None]], monkeypatch: pytest.MonkeyPatch, python: str
) -> Iterator[Callable[[str], Page]]:
    """A page by its path, its commands to be run in a directory with :func:`write_inputs`."""
    write_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    kinds(FeedForwardPart)
    for family, members in list(_KINDS.items()):  # a part that a page registers is gone after it
        monkeypatch.setitem(_KINDS, family, dict(members))
    with given_back():
        pages: list[Page] = []

        def opened(path: str) -> Page:
            pages.append(Page(path, tmp_path, python))
            return pages[-1]

        yield opened
        for page in pages:
            page.stop()

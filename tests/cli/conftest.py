"""The commands as a user runs them: in this process where that shows the same, as a real process where it does not."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import ouroboros
from ouroboros.cli import main

TINY = [
    *("--model.hidden-size", "16", "--model.mixer.num-heads", "2", "--model.ffn.intermediate-size", "24"),
    *("--data.sequence-length", "32", "--train.batch-size", "4", "--train.precision", "fp32", "--train.compile", "off"),
    *("--model.max-position-embeddings", "128", "--train.eval-bytes", "256"),
]


@dataclass(frozen=True)
class Result:
    """What a command left behind."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output as one JSON object and nothing else."""
        assert self.out.endswith("\n") and self.out.count("\n") == 1, self.out
        return json.loads(self.out)

    def error(self, status: int = 1) -> str:
        """The one line of an error, after checking that it is one line and nothing else."""
        assert self.status == status, self
        assert self.out == "", self.out
        assert self.err.startswith("error: ") and self.err.endswith("\n") and self.err.count("\n") == 1, self.err
        return self.err[len("error: ") : -1]


Cli = Callable[..., Result]
GivenBack = Callable[[], AbstractContextManager[None]]


@pytest.fixture(autouse=True)
def process_state(given_back: GivenBack) -> Iterator[None]:
    """Other tests of this process see nothing of the command line's settings."""
    with given_back():
        yield


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], python: str) -> Cli:
    """Run the command line in this process; the processes that it starts itself need not import torch anew."""

    def run(*arguments: object) -> Result:
        capsys.readouterr()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "executable", python)
            try:
                status = main([str(argument) for argument in arguments])
            except SystemExit as stop:
                status = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
        captured = capsys.readouterr()
        return Result(int(status), captured.out, captured.err)

    return run


def environment() -> dict[str, str]:
    """That of a user's shell, with this source tree; buffered output, as in a pipe."""
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    return {**kept, "PYTHONPATH": str(Path(ouroboros.__file__).parent.parent), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def spawn(python: str) -> Callable[..., subprocess.Popen[str]]:
    """Start the real command in a process of its own.

    It is a fork of one that has imported the library. A ``fresh`` interpreter is started where asked for, and where the
    process itself is set up in a way that a fork would not notice.
    """

    def start(*arguments: object, fresh: bool = False, **options: Any) -> subprocess.Popen[str]:
        defaults = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL, "text": True}
        fresh = fresh or bool(options.keys() & {"preexec_fn", "start_new_session"})
        command = [sys.executable if fresh else python, "-m", "ouroboros.cli", *map(str, arguments)]
        return subprocess.Popen(command, **{**defaults, "env": environment(), **options})

    return start


@pytest.fixture(scope="session")
def command(spawn: Callable[..., subprocess.Popen[str]]) -> Cli:
    """Run the real command to its end."""

    def run(*arguments: object, input: str | None = None, **options: Any) -> Result:
        if input is not None:
            options["stdin"] = subprocess.PIPE
        with spawn(*arguments, **options) as process:
            try:
                out, err = process.communicate(input, timeout=100)
            except subprocess.TimeoutExpired:
                process.kill()  # or leaving this block would wait for it
                raise
        return Result(process.returncode, out, err)

    return run


@pytest.fixture(scope="session")
def tiny() -> list[str]:
    """Options that make any recipe a model of a few thousand weights."""
    return TINY


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 8 KB of made-up sentences, with some characters of several bytes."""
    chooser = random.Random(4)
    words = ["".join(chooser.choice("abcdefg\u00e9\u4e16") for _ in range(chooser.randint(2, 6))) for _ in range(40)]
    path = tmp_path_factory.mktemp("text") / "text.txt"
    lines = (" ".join(chooser.choice(words) for _ in range(8)) for _ in range(180))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def trained(text: Path, tmp_path_factory: pytest.TempPathFactory, given_back: GivenBack) -> Path:
    """A finished run of the looped recipe; tests must not change it."""
    run = tmp_path_factory.mktemp("trained") / "run"
    options = ["--data", str(text), "--out", str(run), "--size", "tiny", "--steps", "8", "--quiet"]
    with given_back():
        assert main(["train", "loop", *options, "--train.telemetry-every", "4", "--train.eval-every", "4", *TINY]) == 0
    return run


@pytest.fixture(scope="session")
def files() -> Callable[[Path], dict[str, bytes]]:
    """Every file below a directory with its content, and every directory."""

    def of(path: Path) -> dict[str, bytes]:
        found = sorted(path.rglob("*"))
        return {p.relative_to(path).as_posix(): p.read_bytes() if p.is_file() else b"" for p in found}

    return of

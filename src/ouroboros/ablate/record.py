"""What a study keeps of each run: its numbers, and what has to be equal before two runs may be compared."""

from __future__ import annotations

import functools
import hashlib
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import Any

import ouroboros
from ouroboros.config import from_json
from ouroboros.errors import check
from ouroboros.eval.score import Score
from ouroboros.files import read_text

RESULT = "result.json"
"""In the run directory of a cell that is complete."""
_NOT_COUNTED = {"cli.py", "verbs", "demo", "report", "serve", "convert", "ablate"}
"""Of the package: what decides no number of a run."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A score on held-out text, with the nats of each unit, so that two models can be compared unit by unit
    (:func:`ouroboros.eval.stats.paired_difference`)."""

    bits_per_byte: float
    stderr: float | None
    """Standard error of ``bits_per_byte`` over units."""
    bytes: int
    """Bytes of the text."""
    data_sha256: str
    window: int
    stride: int
    unit_nats: tuple[float, ...]
    unit_bytes: tuple[int, ...]

    @classmethod
    def of(cls, score: Score) -> Measured:
        """What is kept of a score."""
        return cls(
            bits_per_byte=score.bits_per_byte,
            stderr=score.stderr,
            bytes=score.bytes,
            data_sha256=score.data_sha256,
            window=score.window,
            stride=score.stride,
            unit_nats=tuple(map(float, score.unit_nats)),
            unit_bytes=tuple(map(int, score.unit_bytes)),
        )


@dataclass(frozen=True, kw_only=True)
class Packed:
    """The packed form of a trained model."""

    bytes: int
    """Of the file."""
    score: Measured
    """Of the model that the file gives."""
    feasible: bool
    """Whether the file is within the budget, if there is one."""
    exceptions: int
    """Tensors for which the quantiser had to go another way than planned."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """One complete cell: a recipe trained with one seed, and scored."""

    stage: str
    arm: str
    seed: int
    run: str
    """The run directory, relative to the study's: its recipe, metrics with telemetry, and the model."""
    recipe: str
    """:func:`~ouroboros.ablate.changes.fingerprint` of the recipe that was asked for."""
    train_sha256: str
    """Of the training text: sha256 of the digests of its sources."""
    code: str
    """:func:`code_version`."""
    environment: dict[str, str]
    """Where and how it was computed."""
    layout: str
    parameters: int
    """That are stored."""
    weights_bytes: int
    """Of the file of the trained weights."""
    flops_per_token: int
    """Training operations per token."""
    steps: int
    tokens: int
    """Of training."""
    seconds: float
    """Of training."""
    skipped: int
    """Steps whose loss or gradient was not finite."""
    score: Measured
    packed: Packed | None = None

    @property
    def cell(self) -> str:
        """Which cell it is, in words."""
        return f"stage {self.stage}, arm {self.arm}, seed {self.seed}"

    @property
    def bits_per_byte(self) -> float:
        return self.score.bits_per_byte

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / max(self.seconds, 1e-9)


def read_result(run: Path) -> Result | None:
    """The result in the run directory of a cell, None where it is not complete.

    Raises:
        OuroborosError: the file is damaged.
    """
    path = run / RESULT
    return from_json(Result, read_text(path), where=str(path)) if path.is_file() else None


def check_comparable(results: Iterable[Result]) -> None:
    """Refuse to compare results of different data, code or machines.

    Raises:
        OuroborosError: names the two cells and what differs.
    """
    first, *others = list(results)
    for other in others:
        pairs: list[tuple[str, Any, Any]] = [("code", first.code, other.code)]
        pairs += [(name, first.environment.get(name), other.environment.get(name)) for name in FIXED]
        if first.stage == other.stage:
            pairs += [
                (f"held-out {name}", getattr(first.score, name), getattr(other.score, name))
                for name in ("data_sha256", "window", "stride")
            ]
        if first.arm == other.arm:
            pairs.append(("training text", first.train_sha256, other.train_sha256))
        found = [f"{name} ({one} and {two})" for name, one, two in pairs if one != two]
        check(
            not found,
            f"cannot be compared: {first.cell} and {other.cell} differ in {', '.join(found)}; run both again, with one"
            " version on one machine, in a new directory",
        )


FIXED = ("torch", "device", "processor", "threads", "precision", "muon_precision")
"""Entries of :func:`environment` that have to be equal."""


def environment(threads: int, precision: str, muon_precision: str) -> dict[str, str]:
    """Where a run is computed; what of it has to be equal stands in :data:`FIXED`."""
    import torch

    from ouroboros.train.precision import choose_device

    device = choose_device()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": name,
        "processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "threads": str(threads),
        "precision": precision,
        "muon_precision": muon_precision,
    }


@functools.cache
def code_version() -> str:
    """The version of the package, and a hash of all its code that decides a number: comments, docstrings and what only
    shows results do not count."""
    digest, root = hashlib.sha256(), Path(ouroboros.__file__).parent
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if name.parts[0] not in _NOT_COUNTED:
            digest.update(name.as_posix().encode())
            _feed(digest, compile(path.read_bytes(), name.name, "exec", optimize=2, dont_inherit=True))
    return f"{ouroboros.__version__}+{digest.hexdigest()[:16]}"


def _feed(digest: Any, code: CodeType) -> None:
    """Add compiled code without the numbers of its lines."""
    digest.update(code.co_code)
    names = (code.co_name, code.co_names, code.co_varnames, code.co_freevars, code.co_argcount, code.co_kwonlyargcount)
    digest.update(repr((names, code.co_flags)).encode())
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            _feed(digest, constant)
        else:  # a set has its members in another order in every process
            digest.update(repr(sorted(map(repr, constant)) if isinstance(constant, frozenset) else constant).encode())

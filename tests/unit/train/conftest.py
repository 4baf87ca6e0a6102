"""Small runs: a model of a few thousand weights, a few kilobytes of text, fractions of a second each."""

from __future__ import annotations

import hashlib
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ouroboros.config import (
    AttentionSpec,
    DataSpec,
    FeedForwardSpec,
    ModelSpec,
    OptimSpec,
    Recipe,
    RMSNormSpec,
    TrainSpec,
    from_dict,
    to_dict,
)
from ouroboros.config.parts.loop import InjectionSpec, LoopEmbeddingSpec, LoopNormSpec, RecurrenceGateSpec
from ouroboros.data.shards import prepare
from ouroboros.model.configuration import OuroborosConfig
from ouroboros.model.modeling import OuroborosForCausalLM
from ouroboros.train import precision
from ouroboros.train.distributed import Workers
from ouroboros.train.log import Progress, Status
from ouroboros.train.run import resolve
from ouroboros.train.trainer import Trainer

MakeRecipe = Callable[..., Recipe]
LOOP_PARTS = (InjectionSpec(mode="add"), LoopEmbeddingSpec(rows=4), LoopNormSpec(rows=4), RecurrenceGateSpec())


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def quick_peak(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Measuring the matrix-product peak takes 0.3 s a process; only its own tests need the real one."""
    if request.module.__name__.rpartition(".")[2] != "test_precision":
        for module in ("meter", "precision"):
            monkeypatch.setattr(f"ouroboros.train.{module}.matmul_peak", lambda device, dtype, *_: 1e9)
    assert precision.choose_device().type == "cpu"


def sentences(seed: int, lines: int) -> str:
    """Text with structure that a small model can learn: lines of made-up words."""
    chooser = random.Random(seed)
    words = ["".join(chooser.choice("abcdefgh") for _ in range(chooser.randint(2, 7))) for _ in range(40)]
    return "".join(" ".join(chooser.choice(words) for _ in range(8)) + "\n" for _ in range(lines))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A file of 4 KB."""
    path = tmp_path / "text.txt"
    path.write_text(sentences(1, 100), encoding="utf-8")
    return path


@pytest.fixture
def make(text: Path) -> MakeRecipe:
    """Makes a small looped recipe; ``make(**{"train.steps": 5, "model.block.dropout": 0.1})`` changes fields."""
    base = Recipe(
        name="small",
        model=ModelSpec(layout="1 (1)x2 1", hidden_size=16, max_position_embeddings=64).replace(
            mixer=AttentionSpec(num_heads=2),
            ffn=FeedForwardSpec(intermediate_size=24),
            norm=RMSNormSpec(placement="sandwich"),
        ),
        data=DataSpec(sources=(str(text),), sequence_length=32),
        optim=OptimSpec(muon_precision="fp32"),  # two runs that are compared choose alike
        train=TrainSpec(
            steps=6, batch_size=4, precision="fp32", compile="off", eval_every=0, eval_bytes=256, checkpoint_every=0
        ),
    )

    def build(**changes: Any) -> Recipe:
        values = to_dict(base)
        for path, value in changes.items():
            *parents, name = path.split(".")
            inner = values
            for parent in parents:
                inner = inner[parent]
            inner[name] = value
        return from_dict(Recipe, values)

    return build


@pytest.fixture
def everything(make: MakeRecipe, tmp_path: Path) -> MakeRecipe:
    """As ``make``, with everything that has state or draws numbers: random loops, dropout, corrupted inputs, averaged
    weights, accumulation, two weighted sources read more than once, Muon and AdamW, every loop part, registers.
    """
    small, other = tmp_path / "small.txt", tmp_path / "other.txt"
    small.write_text(sentences(2, 14), encoding="utf-8")
    other.write_text(sentences(3, 40), encoding="utf-8")
    fixed = {
        "model.block.dropout": 0.1,
        "model.registers": 2,
        "model.loop": [to_dict(part) for part in LOOP_PARTS],
        "data.sources": [f"{small}=0.7", f"{other}=0.3"],
        "train.loops.sampling": "poisson",
        "train.loops.mean": 2.0,
        "train.loops.max": 4,
        "train.accumulation": 2,
        "train.corruption": 0.1,
        "train.label_smoothing": 0.05,
        "train.ema_decay": 0.9,
        "train.steps": 12,
        "train.telemetry_every": 3,
        "train.eval_every": 5,
        "train.log_every": 2,
    }

    def build(**changes: Any) -> Recipe:
        return make(**{**fixed, **changes})

    return build


@pytest.fixture
def trainer_of(tmp_path: Path) -> Callable[[Recipe], Trainer]:
    """A trainer outside any run, its weights decided by the recipe's seed."""

    def build(recipe: Recipe) -> Trainer:
        data = prepare(recipe.data, tmp_path / "data")
        recipe = resolve(recipe, data)
        torch.manual_seed(recipe.train.seed)
        model = OuroborosForCausalLM(OuroborosConfig.from_spec(recipe.model, eos_token_id=data.tokenizer.eos_id))
        return Trainer(recipe, model, data, Workers())

    return build


@pytest.fixture
def scores(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``scores(3.0, OSError("gone"), 2.5)``: what the validations of a run give, in bits per byte, or raise.

    Nats per token are twice the bits per byte, with the standard error ``stderr``.
    """

    def use(*results: float | BaseException, stderr: float | None = 0.0) -> None:
        left = iter(results)

        def validate(trainer: Trainer, sample: list[bytes]) -> SimpleNamespace:
            result = next(left)
            if isinstance(result, BaseException):
                raise result
            found = {"bits_per_byte": result, "stderr": None, "nats_per_token": 2 * result}
            return SimpleNamespace(**found, nats_per_token_stderr=stderr, bytes=256)

        monkeypatch.setattr("ouroboros.train.validate.validate", validate)

    return use


class StopAt(Progress):
    """Does something right after a step: a signal to this process, or an exception, which stands for a crash."""

    def __init__(self, step: int, what: signal.Signals | type[BaseException]) -> None:
        super().__init__(quiet=True)
        self.step, self.what = step, what

    def update(self, status: Status) -> None:
        if status.step == self.step:
            if isinstance(self.what, signal.Signals):
                os.kill(os.getpid(), self.what)
            else:
                raise self.what("simulated crash")


@pytest.fixture
def stop_at() -> type[StopAt]:
    return StopAt


@pytest.fixture
def sha() -> Callable[[Path], str]:
    """sha256 of the exported weights of a run."""

    def of(run: Path) -> str:
        return hashlib.sha256((run / "model.safetensors").read_bytes()).hexdigest()

    return of

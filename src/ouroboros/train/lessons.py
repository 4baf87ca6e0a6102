"""Learning from another model: what it predicts, and the state that it has in a place, beside the text.

Shapes: B sequences, T positions, K positions that are learned, D model width, V vocabulary.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ouroboros.config import Recipe, TaughtTraining
from ouroboros.data.prepared import PreparedData
from ouroboros.errors import OuroborosError, check
from ouroboros.files import replacing, sha256_of
from ouroboros.model.executor import observe
from ouroboros.model.loss import logits_loss, plus
from ouroboros.model.modeling import OuroborosForCausalLM
from ouroboros.model.reading import load_model
from ouroboros.nn.head_loss import IGNORED
from ouroboros.train.distill import divergence
from ouroboros.train.distributed import Workers
from ouroboros.train.rundir import WEIGHTS

KEPT = torch.bfloat16
"""In what states are kept on the disk: rounding them costs the student less than it gains in text."""


class Lesson(NamedTuple):
    """What the teacher makes of a batch."""

    final_BTD: Tensor
    """What its head reads."""
    state_BTD: Tensor | None
    """What enters the block that is matched; None where none is."""


class Losses(NamedTuple):
    """Of a batch, in nats per token but for the state."""

    objective: Tensor
    """What is minimised."""
    plain: Tensor
    """The loss on the text, without gradient."""
    divergence: Tensor
    """Of the teacher's predictions from the student's, without gradient."""
    state: Tensor | None
    """How far the state is from the teacher's, as a share of the latter's square, without gradient."""


class Lessons:
    """A frozen model of the same vocabulary, and the losses of a student against it.

    Args:
        spec: which one, and the weights of the losses; ``spec.model`` is given.
        student: the model that learns.
        seed: decides which positions are learned.

    Raises:
        OuroborosError: the teacher cannot be read or does not belong to the student, or the blocks are not theirs.
    """

    def __init__(self, spec: TaughtTraining, student: OuroborosForCausalLM, seed: int) -> None:
        assert spec.model is not None
        directory = Path(spec.model)
        check(directory.is_dir(), f"train.teach.model: {directory} is no model directory: give the teacher's")
        self.spec, self.student, self.seed = spec, student, seed
        self.model = load_model(directory).requires_grad_(False)
        here, there = student.config.vocab_size, self.model.config.vocab_size
        check(
            here == there,
            f"train.teach.model: {directory} has a vocabulary of {there} and this model one of {here}: they must agree",
        )
        if spec.blocks is not None:
            for model, block, name in zip(
                (student, self.model), spec.blocks, ("this model", "the teacher"), strict=True
            ):
                count = model.schedule.num_blocks
                check(0 <= block < count, f"train.teach.blocks: {name} has {count} blocks and no block {block}")
            check(
                student.config.hidden_size == self.model.config.hidden_size,
                "train.teach.blocks: the states of models of different width cannot be compared: leave it out",
            )
        torch.nn.Module.to(self.model, next(student.parameters()).device)
        self.folder: Path | None = None
        if spec.keep is not None:
            # The states of other weights, or of another place, are others.
            place = "" if spec.blocks is None else f"-{spec.blocks[1]}"
            self.folder = Path(spec.keep) / f"{sha256_of(directory / WEIGHTS)[:16]}{place}"

    def reserve(self, windows: int, length: int) -> None:
        """Make the folder of kept states, if the disk has room for those of so many windows.

        Raises:
            OuroborosError: there is too little room, or the folder cannot be made.
        """
        if self.folder is None:
            return
        states = 1 if self.spec.blocks is None else 2
        size = length * self.model.config.hidden_size * KEPT.itemsize * states
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            missing = max(0, windows - sum(1 for path in self.folder.iterdir() if path.suffix == ".safetensors"))
            free = shutil.disk_usage(self.folder).free
        except OSError as error:
            raise OuroborosError(f"train.teach.keep: cannot use {self.folder}: {error.strerror or error}") from None
        check(
            missing * size < free,
            f"train.teach.keep: the teacher's states of {missing:,} windows take {missing * size / 1e9:.1f} GB, and"
            f" {self.spec.keep} has {free / 1e9:.1f} GB: make room, train less, or name another folder",
        )

    def positions(self, length: int, step: int) -> Tensor:
        """The positions that are learned in a step, (K,), sorted."""
        count = max(1, round(self.spec.share * length))
        if count == length:
            return torch.arange(length)
        chooser = torch.Generator().manual_seed((self.seed * 10_000_019 + step) % 2**63)
        return torch.randperm(length, generator=chooser)[:count].sort().values

    @torch.no_grad()
    def lesson(self, ids_BT: Tensor) -> Lesson:
        """What the teacher makes of ``ids``: read where it is kept, else computed, and kept if that is asked for."""
        if self.folder is None:
            return self._computed(ids_BT)
        paths = [self.folder / f"{_name(row)}.safetensors" for row in ids_BT]
        rows = [_read(path) for path in paths]
        missing = [index for index, row in enumerate(rows) if row is None]
        if missing:
            found = self._computed(ids_BT[missing])
            for at, index in enumerate(missing):
                tensors = {"final": found.final_BTD[at]}
                if found.state_BTD is not None:
                    tensors["state"] = found.state_BTD[at]
                kept = rows[index] = {name: tensor.to("cpu", KEPT).contiguous() for name, tensor in tensors.items()}
                _write(paths[index], kept)
        device = ids_BT.device
        final, state = (
            torch.stack([row[name] for row in rows]).to(device) if name in rows[0] else None  # pyrefly: ignore
            for name in ("final", "state")
        )
        assert final is not None
        return Lesson(final, state)

    def _computed(self, ids_BT: Tensor) -> Lesson:
        states: list[Tensor] = []
        with _entering(self.model, None if self.spec.blocks is None else self.spec.blocks[1], states):
            final = self.model.model(input_ids=ids_BT, use_cache=False).last_hidden_state
        return Lesson(final, states[-1] if states else None)

    def losses(
        self, wrapped: Any, arguments: dict[str, Any], targets_BT: Tensor, step: int, smoothing: float
    ) -> Losses:
        """``(1 - w) CE + w T^2 KL(teacher || student)``, and v times the mean of ``|h - t|^2 / |t|^2``, where h and t
        are the two states and w and v the weights of the specification; with what parts of the student add.

        Args:
            wrapped: the student as it is called.
            arguments: of that call, ``input_ids`` among them.
            targets_BT: the tokens that follow, -100 where nothing is learned, from the teacher neither.
            step: decides the positions.
            smoothing: of the labels of CE.
        """
        spec, ids_BT = self.spec, arguments["input_ids"]
        at = self.positions(ids_BT.shape[1], step).to(ids_BT.device)
        lesson, states = self.lesson(ids_BT), []
        with _entering(self.student, None if spec.blocks is None else spec.blocks[0], states):
            output = wrapped(**arguments, logits_to_keep=at)
        logits_BKV, targets_BK = output.logits, targets_BT[:, at]
        learned = targets_BK != IGNORED
        with torch.no_grad():
            wanted_NV = self.model.logits(lesson.final_BTD[:, at][learned].to(logits_BKV.dtype))
        found_NV = logits_BKV[learned]
        text, plain = logits_loss(found_NV, targets_BK[learned], smoothing)
        apart = divergence(found_NV, wanted_NV, spec.temperature)
        objective = (1 - spec.weight) * text + spec.weight * spec.temperature**2 * apart
        state = None
        if lesson.state_BTD is not None:
            theirs = lesson.state_BTD.float()
            state = ((states[-1].float() - theirs).square().sum(-1) / theirs.square().sum(-1)).mean()
            objective = objective + spec.states * state
        objective = plus(objective, output.auxiliary_loss)
        return Losses(objective, plain, apart.detach(), None if state is None else state.detach())


def lessons_of(recipe: Recipe, student: OuroborosForCausalLM, data: PreparedData, workers: Workers) -> Lessons | None:
    """The teacher of a recipe, with room for what is kept of it; None where it has none.

    Raises:
        OuroborosError: as of :class:`Lessons` and :meth:`Lessons.reserve`, or options that exclude each other.
    """
    spec, length = recipe.train, recipe.data.sequence_length
    if spec.teach.model is None:
        return None
    check(
        spec.teach.share == 1 or recipe.data.loss == "all",
        "train.teach.share draws positions and data.loss says which are learned: leave one of them out",
    )
    lessons = Lessons(spec.teach, student, spec.seed)
    if workers.is_main:
        windows = -(-data.count("train", "tokens") // length)
        if spec.steps is not None or spec.tokens is not None:
            tokens = spec.tokens or (spec.steps or 0) * spec.batch_size * length
            windows = min(windows, -(-tokens // length))
        lessons.reserve(windows, length)
    workers.barrier()
    return lessons


@contextlib.contextmanager
def _entering(model: OuroborosForCausalLM, block: int | None, states: list[Tensor]) -> Iterator[None]:
    """Collect the states that enter a block."""

    def on_visit(_: Any, visit: Any, before: Tensor, after: Tensor) -> None:
        if visit.visit.block == block:
            states.append(before)

    if block is None:
        yield
        return
    with observe(model, on_visit=on_visit):
        yield


def _name(ids_T: Tensor) -> str:
    return hashlib.sha256(ids_T.to("cpu", torch.int64).numpy().tobytes()).hexdigest()[:32]


def _read(path: Path) -> dict[str, Tensor] | None:
    """What is kept of a window; None where nothing is, or what is cannot be read and is made again."""
    try:
        return load_file(path)
    except (OSError, SafetensorError):
        return None


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    try:
        with replacing(path) as temporary:
            save_file(tensors, temporary)
    except (OSError, SafetensorError) as error:
        raise OuroborosError(
            f"train.teach.keep: cannot write {path}: {error}; make room, or name another folder"
        ) from None

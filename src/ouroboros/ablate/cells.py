"""One cell of a study: a recipe trained with one seed in a run directory of its own, scored, packed if asked.

A cell that is interrupted, however that happens, goes on where it was: training resumes from its last checkpoint, and
what follows is done again. The result is written last, and what has one is not run again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ouroboros.ablate.changes import differences, fingerprint
from ouroboros.ablate.record import RESULT, Measured, Packed, Result, code_version, environment, read_result
from ouroboros.ablate.study import Packing
from ouroboros.accounting import cost, training_flops
from ouroboros.config import Recipe, to_json
from ouroboros.errors import Diverged, OuroborosError, check
from ouroboros.files import read_text, whole_directory, write_whole
from ouroboros.train.rundir import RunDirectory

if TYPE_CHECKING:
    from ouroboros.api import OpenedModel
    from ouroboros.data.prepared import PreparedData

PACKED, DIVERGED = "packed.ouro", "diverged.txt"
"""In the run directory: the packed model, and why there is no result where losses or scores left all bounds."""
NEAR = 0.991
"""The share of a budget of bytes that a packed file has at least, so that files of one budget are equal within 1 %."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What to run. Its values are plain, so that another process, or another machine, can be told."""

    root: str
    """The study's directory."""
    run: str
    """The run directory, relative to that."""
    stage: str
    arm: str
    seed: int
    recipe: Recipe
    """With seed and budget."""
    data: str
    """The prepared text, relative to the study's directory."""
    precision: Literal["fp32", "bf16"]
    """In which recipes are trained that leave that open."""
    muon_precision: Literal["fp32", "bf16"]
    """The same of Muon's orthogonalisation."""
    compile: Literal["on", "off"]
    """Whether recipes are compiled that leave that open."""
    threads: int
    """Of all its processes together."""
    processes: int
    split: str
    """The held-out part that is scored."""
    window: int
    score_bytes: int | None = None
    packing: Packing | None = None

    @property
    def path(self) -> Path:
        """The run directory."""
        return Path(self.root) / self.run

    @property
    def name(self) -> str:
        """For messages."""
        return f"stage {self.stage}, arm {self.arm}, seed {self.seed}"

    @property
    def pinned(self) -> Recipe:
        """The recipe, with what runs would otherwise choose each for itself by measurement."""
        train = self.recipe.train
        precision = self.precision if train.precision == "auto" else train.precision
        threads = train.threads or max(1, self.threads // self.processes)
        compiled = self.compile if train.compile == "auto" else train.compile
        train = dataclasses.replace(train, precision=precision, threads=threads, compile=compiled)
        optim = self.recipe.optim
        if optim.muon_precision == "auto":
            optim = dataclasses.replace(optim, muon_precision=self.muon_precision)
        return dataclasses.replace(self.recipe, train=train, optim=optim)


class Stopped(OuroborosError):
    """A signal stopped training; ``reason`` is its name."""

    def __init__(self, message: str, reason: str | None) -> None:
        super().__init__(message)
        self.reason = reason


def run_cell(cell: Cell) -> Result:
    """The result of a cell, which is run as far as it has not been.

    Raises:
        Stopped: a signal asked training to stop; a checkpoint is saved.
        Diverged: training diverged or its guard stopped it, or the score is not finite, now or before.
        OuroborosError: training or scoring failed, the disk is full, or the directory has a run of another recipe;
            names the cell.
    """
    try:
        present = result_of(cell)
        if present is not None:
            return present
        if has_diverged(cell.path):
            raise Diverged(read_text(cell.path / DIVERGED).strip())
        _train(cell)
        result = _measure(cell)
        write_whole(cell.path / RESULT, to_json(result).encode())
        # They are several times as large as the model, and only a run that goes on needs them.
        shutil.rmtree(RunDirectory(cell.path).checkpoints, ignore_errors=True)
        return result
    except Stopped:
        raise
    except OSError as error:
        raise OuroborosError(f"{cell.name}: {error.filename or cell.path}: {error.strerror or error}") from error
    except OuroborosError as error:
        if isinstance(error, Diverged):
            note_diverged(cell, error)
        kind = Diverged if has_diverged(cell.path) else OuroborosError
        raise kind(f"{cell.name}: {error}") from error


def result_of(cell: Cell) -> Result | None:
    """The result of a cell, None where it is not complete.

    Raises:
        OuroborosError: the file is damaged, or is the result of another recipe.
    """
    result = read_result(cell.path)
    check(
        result is None or result.recipe == fingerprint(cell.recipe),
        f"{cell.path}: holds the result of another recipe than arm {cell.arm!r} has now; remove it, or choose another"
        " --out",
    )
    return result


def note_diverged(cell: Cell, error: Diverged) -> None:
    """Keep in its directory why a cell has no result, so that it is not tried again."""
    write_whole(cell.path / DIVERGED, f"{error}\n".encode())


def has_diverged(path: Path) -> bool:
    """Whether the cell in a run directory ended because losses or scores left all bounds."""
    return (path / DIVERGED).is_file()


def _train(cell: Cell) -> None:
    """Train, or go on training, until the model is there."""
    from ouroboros.train.run import resolve

    run = RunDirectory(cell.path)
    if not run.is_run:
        _place(Path(cell.root) / cell.data, run.data)
    else:
        begun = run.read_recipe()
        changes = differences(begun, dataclasses.replace(resolve(cell.pinned, run.open_data()), data=begun.data))
        check(
            not changes,
            f"{cell.path}: holds a run of another recipe, which differs in {', '.join(changes)}; remove it, or choose"
            " another --out",
        )
    if run.weights_file.is_file():
        return
    if cell.processes > 1:
        _train_together(cell)
    else:
        train(cell)


def train(cell: Cell) -> None:
    """The training of a cell in this process, or in this one among others that ``torchrun`` has started.

    Raises:
        Stopped: a signal asked training to stop; a checkpoint is saved.
        Diverged: losses stayed non-finite, or the guard stopped the run.
        OuroborosError: training failed.
    """
    from ouroboros.train.run import resume, start

    result = resume(cell.path) if RunDirectory(cell.path).is_run else start(cell.pinned, cell.path)
    if not result.finished or result.asked:
        signal = result.asked or result.reason
        raise Stopped(f"{cell.name}: stopped by {signal}", signal)


def _train_together(cell: Cell) -> None:
    """The training of a cell as a job of several processes."""
    with tempfile.TemporaryDirectory(prefix="ouroboros-") as directory:
        told = Path(directory) / "cell.json"
        told.write_text(to_json(cell))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={cell.processes}", "-m", "ouroboros.ablate.worker", str(told)]
        done = subprocess.run(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, check=False)
    said = [line.removeprefix("error: ") for line in done.stderr.splitlines() if line.startswith("error: ")]
    check(done.returncode == 0, said[0] if said else f"a job of {cell.processes} processes failed")
    check(RunDirectory(cell.path).weights_file.is_file(), "a job of several processes was stopped")


def _place(prepared: Path, data: Path) -> None:
    """Give a run the prepared text as its own: the same files under other names, where the file system can."""
    if data.is_dir():
        return
    with whole_directory(data, replace=False) as work:
        shutil.copytree(prepared, work, dirs_exist_ok=True, copy_function=_link)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _measure(cell: Cell) -> Result:
    """Score the trained model, pack it, and collect its numbers."""
    from ouroboros.api import open_model

    run = RunDirectory(cell.path)
    opened, data, state = open_model(cell.path), run.open_data(), run.state()
    documents = held_out(data, cell.split)
    resolved, counters = run.read_recipe(), state["counters"]
    facts = {name: str(state[name]) for name in ("dtype", "muon_dtype", "compile")}
    model = resolved.model
    return Result(
        stage=cell.stage,
        arm=cell.arm,
        seed=cell.seed,
        run=cell.run,
        recipe=fingerprint(cell.recipe),
        train_sha256=train_hash(data),
        code=code_version(),
        environment=environment(cell.threads, cell.precision, cell.muon_precision) | facts,
        layout=model.layout,
        parameters=cost(model).parameters,
        weights_bytes=run.weights_file.stat().st_size,
        flops_per_token=training_flops(model, resolved.train.loops, (resolved.data.sequence_length + 1) // 2),
        steps=counters["step"],
        tokens=counters["tokens"],
        seconds=counters["seconds"],
        skipped=counters["skipped"],
        score=_score(opened, documents, cell.window, cell.score_bytes, state["dtype"]),
        packed=None
        if cell.packing is None
        else _pack(cell.path, cell.packing, opened, data, documents, cell.window, cell.score_bytes),
    )


def held_out(data: PreparedData, split: str) -> list[bytes]:
    """The documents that are scored.

    Raises:
        OuroborosError: there are none.
    """
    documents = data.documents(split)
    check(any(documents), f"the data has no {split} part to score; set data.{split}_fraction above 0")
    return documents


def train_hash(data: PreparedData) -> str:
    """sha256 (hex) of the digests of the training text of each source; of a stream that is what was read ahead."""
    files = data.manifest["files"]
    digests = [files[f"{index}-train.raw"]["sha256"] for index in range(len(data.sources))]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _score(
    opened: OpenedModel, documents: list[bytes], window: int, most: int | None, dtype: str = "float32"
) -> Measured:
    """Every byte with at least half a window of context where there is so much."""
    import torch

    from ouroboros.eval.score import score

    found = score(
        opened.model,
        opened.tokenizer,
        documents,
        window=window,
        stride=max(1, window // 2),
        max_bytes=most,
        amp=None if dtype == "float32" else getattr(torch, dtype),
    )
    return Measured.of(found)


def _pack(
    run: Path,
    packing: Packing,
    opened: OpenedModel,
    data: PreparedData,
    documents: list[bytes],
    window: int,
    most: int | None,
) -> Packed:
    """Write the packed file, and score the model that it gives."""
    from ouroboros.api import open_model

    size, feasible, exceptions = pack_run(opened, data, run / PACKED, packing)
    score = _score(open_model(run / PACKED), documents, window, most)
    return Packed(bytes=size, score=score, feasible=feasible, exceptions=exceptions)


def pack_again(path: Path, result: Result, packing: Packing, split: str) -> Result:
    """The result of a complete cell with another packed file, which replaces the one that it has.

    Args:
        path: the run directory.
        result: what it holds.
        packing: how the model is packed now.
        split: the held-out part that is scored, all of it.

    Raises:
        OuroborosError: the model or its text cannot be read.
    """
    from ouroboros.api import open_model

    data = RunDirectory(path).open_data()
    packed = _pack(path, packing, open_model(path), data, held_out(data, split), result.score.window, None)
    made = dataclasses.replace(result, packed=packed)
    write_whole(path / RESULT, to_json(made).encode())
    return made


def pack_run(opened: OpenedModel, data: PreparedData, out: Path, packing: Packing) -> tuple[int, bool, int]:
    """Pack a trained model into the file ``out``, calibrated on its training text.

    Returns:
        The file's size in bytes, whether it is within the budget, and for how many tensors the quantiser had to go
        another way than planned.
    """
    from ouroboros.pack.budget import fit
    from ouroboros.pack.calibrate import Quantized, quantize_model
    from ouroboros.pack.ids import training_ids
    from ouroboros.pack.plan import uniform
    from ouroboros.pack.write import end_of_text, pack

    model = opened.model
    length = min(data.spec.sequence_length, packing.calibration_tokens)
    ids = training_ids(data, -(-packing.calibration_tokens // length), length)

    def file(made: Quantized) -> bytes:
        return pack(opened.spec, made.tensors, opened.tokenizer, eos_token_id=end_of_text(model))

    given: dict[str, Any] = {"mode": packing.mode, "allow_fallbacks": True}
    if packing.budget is None:
        made, feasible = quantize_model(model, uniform(packing.bits or 8), ids, **given), True
    else:
        found = fit(model, ids, packing.budget, lambda made: len(file(made)), enough=NEAR, **given)
        made, feasible = found.made, found.feasible
    content = file(made)
    write_whole(out, content)
    return len(content), feasible, len(made.exceptions)

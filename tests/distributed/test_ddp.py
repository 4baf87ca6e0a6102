"""Two processes through ``torchrun`` train as one process with the same global batch.

Starting two processes takes longer than all they do here, so one start serves every case.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import ouroboros
from ouroboros.cli import main
from ouroboros.data.token_shards import write_shards
from ouroboros.train.log import read_metrics

DRIVER = """
import hashlib, json, logging, os, signal, sys
from pathlib import Path

import torch

torch.set_num_threads(1)
from ouroboros.cli import main
from ouroboros.train import distributed, validate
from ouroboros.train.log import Progress
from ouroboros.train.trainer import Trainer

here, rank = Path(sys.argv[2]), int(os.environ["RANK"])
results, losses, trained = {}, Trainer.losses, []
for name, (arguments, stop_at, port) in json.loads(Path(sys.argv[1]).read_text()).items():
    # A process usually joins one group in its life; each further one needs a meeting point of its own.
    os.environ |= {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "False"}
    update = Progress.update

    def stopping(self, status):  # the main process alone is asked to stop
        if status.step == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    Progress.update = stopping if stop_at else update
    if name == "failing":  # on the main process alone
        def failing(trainer, sample):
            raise RuntimeError("no memory")

        validate.validate = failing

    def high(self, *arguments, **options):  # on the other process alone, three times
        trained.append(self.model)
        factor = 10.0 if rank == 1 and self.counters.step in (13, 14, 15) else 1.0
        return tuple(x * factor for x in losses(self, *arguments, **options))

    Trainer.losses = high if name.startswith("rollback") else losses
    sys.stdout = (here / f"{name}.{rank}.out").open("w")
    sys.stderr = (here / f"{name}.{rank}.err").open("w")
    status = main(arguments)
    sys.stdout.close(), sys.stderr.close()
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    Progress.update = update
    (here / f"{name}.{rank}.status").write_text(str(status))
    if name == "rollback":
        weights = b"".join(p.detach().numpy().tobytes() for p in trained[-1].parameters())
        (here / f"{name}.{rank}.sha256").write_text(hashlib.sha256(weights).hexdigest())
"""

SIZES = [
    *(
        "--size",
        "tiny",
        "--model.hidden-size",
        "16",
        "--model.mixer.num-heads",
        "2",
        "--model.ffn.intermediate-size",
        "24",
    ),
    *("--data.sequence-length", "32", "--train.batch-size", "8", "--train.precision", "fp32", "--train.compile", "off"),
    *("--train.log-every", "1", "--train.eval-bytes", "256", "--train.eval-every", "3", "--train.accumulation", "2"),
    *("--train.telemetry-every", "2", "--train.ema-decay", "0.9", "--steps", "6", "--json"),
    *("--optim.muon-precision", "fp32"),  # left open it is measured, and runs that are compared must choose alike
]
LOOPS = [
    *("--train.loops.sampling", "uniform", "--train.loops.min", "1", "--train.loops.max", "3"),
    *("--train.loops.backprop", "2", "--model.loop.inject", "add", "--model.loop.embedding"),
    *("--model.loop.norm", "--model.loop.gate", "--model.registers", "2", "--model.loop.flow.rank", "4"),
    *("--model.loop.anchor.width", "4", "--model.loop.hyper.streams", "2"),
    *("--model.loop.halt.hidden", "8", "--model.loop.halt.bias", "-1", "--model.loop.halt.cost", "steps"),
]
NOISE = ["--train.label-smoothing", "0.1", "--train.corruption", "0.2"]
STAGES = [
    *("--train.quantize.mode", "noise", "--train.distill.fraction", "0.4", "--train.distill.lr", "1"),
    *("--train.low-rank.rank", "2", "--train.low-rank.where", "*mlp*"),
]

SHARDED = ["--train.sharding", "full"]
SHARED = [*SHARDED, *LOOPS, "--model.mixer.value-residual", "0.5", "--train.activation-checkpointing"]
"""Visits hand values to one another, loop counts differ from step to step, and activations are computed again."""

PATIENCE = ["--train.eval-every", "1", "--train.patience", "2", "--optim.lr", "1e-30", "--optim.embedding-lr", "1e-30"]
"""At these rates no weight moves and no score gets better, on any processor."""


ROLLBACK = ["--train.guard.action", "rollback", "--train.checkpoint-every", "3", "--steps", "18"]


@pytest.fixture(autouse=True)
def process_state(given_back: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    with given_back():
        yield


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"{n} times {n % 7} is {n * (n % 7)}\n" for n in range(400)))
    ids = [np.append(256, np.frombuffer(line, np.uint8)) for line in path.read_bytes().splitlines()]
    write_shards(path.parent, "lines", ids, shard_tokens=3000)
    return path


def source_of(text: Path, name: str) -> str:
    """What a case trains on: the text, or its lines as token shards."""
    return f"shards:{text.parent}" if name == "shards" else str(text)


def free_ports() -> Iterator[int]:
    """Ports below those that systems hand out by themselves: the groups' own connections take none of them before it is
    its turn."""
    for port in range(20_000 + os.getpid() % 10_000, 32_000):
        try:
            socket.create_server(("127.0.0.1", port)).close()
        except OSError:  # somebody has it
            continue
        yield port


@pytest.fixture(scope="module")
def outcomes(text: Path, tmp_path_factory: pytest.TempPathFactory, python: str) -> Path:
    """Every case under two processes, in one start; the directory of what they left."""
    here = tmp_path_factory.mktemp("two")

    def train(out: str, *more: str) -> list[str]:
        return ["train", "loop", "--data", source_of(text, out), "--out", str(here / out), *SIZES, *more]

    cases = {
        "plain": (train("plain"), None),
        "shards": (train("shards"), None),
        "loops": (train("loops", *LOOPS), None),
        "noise": (train("noise", *NOISE), None),
        "stages": (train("stages", *STAGES), None),
        "sharded": (train("sharded", *SHARDED), None),
        "shared": (train("shared", *SHARED), None),
        "sharded-stopped": (train("sharded-stopped", *SHARDED), 3),
        "sharded-resumed": (["resume", str(here / "sharded-stopped"), "--json", "--quiet"], None),
        "grown": (["resume", str(here / "grown"), "--json", "--quiet"], None),
        "dropout": (train("dropout", "--model.dropout", "0.1"), None),
        "stopped": (train("stopped", "--model.dropout", "0.1"), 3),
        "resumed": (["resume", str(here / "stopped"), "--json", "--quiet"], None),
        "patience": (train("patience", *PATIENCE), None),
        "odd": (train("odd", "--train.batch-size", "6", "--train.accumulation", "2"), None),
        "rollback": (train("rollback", *ROLLBACK), None),
        "rollback-sharded": (train("rollback-sharded", *ROLLBACK, *SHARDED), None),
        "failing": (train("failing", "--train.eval-every", "1", "--train.max-bad-validations", "2"), None),
    }
    listed = {name: (*case, port) for (name, case), port in zip(cases.items(), free_ports(), strict=False)}
    (here / "cases.json").write_text(json.dumps(listed))
    (here / "driver.py").write_text(DRIVER)
    assert main([*train("grown", *SHARDED), "--quiet"]) == 0
    back_to_the_third_step(here / "grown")
    source = str(Path(ouroboros.__file__).parent.parent)
    launcher = [python, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"]
    command = [*launcher, str(here / "driver.py"), str(here / "cases.json"), str(here)]
    environment = {**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            _, errors = process.communicate(timeout=300)
        except subprocess.TimeoutExpired:
            process.terminate()  # the launcher then ends its workers
            done = sorted(path.name for path in here.glob("*.status"))
            pytest.fail(f"two processes hang; ended: {done}; {process.communicate()[1][-3000:]}")
    assert process.returncode == 0, errors[-3000:]
    return here


def back_to_the_third_step(run: Path) -> None:
    """As if the run had been killed between its third and its sixth step."""
    shutil.rmtree(run / "checkpoints" / "step-00000006")
    (run / "model.safetensors").unlink()


def status(here: Path, name: str) -> list[int]:
    return [int((here / f"{name}.{rank}.status").read_text()) for rank in (0, 1)]


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(run / "metrics.jsonl") if record["kind"] == "train"]


CASES = [("plain", []), ("shards", []), ("loops", LOOPS), ("noise", NOISE), ("stages", STAGES)]
CASES += [("sharded", SHARDED), ("shared", SHARED)]


@pytest.mark.timeout(360)
@pytest.mark.parametrize(("name", "more"), CASES)
def test_two_processes_train_as_one(name, more, outcomes, text, tmp_path, capsys):
    run = outcomes / name
    assert status(outcomes, name) == [0, 0], (outcomes / f"{name}.0.err").read_text()
    arguments = ["--data", source_of(text, name), "--out", str(tmp_path / "one"), *SIZES, *more]
    assert main(["train", "loop", *arguments]) == 0
    alone = json.loads(capsys.readouterr().out)
    assert len(losses(run)) == 6 and losses(run) == pytest.approx(losses(tmp_path / "one"), abs=1e-4)
    two, one = (load_file(path / "model.safetensors") for path in (run, tmp_path / "one"))
    assert two.keys() == one.keys()
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=0, atol=2e-3 if more else 5e-4)
    said = json.loads((outcomes / f"{name}.0.out").read_text())
    assert (said["tokens"], said["step"]) == (alone["tokens"], alone["step"]) == (6 * 8 * 32, 6)
    kinds = [[r["kind"] for r in read_metrics(path / "metrics.jsonl")] for path in (run, tmp_path / "one")]
    assert kinds[0] == kinds[1] and {"valid", "telemetry"} <= set(kinds[0])


def test_one_process_speaks(outcomes):
    for name in ("plain", "stopped", "resumed"):
        assert (outcomes / f"{name}.0.out").read_text().count("\n") == 1
        assert (outcomes / f"{name}.1.out").read_text() == (outcomes / f"{name}.1.err").read_text() == ""
    assert "2 process(es)" in (outcomes / "plain.0.err").read_text()


def test_a_signal_to_one_process_stops_both_and_resume_is_exact(outcomes):
    assert status(outcomes, "stopped") == [143, 143]
    stopped = json.loads((outcomes / "stopped.0.out").read_text())
    assert (stopped["finished"], stopped["stopped_by"], stopped["step"]) == (False, "SIGTERM", 3)
    assert status(outcomes, "resumed") == [0, 0], (outcomes / "resumed.0.err").read_text()
    whole, parts = (outcomes / name / "model.safetensors" for name in ("dropout", "stopped"))
    assert whole.read_bytes() == parts.read_bytes()


def test_a_sharded_run_that_is_stopped_and_resumed_is_exact(outcomes):
    assert status(outcomes, "sharded-stopped") == [143, 143]
    assert status(outcomes, "sharded-resumed") == [0, 0], (outcomes / "sharded-resumed.0.err").read_text()
    whole, parts = (outcomes / name / "model.safetensors" for name in ("sharded", "sharded-stopped"))
    assert whole.read_bytes() == parts.read_bytes()


def test_a_batch_that_does_not_divide_is_refused_by_both_and_leaves_nothing(outcomes):
    assert status(outcomes, "odd") == [1, 1]
    message = (outcomes / "odd.0.err").read_text()
    assert (
        message.startswith("error: train.batch_size (6) must be a multiple of processes (2) times") and "\n" in message
    )
    assert not (outcomes / "odd").exists()


def test_a_run_of_two_processes_goes_on_alone(outcomes, tmp_path, capsys):
    """Gradients are then summed in another order, so the losses agree closely and not to the bit."""
    run = tmp_path / "run"
    shutil.copytree(outcomes / "plain", run)
    assert main(["resume", str(run), "--train.steps", "7", "--allow-changes", "--json", "--quiet"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 7


@pytest.mark.parametrize("name", ["shrunk", "grown"])
def test_a_sharded_run_goes_on_with_another_number_of_processes(name, outcomes, tmp_path, capsys):
    """From two to one, and from one to two: the same checkpoint, whole tensors, serves either."""
    run = outcomes / name
    if name == "shrunk":
        run = tmp_path / "run"
        shutil.copytree(outcomes / "sharded", run)
        back_to_the_third_step(run)
        assert main(["resume", str(run), "--json", "--quiet"]) == 0
        assert json.loads(capsys.readouterr().out)["step"] == 6
    else:
        assert status(outcomes, "grown") == [0, 0], (outcomes / "grown.0.err").read_text()
    assert len(losses(run)) == 6 and losses(run) == pytest.approx(losses(outcomes / "sharded"), abs=1e-4)
    for file in ("model.safetensors", "checkpoints/step-00000006/optimizer.safetensors"):
        found, expected = (load_file(path / file) for path in (run, outcomes / "sharded"))
        assert found.keys() == expected.keys()
        for key in found:
            torch.testing.assert_close(found[key], expected[key], rtol=0, atol=5e-4)


def test_a_validation_that_fails_on_one_process_stops_both_with_a_checkpoint(outcomes):
    assert status(outcomes, "failing") == [1, 1]
    main_error, other = ((outcomes / f"failing.{rank}.err").read_text() for rank in (0, 1))
    assert "2 validations in a row failed, the last one with RuntimeError: no memory; step 2 is saved" in main_error
    assert "2 validations in a row failed, see the main process" in other
    assert (outcomes / "failing" / "checkpoints" / "step-00000002" / "COMPLETE.json").is_file()


def test_patience_ends_both_processes_at_the_same_step(outcomes):
    assert status(outcomes, "patience") == [0, 0], (outcomes / "patience.0.err").read_text()
    facts = json.loads((outcomes / "patience.0.out").read_text())
    assert facts["stopped_by"] == "patience" and facts["exported_step"] == facts["best_step"] == facts["step"] - 2


@pytest.mark.parametrize("name", ["rollback", "rollback-sharded"])
def test_what_one_process_finds_unusual_takes_both_back(name, outcomes):
    assert status(outcomes, name) == [0, 0], (outcomes / f"{name}.0.err").read_text()
    records = read_metrics(outcomes / name / "metrics.jsonl")
    (alarm,), (back,) = ([r for r in records if r["kind"] == kind] for kind in ("guard", "rollback"))
    assert (alarm["step"], alarm["quantity"]) == (14, "loss")
    assert (back["step"], back["to_step"], back["goes_on"]) == (16, 3, True)
    assert len(losses(outcomes / name)) == 18
    assert losses(outcomes / name) == pytest.approx(losses(outcomes / "rollback"), rel=1e-2)
    weights = [(outcomes / f"rollback.{rank}.sha256").read_text() for rank in (0, 1)]
    assert weights[0] == weights[1]  # of each process, at the end

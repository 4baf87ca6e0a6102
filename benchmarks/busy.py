"""Training beside a busy process: tokens per second of ``loop`` alone and with one other program that never rests.

Each arm is a process of its own, because how threads wait is settled when torch is loaded: ``runtime`` leaves it to the
thread runtime, ``command`` sets what ``ouroboros`` sets and takes fewer threads when it is slowed; a short spin,
``sleep at once`` and ``one thread`` are for comparison. The arms take turns, first on the machine as it is and then
beside the busy process.
"""

from __future__ import annotations

import os
import subprocess
import sys

from common import alternate, load, parser, ratio, report, spread

from ouroboros.cli import THREAD_RUNTIME

WORKER = """
import dataclasses, sys, time
import torch
from ouroboros.model.configuration import OuroborosConfig
from ouroboros.model.modeling import OuroborosForCausalLM
from ouroboros.optim import build_optimizers
from ouroboros.recipes import recipe
from ouroboros.train.threads import Threads

made = recipe("loop", sys.argv[1])
model = OuroborosForCausalLM(OuroborosConfig.from_spec(dataclasses.replace(made.model, vocab_size=2048))).train()
optimizers = build_optimizers(model, made.optim)
ids = torch.randint(0, 2048, (made.train.batch_size, made.data.sequence_length + 1))

def step():
    model(input_ids=ids[:, :-1], use_cache=False, targets=ids[:, 1:]).loss.backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()

step()
Threads.WINDOW, Threads.PATIENCE = 0.5, 10.0
threads = Threads(torch.get_num_threads())
print("ready", flush=True)
for line in sys.stdin:
    begun, steps = time.perf_counter(), 0
    while (now := time.perf_counter()) - begun < float(line):
        step()
        steps += 1
        if sys.argv[2] == "command" and (count := threads.observe(time.perf_counter() - now, 1.0)) is not None:
            torch.set_num_threads(count)
    print(steps * ids[:, 1:].numel() / (time.perf_counter() - begun), flush=True)
"""
ARMS = {
    "command": THREAD_RUNTIME,
    "2,000 turns": {"GOMP_SPINCOUNT": "2000"},
    "runtime": {},
    "sleep at once": {"OMP_WAIT_POLICY": "PASSIVE"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}


def main() -> None:
    """Run the comparison."""
    options = parser(__doc__)
    options.add_argument("--seconds", type=float, default=2.0, help="of every turn")
    chosen = options.parse_args()
    started = load()
    size, seconds = ("tiny", 0.2) if chosen.quick else ("small", chosen.seconds)
    rounds = chosen.rounds or (1 if chosen.quick else 7)
    workers = {name: _start(size, name, settings, chosen.threads) for name, settings in ARMS.items()}
    turns = {name: (lambda worker=worker: _ask(worker, seconds)) for name, worker in workers.items()}
    try:
        alone = alternate(turns, rounds)
        with subprocess.Popen([sys.executable, "-c", "while True: sum(range(100_000))"]) as busy:
            try:
                for turn in turns.values():
                    turn()  # the command notices the other program
                    turn()
                beside = alternate(turns, rounds)
            finally:
                busy.kill()
    finally:
        for worker in workers.values():
            worker.kill()
            worker.wait()
            for pipe in (worker.stdin, worker.stdout):
                if pipe is not None:
                    pipe.close()
    report(
        "busy",
        started,
        model=f"loop, {size}",
        tokens_per_second={
            name: {"alone": spread(alone[name]), "beside a busy process": spread(beside[name])} for name in ARMS
        },
        alone_to_runtime={name: ratio(alone[name], alone["runtime"]) for name in ARMS if name != "runtime"},
        beside_to_alone={name: ratio(beside[name], alone[name]) for name in ARMS},
    )


def _start(size: str, arm: str, settings: dict[str, str], threads: int | None) -> subprocess.Popen[str]:
    """A process that trains when it is asked to."""
    kept = {key: value for key, value in os.environ.items() if key not in {"OMP_WAIT_POLICY", *THREAD_RUNTIME}}
    if threads is None:
        kept.pop("OMP_NUM_THREADS", None)
    else:
        kept["OMP_NUM_THREADS"] = str(threads)
    worker = subprocess.Popen(
        [sys.executable, "-c", WORKER, size, arm],
        env={**kept, **settings},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert worker.stdout is not None and worker.stdout.readline().strip() == "ready"
    return worker


def _ask(worker: subprocess.Popen[str], seconds: float) -> float:
    """Tokens per second over the next ``seconds``."""
    assert worker.stdin is not None and worker.stdout is not None
    worker.stdin.write(f"{seconds}\n")
    worker.stdin.flush()
    return float(worker.stdout.readline())


if __name__ == "__main__":
    main()

"""Cells in this process, or in several that are started once and kept."""

from __future__ import annotations

import contextlib
import json
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ouroboros.ablate.cells import Cell
from ouroboros.ablate.worker import outcome
from ouroboros.config import to_dict
from ouroboros.train.stop import StopControl

Take = Callable[[Cell, Mapping[str, Any]], None]
"""Receives a cell and what became of it, see :func:`ouroboros.ablate.worker.outcome`; what it raises ends all."""


def run_all(cells: Sequence[Cell], workers: int, take: Take) -> None:
    """Run the cells in their order, ``workers`` at a time, each in a process of its own unless there is one."""
    if workers == 1 or len(cells) < 2:
        for cell in cells:
            take(cell, outcome(cell))
        return
    with _processes(cells, min(workers, len(cells))) as answers:
        for _ in cells:
            take(*answers.get())


@contextlib.contextmanager
def _processes(cells: Sequence[Cell], count: int) -> Iterator[queue.SimpleQueue[tuple[Cell, Mapping[str, Any]]]]:
    """Answers as they come. At the end of the context the processes end too, whatever they are doing; a signal that
    asks this process to stop is passed on, and each saves a checkpoint first."""
    waiting: queue.SimpleQueue[Cell] = queue.SimpleQueue()
    for cell in cells:
        waiting.put(cell)
    answers: queue.SimpleQueue[tuple[Cell, Mapping[str, Any]]] = queue.SimpleQueue()
    command = [sys.executable, "-m", "ouroboros.ablate.worker"]
    processes = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(count)
    ]

    def pass_on(_: str) -> None:
        for process in processes:
            process.terminate()

    threads = [threading.Thread(target=_feed, args=(process, waiting, answers), daemon=True) for process in processes]
    with StopControl(pass_on):
        for thread in threads:
            thread.start()
        try:
            yield answers
        finally:
            for process in processes:
                process.kill()
                process.wait()
            for process, thread in zip(processes, threads, strict=True):
                thread.join()
                for pipe in (process.stdin, process.stdout):
                    with contextlib.suppress(OSError):  # what was not read will not be
                        pipe.close()  # pyrefly: ignore (there are both)


def _feed(
    process: subprocess.Popen[str],
    waiting: queue.SimpleQueue[Cell],
    answers: queue.SimpleQueue[tuple[Cell, Mapping[str, Any]]],
) -> None:
    """Give one process cell after cell, until none waits or it ends."""
    assert process.stdin is not None and process.stdout is not None
    while True:
        try:
            cell = waiting.get_nowait()
        except queue.Empty:
            return
        try:
            process.stdin.write(json.dumps(to_dict(cell)) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except OSError:
            line = ""
        if not line:
            error = f"{cell.name}: its process ended with status {process.wait()}"
            answers.put((cell, {"error": error, "lasting": True}))
            return
        answers.put((cell, json.loads(line)))

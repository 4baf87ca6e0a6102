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

from ouroboros.ablate.cells import Cell, Stopped
from ouroboros.ablate.worker import outcome
from ouroboros.config import to_dict
from ouroboros.train.stop import StopControl

Answer = tuple[Cell, Mapping[str, Any]]
"""A cell and what became of it, see :func:`ouroboros.ablate.worker.outcome`."""
Answers = tuple[queue.SimpleQueue[Answer | None], StopControl]
Take = Callable[[Cell, Mapping[str, Any]], None]
"""Receives an answer; what it raises ends all."""


def run_all(cells: Sequence[Cell], workers: int, take: Take) -> None:
    """Run the cells in their order, ``workers`` at a time, each in a process of its own unless there is one."""
    if workers == 1 or len(cells) < 2:
        for cell in cells:
            take(cell, outcome(cell))
        return
    with _processes(cells, min(workers, len(cells))) as (answers, control):
        for answer in iter(answers.get, None):
            try:
                take(*answer)
            except Stopped:
                if not control.requested:
                    raise
                # All were asked to stop, and the others have answers too: a checkpoint that is saved, or a result.
        if control.requested:
            raise Stopped(f"stopped by {control.reason}; the same command goes on from here", control.reason)


@contextlib.contextmanager
def _processes(cells: Sequence[Cell], count: int) -> Iterator[Answers]:
    """Answers as they come, with None behind the last one, and whether all were asked to stop.

    At the end of the context the processes end too, whatever they are doing. A signal that asks this process to stop is
    passed on: each saves a checkpoint and answers, and gets no other cell.
    """
    waiting: queue.SimpleQueue[Cell] = queue.SimpleQueue()
    for cell in cells:
        waiting.put(cell)
    answers: queue.SimpleQueue[Answer | None] = queue.SimpleQueue()
    command = [sys.executable, "-m", "ouroboros.ablate.worker"]
    # In groups of their own, so that Ctrl-C reaches this process alone, which passes it on.
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "process_group": 0}
    processes = [subprocess.Popen(command, **pipes) for _ in range(count)]

    def pass_on(_: str) -> None:
        for process in processes:
            process.terminate()

    with StopControl(pass_on) as control:
        feeds = [(process, waiting, answers, control) for process in processes]
        threads = [threading.Thread(target=_feed, args=feed, daemon=True) for feed in feeds]
        for thread in threads:
            thread.start()
        end = threading.Thread(target=_end, args=(threads, answers), daemon=True)
        end.start()
        try:
            yield answers, control
        finally:
            for process in processes:
                process.kill()
                process.wait()
            end.join()
            for process in processes:
                for pipe in (process.stdin, process.stdout):
                    with contextlib.suppress(OSError):  # what was not read will not be
                        pipe.close()  # pyrefly: ignore (there are both)


def _end(threads: Sequence[threading.Thread], answers: queue.SimpleQueue[Answer | None]) -> None:
    """Say when there are no more answers."""
    for thread in threads:
        thread.join()
    answers.put(None)


def _feed(
    process: subprocess.Popen[str],
    waiting: queue.SimpleQueue[Cell],
    answers: queue.SimpleQueue[Answer | None],
    control: StopControl,
) -> None:
    """Give one process cell after cell, until none waits, all are asked to stop, or it ends."""
    assert process.stdin is not None and process.stdout is not None
    while not control.requested:
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
            status, reason = process.wait(), control.reason
            if reason is not None:  # it was not training, but scoring or packing, which is done anew
                answers.put((cell, {"error": f"{cell.name}: stopped by {reason}", "stopped": reason}))
            else:
                answers.put((cell, {"error": f"{cell.name}: its process ended with status {status}", "lasting": True}))
            return
        answers.put((cell, json.loads(line)))

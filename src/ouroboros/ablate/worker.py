"""A process that runs cells, one after the other: ``python -m ouroboros.ablate.worker``.

Each line on standard input is a cell as JSON, and each line on standard output says what became of it. When the input
ends, the process ends too, in the middle of a cell if need be: its study is gone, and the cell can be resumed. With the
name of a file that holds a cell, the process trains it together with others that ``torchrun`` has started.
"""

from __future__ import annotations

import errno
import json
import os
import queue
import sys
import threading
from pathlib import Path
from typing import Any

import torch

from ouroboros.ablate.cells import Cell, Stopped, note_diverged, run_cell, train
from ouroboros.config import from_json, to_dict
from ouroboros.errors import Diverged, OuroborosError
from ouroboros.model.pretrained import quiet_loading

_LASTING = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM}
"""System errors that every other cell would meet too."""


def outcome(cell: Cell) -> dict[str, Any]:
    """Run a cell; its ``result`` as JSON values, or the ``error`` that kept it from one, with what is known of it:
    ``stopped`` by which signal, ``diverged``, or whether it is ``lasting``, so that other cells would meet it too."""
    try:
        return {"result": to_dict(run_cell(cell))}
    except Stopped as stopped:
        return {"stopped": stopped.reason, "error": str(stopped)}
    except Diverged as error:
        return {"diverged": True, "error": str(error)}
    except (OuroborosError, OSError) as error:
        return {"error": str(error), "lasting": _is_lasting(error)}


def _is_lasting(error: BaseException | None) -> bool:
    """Whether the system refuses what it would refuse every cell, by the errors that led to this one."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _LASTING:
            return True
        error = error.__cause__ or error.__context__
    return False


def main() -> None:
    """Answer the cells on standard input."""
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(lines,), daemon=True).start()
    while True:
        cell = from_json(Cell, lines.get(), where="cell")
        torch.set_num_threads(cell.threads)
        sys.stdout.write(json.dumps(outcome(cell)) + "\n")
        sys.stdout.flush()


def _read(lines: queue.SimpleQueue[str]) -> None:
    """Pass lines on; at the end of the input the process is over, wherever it is."""
    for line in sys.stdin:
        lines.put(line)
    os._exit(0)


def join(told: Path) -> None:
    """Be one of the processes that train the cell in the file ``told``."""
    cell = from_json(Cell, told.read_text(), where=str(told))
    torch.set_num_threads(max(1, cell.threads // cell.processes))
    status = 0
    try:
        train(cell)
    except (OuroborosError, OSError) as error:
        if isinstance(error, Diverged):  # who waits for these processes learns no more than that they failed
            note_diverged(cell, error)
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        status = 1
    sys.stderr.flush()
    os._exit(status)  # threads of the process group can keep an interpreter from ending


if __name__ == "__main__":
    with quiet_loading():
        join(Path(sys.argv[1])) if len(sys.argv) > 1 else main()

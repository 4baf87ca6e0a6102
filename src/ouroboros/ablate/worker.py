"""A process that runs cells, one after the other: ``python -m ouroboros.ablate.worker``.

Each line on standard input is a cell as JSON, and each line on standard output says what became of it. When the input
ends, the process ends too, in the middle of a cell if need be: its study is gone, and the cell can be resumed.
"""

from __future__ import annotations

import errno
import json
import os
import queue
import sys
import threading
from typing import Any

from ouroboros.ablate.cells import Cell, Stopped, run_cell
from ouroboros.config import from_json, to_dict
from ouroboros.errors import OuroborosError

_LASTING = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM}
"""System errors that every other cell would meet too."""


def outcome(cell: Cell) -> dict[str, Any]:
    """Run a cell; its ``result`` as JSON values, or what kept it from one: ``stopped`` by which signal, or an ``error``
    and whether it is ``lasting``, so that other cells would meet it too."""
    try:
        return {"result": to_dict(run_cell(cell))}
    except Stopped as stopped:
        return {"stopped": stopped.reason, "error": str(stopped)}
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
    import torch
    from transformers.utils import logging as hf_logging

    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
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


if __name__ == "__main__":
    main()

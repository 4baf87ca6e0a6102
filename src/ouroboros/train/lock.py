"""One process per run directory."""

from __future__ import annotations

import datetime
import json
import logging
import os
import socket
from pathlib import Path
from types import TracebackType
from typing import Any

from ouroboros.errors import OuroborosError
from ouroboros.files import process_alive

logger = logging.getLogger(__name__)


class RunLock:
    """An exclusive lock on a run directory, held within a ``with`` block.

    The kernel drops the lock when its process ends, however it ends, so a lock left behind is taken over. The file
    ``.lock`` stays: removing it would let two processes lock two files of the same name.

    Args:
        run_dir: an existing directory.

    Raises:
        OuroborosError: on entry, when another process holds the lock or the directory cannot be written.
    """

    def __init__(self, run_dir: Path | str) -> None:
        self.run_dir = Path(run_dir)
        self.path = self.run_dir / ".lock"
        self._descriptor: int | None = None

    def __enter__(self) -> RunLock:
        import fcntl  # not on Windows, where importing this module has to work

        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise OuroborosError(f"{self.path}: cannot lock the run directory: {error.strerror}") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            left = _read_holder(descriptor)
            if left:
                logger.info("%s: taking over the lock of process %s, which did not end cleanly", self.path, left["pid"])
            holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": _now()}
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(holder).encode(), 0)
        except BlockingIOError:
            message = _refusal(self.run_dir, _read_holder(descriptor))
            os.close(descriptor)
            raise OuroborosError(message) from None
        except OSError as error:
            os.close(descriptor)
            raise OuroborosError(f"{self.path}: cannot lock the run directory: {error.strerror}") from None
        self._descriptor = descriptor
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._descriptor is None:
            return
        try:
            os.ftruncate(self._descriptor, 0)
        finally:
            os.close(self._descriptor)
            self._descriptor = None


def _now() -> str:
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")


def _read_holder(descriptor: int) -> dict[str, Any]:
    """Who wrote the lock file: ``pid``, ``host`` and ``since``, or nothing if it is empty or half-written."""
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:
        return {}
    known = isinstance(holder, dict) and {"host", "since"} <= holder.keys() and isinstance(holder.get("pid"), int)
    return holder if known else {}


def _refusal(run_dir: Path, holder: dict[str, Any]) -> str:
    """Why the lock was refused, and what to do."""
    if not holder:
        return f"{run_dir} is in use by another process; stop it or choose another directory"
    who = f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    if holder["host"] == socket.gethostname() and not process_alive(holder["pid"]):
        return f"{run_dir} was in use by {who}, which has ended but left a child process running; stop that first"
    return f"{run_dir} is in use by {who}; stop it or choose another directory"

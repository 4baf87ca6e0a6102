"""One process per run directory."""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock

from ouroboros.errors import OuroborosError
from ouroboros.files import process_alive

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def run_lock(run: Path) -> Iterator[None]:
    """Hold the exclusive lock on the run directory ``run``, which exists.

    The kernel drops the lock when its process ends, however it ends, so a lock left behind is taken over. The file
    ``.lock`` says who holds it. It stays: removing it would let two processes lock two files of the same name.

    Raises:
        OuroborosError: another process holds the lock, or the directory cannot be written.
    """
    path = run / ".lock"
    lock = filelock.FileLock(path, blocking=False, fallback_to_soft=False)
    try:
        lock.acquire()
        left = _holder(path)
        if left:
            logger.info("%s: taking over the lock of process %s, which did not end cleanly", path, left["pid"])
        since = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        path.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}))
    except filelock.Timeout:
        raise OuroborosError(_refusal(run, _holder(path))) from None
    except OSError as error:
        lock.release()
        raise OuroborosError(f"{path}: cannot lock the run directory: {error.strerror}") from None
    try:
        yield
    finally:
        try:
            if path.exists():  # what undoes a run that could not begin removes it
                path.write_text("")
        finally:
            lock.release()


def _holder(path: Path) -> dict[str, Any]:
    """Who wrote the lock file: ``pid``, ``host`` and ``since``, or nothing if it is empty or half-written."""
    try:
        holder = json.loads(path.read_bytes())
    except ValueError:
        return {}
    known = isinstance(holder, dict) and {"host", "since"} <= holder.keys() and isinstance(holder.get("pid"), int)
    return holder if known else {}


def _refusal(run: Path, holder: dict[str, Any]) -> str:
    """Why the lock was refused, and what to do."""
    if not holder:
        return f"{run} is in use by another process; stop it or choose another directory"
    who = f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    if holder["host"] == socket.gethostname() and not process_alive(holder["pid"]):
        return f"{run} was in use by {who}, which has ended but left a child process running; stop that first"
    return f"{run} is in use by {who}; stop it or choose another directory"

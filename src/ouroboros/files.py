"""Files and directories that are there whole or not at all, whatever interrupts the writing.

What is being written stands in a hidden sibling, flushed to the disk before it is renamed into place. A process that is
killed leaves at most such a sibling behind, which :func:`remove_leftovers` finds.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import socket
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ouroboros.errors import OuroborosError, check

_LEFTOVER = re.compile(r"\.(?P<name>.+)\.tmp-(?:(?P<host>.+)-)?(?P<pid>\d+)(?:-\w+)?")


def flush(path: Path) -> None:
    """Bring a file, or the names in a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """sha256 (hex) of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_text(path: Path) -> str:
    """The text of a file.

    Raises:
        OuroborosError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise OuroborosError(f"{path}: not UTF-8 text; the file is damaged") from None
    except OSError as error:
        raise OuroborosError(f"{path}: cannot read: {error.strerror}") from None


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        OuroborosError: it cannot be read, or holds anything else.
    """
    found: Any = None
    with contextlib.suppress(ValueError, RecursionError):
        found = json.loads(read_text(path))
    check(isinstance(found, dict), f"{path}: expected a JSON object; the file is damaged")
    return found


_writing: set[Path] = set()
"""Temporaries that this process is writing; others that bear its number are of an earlier process of that number."""


def temporary_sibling(path: Path) -> Path:
    """A fresh name beside ``path`` that tells the machine and the process."""
    return path.with_name(f".{path.name}.tmp-{socket.gethostname()}-{os.getpid()}-x{uuid.uuid4().hex[:8]}")


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """Where the content of ``path`` stands until it is whole."""
    temporary = temporary_sibling(path)
    _writing.add(temporary)
    try:
        yield temporary
    finally:
        _remove(temporary)
        _writing.discard(temporary)


def _remove(path: Path) -> None:
    """Remove a file or a directory, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove the temporary siblings in ``folder`` (of ``name``, or all) whose process, of this machine, has ended.

    Those of other machines stay: nothing tells whether their processes live. The folder need not be there.
    """
    for path in folder.iterdir() if folder.is_dir() else ():
        match = _LEFTOVER.fullmatch(path.name)
        if match is None or match["host"] not in (None, socket.gethostname()) or name not in (None, match["name"]):
            continue
        ended = int(match["pid"]) == os.getpid() or not process_alive(int(match["pid"]))
        if ended and path not in _writing:
            _remove(path)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file to write, which takes the place of ``path`` when the body ends without an error.

    Raises:
        OSError: what the system refuses.
    """
    with _temporary(path) as temporary:
        yield temporary
        flush(temporary)
        temporary.replace(path)


def write_whole(path: Path, content: bytes) -> None:
    """Write a small file: afterwards it is whole, or as it was.

    Raises:
        OuroborosError: it cannot be written.
    """
    try:
        with replacing(path) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        raise OuroborosError(f"cannot write {path}: {error.strerror or error}") from None


def append(path: Path, content: bytes, *, flushed: bool = False) -> None:
    """Append to a file, which is made if it is missing: all of ``content``, or after any error nothing of it.

    ``flushed`` brings it to the disk before the function returns.

    Raises:
        OSError: what the system refuses.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        size = os.fstat(descriptor).st_size
        try:
            while content:
                content = content[os.write(descriptor, content) :]
            if flushed:
                os.fsync(descriptor)
        except BaseException:  # also Ctrl-C: no half line stays
            os.ftruncate(descriptor, size)
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def whole_directory(
    target: Path, *, replace: bool = True, seal: Callable[[Path], None] | None = None
) -> Iterator[Path]:
    """A temporary directory to fill, which takes the place of ``target`` when the body ends without an error.

    Args:
        target: the directory; its parents are made.
        replace: an existing target is called ``.NAME.old-PID`` until it is replaced, so that one of the two is there at
            every instant. Without, a target that is there by then and not empty is an error.
        seal: called with the temporary directory once its content is on the disk, to write what says so.

    Raises:
        OSError: what the system refuses, also where safetensors and tokenizers report it as text.
    """
    with _temporary(target) as temporary, system_errors():
        if not target.parent.is_dir():
            target.parent.mkdir(parents=True, exist_ok=True)
            flush(target.parent.parent)
        temporary.mkdir()
        yield temporary
        _settle(temporary)
        if seal is not None:
            seal(temporary)
            flush(temporary)
        _take_place(temporary, target, replace)


@contextlib.contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """As :func:`whole_directory`, for a place that the user has chosen and where nothing may be lost.

    Raises:
        OuroborosError: ``out`` exists and is not an empty directory, or cannot be written.
    """
    free = not out.exists() or (out.is_dir() and not any(out.iterdir()))
    check(free, f"{out} exists and is not an empty directory; choose another place to write to")
    try:
        with whole_directory(out, replace=False) as work:
            yield work
    except OSError as error:
        raise OuroborosError(f"cannot write {out}: {error.strerror or error}") from None


def _settle(directory: Path) -> None:
    """Bring the content to the disk before its name, so that a power cut cannot leave empty files."""
    mode = directory.stat().st_mode & 0o666
    for path in (*sorted(directory.rglob("*")), directory):
        if path.is_file():
            path.chmod(mode)  # the tensor writer makes its files private to the user
        flush(path)


def _take_place(temporary: Path, target: Path, replace: bool) -> None:
    """Rename ``temporary`` to ``target``; what was there goes only when it is replaced."""
    replaced = target.with_name(f".{target.name}.old-{os.getpid()}")
    replaces = replace and target.exists()
    if replaces:
        _remove(replaced)
        target.rename(replaced)
    try:
        temporary.rename(target)
    except OSError:
        if replaces:
            replaced.rename(target)
        raise
    flush(target.parent)
    if replaces:
        _remove(replaced)


@contextlib.contextmanager
def system_errors() -> Iterator[None]:
    """Turn the system errors that safetensors and tokenizers report as text back into :class:`OSError`."""
    try:
        yield
    except (OSError, OuroborosError):
        raise
    except Exception as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


def process_alive(pid: int) -> bool:
    """Whether a process with this id exists on this machine; True where the system cannot be asked."""
    if os.name != "posix":
        return True  # signal 0 asks on POSIX only
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # it is there, and someone else's
        return True
    return True

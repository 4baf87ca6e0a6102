"""A directory that appears whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from ouroboros.errors import OuroborosError, check
from ouroboros.files import flush


@contextlib.contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """A temporary sibling of ``out`` to write into, renamed to ``out`` when the body ends without an error.

    Raises:
        OuroborosError: ``out`` exists and is not an empty directory, or cannot be written.
    """
    free = not out.exists() or (out.is_dir() and not any(out.iterdir()))
    check(free, f"{out} exists and is not an empty directory; choose another --out")
    temporary = out.with_name(f".{out.name}.tmp-{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        _flush(temporary)
        temporary.rename(out)
    except OSError as error:
        raise OuroborosError(f"cannot write {out}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _flush(directory: Path) -> None:
    """Bring the content to the disk before its name, so that a power cut cannot leave empty files under ``out``."""
    mode = directory.stat().st_mode & 0o666
    for path in (*directory.rglob("*"), directory):
        if path.is_file():
            path.chmod(mode)  # the tensor writer makes files private to the user
        flush(path)

"""A conversation kept as it happens: one JSON object a line, appended when a turn has ended."""

from __future__ import annotations

import datetime
import json
import stat
from pathlib import Path
from typing import Any

from ouroboros.errors import OuroborosError, check
from ouroboros.files import append


class Transcript:
    """Appends turns to a file.

    A turn that cannot be written (a full disk) is kept and written before the next one; what was written of it is taken
    back, so every line of the file is always whole.

    Args:
        path: a new file, an empty one or a transcript.

    Raises:
        OuroborosError: another file, which is left as it is, or one that cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.waiting: list[bytes] = []
        """Lines that are not in the file yet."""
        try:
            # Looked at first: to open a pipe or a device could wait for ever.
            check(not path.exists() or stat.S_ISREG(path.stat().st_mode), f"transcript {path}: not a regular file")
            path.touch()
            for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
                check(
                    line.endswith(b"\n") and _is_turn(line),
                    f"transcript {path}: line {number} is no turn of a conversation, so nothing is appended;"
                    " choose another file",
                )
        except OSError as error:
            raise OuroborosError(f"transcript {path}: {error.strerror or error}") from None

    def add(self, user: str, model: str, **facts: Any) -> None:
        """Append one turn, with the time (UTC) and what else is known of it; errors as of :meth:`flush`."""
        now = datetime.datetime.now(datetime.UTC)
        turn = {"time": now.isoformat(timespec="seconds"), "user": user, "model": model, **facts}
        self.waiting.append(json.dumps(turn).encode("ascii") + b"\n")
        self.flush()

    def flush(self) -> None:
        """Write the turns that wait, if any.

        Raises:
            OuroborosError: they cannot be written, and go on waiting.
        """
        if not self.waiting:
            return
        try:
            append(self.path, b"".join(self.waiting), flushed=True)
        except OSError as error:
            reason = f"{error.strerror or error}; {len(self.waiting)} turn(s) are not in it yet"
            raise OuroborosError(f"transcript {self.path}: {reason}") from None
        self.waiting.clear()


def _is_turn(line: bytes) -> bool:
    try:
        turn = json.loads(line)
    except ValueError:
        return False
    return isinstance(turn, dict) and turn.keys() >= {"time", "user", "model"}

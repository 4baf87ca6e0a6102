"""What a run reports: metrics as JSON lines in the run directory, and a progress line on a console."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ouroboros.errors import OuroborosError
from ouroboros.files import append, replacing

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live

logger = logging.getLogger(__name__)


class MetricsLog:
    """Appends records to a file of JSON lines; each is in the file before :meth:`write` returns.

    A last line torn by a crash is removed on opening. The file is strict JSON: NaN and infinities become ``null``.

    Args:
        path: made if missing. None for processes that record nothing.
        resume_step: on resume, the step of the checkpoint; records of later steps are removed, because those steps
            are about to be taken again. The rewriting is atomic.

    Raises:
        OuroborosError: the file cannot be read or written.
    """

    def __init__(self, path: Path | None, *, resume_step: int | None = None) -> None:
        self.path = path
        if path is None:
            return
        try:
            _repair(path, resume_step)
            append(path, b"")
        except OSError as error:
            raise OuroborosError(f"{path}: cannot open the metrics: {error.strerror}") from None

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record. Values may be nested, and scalars of numpy and torch.

        Raises:
            OuroborosError: a value is not JSON, or the disk is full; the file then ends with the record before.
        """
        if self.path is None:
            return
        try:
            line = json.dumps(_strict(record), allow_nan=False, separators=(", ", ": ")) + "\n"
        except (TypeError, ValueError) as error:
            raise OuroborosError(f"{self.path}: cannot write metrics: {error}") from None
        try:
            append(self.path, line.encode())
        except OSError as error:
            raise OuroborosError(f"{self.path}: cannot write metrics: {error.strerror}") from None


def read_metrics(path: Path | str) -> list[dict[str, Any]]:
    """The records of a metrics file; lines that are not JSON objects (a torn last one) are left out."""
    return [record for line in Path(path).read_bytes().splitlines() if (record := _record(line)) is not None]


def _record(line: bytes) -> dict[str, Any] | None:
    """The record on one line, or None if it is not a JSON object."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _repair(path: Path, resume_step: int | None) -> None:
    """Remove broken lines and records after ``resume_step``, if there are any, by an atomic rewriting."""
    if not path.exists():
        return
    present = path.read_bytes()
    kept = []
    for number, line in enumerate(present.splitlines(keepends=True), start=1):
        record = _record(line)
        if record is None or not line.endswith(b"\n"):
            logger.warning("%s: line %d is incomplete or not JSON; removed", path, number)
            continue
        step = record.get("step")
        if resume_step is None or not isinstance(step, (int, float)) or step <= resume_step:
            kept.append(line)
    if b"".join(kept) == present:
        return
    with replacing(path) as temporary:
        temporary.write_bytes(b"".join(kept))


def _strict(value: Any) -> Any:
    """``value`` in the types of strict JSON."""
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    if not isinstance(value, (bool, int, float, str)) and hasattr(value, "tolist"):
        return _strict(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


@dataclass(frozen=True, kw_only=True)
class Status:
    """What the progress line shows."""

    step: int
    progress: float
    """Share of the run done, in [0, 1]."""
    loss: float
    """Nats per token."""
    bits_per_byte: float
    tokens_per_second: float
    peak_share: float
    """Achieved operations per second as a share of the measured matrix-product peak."""
    note: str = ""


class Progress:
    """A progress line, redrawn in place on a terminal, printed every so often elsewhere.

    Args:
        console: where to, normally ``rich.console.Console(stderr=True)``, which is made if None.
        quiet: show nothing.
        every: seconds between lines when the console is not a terminal.
        clock: seconds, for tests.
    """

    REFRESH_SECONDS = 0.2

    def __init__(
        self,
        console: Console | None = None,
        *,
        quiet: bool = False,
        every: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.quiet = quiet
        self._console = console
        self._every = every
        self._clock = clock
        self._live: Live | None = None
        self._start: tuple[float, float] | None = None
        self._shown_at = -math.inf
        self._pending: str | None = None

    def __enter__(self) -> Progress:
        if self.quiet:
            return self
        if self._console is None:
            from rich.console import Console

            self._console = Console(stderr=True)
        if self._console.is_terminal:
            from rich.live import Live

            # Without a refresh thread: a fork (data workers) must not find its lock held.
            self._live = Live(console=self._console, auto_refresh=False)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pending is not None:
            self._show(self._pending)
        if self._live is not None:
            self._live.stop()
            self._live = None

    def update(self, status: Status) -> None:
        """Show ``status``, unless the line before was shown too recently; the last one is always shown in the end."""
        if self.quiet:
            return
        now = self._clock()
        if self._start is None:
            self._start = (now, status.progress)
        seconds = remaining_seconds(now - self._start[0], self._start[1], status.progress)
        line = status_line(status, seconds, resident_bytes())
        if now - self._shown_at >= (self.REFRESH_SECONDS if self._live is not None else self._every):
            self._show(line)
            self._shown_at = now
        else:
            self._pending = line

    def message(self, text: str) -> None:
        """Show a line that stays, above the progress line."""
        if not self.quiet and self._console is not None:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _show(self, line: str) -> None:
        self._pending = None
        if self._live is not None:
            from rich.text import Text

            self._live.update(Text(line, no_wrap=True, overflow="ellipsis"), refresh=True)
        else:
            self.message(line)


def remaining_seconds(elapsed: float, started: float, progress: float) -> float | None:
    """Time to the end, when ``elapsed`` seconds took the run from ``started`` to ``progress``; None if unknown."""
    gained = progress - started
    return elapsed * (1.0 - progress) / gained if gained > 0 else None


def status_line(status: Status, seconds_left: float | None, memory: int | None) -> str:
    """The progress line as plain text: what is not known is left out."""
    parts = [f"{100 * status.progress:5.1f}%", f"step {status.step:,}", f"loss {status.loss:.4f}"]
    parts += [f"{status.bits_per_byte:.4f} bits/byte", f"{status.tokens_per_second:,.0f} tok/s"]
    parts.append(f"{100 * status.peak_share:.0f}% of peak")
    if seconds_left is not None:
        minutes, seconds = divmod(round(seconds_left), 60)
        hours, minutes = divmod(minutes, 60)
        parts.append(f"ETA {hours}:{minutes:02d}:{seconds:02d}" if hours else f"ETA {minutes}:{seconds:02d}")
    if memory is not None:
        parts.append(f"{memory / 1e9:.2f} GB")
    if status.note:
        parts.append(status.note)
    return "  ".join(parts)


def resident_bytes() -> int | None:
    """Memory of this process in bytes: now on Linux, at its peak on other systems, None where nothing tells."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return _peak_bytes()


def _peak_bytes() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

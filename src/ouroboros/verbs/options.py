"""Option parsing shared by the verbs: typed options from dataclasses, errors as one line."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import logging
import math
import signal
import sys
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any, TypeVar

from tyro.conf import Positional, arg

from ouroboros.errors import UsageError

T = TypeVar("T")

# Options that several verbs have, each with its sentence of help.
Model = Annotated[Path, Positional, arg(help="The model: a run directory, a transformers directory or a packed file.")]
Run = Annotated[Path, Positional, arg(help="The run directory, as `ouroboros train --out` made it.")]
Loops = Annotated[
    int | None, arg(help="Loop count for every token; by default the one that the model was trained with.")
]
Json = Annotated[bool, arg(help="Print exactly one JSON object on standard output, in place of text.")]
Quiet = Annotated[bool, arg(help="Show no progress on standard error.")]
TextField = Annotated[str, arg(help="The field of JSON and Parquet records that holds the text.")]
SkipBadRecords = Annotated[bool, arg(help="Leave out records that cannot be read, in place of stopping at the first.")]


def parse(cls: type[T], verb: str, arguments: Sequence[str], *, default: Any = None) -> T:
    """``arguments`` as an instance of the dataclass ``cls``; ``--help`` prints and exits with status 0.

    Where a field may be one of several specifications, the options are those of the one in ``default``.

    Raises:
        UsageError: one line that names the option, what is wrong and the nearest valid one.
    """
    import tyro

    given = {} if default is None else {"default": default}
    if _describing.get():
        raise _Described(cls, given)
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            config = (tyro.conf.AvoidSubcommands,)
            return tyro.cli(cls, prog=f"ouroboros {verb}", args=list(arguments), config=config, **given)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UsageError(_flatten(complaint.getvalue(), verb)) from None


class _Described(Exception):
    """Ends a verb that is only asked for its options."""


_describing: ContextVar[bool] = ContextVar("_describing", default=False)


def describe(verb: Callable[[Sequence[str]], int]) -> tuple[type, dict[str, Any]]:
    """The options that ``verb --help`` lists, as a dataclass, and its ``default`` if they have one."""
    token = _describing.set(True)
    try:
        verb(["--help"])
    except _Described as found:
        return found.args
    finally:
        _describing.reset(token)
    raise TypeError(f"{verb} does not parse its options")


def _flatten(box: str, verb: str) -> str:
    """tyro's boxed message as one line: its first paragraph, and the first suggestion if there is one."""
    lines = [line.strip("\u2502\u256d\u256e\u2570\u256f ") for line in box.splitlines()]
    # A terminal without Unicode gets hyphens, and a rule of its own under the title.
    rules = [index for index, line in enumerate(lines) if line and not line.strip("\u2500-")]
    begin, end = [*([0] if "\u2500" in box else []), *rules, len(lines), len(lines)][:2]
    first = " ".join(line for line in lines[begin + 1 : end] if line).split(" Got errors:")[0]
    behind = (after for line, after in itertools.pairwise(lines) if line.startswith("Perhaps you meant"))
    if suggested := next(behind, ""):
        first += f"; did you mean {suggested.split()[0].rstrip(',')}?"
    return f"{first or 'wrong options'}; see `ouroboros {verb} --help`"


def collect(arguments: Sequence[str], option: str) -> list[str]:
    """Gather the values of a repeated ``option`` behind its first use, so that both spellings of a list work.

    >>> collect(["--data", "a", "--seed", "1", "--data", "b"], "--data")
    ['--data', 'a', 'b', '--seed', '1']
    """
    rest: list[str] = []
    values: list[str] = []
    at, inside = None, False
    for word in arguments:
        name, equals, value = word.partition("=")
        if name == option:
            at, inside = len(rest) if at is None else at, not equals
            values += [value] if equals else []
        elif inside and not word.startswith("--"):
            values.append(word)
        else:
            inside = False
            rest.append(word)
    return rest if at is None else [*rest[:at], option, *values, *rest[at:]]


def signal_status(name: str | None) -> int:
    """The exit status of what the signal ``name`` stopped; 143, as for SIGTERM, if another process was signalled."""
    return 128 + getattr(signal, name or "", signal.SIGTERM)


def log_to_stderr() -> None:
    """Send warnings of the library to standard error."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)


def quiet_transformers() -> None:
    """No advice and no loading bars from transformers on the command line."""
    from transformers.utils import logging as hf_logging

    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()


def emit_json(value: Any) -> None:
    """Print exactly one JSON object on standard output; NaN and infinities, which JSON lacks, become null."""
    sys.stdout.write(json.dumps(_finite(value), allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def say(text: str = "") -> None:
    """Print a line of the result on standard output."""
    sys.stdout.write(text + "\n")

"""The files that a directory or a glob means: links are followed, and files that are left out are named.

A directory means its text, code and record files, compressed ones too. Every real directory is read once, however many
links lead to it, under its own name where it lies below the source. Documentation (a README, a licence) is no data
where there is data of another kind, as in the usual layout of a hub data set; a directory of notes is all data.
"""

from __future__ import annotations

import glob
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePath
from typing import NoReturn

from ouroboros.data.textfile import text_suffix
from ouroboros.errors import OuroborosError, check

logger = logging.getLogger(__name__)

RECORD_SUFFIXES = frozenset({".jsonl", ".ndjson", ".json", ".parquet"})
_TEXT_NAMES = """
    adoc asm awk bash bat bib bzl c cc cfg cl clj cmake conf cpp cs css csv cu cuh cxx d dart diff el
    erl ex exs f90 fs glsl go gradle groovy h hh hpp hs htm html ini java jl js jsx kt latex lean lisp
    log lua m markdown md mjs ml mli mm nim nix org pas patch php pl pm proto ps1 py pyi pyx r rb rkt rs
    rst s sbt scala scm sh sol sql srt svelte swift tcl tex text toml ts tsv tsx txt v vb vhd vim vue
    wat xml yaml yml zig zsh
"""
TEXT_SUFFIXES = frozenset(f".{name}" for name in _TEXT_NAMES.split())
MAGIC = frozenset("*?[")
"""The signs that make a name a glob."""
_DOCUMENTATION = re.compile(
    r"(?i)(readme|licen[cs]e|copying|notice|changelog|contributing|code_of_conduct|security|citation)([-_.].*)?"
)
_SHOWN = 8
"""Names or kinds in one message."""

Files = list[tuple[str, Path]]
"""(name within the source, path), sorted by name."""


def walk(root: Path) -> Iterator[tuple[Path, list[str]]]:
    """``root`` and the directories below it, each real one once, with the names of their files; hidden files and
    directories and ``__pycache__`` are passed over. Links are followed after everything that is no link, but for those
    that lead to a directory above ``root``. What cannot be read is an :class:`OSError`."""
    seen = {_identity(folder) for folder in root.resolve().parents}
    pending = [root]
    while pending:
        for folder, folders, files in os.walk(pending.pop(0), onerror=_give_up):
            place = _identity(Path(folder))
            if place in seen:
                folders.clear()
                continue
            seen.add(place)
            folders[:] = sorted(name for name in folders if not name.startswith((".", "__pycache__")))
            pending += [path for name in folders if (path := Path(folder, name)).is_symlink()]
            yield Path(folder), [name for name in files if not name.startswith(".")]


def _give_up(error: OSError) -> NoReturn:
    raise error


def _identity(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_dev, found.st_ino


def lies_inside(path: Path, root: Path) -> bool:
    """Whether ``path``, which need not exist, lies in the directory ``root`` or in one that it links to."""
    above = {_identity(folder) for folder in (path.resolve(), *path.resolve().parents) if folder.exists()}
    return any(_identity(folder) in above for folder, _ in walk(root))


def directory_files(text: str, root: Path, *, quiet: bool = False) -> Files:
    """Text, code and record files below a directory, as :func:`walk` goes through it.

    ``text`` is the source as the user wrote it, for messages; with ``quiet``, what is left out is not logged. Nothing
    to read, and what cannot be read, is an error.
    """
    below = (folder / name for folder, files in walk(root) for name in files)
    # A link to nothing matters only if somebody would read it.
    sizes = _sizes(text, root, (path for path in below if _is_wanted(path.name) or path.exists()))
    kinds = {name: text_suffix(PurePath(name)) for name in sizes if _is_wanted(name)}
    told = {name for name in kinds if _DOCUMENTATION.fullmatch(PurePath(name).name)}
    others = {kinds[name] for name in kinds.keys() - told}
    told = {name for name in told if others - {kinds[name]}}
    left: Counter[str] = Counter()
    for name in sizes.keys() - kinds.keys():
        left[PurePath(name).suffix.lower() or PurePath(name).name] += sizes[name]
    skipped = ", ".join([*sorted(told), *sorted(left, key=lambda kind: (-left[kind], kind))][:_SHOWN])
    check(
        bool(kinds),
        f"source {text!r}: no text, code or record files in this directory{f' (it has {skipped})' if skipped else ''};"
        f" a glob such as '{text.rstrip('/')}/**/*' reads any file",
    )
    chosen = sorted(kinds.keys() - told)
    if skipped and not quiet:
        # A user would not expect most of the bytes to be left out.
        level = logging.WARNING if left.total() > sum(sizes[name] for name in chosen) else logging.INFO
        logger.log(
            level,
            "source %r: skipped documentation and files of other kinds, %d of %d bytes: %s; name them or a glob",
            *(text, left.total() + sum(sizes[name] for name in told), sum(sizes.values()), skipped),
        )
    return [(name, root / name) for name in chosen]


def glob_files(text: str, base: Path | None) -> Files:
    """Files that a glob matches; names are relative to the part of the pattern before its first wildcard.

    ``**`` goes into directories as :func:`walk` does. ``text`` is relative to ``base``, or to the current directory.
    Nothing that matches, and what cannot be read, is an error.
    """
    parts = Path(os.path.expanduser(text)).parts
    fixed = next(i for i, part in enumerate(parts) if MAGIC & set(part))
    root, rest = (base or Path()).joinpath(*parts[:fixed]), parts[fixed:]
    names = sorted(_sizes(text, root, _matches(root, rest)))
    hint = f"(looked in {str(root)!r}); '**/*' goes into directories"
    check(bool(names), f"source {text!r}: no file matches this glob {hint}")
    return [(name, root / name) for name in names]


def _matches(root: Path, parts: tuple[str, ...]) -> Iterator[Path]:
    if "**" not in parts:
        yield from (root / match for match in glob.glob(os.path.join(*parts), root_dir=root))
        return
    at = parts.index("**")
    tops = [path for path in (_matches(root, parts[:at]) if at else [root]) if path.is_dir()]
    for folder, files in (found for top in tops for found in walk(top)):
        yield from _matches(folder, parts[at + 1 :]) if parts[at + 1 :] else (folder / name for name in files)


def _sizes(text: str, root: Path, paths: Iterable[Path]) -> dict[str, int]:
    """The size of each file by its name within the source, without directories, pipes and devices."""
    try:
        found = [path for path in paths if path.is_file() or not path.exists()]  # not there: the next line fails
        return {path.relative_to(root).as_posix(): path.stat().st_size for path in found}
    except OSError as error:
        raise OuroborosError(f"source {text!r}: cannot be read: {error.strerror}: {error.filename}") from None


def _is_wanted(name: str) -> bool:
    # A plain .json file is configuration more often than text; name such files or a glob to read them.
    return text_suffix(PurePath(name)) in TEXT_SUFFIXES | RECORD_SUFFIXES and not name.lower().endswith(".json")

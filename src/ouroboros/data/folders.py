"""The files that a directory or a glob means: links are followed, and what is left out is named.

A directory means its text, code and record files, compressed ones too. Every real directory is read once, however many
links lead to it, under its own name where it lies below the source. Documentation (a README, a licence) is no data
where there is data of another kind, as in the usual layout of a hub data set; a directory of notes is all data.
"""

from __future__ import annotations

import errno
import glob
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import NoReturn

from ouroboros.data.textfile import special_kind, text_suffix
from ouroboros.errors import OuroborosError

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


def walk(root: Path, loops: list[Path] | None = None) -> Iterator[tuple[Path, list[str]]]:
    """``root`` and the directories below it that are not hidden, each real one once, with the names of their files.

    Links are followed after everything that is no link. A link that leads to a directory above ``root`` is a loop: it
    is not followed, and put into ``loops``.

    Raises:
        OSError: a directory cannot be read.
    """
    seen: set[tuple[int, int]] = set()
    above = {_identity(folder) for folder in root.resolve().parents}
    pending = [root]
    while pending:
        links: list[Path] = []
        for folder, folders, files in os.walk(pending.pop(0), onerror=_give_up):
            place = _identity(Path(folder))
            if place in seen:
                folders.clear()
                continue
            seen.add(place)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            links += [path for name in folders if (path := Path(folder, name)).is_symlink()]
            yield Path(folder), files
        ahead = [link for link in links if _identity(link) not in above]
        if loops is not None:
            loops += [link for link in links if link not in ahead]
        pending += ahead


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
    """Text, code and record files below a directory; hidden files and ``__pycache__`` are passed over.

    Args:
        text: the source as the user wrote it, for messages.
        root: the directory.
        quiet: log nothing of what is left out.

    Raises:
        OuroborosError: nothing to read; nothing but documentation beside larger files of other kinds; a directory that
            cannot be read; a link to a file that is gone.
    """
    loops: list[Path] = []
    found, unusable = _sizes(text, root, _below(root, loops), loops)
    sizes = {name: size for name, size in found.items() if _is_wanted(name)}
    others = {name: size for name, size in found.items() if name not in sizes}
    documentation = _documentation(sizes)
    _refuse_nothing(text, sizes, others, documentation)
    chosen = sorted(sizes.keys() - documentation)
    if not quiet:
        _report_unusable(text, unusable)
        if documentation:
            logger.info("source %r: skipped documentation: %s", text, _some(sorted(documentation)))
        _report_others(text, others, sum(sizes[name] for name in chosen))
    return [(name, root / name) for name in chosen]


def glob_files(text: str, base: Path | None, *, quiet: bool = False) -> Files:
    """Files that a glob matches; names are relative to the part of the pattern before its first wildcard.

    ``**`` goes into directories as :func:`walk` does.

    Args:
        text: the glob as the user wrote it.
        base: what it is relative to; None means the current directory.
        quiet: log nothing of what is left out.

    Raises:
        OuroborosError: nothing matches; a directory that cannot be read.
    """
    root, rest = _split_glob(text, base)
    loops: list[Path] = []
    folders: list[Path] = []

    def matches() -> Iterator[Path]:
        for path in _matches(root, rest, loops):
            if path.is_dir():
                folders.append(path)
            else:
                yield path

    sizes, unusable = _sizes(text, root, matches(), loops)
    if not quiet:
        _report_unusable(text, unusable)
    if not sizes:
        hint = "; '**/*' goes into directories" if folders or unusable else f" (looked in {str(root)!r})"
        raise OuroborosError(f"source {text!r}: no file matches this glob{hint}")
    return [(name, root / name) for name in sorted(sizes)]


def glob_matches(text: str, base: Path | None) -> Iterator[Path]:
    """Everything that a glob matches, files or not; some perhaps twice."""
    return _matches(*_split_glob(text, base), [])


def _split_glob(text: str, base: Path | None) -> tuple[Path, tuple[str, ...]]:
    """The directory before the first wildcard, and the pattern from there on."""
    parts = Path(os.path.expanduser(text)).parts
    fixed = next(i for i, part in enumerate(parts) if MAGIC & set(part))
    return (base or Path()).joinpath(*parts[:fixed]), parts[fixed:]


def _matches(root: Path, parts: tuple[str, ...], loops: list[Path]) -> Iterator[Path]:
    if "**" not in parts:
        yield from (root / match for match in glob.glob(os.path.join(*parts), root_dir=root))
        return
    at = parts.index("**")
    tops = [path for path in (_matches(root, parts[:at], loops) if at else [root]) if path.is_dir()]
    for folder, files in (found for top in tops for found in walk(top, loops)):
        if parts[at + 1 :]:
            yield from _matches(folder, parts[at + 1 :], loops)
        else:
            yield from (folder / name for name in files if not name.startswith("."))


def _below(root: Path, loops: list[Path]) -> Iterator[Path]:
    """The files below a directory that are not hidden; a link to nothing only if somebody would read it."""
    for folder, files in walk(root, loops):
        if "__pycache__" not in folder.relative_to(root).parts:
            paths = (folder / name for name in files if not name.startswith("."))
            yield from (path for path in paths if _is_wanted(path.name) or path.exists())


def _sizes(text: str, root: Path, paths: Iterable[Path], loops: list[Path]) -> tuple[dict[str, int], set[str]]:
    """The size of each file by its name within the source; and what is no file, with the reason."""
    sizes: dict[str, int] = {}
    unusable: set[str] = set()
    try:
        for path in paths:
            name = path.relative_to(root).as_posix()
            try:
                found = path.stat()
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ELOOP):
                    raise
                raise OuroborosError(
                    f"source {text!r}: {name!r} is a link to a file that is gone; restore the file or remove the link"
                ) from None
            if kind := special_kind(found.st_mode):
                unusable.add(f"{name} ({kind})")
            else:
                sizes[name] = found.st_size
    except OSError as error:
        raise OuroborosError(f"source {text!r}: cannot be read: {error.strerror}: {error.filename}") from None
    unusable.update(f"{link.relative_to(root).as_posix()} (a link to a directory above)" for link in loops)
    return sizes, unusable


def _is_wanted(name: str) -> bool:
    # A plain .json file is configuration more often than text; name such files or a glob to read them.
    return text_suffix(PurePath(name)) in TEXT_SUFFIXES | RECORD_SUFFIXES and not name.lower().endswith(".json")


def _is_documentation(name: str) -> bool:
    return _DOCUMENTATION.fullmatch(PurePath(name).name) is not None


def _documentation(names: Iterable[str]) -> set[str]:
    """Documentation among ``names`` that stands beside data of another kind."""
    told = {name for name in names if _is_documentation(name)}
    kinds = {text_suffix(PurePath(name)) for name in set(names) - told}
    return {name for name in told if kinds - {text_suffix(PurePath(name))}}


def _refuse_nothing(text: str, sizes: Mapping[str, int], others: Mapping[str, int], documentation: set[str]) -> None:
    hint = f"a glob such as '{text.rstrip('/')}/**/*' reads any file"
    if not sizes:
        found = f" (it has {_kinds(others)})" if others else ""
        raise OuroborosError(f"source {text!r}: no text, code or record files in this directory{found}; {hint}")
    is_told = not documentation and all(map(_is_documentation, sizes))
    if is_told and sum(others.values()) > sum(sizes.values()):
        raise OuroborosError(
            f"source {text!r}: only documentation ({_some(sorted(sizes))}) beside files of other kinds"
            f" ({_kinds(others)}); {hint}"
        )


def _report_unusable(text: str, unusable: set[str]) -> None:
    if unusable:
        logger.warning("source %r: left out: %s", text, _some(sorted(unusable)))


def _report_others(text: str, others: Mapping[str, int], read: int) -> None:
    """Log the files of other kinds; a warning where they are most of the bytes, which a user would not expect."""
    left = sum(others.values())
    if left > read:
        what = f"{left:,} of {left + read:,}: files of other kinds ({_kinds(others)})"
        logger.warning("source %r: most of its bytes are skipped, %s; name them or a glob to read them", text, what)
    elif others:
        logger.info("source %r: skipped files of other kinds: %s", text, _kinds(others))


def _kinds(sizes: Mapping[str, int]) -> str:
    """The kinds of files, those with most bytes first."""
    kinds: Counter[str] = Counter()
    for name, size in sizes.items():
        kinds[PurePath(name).suffix.lower() or PurePath(name).name] += size
    return _some(sorted(kinds, key=lambda kind: (-kinds[kind], kind)))


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more

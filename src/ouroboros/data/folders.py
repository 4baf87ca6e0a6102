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

    Links are followed after everything that is no link. One that leads to a directory above ``root`` is a loop: it is
    not followed, and put into ``loops``.

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
    sizes: dict[str, int] = {}
    others: dict[str, int] = {}
    loops: list[Path] = []
    unusable: list[str] = []
    try:
        for folder, files in walk(root, loops):
            if "__pycache__" in folder.relative_to(root).parts:
                continue
            for name in sorted(name for name in files if not name.startswith(".")):
                place = (folder / name).relative_to(root).as_posix()
                is_wanted = _is_wanted(name)
                if not is_wanted and not (folder / name).exists():
                    continue  # a link to nothing, which nobody would read
                kind, size = _examine(text, folder / name, place)
                if kind:
                    unusable.append(f"{place} ({kind})")
                else:
                    (sizes if is_wanted else others)[place] = size
    except OSError as error:
        raise OuroborosError(f"source {text!r}: cannot be read: {error.strerror}: {error.filename}") from None
    unusable += _loop_names(loops, root)
    documentation = _documentation(sizes)
    chosen = sizes.keys() - documentation
    _refuse_nothing(text, sizes, others, documentation)
    if not quiet:
        _report(text, chosen, sizes, others, documentation, unusable)
    return [(name, root / name) for name in sorted(chosen)]


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
    try:
        paths = set(_matches(root, rest, loops))
        places = {path.relative_to(root).as_posix(): path for path in paths if not path.is_dir()}
        kinds = {place: _examine(text, path, place)[0] for place, path in places.items()}
    except OSError as error:
        raise OuroborosError(f"source {text!r}: cannot be read: {error.strerror}: {error.filename}") from None
    unusable = [f"{place} ({kind})" for place, kind in kinds.items() if kind] + _loop_names(loops, root)
    if unusable and not quiet:
        logger.warning("source %r: left out: %s", text, _some(sorted(unusable)))
    files = sorted((place, path) for place, path in places.items() if not kinds[place])
    if not files:
        raise OuroborosError(
            f"source {text!r}: no file matches this glob"
            + ("; '**/*' goes into directories" if paths else f" (looked in {str(root)!r})")
        )
    return files


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


def _examine(text: str, path: Path, place: str) -> tuple[str | None, int]:
    """What it is if it is no file, and its size."""
    try:
        found = path.stat()
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ELOOP):
            raise
        raise OuroborosError(
            f"source {text!r}: {place!r} is a link to a file that is gone; restore the file or remove the link"
        ) from None
    return special_kind(found.st_mode), found.st_size


def _loop_names(loops: Iterable[Path], root: Path) -> list[str]:
    return [f"{name} (a link to a directory above)" for name in {link.relative_to(root).as_posix() for link in loops}]


def _is_wanted(name: str) -> bool:
    # A plain .json file is configuration more often than text; name such files or a glob to read them.
    return text_suffix(PurePath(name)) in TEXT_SUFFIXES | RECORD_SUFFIXES and not name.lower().endswith(".json")


def _documentation(names: Iterable[str]) -> set[str]:
    """Documentation among ``names`` that stands beside data of another kind."""
    told = {name for name in names if _DOCUMENTATION.fullmatch(PurePath(name).name)}
    kinds = {text_suffix(PurePath(name)) for name in set(names) - told}
    return {name for name in told if kinds - {text_suffix(PurePath(name))}}


def _refuse_nothing(text: str, sizes: Mapping[str, int], others: Mapping[str, int], documentation: set[str]) -> None:
    hint = f"a glob such as '{text.rstrip('/')}/**/*' reads any file"
    if not sizes:
        found = f" (it has {_kinds(others)})" if others else ""
        raise OuroborosError(f"source {text!r}: no text, code or record files in this directory{found}; {hint}")
    is_told = not documentation and all(_DOCUMENTATION.fullmatch(PurePath(name).name) for name in sizes)
    if is_told and sum(others.values()) > sum(sizes.values()):
        raise OuroborosError(
            f"source {text!r}: only documentation ({_some(sorted(sizes))}) beside files of other kinds"
            f" ({_kinds(others)}); {hint}"
        )


def _report(
    text: str,
    chosen: Iterable[str],
    sizes: Mapping[str, int],
    others: Mapping[str, int],
    documentation: set[str],
    unusable: list[str],
) -> None:
    """Log what is left out; a warning where a user would not expect it."""
    if unusable:
        logger.warning("source %r: left out: %s", text, _some(sorted(unusable)))
    if documentation:
        logger.info("source %r: skipped documentation: %s", text, _some(sorted(documentation)))
    left, read = sum(others.values()), sum(sizes[name] for name in chosen)
    if left > read:
        logger.warning(
            "source %r: most of its bytes are skipped, %s of %s: files of other kinds (%s); name them or a glob to read"
            " them",
            text,
            f"{left:,}",
            f"{left + read:,}",
            _kinds(others),
        )
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

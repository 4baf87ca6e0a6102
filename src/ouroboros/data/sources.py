"""How sources are named: built-in texts, files, globs, directories, hub streams, and mixtures of several.

A source is written ``TEXT``, ``TEXT@FORMAT`` or either with ``=WEIGHT``. ``mix:NAME`` stands for several sources with
formats and weights, streamed from the hub, and ``mix:NAME:DIR`` for the same ones from files of that directory; a
mixture is replaced by its parts before anything is read, so shards, weights, resume and errors see the parts. Which
files a directory or a glob means: :mod:`ouroboros.data.folders`. What is read of them:
:mod:`ouroboros.data.documents`.

Systems bring sources of their own through two places of the registry. An entry NAME of ``sources`` is a function
without arguments that makes the text of the source ``NAME:``, as bytes: one document, which no filter leaves out. An
entry NAME of ``mixtures`` is a tuple of :class:`Part` s, the mixture ``mix:NAME``.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from ouroboros.data.bundled import bundled_files
from ouroboros.data.folders import MAGIC, RECORD_SUFFIXES, Files, directory_files, glob_files, glob_matches
from ouroboros.data.formats import find_format, formats
from ouroboros.data.textfile import text_suffix
from ouroboros.errors import OuroborosError, check, nearest
from ouroboros.registry import found, load

_PART_SUFFIXES = (".jsonl", ".parquet", ".jsonl.gz", ".jsonl.zst")


class Part(NamedTuple):
    """One source of a mixture."""

    name: str
    """Its format, and the stem of its file in a directory."""
    hub: str
    weight: float


@dataclass(frozen=True)
class SourceRef:
    """A source as the user named it; relative paths are resolved against ``base`` (None: the current directory)."""

    text: str
    weight: float = 1.0
    base: Path | None = None
    format: str | None = None
    """Name or template of the format of its records; None: the column ``data.text_field``."""

    @property
    def path(self) -> Path:
        """The file system path of a local source."""
        path = Path(os.path.expanduser(self.text))
        return path if self.base is None else self.base / path

    @property
    def is_built_in(self) -> bool:
        """Whether every machine has it."""
        return self.text in built_in()

    @property
    def is_hub(self) -> bool:
        """Whether it is streamed from the hub."""
        return self.text.startswith("hf:")

    @property
    def is_local(self) -> bool:
        """Whether it stands in the file system, or would if it existed."""
        return not (self.is_built_in or self.is_hub)

    @property
    def is_directory(self) -> bool:
        """Whether it is a directory, of which files are chosen by their names."""
        return self.is_local and self.path.is_dir()

    @property
    def is_glob(self) -> bool:
        """Whether it is a pattern; a file that is called like one wins."""
        return self.is_local and not self.path.exists() and bool(MAGIC & set(self.text))

    @property
    def kind(self) -> str:
        """What manifests call it: the name of a built-in text, ``hf``, ``directory``, ``glob``, ``records`` or ``file``
        (also for what does not exist)."""
        if self.is_built_in:
            return self.text.removesuffix(":")
        answers = {"hf": self.is_hub, "directory": self.is_directory, "glob": self.is_glob}
        otherwise = "records" if is_records(self.path) else "file"
        return next((name for name, is_it in answers.items() if is_it), otherwise)

    @property
    def made(self) -> Callable[[], bytes] | None:
        """What makes the text of a source that is not read from anywhere."""
        target = found("sources").get(self.text.removesuffix(":")) if self.is_built_in else None
        return load(target) if target else None

    @property
    def is_filtered(self) -> bool:
        """Whether filters apply: a text that the user chose by itself, or that is made, is taken as it is."""
        is_one_text = self.is_local and not (self.is_directory or self.is_glob or is_records(self.path))
        return not is_one_text and self.made is None

    def is_there(self) -> bool:
        """Whether a local source exists; True for every other kind."""
        if self.is_glob:
            return any(True for _ in glob_matches(self.text, self.base))
        return not self.is_local or self.path.exists()


def built_in() -> tuple[str, ...]:
    """Sources that every machine has, as they are written."""
    return tuple(sorted(("python:", *(f"{name}:" for name in found("sources")))))


def parse_source(text: str, *, base: Path | None = None) -> SourceRef:
    """Read ``TEXT``, ``TEXT@FORMAT``, ``TEXT=WEIGHT`` or ``TEXT@FORMAT=WEIGHT``.

    Weights are relative and default to 1. A file whose name has these signs in it wins.

    Raises:
        OuroborosError: empty text; a weight that is not a positive number; an unknown format; a mixture.
    """
    check(
        bool(text.strip()),
        "data.sources: a source is empty; name a file, a directory, a glob, 'hf:NAME' or a built-in text"
        f" ({', '.join(map(repr, built_in()))})",
    )
    whole = SourceRef(text, base=base)
    if whole.path.exists():
        return whole
    check(
        not text.startswith("mix:"),
        f"source {text!r}: a mixture is several sources, so it cannot be used where one is meant",
    )
    name, weight = _split_weight(text)
    name, form = _split_format(name, base)
    check(bool(name), f"source {text!r}: no name before {'@' if form else '='!r}")
    if form is not None:
        try:
            find_format(form)
        except OuroborosError as error:
            raise OuroborosError(f"source {text!r}: {error}") from None
    return SourceRef(name, weight, base, form)


def parse_sources(texts: Iterable[str], *, base: Path | None = None, need_files: bool = True) -> tuple[SourceRef, ...]:
    """All sources, each mixture replaced by its parts; a weight of a mixture multiplies theirs.

    Args:
        texts: as the user wrote them.
        base: directory that relative paths are resolved against.
        need_files: False asks for weights and formats only, so the files of a mixture may be gone.

    Raises:
        OuroborosError: as :func:`parse_source`; an unknown mixture; a directory that lacks a part; a source named
            twice.
    """
    refs: list[SourceRef] = []
    for text in texts:
        parts = _expand(text, base, need_files) if text.startswith("mix:") else [parse_source(text, base=base)]
        for ref in parts:
            check(
                all(ref.text != other.text for other in refs),
                f"source {ref.text!r}: named twice; name it once with a weight, '{ref.text}=2'",
            )
            refs.append(ref)
    return tuple(refs)


def _expand(text: str, base: Path | None, need_files: bool) -> list[SourceRef]:
    """The parts of a mixture."""
    whole, weight = _split_weight(text)
    name, sign, directory = whole.removeprefix("mix:").partition(":")
    mixtures = found("mixtures")
    check(name in mixtures, f"source {text!r}: unknown mixture {name!r}{nearest(name, mixtures)}")
    check(not sign or bool(directory), f"source {text!r}: no directory after 'mix:{name}:'")
    refs = []
    for part in load(mixtures[name]):
        place = f"hf:{part.hub}"
        if directory:
            place = _local_file(text, directory, part, base) if need_files else f"{directory}/{part.name}"
        refs.append(SourceRef(place, weight * part.weight, base, part.name))
    return refs


def _local_file(text: str, directory: str, part: Part, base: Path | None) -> str:
    folder = SourceRef(directory, base=base)
    check(folder.is_directory, f"source {text!r}: no such directory {str(folder.path)!r}")
    files = [f"{directory.rstrip('/')}/{part.name}{suffix}" for suffix in _PART_SUFFIXES]
    there = [file for file in files if replace(folder, text=file).path.is_file()]
    names = " or ".join(part.name + suffix for suffix in _PART_SUFFIXES)
    check(bool(there), f"source {text!r}: part {part.name!r} is missing: no {names} in {str(folder.path)!r}")
    return there[0]


def _split_weight(text: str) -> tuple[str, float]:
    """``TEXT=WEIGHT`` as (TEXT, weight), the weight 1 without one.

    Raises:
        OuroborosError: a weight that is not a positive number.
    """
    name, sign, number = text.rpartition("=")
    # "=" may be part of a template: notes.jsonl@{a} = {b}
    if not sign or ("@" in name and "{" in name and "}" in number):
        return text, 1.0
    try:
        weight = float(number)
    except ValueError:
        raise OuroborosError(
            f"source {text!r}: the weight after '=' must be a number, as in 'notes.txt=0.3', got {number!r}"
        ) from None
    check(math.isfinite(weight) and weight > 0, f"source {text!r}: the weight must be > 0 and finite, got {number}")
    return name, weight


def _split_format(text: str, base: Path | None) -> tuple[str, str | None]:
    """Split at the ``@`` that ends the longest existing path, else at the first one that a format follows."""
    places = [place for place, sign in enumerate(text) if sign == "@"]
    if not places or SourceRef(text, base=base).path.exists():
        return text, None
    for place in reversed(places):
        if place and SourceRef(text[:place], base=base).path.exists():
            return text[:place], text[place + 1 :]
    for place in places:
        name, form = text[:place], text[place + 1 :]
        # Of what is not on this disk, only a hub name or a glob can have a format misspelt; else it is a missing file.
        is_elsewhere = name.startswith(("hf:", *built_in())) or MAGIC & set(name)
        if form in formats() or "{" in form or (is_elsewhere and re.fullmatch(r"[^/*?@]*", form)):
            return name, form
    return text, None


def source_files(ref: SourceRef, *, quiet: bool = False) -> Files:
    """The files of a source in the order they are read; none of a text that is made or of a hub stream.

    Args:
        ref: the source.
        quiet: log nothing of what is left out.

    Raises:
        OuroborosError: nothing to read; what cannot be read.
    """
    if ref.text == "python:":
        return list(bundled_files())
    if ref.is_directory:
        return directory_files(ref.text, ref.path, quiet=quiet)
    if ref.is_glob:
        return glob_files(ref.text, ref.base)
    if not ref.is_local:
        return []
    _check_file(ref)
    return [(ref.path.name, ref.path)]


def is_records(path: Path) -> bool:
    """Whether a file holds records, by its name."""
    return text_suffix(path) in RECORD_SUFFIXES


def _check_file(ref: SourceRef) -> None:
    path = ref.path
    if path.exists():
        return  # what is no file is refused where files are opened
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        raise OuroborosError(f"source {ref.text!r}: no such file, and no directory {str(path.parent)!r}") from None
    hint = nearest(path.name, names) if names else ""
    # "needle.txt" is a file that is not there rather than a misspelt "needle:".
    if not path.suffix and nearest(ref.text, built_in()).startswith("; did"):
        hint = nearest(ref.text, built_in())
    if not hint.startswith("; did"):
        hint = " (a Hugging Face data set is written 'hf:NAME')"
    raise OuroborosError(f"source {ref.text!r}: no such file or directory{hint}")

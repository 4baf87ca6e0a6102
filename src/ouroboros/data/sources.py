"""How sources are named: built-in texts, files, globs, directories, hub streams, token shards, mixtures of several.

A source is written ``TEXT``, ``TEXT@FORMAT`` or either with ``=WEIGHT``. ``mix:NAME`` stands for several sources with
formats and weights, streamed from the hub, and ``mix:NAME:DIR`` for the same ones from files of that directory; a
mixture is replaced by its parts before anything is read. Which files a directory or a glob means:
:mod:`ouroboros.data.folders`. What is read of them: :mod:`ouroboros.data.documents`.

Systems bring sources of their own through two places of the registry. An entry NAME of ``sources`` is a function
without arguments that makes the text of the source ``NAME:``, as bytes: one document, which no filter leaves out. An
entry NAME of ``mixtures`` is a tuple of :class:`Part` s, the mixture ``mix:NAME``.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ouroboros.data.bundled import bundled_files
from ouroboros.data.folders import MAGIC, RECORD_SUFFIXES, Files, directory_files, glob_files
from ouroboros.data.formats import find_format, formats
from ouroboros.data.textfile import text_suffix
from ouroboros.data.token_shards import PREFIX, shard_files
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
        path = Path(os.path.expanduser(self.text.removeprefix(PREFIX)))
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
    def is_shards(self) -> bool:
        """Whether it is one of token shards, see :mod:`ouroboros.data.token_shards`."""
        return self.text.startswith(PREFIX)

    @property
    def kind(self) -> str:
        """What manifests call it: the name of a built-in text, ``hf``, ``shards``, ``directory``, ``glob`` (a file that
        is called like one wins), ``records`` or ``file`` (also for what does not exist)."""
        if self.is_built_in:
            return self.text.removesuffix(":")
        if self.is_hub or self.is_shards:
            return "hf" if self.is_hub else "shards"
        if self.path.is_dir():
            return "directory"
        if MAGIC & set(self.text) and not self.path.exists():
            return "glob"
        return "records" if is_records(self.path) else "file"

    @property
    def made(self) -> Callable[[], bytes] | None:
        """What makes the text of a source that is not read from anywhere."""
        target = found("sources").get(self.text.removesuffix(":")) if self.is_built_in else None
        return load(target) if target else None

    @property
    def is_filtered(self) -> bool:
        """Whether filters apply: a text that the user chose by itself, or that is made, is taken as it is."""
        kind = self.kind
        return kind != "file" and self.made is None and not (self.is_shards and self.path.exists())

    def is_there(self) -> bool:
        """Whether a local source exists; True for every other kind."""
        with contextlib.suppress(OuroborosError):
            return self.is_built_in or self.is_hub or bool(source_files(self, quiet=True))
        return False


def built_in() -> tuple[str, ...]:
    """Sources that every machine has, as they are written."""
    return tuple(sorted(("python:", *(f"{name}:" for name in found("sources")))))


def parse_source(text: str, *, base: Path | None = None) -> SourceRef:
    """Read ``TEXT``, ``TEXT@FORMAT``, ``TEXT=WEIGHT`` or ``TEXT@FORMAT=WEIGHT``; weights are relative and default to 1.
    A file whose name has these signs in it wins. Whatever is none of these is an error."""
    check(
        bool(text.strip()),
        "data.sources: a source is empty; name a file, a directory, a glob, 'hf:NAME' or a built-in text"
        f" ({', '.join(map(repr, built_in()))})",
    )
    whole = SourceRef(text, base=base)
    if whole.path.exists():
        return whole
    name, weight = _split_weight(text)
    name, form = _split_format(name, base)
    check(bool(name), f"source {text!r}: no name before {'@' if form else '='!r}")
    if form is not None:
        find_format(form)
    return SourceRef(name, weight, base, form)


def parse_sources(texts: Iterable[str], *, base: Path | None = None, need_files: bool = True) -> tuple[SourceRef, ...]:
    """All sources, each mixture replaced by its parts; a weight of a mixture multiplies theirs.

    Without ``need_files`` only weights and formats are asked for, so the files of a mixture may be gone. An unknown
    mixture, one that lacks a part, and a source that is named twice are errors.
    """
    refs: list[SourceRef] = []
    for text in texts:
        refs += _expand(text, base, need_files) if text.startswith("mix:") else [parse_source(text, base=base)]
    names = [ref.text for ref in refs]
    for name in names:
        check(names.count(name) == 1, f"source {name!r}: named twice; name it once with a weight, '{name}=2'")
    return tuple(refs)


def _expand(text: str, base: Path | None, need_files: bool) -> list[SourceRef]:
    """The parts of a mixture."""
    whole, weight = _split_weight(text)
    name, sign, directory = whole.removeprefix("mix:").partition(":")
    mixtures = found("mixtures")
    check(name in mixtures, f"source {text!r}: unknown mixture {name!r}{nearest(name, mixtures)}")
    refs = []
    for part in load(mixtures[name]):
        files = [f"{directory.rstrip('/')}/{part.name}{suffix}" for suffix in _PART_SUFFIXES]
        places = [file for file in files if not need_files or SourceRef(file, base=base).path.is_file()]
        places = places if sign else [f"hf:{part.hub}"]
        names = " or ".join(part.name + suffix for suffix in _PART_SUFFIXES)
        check(bool(places), f"source {text!r}: part {part.name!r} is missing: no {names} in {directory!r}")
        refs.append(SourceRef(places[0], weight * part.weight, base, part.name))
    return refs


def _split_weight(text: str) -> tuple[str, float]:
    """``TEXT=WEIGHT`` as (TEXT, weight), the weight 1 without one."""
    name, sign, number = text.rpartition("=")
    # "=" may be part of a template: notes.jsonl@{a} = {b}
    if not sign or ("@" in name and "{" in name and "}" in number):
        return text, 1.0
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    check(
        math.isfinite(weight) and weight > 0,
        f"source {text!r}: the weight must be > 0 and finite, as in 'notes.txt=0.3', got {number!r}",
    )
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
    """The files of a source in the order they are read; none of a text that is made or of a hub stream. Nothing to
    read, and what cannot be read, is an error. With ``quiet``, what is left out is not logged."""
    if ref.is_built_in or ref.is_hub:
        return list(bundled_files()) if ref.text == "python:" else []
    if ref.is_shards:
        return shard_files(ref.text.removeprefix(PREFIX), ref.base)
    kind = ref.kind
    if kind == "directory":
        return directory_files(ref.text, ref.path, quiet=quiet)
    if kind == "glob":
        return glob_files(ref.text, ref.base)
    path = ref.path
    if not path.exists():
        names = [entry.name for entry in path.parent.glob("*")]
        # "needle.txt" is a file that is not there rather than a misspelt "needle:".
        hints = [nearest(path.name, names), "" if path.suffix else nearest(ref.text, built_in())]
        close = [hint for hint in hints if hint.startswith("; did")]
        hint = close[-1] if close else " (a Hugging Face data set is written 'hf:NAME')"
        raise OuroborosError(f"source {ref.text!r}: no such file or directory{hint}")
    check(
        path.is_file(),
        f"file {str(path)!r}: is a named pipe or a device, which cannot be read twice; write it to a file first",
    )
    return [(path.name, path)]


def is_records(path: Path) -> bool:
    """Whether a file holds records, by its name."""
    return text_suffix(path) in RECORD_SUFFIXES

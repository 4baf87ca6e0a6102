"""Named mixtures: several sources with formats and weights under one name, from the hub or from a directory.

``mix:rhrm`` is four hub data sets; ``mix:rhrm:DIR`` the same four from files of that directory. A mixture is replaced
by its parts before anything is read, so shards, weights, resume and errors see the parts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from ouroboros.data.sources import SourceRef, parse_source, split_weight
from ouroboros.errors import OuroborosError, check, nearest

_SUFFIXES = (".jsonl", ".parquet", ".jsonl.gz", ".jsonl.zst")


@dataclass(frozen=True)
class Part:
    """One source of a mixture."""

    name: str
    """Its format, and the stem of its file in a directory."""
    hub: str
    weight: float


MIXTURES: dict[str, tuple[Part, ...]] = {
    # The published shares of R-HRM.
    "rhrm": (
        Part("tinygsm", "TinyGSM/TinyGSM", 0.40),
        Part("tiny-codes", "nampdn-ai/tiny-codes", 0.30),
        Part("cosmopedia", "HuggingFaceTB/cosmopedia-100k", 0.15),
        Part("metamath", "meta-math/MetaMathQA", 0.15),
    ),
}
"""The named mixtures, by name."""


def parse_sources(texts: Iterable[str], *, base: Path | None = None, need_files: bool = True) -> tuple[SourceRef, ...]:
    """All sources, each mixture replaced by its parts; a weight of a mixture multiplies theirs.

    Args:
        texts: as the user wrote them.
        base: directory that relative paths are resolved against.
        need_files: False asks for weights and formats only, so the files of a mixture may be gone.

    Raises:
        OuroborosError: as :func:`~ouroboros.data.sources.parse_source`; an unknown mixture; a directory that lacks a
            part; a source named twice.
    """
    refs: list[SourceRef] = []
    for text in texts:
        found = _expand(text, base, need_files) if text.startswith("mix:") else [parse_source(text, base=base)]
        for ref in found:
            if any(ref.text == other.text for other in refs):
                raise OuroborosError(f"source {ref.text!r}: named twice; name it once with a weight, '{ref.text}=2'")
            refs.append(ref)
    return tuple(refs)


def _expand(text: str, base: Path | None, need_files: bool) -> list[SourceRef]:
    whole, weight = split_weight(text)
    name, sign, directory = whole.removeprefix("mix:").partition(":")
    if name not in MIXTURES:
        raise OuroborosError(f"source {text!r}: unknown mixture {name!r}{nearest(name, MIXTURES)}")
    check(not sign or bool(directory), f"source {text!r}: no directory after 'mix:{name}:'")
    refs = []
    for part in MIXTURES[name]:
        place = f"hf:{part.hub}"
        if directory:
            place = _local_file(text, directory, part, base) if need_files else f"{directory}/{part.name}"
        refs.append(SourceRef(place, weight * part.weight, base, part.name))
    return refs


def _local_file(text: str, directory: str, part: Part, base: Path | None) -> str:
    folder = SourceRef(directory, base=base)
    if folder.kind != "directory":
        raise OuroborosError(f"source {text!r}: no such directory {str(folder.path)!r}")
    for suffix in _SUFFIXES:
        file = replace(folder, text=f"{directory.rstrip('/')}/{part.name}{suffix}")
        if file.path.is_file():
            return file.text
    names = " or ".join(part.name + suffix for suffix in _SUFFIXES)
    raise OuroborosError(f"source {text!r}: part {part.name!r} is missing: no {names} in {str(folder.path)!r}")

"""``ouroboros inspect FILE``: what a packed file holds, and what every part of it costs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyro.conf import Positional

from ouroboros.errors import check
from ouroboros.verbs.options import Json, emit_json, parse, say

if TYPE_CHECKING:
    from ouroboros.pack.artifact import Artifact


@dataclass(frozen=True, kw_only=True)
class InspectOptions:
    """List the tensors of a packed file with their bytes, and what the file says of itself."""

    file: Positional[Path]
    """The packed file, as `ouroboros pack` made it."""
    json: Json = False


def inspect(arguments: Sequence[str]) -> int:
    """The verb ``inspect``."""
    options = parse(InspectOptions, "inspect", arguments)
    from ouroboros.pack.artifact import Artifact

    check(
        not options.file.is_dir(),
        f"{options.file} is a directory; inspect lists a packed file, and `ouroboros show` a model",
    )
    artifact = Artifact(options.file)
    artifact.tensors()  # a file that cannot be used is not described
    facts = describe(artifact)
    if options.json:
        emit_json(facts)
    else:
        _tell(facts)
    return 0


def describe(artifact: Artifact) -> dict[str, Any]:
    """The content of a packed file as JSON values. Bytes of a tensor are those of its codes or numbers and its steps;
    steps are compressed together, and each tensor is given its share by their number."""
    header = artifact.header
    steps = header.section("scales")
    count = sum(entry.matrix[0] * entry.groups for _, entry in header.tensors)
    tensors = []
    for section, entry in header.tensors:
        own = entry.matrix[0] * entry.groups
        size = entry.bytes + (round(own * steps.bytes / count) if steps is not None and count else 0)
        tensors.append(
            {
                "name": entry.name,
                "shape": list(entry.shape),
                "numbers": entry.numbers,
                "stored": section.dtype or f"int{section.bits}",
                "groups": entry.groups,
                "codec": section.codec,
                "bytes": size,
                "bits_per_weight": round(8 * size / entry.numbers, 4),
            }
        )
    sections = {section.name: section.bytes for section in header.sections}
    numbers = sum(entry.numbers for _, entry in header.tensors)
    return {
        "file": artifact.where,
        "bytes": artifact.size,
        "numbers": numbers,
        "bits_per_weight": round(8 * artifact.size / numbers, 4),
        "layout": artifact.spec.layout,
        "vocabulary": artifact.spec.vocab_size,
        "sections": {"header": artifact.size - sum(sections.values()), **sections},
        "tensors": tensors,
        **dataclasses.asdict(header.facts),
    }


def _tell(facts: dict[str, Any]) -> None:
    """The same as tables. Text from the file is written as JSON, which cannot disturb a terminal."""
    say(
        f"{facts['file']}: {facts['bytes']:,} bytes, {facts['numbers']:,} numbers,"
        f" {facts['bits_per_weight']:.3f} bits for each; layout {json.dumps(facts['layout'])}"
    )
    rows = [
        [
            json.dumps(tensor["name"]).strip('"'),
            " x ".join(map(str, tensor["shape"])) or "1",
            tensor["stored"] + (f" / {tensor['groups']}" if tensor["groups"] > 1 else ""),
            tensor["codec"],
            f"{tensor['bytes']:,}",
            f"{tensor['bits_per_weight']:.3f}",
        ]
        for tensor in facts["tensors"]
    ]
    rows.insert(0, ["tensor", "shape", "stored", "codec", "bytes", "bits/weight"])
    widths = [max(len(row[column]) for row in rows) for column in range(6)]
    for row in rows:
        cells = [f"{cell:<{w}}" if n < 4 else f"{cell:>{w}}" for n, (cell, w) in enumerate(zip(row, widths))]
        say("  ".join(cells).rstrip())
    for name, size in facts["sections"].items():
        say(f"{name:<{widths[0]}}  {size:>12,} bytes")
    for name in ("score", "method", "calibration", "provenance"):
        if facts[name] is not None:
            say(f"{name}: {json.dumps(facts[name])}")
    if facts["recipe"] is not None:
        say(f"recipe: {json.dumps(facts['recipe'].get('name')).strip(chr(34))} (--json shows all of it)")

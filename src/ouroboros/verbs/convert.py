"""``ouroboros convert SOURCE --out DIR``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from ouroboros.errors import check
from ouroboros.verbs.options import emit_json, log_to_stderr, parse, quiet_transformers, say


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """Make a model directory of a published checkpoint: R-HRM, Deep Delta Learning or OSAM, told by its content."""

    source: tyro.conf.Positional[Path]
    """The checkpoint: a .pth, .pt, .bin or .safetensors file of its tensors, or a directory with one; with --to a run
    or model directory of ours."""
    out: Path
    """Model directory to write; must be new or empty. With --to the file to write."""
    to: Literal["osam"] | None = None
    """Write a checkpoint that this published program loads, the other way round; OSAM's is a pickle of tensors, numbers
    and text."""
    loops: int | None = None
    """R-HRM: loops of training, which a file does not say; by default those of the published preset of its width."""
    heads: int | None = None
    """R-HRM: attention heads; needed for the first revision where the width is no published preset's."""
    config: Path | None = None
    """Deep Delta Learning: its settings; by default config.json beside the weights."""
    kupdate: int | None = None
    """OSAM: read the memory at every kupdate-th position; by default as in training."""
    tokenizer: Path | None = None
    """Directory of the tokenizer it was trained with (GPT-2's for the published ones), to go with the model."""
    json: bool = False
    """Print one JSON object."""


def convert(arguments: Sequence[str]) -> int:
    """The verb ``convert``."""
    options = parse(ConvertOptions, "convert", arguments)
    log_to_stderr()
    quiet_transformers()
    if options.to is not None:
        return _export(options)
    from ouroboros.convert import systems

    made = systems.convert(
        options.source,
        options.out,
        tokenizer=options.tokenizer,
        loops=options.loops,
        heads=options.heads,
        config=options.config,
        kupdate=options.kupdate,
    )
    if options.json:
        facts = {"out": made.out, "parameters": made.parameters, "tokenizer": made.tokenizer}
        emit_json({"source": str(options.source), "system": made.system, **made.sizes, **facts})
    else:
        say(f"{made.out}: {made.system}, {made.parameters:,} parameters, {made.summary}")
    return 0


def _export(options: ConvertOptions) -> int:
    """The way back: a trained model for a published program."""
    for name in ("loops", "heads", "config", "kupdate", "tokenizer"):
        check(
            getattr(options, name) is None, f"--{name} is about reading a published checkpoint: leave it out with --to"
        )
    from ouroboros.api import open_model
    from ouroboros.convert import osam

    opened = open_model(options.source)
    characters = osam.export(opened.model, opened.tokenizer, options.out)
    if options.json:
        facts = {"system": "OSAM", "out": str(options.out), "characters": characters}
        emit_json({"source": str(options.source), **facts})
    else:
        say(f"{options.out}: a checkpoint of OSAM's published program, {characters:,} characters")
    return 0

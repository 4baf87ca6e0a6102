"""``ouroboros convert SOURCE --out DIR``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from ouroboros.verbs.options import emit_json, log_to_stderr, parse, quiet_transformers, say


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """Make a model directory of a published checkpoint: R-HRM or Deep Delta Learning, told by its content."""

    source: tyro.conf.Positional[Path]
    """The checkpoint: a .pth, .pt, .bin or .safetensors file of its tensors, or a directory with one."""
    out: Path
    """Model directory to write; must be new or empty."""
    loops: int | None = None
    """R-HRM: loops of training, which a file does not say; by default those of the published preset of its width."""
    heads: int | None = None
    """R-HRM: attention heads; needed for the first revision where the width is no published preset's."""
    config: Path | None = None
    """Deep Delta Learning: its settings; by default config.json beside the weights."""
    tokenizer: Path | None = None
    """Directory of the tokenizer it was trained with (GPT-2's for the published ones), to go with the model."""
    json: bool = False
    """Print one JSON object."""


def convert(arguments: Sequence[str]) -> int:
    """The verb ``convert``."""
    options = parse(ConvertOptions, "convert", arguments)
    log_to_stderr()
    quiet_transformers()
    from ouroboros.convert import systems

    made = systems.convert(
        options.source,
        options.out,
        tokenizer=options.tokenizer,
        loops=options.loops,
        heads=options.heads,
        config=options.config,
    )
    if options.json:
        facts = {"out": made.out, "parameters": made.parameters, "tokenizer": made.tokenizer}
        emit_json({"source": str(options.source), "system": made.system, **made.sizes, **facts})
    else:
        say(f"{made.out}: {made.system}, {made.parameters:,} parameters, {made.summary}")
    return 0

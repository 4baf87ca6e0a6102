"""``ouroboros convert SOURCE --out DIR``."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from ouroboros.verbs.options import emit_json, log_to_stderr, parse, quiet_transformers, say


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """Make a model directory of a published R-HRM checkpoint."""

    source: tyro.conf.Positional[Path]
    """The checkpoint: best_model.pth or another .pth, .pt, .bin or .safetensors file of its tensors."""
    out: Path
    """Model directory to write; must be new or empty."""
    loops: int | None = None
    """Loops it was trained with, which it does not say; by default those of the published preset of its width."""
    heads: int | None = None
    """Attention heads; needed for checkpoints of the first revision whose width is no published preset's."""
    tokenizer: Path | None = None
    """Directory of the tokenizer it was trained with (GPT-2's for the published ones), to go with the model."""
    json: bool = False
    """Print one JSON object."""


def convert(arguments: Sequence[str]) -> int:
    """The verb ``convert``."""
    options = parse(ConvertOptions, "convert", arguments)
    log_to_stderr()
    quiet_transformers()
    from ouroboros.convert import rhrm

    made = rhrm.convert(
        options.source, options.out, loops=options.loops, heads=options.heads, tokenizer=options.tokenizer
    )
    if options.json:
        facts = dataclasses.asdict(made)
        emit_json({"source": str(options.source), **facts.pop("sizing"), **facts})
    else:
        s = made.sizing
        say(
            f"{made.out}: {made.parameters:,} parameters, width {s.d_model}, {s.heads} heads, {s.loops} loops,"
            f" {s.prefix_tokens} registers, vocabulary {s.vocab_size:,}"
        )
    return 0

"""``ouroboros export MODEL --to donor|llama OUT``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from ouroboros.verbs.options import Json, Model, emit_json, log_to_stderr, parse, quiet_transformers, say


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Write a model in the form of another library, with the proof that its logits are the same."""

    model: Model
    out: tyro.conf.Positional[Path]
    """Directory to write; it must be new or empty."""
    to: Literal["donor", "llama"]
    """The form, a class of transformers: donor is that of the pretrained model which `ouroboros convert` made this one
    of, llama is Llama's, for every model whose parts Llama has too. A block that is used several times becomes as many
    layers there."""
    no_tokenizer: tyro.conf.FlagCreatePairsOff[bool] = False
    """Write the model without a tokenizer."""
    json: Json = False


def export(arguments: Sequence[str]) -> int:
    """The verb ``export``."""
    options = parse(ExportOptions, "export", arguments)
    log_to_stderr()
    quiet_transformers()
    from ouroboros.api import open_model
    from ouroboros.convert.export import read_record, to_donor, to_llama

    opened = open_model(options.model)
    record = read_record(options.model) if options.to == "donor" else None
    tokenizer = None if options.no_tokenizer else opened.tokenizer
    if record is None:
        made = to_llama(opened.model, options.out, tokenizer)
    else:
        made = to_donor(opened.model, record, options.out, tokenizer)
    facts = {"family": made.family, "layers": made.layers, "parameters": made.parameters, "dtype": made.dtype}
    if options.json:
        proof = {"difference": made.proof.difference, "tokens": made.proof.tokens}
        emit_json({"model": str(options.model), "out": str(options.out), **facts, "proof": proof})
    else:
        say(
            f"{options.out}: {made.family}, {made.layers} layers, {made.parameters:,} parameters, {made.dtype};"
            f" {made.proof.describe()}"
        )
    return 0

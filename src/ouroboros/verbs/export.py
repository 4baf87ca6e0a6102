"""``ouroboros export MODEL --to FORM OUT``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from ouroboros.registry import load
from ouroboros.verbs.options import Json, Model, emit_json, log_to_stderr, parse, quiet_transformers, say

FORMS = {
    "donor": (
        "ouroboros.convert.export:to_its_donor",
        "a model of transformers, of the class of the pretrained one that `ouroboros convert` made this model of.",
    ),
    "llama": (
        "ouroboros.convert.export:to_llama",
        "a model of transformers, of the class Llama, for every model whose parts Llama has too.",
    ),
    "gguf": (
        "ouroboros.convert.gguf_export:to_gguf",
        "a GGUF file with a layer for each visit, which llama.cpp runs, for every model whose parts it has.",
    ),
    "nanbeige-gguf": (
        "ouroboros.convert.gguf_export:to_nanbeige_gguf",
        "a GGUF file that keeps every block once, for a model that is one loop of all its blocks.",
    ),
    "standalone": (
        "ouroboros.convert.standalone:to_standalone",
        "a packed file beside one short program that runs it without this library.",
    ),
}
"""By name: the function that writes the form, and what it is, for the help. The function is called with the path that
the user gave, the model, the directory or file to write, and the tokenizer or None. It returns a value with ``facts``
for JSON and ``describe()`` for people."""
_CHOICE: Any = Literal  # a type checker wants its values spelt out, and they are the names above
_HELP = (
    "What to write: "
    + " ".join(f"{name} is {what}" for name, (_, what) in FORMS.items())
    + " In transformers and in gguf, a block that is used several times becomes as many layers."
)


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Write a model in another form, with the proof that its logits are the same."""

    model: Model
    out: tyro.conf.Positional[Path]
    """Directory to write, which must be new or empty; for the GGUF forms, the file to write."""
    to: Annotated[str, tyro.conf.arg(constructor=_CHOICE[tuple(FORMS)], help=_HELP)]
    no_tokenizer: tyro.conf.FlagCreatePairsOff[bool] = False
    """Write the model without a tokenizer."""
    json: Json = False


def export(arguments: Sequence[str]) -> int:
    """The verb ``export``."""
    options = parse(ExportOptions, "export", arguments)
    log_to_stderr()
    quiet_transformers()
    from ouroboros.api import open_model

    opened = open_model(options.model)
    tokenizer = None if options.no_tokenizer else opened.tokenizer
    write, _ = FORMS[options.to]
    made = load(write)(options.model, opened.own_model, options.out, tokenizer)
    if options.json:
        emit_json({"model": str(options.model), "out": str(options.out), **made.facts})
    else:
        say(f"{options.out}: {made.describe()}")
    return 0

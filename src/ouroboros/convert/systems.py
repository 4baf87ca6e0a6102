"""The published systems whose checkpoints are read: which one a file is of, and a model directory made of it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ouroboros.convert import delta, osam, rhrm
from ouroboros.convert.checkpoint import SUPPORTED, Checkpoint, Published, published_name, read
from ouroboros.errors import OuroborosError, check
from ouroboros.files import new_directory

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class System:
    """A published system: how its checkpoints are known, and what reads them."""

    name: str
    mark: str
    """How a name in its checkpoints begins, and in no other system's."""
    options: frozenset[str]
    """Options of :func:`convert` that say something about its checkpoints; keywords of ``convert``."""
    convert: Callable[..., Published]
    """Called as ``convert(checkpoint, eos_token_id=..., **options)``."""


SYSTEMS = (
    System(name="R-HRM", mark="shared_block.", options=frozenset({"loops", "heads"}), convert=rhrm.convert),
    System(name="Deep Delta Learning", mark="transformer.h.", options=frozenset({"config"}), convert=delta.convert),
    System(name="OSAM", mark="osam.", options=frozenset({"kupdate"}), convert=osam.convert),
)
"""Every system that is read. A new one is a line here and a module with its ``convert``."""


_ROUND = 64
"""Vocabularies are rounded up to a multiple of this for speed: GPT-2's 50,257 to 50,304."""


@dataclass(frozen=True, kw_only=True)
class Converted:
    """What a conversion wrote."""

    out: str
    system: str
    parameters: int
    sizes: dict[str, Any]
    """Sizes and settings in the names of the source."""
    summary: str
    tokenizer: bool
    """Whether ``out`` holds a tokenizer, without which the model cannot be used on text."""


def system_of(checkpoint: Checkpoint) -> System:
    """The system that wrote ``checkpoint``, told by the names in it.

    Raises:
        OuroborosError: none of :data:`SYSTEMS` did; names what there is.
    """
    tensors = checkpoint.content.get("state_dict", checkpoint.content)  # OSAM's stand beside settings
    names = [published_name(str(name)) for name in tensors] if isinstance(tensors, Mapping) else []
    for system in SYSTEMS:
        if any(name.startswith(system.mark) for name in names):
            return system
    known = ", ".join(system.name for system in SYSTEMS)
    raise OuroborosError(
        f"{checkpoint.path}: holds {', '.join(sorted(names)[:3])}, ..., which is of none of the systems that are read"
        f" ({known}); {SUPPORTED}"
    )


def convert(source: Path, out: Path, *, tokenizer: Path | None = None, **options: Any) -> Converted:
    """Write the model of a published checkpoint as the transformers directory ``out``, whole or not at all.

    Args:
        source: a file or directory, see :func:`~ouroboros.convert.checkpoint.read`.
        out: new or empty directory.
        tokenizer: directory of the tokenizer that the model was trained with.
        options: what the checkpoint leaves open, see the ``convert`` of its system; None is as not given.

    Raises:
        OuroborosError: a source that cannot be read or is of no known system, an option of another system, a tokenizer
            of another vocabulary, an ``out`` that is not free.
    """
    from ouroboros.data.tokenize import load_tokenizer

    with new_directory(out) as work:
        text = None if tokenizer is None else load_tokenizer(tokenizer)
        checkpoint = read(source)
        system = system_of(checkpoint)
        try:
            given = _own_options(system, options)
            made = system.convert(checkpoint, eos_token_id=None if text is None else text.eos_id, **given)
        except OuroborosError as error:
            raise OuroborosError(f"{checkpoint.path}: {error}") from None
        check(
            text is None or made.tokenizer is None,
            f"{checkpoint.path} holds the characters it was trained with: leave --tokenizer out",
        )
        text = made.tokenizer if text is None else text
        if text is not None:
            entries = made.model.config.vocab_size
            padded = entries % _ROUND == 0 and 0 <= entries - text.vocab_size < _ROUND
            check(
                text.vocab_size == entries or padded,
                f"{source} has a vocabulary of {entries} and the tokenizer {tokenizer} of {text.vocab_size}:"
                " give the one it was trained with",
            )
            text.padded(entries).save(work)
        made.model.save_pretrained(work)
    if text is None:
        logger.warning("%s has no tokenizer; give --tokenizer DIR with the one the model was trained with", out)
    return Converted(
        out=str(out),
        system=system.name,
        parameters=sum(p.numel() for p in made.model.parameters()),
        sizes=made.sizes,
        summary=made.summary,
        tokenizer=text is not None,
    )


def _own_options(system: System, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were given, all of them ``system``'s."""
    given = {name: value for name, value in options.items() if value is not None}
    for name in sorted(given.keys() - system.options):
        others = " or ".join(other.name for other in SYSTEMS if name in other.options)
        raise OuroborosError(f"this is a checkpoint of {system.name}, and --{name} is for {others}: leave it out")
    return given

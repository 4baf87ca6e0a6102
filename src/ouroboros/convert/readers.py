"""Published checkpoints become model directories of this library.

What reads a system's checkpoints is found at the registry's place ``readers``, where an entry is a :class:`Reader`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ouroboros.convert.checkpoint import SUPPORTED, Checkpoint, Published, read
from ouroboros.errors import OuroborosError, check
from ouroboros.files import new_directory
from ouroboros.registry import found, load

logger = logging.getLogger(__name__)

_ROUND = 64
"""Vocabularies are rounded up to a multiple of this for speed: GPT-2's 50,257 to 50,304."""


@dataclass(frozen=True)
class Option:
    """What a checkpoint may leave open: an option of ``ouroboros convert`` and a keyword of the reader's function."""

    type: type
    help: str
    """A sentence that says what it is, and what is taken if it is not given."""


@dataclass(frozen=True, kw_only=True)
class Reader:
    """What reads the checkpoints of one published system. Its module needs no torch: ``convert --help`` loads it."""

    system: str
    """The system's name, for people."""
    recognises: Callable[[Checkpoint], bool]
    """Whether a checkpoint is one of this system, told by its content."""
    convert: Callable[..., Published]
    """Makes a model of a checkpoint: ``convert(checkpoint, eos_token_id=..., **options)``. Of :attr:`options` it is
    given those that the user gave; ``eos_token_id`` is that of the tokenizer the user gave, or None."""
    options: Mapping[str, Option] = field(default_factory=dict)


def readers() -> list[Reader]:
    """The readers of all systems."""
    return [load(target) for target in found("readers").values()]


def reader_of(checkpoint: Checkpoint) -> Reader:
    """The reader of the system that wrote ``checkpoint``; if none is recognised, the error names those there are."""
    known = readers()
    reader = next((reader for reader in known if reader.recognises(checkpoint)), None)
    if reader is None:
        raise OuroborosError(
            f"{checkpoint.path}: holds {', '.join(checkpoint.names[:3])}, ..., which is of none of the systems that are"
            f" read ({', '.join(reader.system for reader in known)}); {SUPPORTED}"
        )
    return reader


def convert(source: Path, out: Path, *, tokenizer: Path | None = None, **options: Any) -> Published:
    """Write the model of a published checkpoint as the transformers directory ``out``, whole or not at all.

    ``tokenizer`` is the directory of the one that the model was trained with; ``options`` are what the checkpoint
    leaves open, see :attr:`Reader.options`, where None is as not given.

    Raises:
        OuroborosError: a source that cannot be read or is of no known system, an option of another system, a tokenizer
            of another vocabulary, an ``out`` that is not free.
    """
    from ouroboros.data.tokenize import load_tokenizer

    with new_directory(out) as work:
        text = None if tokenizer is None else load_tokenizer(tokenizer)
        checkpoint = read(source)
        reader = reader_of(checkpoint)
        given = {name: value for name, value in options.items() if value is not None}
        for name in sorted(given.keys() - reader.options.keys()):
            others = " or ".join(other.system for other in readers() if name in other.options)
            fault = f"this is a checkpoint of {reader.system}, and --{name} is for {others}: leave it out"
            raise OuroborosError(f"{checkpoint.path}: {fault}")
        try:
            made = reader.convert(checkpoint, eos_token_id=None if text is None else text.eos_id, **given)
        except OuroborosError as error:
            raise OuroborosError(f"{checkpoint.path}: {error}") from None
        check(
            text is None or made.tokenizer is None,
            f"{checkpoint.path} holds the characters it was trained with: leave --tokenizer out",
        )
        text = text or made.tokenizer
        if text is not None:
            entries = made.model.config.vocab_size
            padded = entries % _ROUND == 0 and 0 <= entries - text.vocab_size < _ROUND
            check(
                text.vocab_size == entries or padded,
                f"{source} has a vocabulary of {entries} and the tokenizer {tokenizer} of {text.vocab_size}:"
                " give the one it was trained with",
            )
            text.padded(entries).save(work)
        else:
            logger.warning("%s has no tokenizer; give --tokenizer DIR with the one the model was trained with", out)
        made.model.save_pretrained(work)
    return replace(made, system=reader.system, tokenizer=text)

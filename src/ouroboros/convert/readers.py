"""Published checkpoints, and pretrained models of other libraries, become model directories of this library.

What reads a system's checkpoints is found at the registry's place ``readers``, where an entry is a :class:`Reader`.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ouroboros.convert.checkpoint import SUPPORTED, Checkpoint, Published, read
from ouroboros.convert.layers import Init, listed
from ouroboros.errors import OuroborosError, check
from ouroboros.files import new_directory
from ouroboros.registry import found, load

if TYPE_CHECKING:
    from ouroboros.convert.donors import Donor

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


def convert(
    source: Path,
    out: Path,
    *,
    tokenizer: Path | None = None,
    layout: str | None = None,
    keep: str | None = None,
    init: Init | None = None,
    held_out: Path | None = None,
    no_tokenizer: bool = False,
    **options: Any,
) -> Published:
    """Write the model of a published checkpoint or of a donor as the transformers directory ``out``, whole or not at
    all.

    Args:
        source: a file or directory, see :func:`~ouroboros.convert.checkpoint.read`; or a donor, see
            :func:`~ouroboros.convert.donors.find`.
        out: new or empty directory.
        tokenizer: directory of the tokenizer that the model was trained with; a donor brings its own.
        layout: of a donor's blocks.
        keep: the donor's layers that each block takes.
        init: how the layers of a donor's loop are chosen.
        held_out: text that they are chosen on, if they are.
        no_tokenizer: write a donor's model alone.
        options: what the checkpoint leaves open, see the :attr:`Reader.options` of its system; None is as not given.

    Raises:
        OuroborosError: a source that cannot be read or is of no known system, an option of another system, a tokenizer
            of another vocabulary, an ``out`` that is not free.
    """
    from ouroboros.convert import donors

    donor = donors.find(source)
    if donor is not None:
        for name in sorted(name for name, value in options.items() if value is not None):
            raise OuroborosError(f"{source} is a pretrained model of another library: leave --{name} out")
        return _of_donor(donor, out, tokenizer, no_tokenizer, layout, keep, init, held_out)
    given = {"layout": layout, "keep": keep, "init": init, "held-out": held_out, "no-tokenizer": no_tokenizer}
    for name, value in given.items():
        check(not value, f"--{name} is for pretrained models of other libraries, and {source} is none: leave it out")
    return _of_published(source, out, tokenizer, options)


def _of_published(source: Path, out: Path, tokenizer: Path | None, options: Mapping[str, Any]) -> Published:
    """As :func:`convert`, of a published checkpoint."""
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
    return dataclasses.replace(made, system=reader.system, tokenizer=text)


def _of_donor(
    donor: Donor,
    out: Path,
    tokenizer: Path | None,
    no_tokenizer: bool,
    layout: str | None,
    keep: str | None,
    init: Init | None,
    held_out: Path | None,
) -> Published:
    """As :func:`convert`, of a pretrained model of another library."""
    from ouroboros.convert import choose, donors
    from ouroboros.data.tokenize import load_tokenizer

    check(tokenizer is None or not no_tokenizer, "--tokenizer and --no-tokenizer exclude each other")
    with new_directory(out) as work:
        family, entries = donor.family, donor.config.vocab_size
        text = None
        if not no_tokenizer:
            text = donor.tokenizer() if tokenizer is None else load_tokenizer(tokenizer)
            check(
                text.vocab_size <= entries,
                f"{donor.source} has a vocabulary of {entries} and its tokenizer {text.vocab_size} entries: give the"
                " one it was trained with by --tokenizer DIR",
            )
        windows = None
        if held_out is not None:
            check(text is not None, "--held-out is text, which needs the donor's tokenizer: leave --no-tokenizer out")
            assert text is not None
            windows = choose.windows_of(held_out, text, donor.config.max_position_embeddings)
        made = donors.read(donor, layout, keep, init, windows)
        spec = made.model.config.model_spec
        if text is not None:
            text.padded(entries).save(work)
        made.model.save_pretrained(work)
        donors.write_record(donor, work)
    shown = f"layout {spec.layout!r}, width {spec.hidden_size}, vocabulary {entries:,}; {made.proof.describe()}"
    if made.same:
        shown += ": this is the donor, in other words"
    else:
        shown += (
            f" for the whole donor; this layout keeps layers {listed(made.kept)} and is another model than the donor"
        )
    layers = [found[0] if len(found) == 1 else list(found) for found in made.kept]
    sizes: dict[str, Any] = {"layout": spec.layout, "layers": layers, "identity": made.same}
    if made.choice is not None:
        sizes["choice"] = dataclasses.asdict(made.choice)
        shown += f"\n{made.choice.table()}"
    proof = {"difference": made.proof.difference, "tolerance": donors.TOLERANCE, "tokens": made.proof.tokens}
    return Published(
        model=made.model,
        sizes={**sizes, "proof": proof},
        summary=shown,
        tokenizer=text,
        system=family.title,
    )

"""The way out to llama.cpp: a GGUF file of a model with a layer for each visit, or with its loop.

What is written is read back before the file gets its name, and the logits are compared: by transformers where it knows
the form, else by this library.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ouroboros.convert import donors
from ouroboros.convert.export import UNROLLED_TOLERANCE, Exported, check_fits
from ouroboros.convert.gguf_file import (
    Ends,
    add_tokenizer,
    finish,
    needs_gguf,
    new_file,
    read_tensors,
    write,
    writer_of,
)
from ouroboros.convert.gguf_form import LLAMA, NANBEIGE, Form, expected, form_of, restored, unrolled
from ouroboros.convert.nanbeige import LOOPS, SKIPS_NORM
from ouroboros.convert.tensors import model_of
from ouroboros.errors import check

if TYPE_CHECKING:
    import torch

    from ouroboros.config import ModelSpec
    from ouroboros.data.tokenize import TextTokenizer
    from ouroboros.model.modeling import OuroborosForCausalLM
    from ouroboros.schedule import Visit

SAMPLE = "Caf\u00e9, 12 + 345 = 357.\n\n\tNo: it isn't  so; \u0939\u093f\u0928\u094d\u0926\u0940\r\n    'LL\u2026"
"""A text on which tokenizers differ that cut texts in different ways."""


def to_gguf(source: Path, model: OuroborosForCausalLM, out: Path, tokenizer: TextTokenizer | None) -> Exported:
    """Write ``model`` as the GGUF file ``out`` with a layer for each visit, whole or not at all.

    Args:
        source: where it was opened, which is not read.
        model: float32, in evaluation mode.
        out: a path where nothing is.
        tokenizer: is written too; None leaves it out.

    Raises:
        OuroborosError: a part of the model or its tokenizer has no place in the file, which names it; the logits of
            what is read back differ by more than :data:`~ouroboros.convert.export.UNROLLED_TOLERANCE` of the largest.
    """
    visits = model.schedule.visits
    return _export(model, out, tokenizer, form_of(model), str(len(visits)), visits, {})


def to_nanbeige_gguf(source: Path, model: OuroborosForCausalLM, out: Path, tokenizer: TextTokenizer | None) -> Exported:
    """As :func:`to_gguf`, with every block once and the number of loops: the form of Nanbeige.

    Raises:
        OuroborosError: besides, a layout that is not one loop of all blocks.
    """
    schedule = model.schedule
    whole = len(schedule.segments) == 1 and schedule.segments[0].looped
    check(
        whole,
        f"layout {schedule.notation!r} is not one loop of all blocks, such as (4)x3: blocks before or behind a loop"
        f" have no place in a GGUF file of Nanbeige, and --to gguf writes a layer for each visit",
    )
    more = {LOOPS: schedule.loops, SKIPS_NORM: True}
    visits = schedule.visits[: schedule.num_blocks]
    return _export(model, out, tokenizer, NANBEIGE, schedule.notation, visits, more)


def _export(
    model: OuroborosForCausalLM,
    out: Path,
    tokenizer: TextTokenizer | None,
    form: Form,
    layout: str,
    visits: Sequence[Visit],
    more: Mapping[str, int | bool],
) -> Exported:
    needs_gguf(out, "writing")
    wanted = expected(model, form, layout)
    check_fits(model, wanted, f"a GGUF file of {form.title}", visits)
    spec = dataclasses.replace(wanted, stem=(), tie_embeddings=wanted.tie_embeddings and not wanted.stem)
    state = unrolled(model, visits)
    ends = Ends(model.generation_config.bos_token_id, model.generation_config.eos_token_id)
    with new_file(out) as work:
        dtype = write(work, form, spec, state, tokenizer, ends=ends, more=more)
        theirs = _read(work, form, spec, {name: tensor.shape for name, tensor in state.items()})
        proof = donors.prove(model, theirs, f"{out}, read back", UNROLLED_TOLERANCE)
        if tokenizer is not None:
            _check_tokenizer(out, spec, tokenizer, ends)
    return Exported(
        family=form.title,
        layers=len(visits),
        parameters=sum(tensor.numel() for tensor in state.values()),
        dtype=dtype,
        proof=proof,
    )


def _read(path: Path, form: Form, spec: ModelSpec, shapes: Mapping[str, torch.Size]) -> Any:
    """The model in a file: of transformers, or of this library where transformers would not read all that is in it."""
    mixer: Any = spec.block.mixer
    ffn: Any = spec.block.ffn
    plain = not (mixer.qkv_bias or mixer.out_bias or ffn.bias) and mixer.rope.slowing == mixer.rope.scale == 1
    if form in (LLAMA, NANBEIGE) and plain:
        donor = donors.find(path)
        assert donor is not None
        return donor.looped(donor.model())
    return model_of(spec, restored(form, spec, shapes, read_tensors(path)))


def _check_tokenizer(out: Path, spec: ModelSpec, tokenizer: TextTokenizer, ends: Ends) -> None:
    """Refuse a tokenizer that transformers, given what the file says of it, cuts texts with in another way."""
    with tempfile.TemporaryDirectory() as place:
        alone = Path(place) / "tokenizer.gguf"
        writer = writer_of(alone, LLAMA.name)
        add_tokenizer(writer, spec.vocab_size, tokenizer, ends)
        finish(writer)
        theirs = donors.Donor(str(out), alone.parent, alone.name).tokenizer()
    same = theirs.encode(SAMPLE.encode()).tolist() == tokenizer.encode(SAMPLE.encode()).tolist()
    check(same, f"{out}: the tokenizer that is read back cuts texts otherwise; leave it out by --no-tokenizer")

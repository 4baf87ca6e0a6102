"""The way out to llama.cpp: a GGUF file of a model as a Llama with a layer for each visit, or with its loop.

What is written is read back through transformers before the file gets its name, and the logits are compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ouroboros.convert import donors
from ouroboros.convert.export import UNROLLED_TOLERANCE, Exported, fitted, llama_record
from ouroboros.convert.families import FAMILIES
from ouroboros.convert.gguf_file import LLAMA, needs_gguf, new_file, write
from ouroboros.convert.nanbeige import LOOPS, NANBEIGE, SKIPS_NORM
from ouroboros.convert.tensors import OUTPUT
from ouroboros.errors import check

if TYPE_CHECKING:
    from ouroboros.data.tokenize import TextTokenizer
    from ouroboros.model.modeling import OuroborosForCausalLM
    from ouroboros.schedule import Visit


def to_gguf(source: Path, model: OuroborosForCausalLM, out: Path, tokenizer: TextTokenizer | None) -> Exported:
    """Write ``model`` as the GGUF file ``out`` of a Llama with a layer for each visit, whole or not at all.

    Args:
        source: where it was opened, which is not read.
        model: float32, in evaluation mode.
        out: a path where nothing is.
        tokenizer: is written too; None leaves it out.

    Raises:
        OuroborosError: a part of the model or its tokenizer has no place in the file, which names it; the logits of
            what is read back differ by more than :data:`~ouroboros.convert.export.UNROLLED_TOLERANCE` of the largest.
    """
    return _export(model, out, tokenizer, LLAMA, "a GGUF file of Llama", model.schedule.visits, {})


def to_nanbeige_gguf(source: Path, model: OuroborosForCausalLM, out: Path, tokenizer: TextTokenizer | None) -> Exported:
    """As :func:`to_gguf`, with every block once and the number of loops: the form of Nanbeige.

    Raises:
        OuroborosError: besides, a layout that is not one loop of all blocks.
    """
    schedule, title = model.schedule, "a GGUF file of Nanbeige"
    whole = len(schedule.segments) == 1 and schedule.segments[0].looped
    check(
        whole,
        f"layout {schedule.notation!r} is not one loop of all blocks, such as (4)x3: blocks before or behind a loop"
        f" have no place in {title}, and --to gguf writes a layer for each visit",
    )
    more = {LOOPS: schedule.loops, SKIPS_NORM: True}
    return _export(model, out, tokenizer, NANBEIGE, title, schedule.visits[: schedule.num_blocks], more)


def _export(
    model: OuroborosForCausalLM,
    out: Path,
    tokenizer: TextTokenizer | None,
    architecture: str,
    title: str,
    visits: Sequence[Visit],
    more: Mapping[str, int | bool],
) -> Exported:
    needs_gguf(out, "writing")
    # transformers reads neither biases nor slowed rotations of such files, so that nothing would prove them.
    record: dict[str, Any] = {**llama_record(model), "attention_bias": False, "mlp_bias": False}
    rope = record.get("rope_parameters")
    if rope is not None:
        record["rope_parameters"] = {"rope_type": "default", "rope_theta": rope["rope_theta"]}
    config, state = fitted(model, record, title, visits)
    if config.tie_word_embeddings:
        del state[OUTPUT]  # without one the embedding is the output matrix
    with new_file(out) as work:
        dtype = write(work, architecture, config, state, tokenizer, more)
        donor = donors.find(work)
        assert donor is not None
        theirs = donor.looped(donor.model())
        proof = donors.prove(model, theirs, f"{out}, read back", UNROLLED_TOLERANCE)
        if tokenizer is not None:
            sample = "Caf\u00e9, 12 + 345 = 357.\n\n\tNo: it isn't  so"
            same = donor.tokenizer().encode(sample.encode()).tolist() == tokenizer.encode(sample.encode()).tolist()
            check(same, f"{out}: the tokenizer that is read back cuts texts otherwise; leave it out by --no-tokenizer")
    return Exported(
        family=FAMILIES[architecture].title,
        layers=config.num_hidden_layers,
        parameters=sum(tensor.numel() for tensor in state.values()),
        dtype=dtype,
        proof=proof,
    )

"""The way back: a model that was made of a donor, as a model of the donor's class, which stock transformers loads.

Such a class has no loops, so every visit becomes a layer of its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ouroboros.config import fields_by_path
from ouroboros.convert.donors import RECORD, Proof, prove
from ouroboros.convert.families import FULL, SLIDING, Family, family_of, spec_of
from ouroboros.convert.tensors import EMBEDDING, OUTPUT
from ouroboros.errors import OuroborosError, check, first_line
from ouroboros.files import new_directory

if TYPE_CHECKING:
    from torch import Tensor

    from ouroboros.config import ModelSpec
    from ouroboros.data.tokenize import TextTokenizer
    from ouroboros.model.modeling import OuroborosForCausalLM


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What an export wrote."""

    family: str
    layers: int
    parameters: int
    dtype: str
    """Of the numbers in the file: the donor's own where that changes none of them."""
    proof: Proof


def read_record(directory: Path) -> dict[str, Any]:
    """The donor's configuration, which ``ouroboros convert`` has written beside the model.

    Raises:
        OuroborosError: there is none.
    """
    path = directory / RECORD
    check(
        path.is_file(), f"{directory}: has no {RECORD}: only what `ouroboros convert` made of a donor goes back to it"
    )
    try:
        return dict(json.loads(path.read_bytes()))
    except (OSError, ValueError) as error:
        raise OuroborosError(f"{path}: cannot be read: {first_line(error)}") from None


def to_donor(
    model: OuroborosForCausalLM, record: Mapping[str, Any], out: Path, tokenizer: TextTokenizer | None
) -> Exported:
    """Write ``model`` as the transformers directory ``out`` of the donor's class, whole or not at all.

    Args:
        model: float32, in evaluation mode.
        record: from :func:`read_record`.
        out: new or empty directory.
        tokenizer: is written too.

    Raises:
        OuroborosError: the class lacks something that the model has, or logits differ.
    """
    import torch
    from transformers import AutoModelForCausalLM

    family = family_of(record.get("model_type"))
    config = _config_of(model, record)
    _check_fits(model.config.model_spec, spec_of(config), model)
    theirs = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    state = _state(model, family)
    if config.tie_word_embeddings:
        state[OUTPUT] = state[EMBEDDING]
    theirs.load_state_dict(state)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(theirs.generation_config, name, getattr(model.generation_config, name))
    proof = prove(model, theirs, f"{family.title}, written")
    dtype = getattr(torch, str(record.get("dtype")), torch.float32)
    if all(_survives(family, name, tensor, dtype) for name, tensor in state.items()):
        theirs.to(dtype)
    with new_directory(out) as work:
        theirs.save_pretrained(work)
        if tokenizer is not None:
            tokenizer.save(work)
    return Exported(
        family=family.title,
        layers=config.num_hidden_layers,
        parameters=sum(p.numel() for p in theirs.parameters()),
        dtype=str(theirs.dtype).removeprefix("torch."),
        proof=proof,
    )


def _config_of(model: OuroborosForCausalLM, record: Mapping[str, Any]) -> Any:
    """The donor's configuration with a layer for each visit."""
    from transformers import AutoConfig

    spec = model.config.model_spec
    windows = [spec.blocks[visit.block].mixer.looks_back for visit in model.schedule.visits]
    values: dict[str, Any] = {**record, "num_hidden_layers": len(windows), "vocab_size": spec.vocab_size}
    if "layer_types" in record:
        values["layer_types"] = [FULL if window is None else SLIDING for window in windows]
    return AutoConfig.for_model(**values)


def _check_fits(spec: ModelSpec, expected: ModelSpec, model: OuroborosForCausalLM) -> None:
    """Refuse a model whose parts are not those of the donor's class."""
    check(
        not spec.loop, f"loop parts ({', '.join(part.kind for part in spec.loop)}) have no place in the donor's class"
    )
    check(not spec.registers, "registers have no place in the donor's class")
    pairs = [
        (spec.blocks[visit.block], layer) for visit, layer in zip(model.schedule.visits, expected.blocks, strict=True)
    ]
    for ours, theirs in [*pairs, (spec.head, expected.head), (spec.topology, expected.topology)]:
        here, there = fields_by_path(ours), fields_by_path(theirs)
        other = sorted(name for name in here if here[name] != there.get(name))
        check(not other, f"{', '.join(other[:3])}: the donor's class has {[there.get(name) for name in other[:3]]}")
    check(spec.stem == expected.stem, "the stem is not that of the donor's class")
    check(spec.tie_embeddings == expected.tie_embeddings, "tie_embeddings is not as in the donor")


def _state(model: OuroborosForCausalLM, family: Family) -> dict[str, Tensor]:
    """The model's tensors under the donor's names, those of a block once for each of its visits."""
    given, found = model.state_dict(), {}
    for theirs, ours in family.table.names.items():
        places = [(theirs.format(visit.slot), ours.format(visit.block)) for visit in model.schedule.visits]
        for name, source in places if "{}" in theirs else [(theirs, ours)]:
            if source in given:
                found[name] = given[source] - 1 if family.is_gain(name) else given[source]
    return found


def _survives(family: Family, name: str, tensor: Tensor, dtype: Any) -> bool:
    """Whether the model stays the same when this tensor is written as ``dtype``."""
    written = tensor.to(dtype).to(tensor.dtype)
    return (written + 1).equal(tensor + 1) if family.is_gain(name) else written.equal(tensor)

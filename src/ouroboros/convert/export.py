"""The way out: a model as one of a class that stock transformers loads, its donor's or Llama's.

Such a class has no loops, so every visit becomes a layer of its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ouroboros.config import fields_by_path
from ouroboros.convert.donors import RECORD, SPECIAL_TOKENS, TOLERANCE, Proof, prove
from ouroboros.convert.families import FULL, SLIDING, Family, family_of, rope_parameters, spec_of
from ouroboros.convert.tensors import EMBEDDING, OUTPUT
from ouroboros.errors import OuroborosError, check, first_line
from ouroboros.files import new_directory

if TYPE_CHECKING:
    from torch import Tensor

    from ouroboros.config import BlockSpec, ModelSpec
    from ouroboros.data.tokenize import TextTokenizer
    from ouroboros.model.modeling import OuroborosForCausalLM
    from ouroboros.schedule import Visit

UNROLLED_TOLERANCE = 1e-5
"""How far logits of a Llama-shaped export may be from the model's, as a share of the largest."""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What an export wrote."""

    family: str
    layers: int
    parameters: int
    dtype: str
    """Of the numbers in the file: the donor's own where that changes none of them."""
    proof: Proof

    @property
    def facts(self) -> dict[str, Any]:
        """For JSON."""
        named = ("family", "layers", "parameters", "dtype")
        return {name: getattr(self, name) for name in named} | {"proof": self.proof.facts}

    def describe(self) -> str:
        """One line for people."""
        return (
            f"{self.family}, {self.layers} layers, {self.parameters:,} parameters, {self.dtype};"
            f" {self.proof.describe()}"
        )


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


def to_its_donor(source: Path, model: OuroborosForCausalLM, out: Path, tokenizer: TextTokenizer | None) -> Exported:
    """:func:`to_donor` of a model that was opened at ``source``, where what its donor was is recorded."""
    record = read_record(source)
    check(
        record.get("num_loops", 1) == 1,
        f"{source}: its donor repeats the stack of its layers, and no class of transformers does: --to nanbeige-gguf"
        " writes that form, and --to llama a layer for each visit",
    )
    return to_donor(model, record, out, tokenizer)


def to_llama(source: Path, model: OuroborosForCausalLM, out: Path, tokenizer: TextTokenizer | None) -> Exported:
    """Write ``model``, wherever it was opened, as a Llama of transformers, with a layer for each visit; as
    :func:`to_donor`.

    Raises:
        OuroborosError: the class lacks something that the model has, or logits differ by more than
            :data:`UNROLLED_TOLERANCE`.
    """
    return to_donor(model, llama_record(model), out, tokenizer, tolerance=UNROLLED_TOLERANCE)


def llama_record(model: OuroborosForCausalLM) -> dict[str, Any]:
    """A configuration of Llama of what the first layer of ``model`` says. That all layers say it, and that none says
    more, is for :func:`fitted` to check."""
    spec, tokens = model.config.model_spec, model.generation_config
    first = spec.blocks[model.schedule.visits[0].block]
    heads, settings = first.mixer.heads(spec.hidden_size), fields_by_path(first)
    rotary = first.mixer.rotary(spec.hidden_size)
    return {
        "model_type": "llama",
        "hidden_size": spec.hidden_size,
        "intermediate_size": settings.get("ffn.intermediate_size", spec.hidden_size),
        "num_attention_heads": heads.queries,
        "num_key_value_heads": heads.cached,
        "head_dim": heads.width,
        "max_position_embeddings": spec.max_position_embeddings,
        "rms_norm_eps": first.norm.eps,
        "attention_bias": settings.get("mixer.out_bias", False),
        "mlp_bias": settings.get("ffn.bias", False),
        "tie_word_embeddings": spec.tie_embeddings,
        "initializer_range": spec.init_std,
        **({} if rotary is None else {"rope_parameters": rope_parameters(rotary[0])}),
        **{name: getattr(tokens, name) for name in SPECIAL_TOKENS},
    }


def to_donor(
    model: OuroborosForCausalLM,
    record: Mapping[str, Any],
    out: Path,
    tokenizer: TextTokenizer | None,
    *,
    tolerance: float = TOLERANCE,
) -> Exported:
    """Write ``model`` as the transformers directory ``out`` of the donor's class, whole or not at all.

    Args:
        model: float32, in evaluation mode.
        record: from :func:`read_record`.
        out: new or empty directory.
        tokenizer: is written too.
        tolerance: how far logits may be from the model's, as a share of the largest.

    Raises:
        OuroborosError: the class lacks something that the model has, or logits differ.
    """
    import torch
    from transformers import AutoModelForCausalLM

    family = family_of(record.get("model_type"))
    config, state = fitted(model, record, family.title, model.schedule.visits)
    theirs = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    if config.tie_word_embeddings:
        state[OUTPUT] = state[EMBEDDING]
    theirs.load_state_dict(state)
    for name in SPECIAL_TOKENS:
        if (token := getattr(model.generation_config, name)) is not None:
            setattr(theirs.generation_config, name, token)
    proof = prove(model, theirs, f"{family.title}, written", tolerance)
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


def fitted(
    model: OuroborosForCausalLM, record: Mapping[str, Any], title: str, visits: Sequence[Visit]
) -> tuple[Any, dict[str, Tensor]]:
    """The configuration of transformers that ``record`` begins, with a layer for each of ``visits``, and their tensors
    under its names.

    Raises:
        OuroborosError: a part of the model has no place in what is called ``title``.
    """
    from transformers import AutoConfig

    spec = model.config.model_spec
    windows = [spec.blocks[visit.block].mixer.looks_back for visit in visits]
    values: dict[str, Any] = {**record, "num_hidden_layers": len(windows), "vocab_size": spec.vocab_size}
    if "layer_types" in record:
        values["layer_types"] = [FULL if window is None else SLIDING for window in windows]
    config = AutoConfig.for_model(**values)
    check_fits(model, spec_of(config), title, visits)
    return config, _state(model, family_of(config.model_type), visits)


def check_fits(model: OuroborosForCausalLM, expected: ModelSpec, title: str, visits: Sequence[Visit]) -> None:
    """Refuse a model whose parts are not those that the class ``title`` has with the settings of ``expected``."""
    spec, width = model.config.model_spec, expected.hidden_size
    check(not spec.loop, f"loop parts ({', '.join(part.kind for part in spec.loop)}) have no place in {title}")
    check(not spec.registers, f"registers have no place in {title}")
    stems = [", ".join(part.kind for part in stem) or "none" for stem in (spec.stem, expected.stem)]
    check(spec.stem == expected.stem, f"stem parts ({stems[0]}) are not those of {title} ({stems[1]})")
    layers = [spec.blocks[visit.block] for visit in visits]
    pairs = [(_settings(ours, width), _settings(theirs, width)) for ours, theirs in zip(layers, expected.blocks)]
    outside = ((spec.block.norm, expected.block.norm), (spec.head, expected.head), (spec.topology, expected.topology))
    pairs += [(fields_by_path(ours), fields_by_path(theirs)) for ours, theirs in outside]
    for here, there in pairs:
        names = [name for name in here if here[name] != there.get(name)]
        names = [name for name in names if name.rpartition(".")[2] == "kind"] or names  # options of another part
        other = ", ".join(f"{name} = {here[name]!r} (there {there.get(name)!r})" for name in names[:3])
        check(not names, f"{other}: this has no place in {title}")
    check(spec.tie_embeddings == expected.tie_embeddings, f"tie_embeddings is not as in {title}")


def _settings(block: BlockSpec, width: int) -> dict[str, Any]:
    """What a block computes, by path: without what acts in training alone, and with its heads as numbers."""
    found = {name: value for name, value in fields_by_path(block).items() if not name.endswith("dropout")}
    heads = block.mixer.heads(width)
    resolved = {"mixer.num_kv_heads": heads.cached, "mixer.head_dim": heads.width}
    return found | {name: value for name, value in resolved.items() if name in found}


def _state(model: OuroborosForCausalLM, family: Family, visits: Sequence[Visit]) -> dict[str, Tensor]:
    """The model's tensors under the donor's names, those of a block once for each of ``visits``."""
    given, found = model.state_dict(), {}
    for theirs, ours in family.table.names.items():
        places = [(theirs.format(visit.slot), ours.format(visit.block)) for visit in visits]
        for name, source in places if "{}" in theirs else [(theirs, ours)]:
            if source in given:
                found[name] = given[source] - 1 if family.is_gain(name) else given[source]
    return found


def _survives(family: Family, name: str, tensor: Tensor, dtype: Any) -> bool:
    """Whether the model stays the same when this tensor is written as ``dtype``."""
    written = tensor.to(dtype).to(tensor.dtype)
    return (written + 1).equal(tensor + 1) if family.is_gain(name) else written.equal(tensor)

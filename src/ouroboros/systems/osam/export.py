"""The way back: a model of this library as a checkpoint of the published OSAM program."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ouroboros.config import ModelSpec, fields_by_path
from ouroboros.config.parts.osam import OsamSpec
from ouroboros.errors import OuroborosError, check
from ouroboros.files import replacing
from ouroboros.nn.osam import Osam
from ouroboros.systems.osam import SYSTEM
from ouroboros.systems.osam.checkpoint import MIXER, NAMES, PER_ID, SCALARS, sizes_of
from ouroboros.systems.osam.recipe import osam_published

if TYPE_CHECKING:
    from ouroboros.data.tokenize import TextTokenizer
    from ouroboros.model.modeling import OuroborosForCausalLM

logger = logging.getLogger(__name__)

FREE = (
    *("vocab_size", "hidden_size", "max_position_embeddings", "block.dropout", "init_std", "embedding_std", "head_std"),
    *("output_init", "zero_init_outputs", "register_std", "loop", "share_last_kv"),
    *("block.norm.depth_scale", "block.norm.depth"),
    *(f"block.mixer.{name}" for name in ("buckets", "readout_hidden", "kupdate", "value_path", "freeze_phase")),
    *(f"block.mixer.{name}" for name in ("detach_state", "hash_seed", "dropout", "gate_start", "time_scales")),
)
"""Fields of a model that the published program can be told, or that change nothing in it: sizes, starting values, and
options of parts that a model of one block without loops and feed-forward network lacks. All others must be as
published."""


def check_form(spec: ModelSpec) -> None:
    """Refuse a model that the published program cannot load.

    Raises:
        OuroborosError: names the first field that is not as published.
    """
    found, published = fields_by_path(spec), fields_by_path(osam_published().model)
    found |= {"stem": [part.kind for part in spec.stem]}  # which is empty there
    # Kinds come first: a part of another kind lacks the fields of the published one.
    for name in sorted(published, key=lambda name: not name.endswith("kind")):
        check(
            f"{name}.".startswith(tuple(f"{free}." for free in FREE)) or found.get(name) == published[name],
            f"model.{name.removeprefix('block.')} is {found.get(name)!r} and the published program knows only"
            f" {published[name]!r}",
        )


def from_model(model: OuroborosForCausalLM, ids: int | None = None) -> dict[str, Tensor]:
    """The tensors of ``model`` under their published names, float32 copies on the CPU.

    Without the value path its tensors, which the published program wants all the same, are at their start; a warning
    says so.

    Args:
        model: one of the published form.
        ids: how many ids are exported, the first ones; None: all.

    Raises:
        OuroborosError: the model has another form; names the field.
    """
    spec = model.model.spec
    check_form(spec)
    ours, state = model.state_dict(), {}
    if not _mixer(spec).value_path:
        logger.warning("the model has no value path: its published tensors, which are not used, are at their start")
        ours = _value_path_at_start(spec) | ours
    for theirs, name in NAMES.items():
        tensor = ours[name].detach().cpu()
        tensor = tensor.float() if tensor.is_floating_point() else tensor
        tensor = tensor[:ids] if theirs in PER_ID else tensor
        state[theirs] = tensor.reshape(()) if theirs.removeprefix("osam.") in SCALARS else tensor.clone()
    return state


def _mixer(spec: ModelSpec) -> OsamSpec:
    assert isinstance(spec.block.mixer, OsamSpec)
    return spec.block.mixer


def _value_path_at_start(spec: ModelSpec) -> dict[str, Tensor]:
    """The tensors of a mixer that has just begun, under our names; the same ones every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        whole = Osam(dataclasses.replace(_mixer(spec), value_path=True), spec.hidden_size, spec.block.norm.eps)
    return {MIXER + name: tensor for name, tensor in whole.state_dict().items()}


def write(model: OuroborosForCausalLM, tokenizer: TextTokenizer, out: Path) -> dict[str, Any]:
    """Write the file that the published program reads with ``--load``, whole or not at all.

    The ids of unknown characters and of the end of text, which that program lacks, are left out: it shares their
    probability among the others. It reads the memory at every position, whatever ``kupdate`` is. The file is a pickle,
    because that is what it reads; nothing but tensors, dictionaries, numbers and text is in it.

    Args:
        model: of the published form, see :func:`check_form`.
        tokenizer: of characters.
        out: new file.

    Returns:
        The system's name and the number of characters.

    Raises:
        OuroborosError: a model of another form, another tokenizer, an ``out`` that exists or cannot be written.
    """
    check(not out.exists(), f"{out} exists; choose another --out")
    check(
        tokenizer.kind == "chars" and tokenizer.unknown_id is not None,
        f"data.tokenizer of this model is {tokenizer.kind!r} and the published program knows only 'chars'",
    )
    assert tokenizer.unknown_id is not None
    characters = [tokenizer.decode([index]).decode() for index in range(tokenizer.unknown_id)]
    state, mixer = from_model(model, len(characters)), _mixer(model.model.spec)
    if mixer.kupdate > 1:
        logger.warning("the published program reads the memory at every position, not at every %d-th", mixer.kupdate)
    cfg = {**sizes_of(state, {}), "enable_val": mixer.value_path}
    train_cfg = {name: getattr(mixer, name) for name in ("kupdate", "freeze_phase", "dropout")}
    content = {
        "state_dict": state,
        "cfg": {**cfg, "use_freq_cache": False},
        "train_cfg": {name: value for name, value in cfg.items() if name != "vocab_size"}
        | {**train_cfg, "freq_cache": False},
        "stoi": {character: index for index, character in enumerate(characters)},
        "itos": dict(enumerate(characters)),
    }
    try:
        with replacing(out) as temporary:
            torch.save(content, temporary)  # noqa: TID251
    except (OSError, RuntimeError) as error:  # torch's writer has its own for a directory that is missing
        raise OuroborosError(f"cannot write {out}: {error}") from None
    return {"system": SYSTEM.title, "characters": len(characters)}

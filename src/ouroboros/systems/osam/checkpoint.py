"""Published OSAM checkpoints as models of this library.

A published file is a dictionary of ``state_dict``, ``cfg`` (sizes and two switches), ``train_cfg`` (all of its
program's settings) and the characters of its text, ``stoi`` and ``itos``. Ids are the ranks of the characters; two ids
follow here that the published program lacks, see :mod:`ouroboros.data.characters` and :func:`_spare_rows`.
Shapes: V ids, D model width, m buckets.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ouroboros.config.codec import from_dict
from ouroboros.config.parts.osam import OsamSpec
from ouroboros.convert.checkpoint import Checkpoint, Published, published_name
from ouroboros.convert.readers import Option, Reader
from ouroboros.convert.tensors import RenameTable, model_of, shape_of
from ouroboros.errors import check
from ouroboros.systems.osam import SYSTEM
from ouroboros.systems.osam.recipe import osam_published

if TYPE_CHECKING:
    from torch import Tensor

    from ouroboros.model.modeling import OuroborosForCausalLM

logger = logging.getLogger(__name__)

MIXER = "model.decoder.layers.0.self_attn."
_IN_MIXER = {
    "theta_q_raw": "theta_q_raw",
    "theta_k_raw": "theta_k_raw",
    "omega_raw": "omega_raw",
    "gate_feat_raw": "gate_feature_raw",
    "gate_val_raw": "gate_value_raw",
    "Wq.weight": "q_proj.weight",
    "Wk.weight": "k_proj.weight",
    "Wv.weight": "v_proj.weight",
    "cs.h": "key_buckets",
    "cs.sign": "key_signs",
    "readout.0.weight": "readout_in.weight",
    "readout.0.bias": "readout_in.bias",
    "readout.3.weight": "readout_out.weight",
    "readout.3.bias": "readout_out.bias",
    "v_proj.0.weight": "value_norm.weight",
    "v_proj.0.bias": "value_norm.bias",
    "v_proj.1.weight": "value_in.weight",
    "v_proj.1.bias": "value_in.bias",
    "v_proj.4.weight": "value_out.weight",
    "v_proj.4.bias": "value_out.bias",
}
NAMES = {
    "embed.weight": "model.embed_tokens.weight",
    **{f"osam.{theirs}": f"{MIXER}{ours}" for theirs, ours in _IN_MIXER.items()},
    "osam.ln.weight": "model.norm.weight",
    "osam.ln.bias": "model.norm.bias",
    "head.weight": "lm_head.weight",
}
"""Published name: ours."""
TABLE = RenameTable(system=SYSTEM.title, names=NAMES)
SCALARS = ("gate_feat_raw", "gate_val_raw", "theta_q_raw", "theta_k_raw", "omega_raw")
"""Published names, below ``osam.``, of single numbers: of no axis there, of one here."""
VALUE_PATH = tuple(name for name in NAMES if name.startswith(("osam.v_proj.", "osam.Wv", "osam.gate_val")))
"""Published names that models without the value path have no use for, and published ones hold all the same."""
PER_ID = ("embed.weight", "head.weight")
"""Published names of the matrices with a row for each id."""
MARGIN = 30.0
"""How far, at least, the logits of the ids that are not published lie below the mean of the others: a share of 1e-13 of
the probability, which float32 does not see beside the rest."""


def sizes_of(state: Mapping[str, Tensor], cfg: Mapping[str, Any]) -> dict[str, int]:
    """The sizes of the published ``cfg`` as these tensors have them.

    Raises:
        OuroborosError: tensors are missing or unknown, or ``cfg`` says something else than they do.
    """
    TABLE.check(state)
    found: dict[str, int] = {}
    for name, axes in (("embed.weight", ("vocab_size", "d_model")), ("osam.readout.0.weight", ("readout_hidden", "m"))):
        shape = shape_of(state, name, 2)
        for axis, value in zip(axes, shape, strict=True):
            check(cfg.get(axis, value) == value, f"cfg.{axis} is {cfg.get(axis)} but {name} has shape {shape}")
            found[axis] = value
    outer = (found["vocab_size"], found["d_model"])
    for name, expected in (("head.weight", outer), ("osam.ln.weight", outer[1:]), ("osam.ln.bias", outer[1:])):
        check(state[name].shape == expected, f"{name} has shape {tuple(state[name].shape)}, expected {expected}")
    buckets, signs = state["osam.cs.h"], state["osam.cs.sign"]
    fits = not buckets.is_floating_point() and bool(((buckets >= 0) & (buckets < found["m"])).all())
    check(fits, f"osam.cs.h must hold the number of a bucket, 0 to {found['m'] - 1}, for each coordinate")
    check(bool((signs.abs() == 1).all()), "osam.cs.sign must hold a sign, +1 or -1, of each coordinate")
    return found


def to_model(
    state: Mapping[str, Tensor],
    cfg: Mapping[str, Any] | None = None,
    train_cfg: Mapping[str, Any] | None = None,
    *,
    characters: Sequence[str] | None = None,
    kupdate: int | None = None,
    gate_cap: float = 0.25,
    eos_token_id: int | None = None,
) -> OuroborosForCausalLM:
    """The published model with these tensors, float32, in evaluation mode.

    Args:
        state: published names to tensors; the hash tables are used as stored.
        cfg: the published sizes and switches; what is missing is read from shapes, or is as published.
        train_cfg: the published settings; ``kupdate``, ``freeze_phase`` and ``dropout`` go to the model.
        characters: those of the ids, in order; the model then has two ids more, for unknown ones and the end of text.
        kupdate: instead of that of ``train_cfg``.
        gate_cap: upper end of the two gates, which no published file says.
        eos_token_id: end-of-text token for the configuration; with ``characters`` the last id.

    Raises:
        OuroborosError: names, shapes or settings that do not belong together, weights that are not finite.
    """
    import torch

    cfg, train_cfg = cfg or {}, train_cfg or {}
    sizes, every = sizes_of(state, cfg), train_cfg.get("kupdate", 1)
    values = {
        "buckets": sizes["m"],
        "readout_hidden": sizes["readout_hidden"],
        "kupdate": 1 if every == 0 else every,  # as the published program takes it
        "value_path": cfg.get("enable_val", True),
        "gate_cap": gate_cap,
        **{name: train_cfg[name] for name in ("freeze_phase", "dropout") if name in train_cfg},
    }
    mixer = from_dict(OsamSpec, values if kupdate is None else {**values, "kupdate": kupdate}, where="settings")
    ours = {
        NAMES[name]: tensor.reshape(1) if tensor.ndim == 0 else tensor
        for name, tensor in state.items()
        if mixer.value_path or name not in VALUE_PATH
    }
    vocab_size = sizes["vocab_size"]
    if characters is not None:
        check(
            len(characters) == vocab_size,
            f"the checkpoint has {len(characters)} characters and {vocab_size} rows in embed.weight",
        )
        like = characters.index(" ") if " " in characters else 0
        for name, rows in zip(PER_ID, _spare_rows(state, like), strict=True):
            ours[NAMES[name]] = torch.cat((state[name], rows))
        vocab_size += 2
        eos_token_id = vocab_size - 1
    width = sizes["d_model"]
    spec = osam_published().model.replace(
        vocab_size=vocab_size, hidden_size=width, head_std=(3 * width) ** -0.5, mixer=mixer
    )
    return model_of(spec, ours, eos_token_id=eos_token_id)


def _spare_rows(state: Mapping[str, Tensor], like: int) -> tuple[Tensor, Tensor]:
    """Rows (2, D) of the embedding and the head for the ids that are not published: unknown character, end of text.

    An unknown character reads as the published program reads it, as the one of id ``like``. The end-of-text token is a
    vector of zeros: it adds nothing to the memory. Neither is ever drawn, nor does it take part in a loss: both have
    one logit, so far below the others that float32 does not see it, whatever the text. A row of this kind exists
    because the head reads ``g n + b`` with ``n`` of mean 0: ``c / g`` times that is ``c sum(b / g)``.
    """
    import torch

    gain, bias, head = (state[name].double() for name in ("osam.ln.weight", "osam.ln.bias", "head.weight"))
    embed = torch.stack((state["embed.weight"][like], torch.zeros_like(state["embed.weight"][0])))
    width, mean = gain.numel(), head.mean(0)
    ratio = bias / gain
    spread = (mean * gain - (mean * gain).mean()).norm().item()
    wanted = (mean @ bias).item() - math.sqrt(width) * spread - MARGIN
    scale = wanted / ratio.sum().item() if ratio.sum() != 0 else math.inf
    rounding = 4 * torch.finfo(torch.float32).eps * abs(scale) * (width + ratio.abs().sum().item())
    if not rounding < 1:  # NaN included
        logger.warning(
            "the last norm has next to no bias, as before training, so that no row of the head can keep the model from"
            " drawing the ids of unknown characters and the end of text: their logits are 0"
        )
        return embed, torch.zeros_like(embed)
    return embed, (scale / gain).to(embed.dtype).expand(2, -1)


def convert(checkpoint: Checkpoint, *, kupdate: int | None = None, eos_token_id: int | None = None) -> Published:
    """What the reader does (:class:`~ouroboros.convert.readers.Reader`), with the characters as a tokenizer.

    A file of the tensors alone is read too: then the value path is taken to be on, and there is no tokenizer.

    Raises:
        OuroborosError: parts that do not belong together; else as :func:`to_model`.
    """
    from ouroboros.data.tokenize import character_tokenizer

    content = checkpoint.content
    if "state_dict" in content:
        cfg, train_cfg = _mapping(content, "cfg"), _mapping(content, "train_cfg")
        tensors = dataclasses.replace(checkpoint, content=_mapping(content, "state_dict")).tensors()
        characters = characters_of(content)
    else:
        cfg, train_cfg, tensors, characters = {}, {}, checkpoint.tensors(), None
    if "enable_val" not in cfg:
        logger.warning("%s does not say whether the value path is on: taken as published, on", checkpoint.path)
    if kupdate is None and "kupdate" not in train_cfg:
        logger.warning("%s does not say kupdate: taken as 1; give --kupdate if it was another", checkpoint.path)
    model = to_model(tensors, cfg, train_cfg, characters=characters, kupdate=kupdate, eos_token_id=eos_token_id)
    mixer: Any = model.model.spec.block.mixer
    sizes = {**sizes_of(tensors, cfg), "enable_val": mixer.value_path, "kupdate": mixer.kupdate}
    return Published(
        model=model,
        sizes=sizes,
        summary=f"width {sizes['d_model']}, {sizes['m']:,} buckets, readout of {sizes['readout_hidden']}, kupdate"
        f" {mixer.kupdate}, {'value' if mixer.value_path else 'no value'} path, {sizes['vocab_size']:,} characters",
        tokenizer=None if characters is None else character_tokenizer(["".join(characters).encode()]),
    )


def _mapping(content: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = content.get(name, {})
    named = isinstance(found, Mapping) and all(isinstance(key, str) for key in found)
    check(named, f"entry {name!r} is no dictionary with names")
    return {published_name(key): value for key, value in found.items()}


def characters_of(content: Mapping[str, Any]) -> list[str] | None:
    """The characters of a published file in the order of their ids, None of a file without them.

    Raises:
        OuroborosError: ``stoi`` and ``itos`` are not each other's inverse, or ids are not ranks of characters.
    """
    stoi, itos = content.get("stoi"), content.get("itos")
    if stoi is None and itos is None:
        return None
    characters = [*stoi] if isinstance(stoi, Mapping) and isinstance(itos, Mapping) else [""]
    single = all(isinstance(char, str) and len(char) == 1 and not "\ud800" <= char <= "\udfff" for char in characters)
    check(single, "stoi and itos must be dictionaries of single characters and their ids")
    ranks = dict(enumerate(sorted(characters)))
    fits = itos == ranks and stoi == {char: rank for rank, char in ranks.items()}
    check(fits, "stoi and itos must give each character its rank as id, and be each other's inverse")
    return sorted(characters)


READER = Reader(
    system=SYSTEM.title,
    recognises=lambda checkpoint: checkpoint.has("osam."),
    convert=convert,
    options={"kupdate": Option(int, "The memory is read at every kupdate-th position; by default as in training.")},
)

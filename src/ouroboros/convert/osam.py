"""Published OSAM checkpoints: the same model here, the way back, and the published form of a state.

A published file is a dictionary of ``state_dict``, ``cfg`` (sizes and two switches), ``train_cfg`` (all of its
program's settings) and the characters of its text, ``stoi`` and ``itos``. Ids are the ranks of the characters; two ids
follow here that the published program lacks, see :mod:`ouroboros.data.characters` and :func:`_spare_rows`.
Shapes: B batch, V ids, D model width, m buckets.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ouroboros.config import ModelSpec, OsamSpec
from ouroboros.convert.checkpoint import Checkpoint, Published, published_name
from ouroboros.convert.tensors import model_of
from ouroboros.errors import OuroborosError, check
from ouroboros.files import replacing
from ouroboros.nn.linear_memory import turn_rows
from ouroboros.nn.osam import Osam
from ouroboros.nn.sketch import apply_sketch
from ouroboros.recipes.osam import osam_published

if TYPE_CHECKING:
    from ouroboros.data.tokenize import TextTokenizer
    from ouroboros.model.modeling import OuroborosForCausalLM

logger = logging.getLogger(__name__)

_BLOCK = "model.decoder.layers.0.self_attn."
NAMES = {
    "embed.weight": "model.embed_tokens.weight",
    "osam.theta_q_raw": _BLOCK + "theta_q_raw",
    "osam.theta_k_raw": _BLOCK + "theta_k_raw",
    "osam.omega_raw": _BLOCK + "omega_raw",
    "osam.gate_feat_raw": _BLOCK + "gate_feature_raw",
    "osam.gate_val_raw": _BLOCK + "gate_value_raw",
    "osam.Wq.weight": _BLOCK + "q_proj.weight",
    "osam.Wk.weight": _BLOCK + "k_proj.weight",
    "osam.Wv.weight": _BLOCK + "v_proj.weight",
    "osam.cs.h": _BLOCK + "key_buckets",
    "osam.cs.sign": _BLOCK + "key_signs",
    "osam.readout.0.weight": _BLOCK + "readout_in.weight",
    "osam.readout.0.bias": _BLOCK + "readout_in.bias",
    "osam.readout.3.weight": _BLOCK + "readout_out.weight",
    "osam.readout.3.bias": _BLOCK + "readout_out.bias",
    "osam.v_proj.0.weight": _BLOCK + "value_norm.weight",
    "osam.v_proj.0.bias": _BLOCK + "value_norm.bias",
    "osam.v_proj.1.weight": _BLOCK + "value_in.weight",
    "osam.v_proj.1.bias": _BLOCK + "value_in.bias",
    "osam.v_proj.4.weight": _BLOCK + "value_out.weight",
    "osam.v_proj.4.bias": _BLOCK + "value_out.bias",
    "osam.ln.weight": "model.norm.weight",
    "osam.ln.bias": "model.norm.bias",
    "head.weight": "lm_head.weight",
}
"""Published name: ours."""
SCALARS = ("gate_feat_raw", "gate_val_raw", "theta_q_raw", "theta_k_raw", "omega_raw")
"""Published names, below ``osam.``, of single numbers: of no axis there, of one here."""
VALUE_PATH = tuple(name for name in NAMES if name.startswith(("osam.v_proj.", "osam.Wv", "osam.gate_val")))
"""Published names that models without the value path have no use for, and published ones hold all the same."""
FORM = (
    *("layout", "tie_embeddings", "embedding_norm", "logit_scale", "logit_softcap", "registers", "positions"),
    *("residual", "ffn.kind", "norm.kind", "norm.placement", "norm.eps", "mixer.kind", "mixer.independent_hashes"),
    *("mixer.sketch_values", "mixer.frequencies", "mixer.decay", "mixer.normalisation", "mixer.gate_cap"),
)
"""What the published program cannot be told: a model it can load has these fields as published."""
_AXES = {
    **dict.fromkeys(NAMES, ("d_model",)),
    **dict.fromkeys((f"osam.{name}" for name in SCALARS), ()),
    **dict.fromkeys(("embed.weight", "head.weight"), ("vocab_size", "d_model")),
    **dict.fromkeys((f"osam.{name}.weight" for name in ("Wq", "Wk", "Wv", "v_proj.1", "v_proj.4")), ("d_model",) * 2),
    "osam.readout.0.weight": ("readout_hidden", "m"),
    "osam.readout.0.bias": ("readout_hidden",),
    "osam.readout.3.weight": ("d_model", "readout_hidden"),
}
"""The fields of ``cfg`` that each shape repeats."""
MARGIN = 30.0
"""How far, at least, the logits of the ids that are not published lie below the mean of the others: a share of 1e-13 of
the probability, which float32 does not see beside the rest."""


def sizes_of(state: Mapping[str, Tensor], cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The published ``cfg`` of these tensors, with what shapes say where ``cfg`` is silent.

    Raises:
        OuroborosError: tensors are missing, unknown or misshapen, or ``cfg`` says something else than they do.
    """
    missing, unknown = sorted(NAMES.keys() - state.keys()), sorted(state.keys() - NAMES.keys())
    check(not missing, f"not the tensors of an OSAM model: {', '.join(missing[:5])} missing")
    check(not unknown, f"not the tensors of an OSAM model: {', '.join(unknown[:5])} unknown")
    found: dict[str, Any] = {}
    for name in ("embed.weight", "osam.readout.0.weight"):
        shape = tuple(state[name].shape)
        check(len(shape) == 2 and min(shape) > 0, f"{name} has shape {shape}, expected a matrix")
        for axis, value in zip(_AXES[name], shape, strict=True):
            check(cfg.get(axis, value) == value, f"cfg.{axis} is {cfg.get(axis)} but {name} has shape {shape}")
            found[axis] = value
    for name, axes in _AXES.items():
        shape, expected = tuple(state[name].shape), tuple(found[axis] for axis in axes)
        check(shape == expected, f"{name} has shape {shape}, expected {expected}")
    h = state["osam.cs.h"]
    check(
        not h.is_floating_point() and bool(((h >= 0) & (h < found["m"])).all()),
        f"osam.cs.h must hold the number of a bucket, 0 to {found['m'] - 1}, for each coordinate",
    )
    check(bool((state["osam.cs.sign"].abs() == 1).all()), "osam.cs.sign must hold a sign, +1 or -1, of each coordinate")
    return found | {"enable_val": _switch(cfg, "enable_val", True), "use_freq_cache": _switch(cfg, "use_freq_cache")}


def to_spec(
    state: Mapping[str, Tensor],
    cfg: Mapping[str, Any] | None = None,
    train_cfg: Mapping[str, Any] | None = None,
    *,
    kupdate: int | None = None,
    gate_cap: float = 0.25,
) -> ModelSpec:
    """The specification of the model whose tensors these are; see :func:`to_model`."""
    cfg, train_cfg = cfg or {}, train_cfg or {}
    sizes = sizes_of(state, cfg)
    every = train_cfg.get("kupdate", 1) if kupdate is None else kupdate
    dropout = train_cfg.get("dropout", 0.0)
    check(isinstance(every, int), f"train_cfg.kupdate must be a whole number, got {every!r}")
    check(isinstance(dropout, (int, float)), f"train_cfg.dropout must be a number, got {dropout!r}")
    d_model = sizes["d_model"]
    return dataclasses.replace(
        osam_published().model,
        vocab_size=sizes["vocab_size"],
        hidden_size=d_model,
        head_std=(3 * d_model) ** -0.5,
        mixer=OsamSpec(
            buckets=sizes["m"],
            readout_hidden=sizes["readout_hidden"],
            kupdate=max(every, 1) if kupdate is None else every,  # less counts as 1 there
            value_path=sizes["enable_val"],
            freeze_phase=_switch(train_cfg, "freeze_phase"),
            freq_cache=sizes["use_freq_cache"],
            gate_cap=gate_cap,
            dropout=float(dropout),
        ),
    )


def _switch(settings: Mapping[str, Any], name: str, default: bool = False) -> bool:
    value = settings.get(name, default)
    check(isinstance(value, bool), f"{name} must be true or false, got {value!r}")
    return value


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
    spec = to_spec(state, cfg, train_cfg, kupdate=kupdate, gate_cap=gate_cap)
    for name, tensor in state.items():
        check(bool(torch.isfinite(tensor).all()), f"tensor {name!r} holds NaN or infinity")
    ours = {
        NAMES[name]: tensor.reshape(1) if tensor.ndim == 0 else tensor
        for name, tensor in state.items()
        if _mixer(spec).value_path or name not in VALUE_PATH
    }
    if characters is not None:
        check(
            len(characters) == spec.vocab_size,
            f"the checkpoint has {len(characters)} characters and {spec.vocab_size} rows in embed.weight",
        )
        like = characters.index(" ") if " " in characters else 0
        embed, head = _spare_rows(state, like)
        ours[NAMES["embed.weight"]] = torch.cat((state["embed.weight"], embed))
        ours[NAMES["head.weight"]] = torch.cat((state["head.weight"], head))
        spec = dataclasses.replace(spec, vocab_size=spec.vocab_size + len(embed))
        eos_token_id = spec.vocab_size - 1
    return model_of(spec, ours, eos_token_id=eos_token_id)


def _spare_rows(state: Mapping[str, Tensor], like: int) -> tuple[Tensor, Tensor]:
    """Rows (2, D) of the embedding and the head for the ids that are not published: unknown character, end of text.

    An unknown character reads as the published program reads it, as the one of id ``like``. The end-of-text token is a
    vector of zeros: it adds nothing to the memory. Neither is ever drawn, nor does it take part in a loss: both have
    one logit, so far below the others that float32 does not see it, whatever the text. A row of this kind exists
    because the head reads ``g n + b`` with ``n`` of mean 0: ``c / g`` times that is ``c sum(b / g)``.
    """
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
    published = osam_published().model
    for field in FORM:
        found, expected = (_field(it, field) for it in (spec, published))
        check(found == expected, f"model.{field} is {found!r} and the published program knows only {expected!r}")
    ours, state = model.state_dict(), {}
    if not _mixer(spec).value_path:
        logger.warning("the model has no value path: its published tensors, which are not used, are at their start")
        ours = _value_path_at_start(spec) | ours
    for theirs, name in NAMES.items():
        tensor = ours[name].detach().cpu()
        tensor = tensor.float() if tensor.is_floating_point() else tensor
        tensor = tensor[:ids] if theirs in ("embed.weight", "head.weight") else tensor
        state[theirs] = tensor.reshape(()) if theirs.removeprefix("osam.") in SCALARS else tensor.clone()
    return state


def _mixer(spec: ModelSpec) -> OsamSpec:
    assert isinstance(spec.mixer, OsamSpec)
    return spec.mixer


def _field(spec: Any, dotted: str) -> Any:
    """The field, or its end where there is no more: a mixer of another kind lacks the fields of this one."""
    return functools.reduce(lambda it, name: getattr(it, name, None), dotted.split("."), spec)


def _value_path_at_start(spec: ModelSpec) -> dict[str, Tensor]:
    """The tensors of a mixer that has just begun, under our names; the same ones every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        whole = Osam(dataclasses.replace(_mixer(spec), value_path=True), spec.hidden_size, spec.norm.eps)
    return {_BLOCK + name: tensor for name, tensor in whole.state_dict().items()}


class PublishedState(NamedTuple):
    """A state in the form of the published program."""

    K: Tensor
    """(B, 2, m): the sketched sum of keys, real and imaginary."""
    H: Tensor | None
    """(B, 2, D, m): the sum of values times sketched keys; None without the value path."""
    FK: Tensor | None
    """(B, m) complex: the spectrum of K, unitary; only with ``freq_cache``."""


def published_state(mixer: Osam, state: Tensor, position: int | Tensor) -> PublishedState:
    """The published form of a mixer's state, 32 times as large at the published sizes.

    Our memory turns by a frequency at each token, the published one stands still and its tokens turn: the frames agree
    at position 0.

    Args:
        mixer: of the published form.
        state: (B, 2 D, E + 1), see :func:`~ouroboros.nn.linear_memory.read_and_write`.
        position: tokens seen, one number or (B,).
    """
    spec = mixer.spec
    check(not spec.decay, "a memory with mixer.decay has no published form")
    steps = torch.as_tensor(position, dtype=state.dtype, device=state.device)
    still = turn_rows(state, mixer.turn(state.dtype), -steps).unflatten(1, (2, -1))
    sketched = apply_sketch(still.mT, mixer.key_sketch, spec.buckets)  # (B, 2, E + 1, m)
    K = sketched[:, :, -1]
    FK = torch.fft.fft(torch.complex(K[:, 0], K[:, 1]), norm="ortho") if spec.freq_cache else None
    return PublishedState(K, sketched[:, :, :-1] if spec.value_path else None, FK)


def convert(checkpoint: Checkpoint, *, kupdate: int | None = None, eos_token_id: int | None = None) -> Published:
    """The model of a published checkpoint, and its characters as a tokenizer.

    A file of the tensors alone is read too: then the value path is taken to be on, and there is no tokenizer.

    Args:
        checkpoint: what was read.
        kupdate: read the memory at every kupdate-th position; by default as in training.
        eos_token_id: end-of-text token for the configuration of a model without characters.

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
    mixer, sizes = _mixer(model.config.model_spec), sizes_of(tensors, cfg)
    path = "value path" if sizes["enable_val"] else "no value path"
    return Published(
        model=model,
        sizes={**sizes, "kupdate": mixer.kupdate},
        summary=f"width {sizes['d_model']}, {sizes['m']:,} buckets, readout of {sizes['readout_hidden']}, kupdate"
        f" {mixer.kupdate}, {path}, {sizes['vocab_size']:,} characters",
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
    check(isinstance(stoi, Mapping) and isinstance(itos, Mapping), "stoi and itos must both be dictionaries")
    assert isinstance(stoi, Mapping) and isinstance(itos, Mapping)
    check({index: char for char, index in stoi.items()} == dict(itos), "stoi and itos are not each other's inverse")
    single = all(isinstance(char, str) and len(char) == 1 and not "\ud800" <= char <= "\udfff" for char in stoi)
    check(single, "stoi must give the id of single characters")
    found = sorted(stoi)
    check([stoi[char] for char in found] == list(range(len(found))), "the ids in stoi are not the characters' ranks")
    return found


def export(model: OuroborosForCausalLM, tokenizer: TextTokenizer, out: Path) -> int:
    """Write the file that the published program reads with ``--load``, whole or not at all; the ids it holds.

    The ids of unknown characters and of the end of text, which that program lacks, are left out: it shares their
    probability among the others. It reads the memory at every position, whatever ``kupdate`` is. The file is a pickle,
    because that is what it reads; nothing but tensors, dictionaries, numbers and text is in it.

    Args:
        model: of the published form, see :func:`from_model`.
        tokenizer: of characters.
        out: new file.

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
    cfg = sizes_of(state, {"enable_val": mixer.value_path, "use_freq_cache": mixer.freq_cache})
    content = {
        "state_dict": state,
        "cfg": cfg,
        "train_cfg": {
            **{name: cfg[name] for name in ("d_model", "m", "readout_hidden", "enable_val")},
            **{name: getattr(mixer, name) for name in ("kupdate", "freeze_phase", "dropout", "freq_cache")},
        },
        "stoi": {character: index for index, character in enumerate(characters)},
        "itos": dict(enumerate(characters)),
    }
    try:
        with replacing(out) as temporary:
            torch.save(content, temporary)  # noqa: TID251
    except (OSError, RuntimeError) as error:  # torch's writer has its own for a directory that is missing
        raise OuroborosError(f"cannot write {out}: {error}") from None
    return len(characters)

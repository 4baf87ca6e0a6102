"""Published checkpoints of the crawler, of Helix and of the plain model beside them, as models of this library.

What no tensor shows (how often blocks are used, heads, slopes, divisors of positions) is taken from the settings, whose
names are those of :class:`~ouroboros.systems.crawler.published.Published`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ouroboros.convert.checkpoint import Checkpoint
from ouroboros.convert.checkpoint import Published as Converted
from ouroboros.convert.readers import Option, Reader
from ouroboros.convert.tensors import model_of, shape_of
from ouroboros.errors import check
from ouroboros.systems.crawler import SYSTEM
from ouroboros.systems.crawler.published import Published

if TYPE_CHECKING:
    from torch import Tensor

    from ouroboros.model.modeling import OuroborosForCausalLM

_LOOP, _EXCHANGE = "decoder.loops.0.", "decoder.topology.exchange."
_OUTER = {
    "tok_emb.weight": "embed_tokens.weight",
    "bigram.embed.weight": "stem.ngram.table.weight",
    "bigram.proj.weight": "stem.ngram.proj.weight",
    "bigram.scale": "stem.ngram.scale",
    "smear.gate": "stem.smear.gate",
    "skip_weights": "decoder.topology.skips.weight",
    "skip_confidence.weight": "decoder.topology.skips.gate.weight",
    "skip_confidence.bias": "decoder.topology.skips.gate.bias",
    "loop_inst_proj.weight": _LOOP + "flow.down.weight",
    "loop_smear.gate": _LOOP + "loop_smear.gate",
    "shared_tap_up.weight": _LOOP + "tap.up.0.weight",
    "helix_merge_gate": _EXCHANGE + "merge",
    "helix_fire_embeds": _EXCHANGE + "embedding",
    "helix_f2c_down.weight": _EXCHANGE + "up.down_proj.weight",
    "helix_f2c_up.weight": _EXCHANGE + "up.up_proj.weight",
    "helix_c2f_down.weight": _EXCHANGE + "down.down_proj.weight",
    "helix_c2f_up.weight": _EXCHANGE + "down.up_proj.weight",
}
"""Published name outside of blocks: ours, below ``model``."""
_NUMBERED = {
    "loop_inst_up": "flow.up",
    "loop_tap_up": "tap.up",
    "tap_proj": "tap.down",
    "anchor_write": "anchor.write",
}
"""The same of matrices for each loop or tapped block, below the parts of the loop."""
_BLOCK = {
    "attn.c_q.weight": "self_attn.q_proj.weight",
    "attn.c_k.weight": "self_attn.k_proj.weight",
    "attn.c_v.weight": "self_attn.v_proj.weight",
    "attn.proj.weight": "self_attn.o_proj.weight",
    "attn.q_gain": "self_attn.query_gain",
    "attn_scale": "mixer_residual.scale",
    "mlp_scale": "mlp_residual.scale",
    "resid_mix": "entrance.weight",
    "mlp.fc.weight": "mlp.up_proj.weight",
    "mlp.proj.weight": "mlp.down_proj.weight",
    "mlp.stage1.weight": "mlp.stage.weight",
    "mlp.bypass.weight": "mlp.bypass.weight",
}
"""Published name within a block: ours."""
_BRIDGES = {"c2f": "up", "f2c": "down"}
"""Directions of hints by attention, which the program names the other way round than linear ones."""
_MAPS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "o_proj"}


class Names:
    """What the tensors of a published model are called here.

    Args:
        settings: of the model.
    """

    def __init__(self, settings: Published) -> None:
        self.settings = settings

    def ours(self, name: str) -> tuple[str, int | None] | None:
        """Our name below ``model``, and the row if the tensor is one of a table; None if the model has no use for it.

        Raises:
            OuroborosError: no published model has a tensor of this name.
        """
        if name in _OUTER:
            return _OUTER[name], None
        found = re.fullmatch(r"(flat_blocks|blocks|crawler_blocks)\.(\d+)\.(.+)", name)
        if found:
            shared, index = found[1] == "crawler_blocks", int(found[2])
            block = self.settings.shared_block(index) if shared else self.settings.flat_block(index)
            inner = self._in_block(found[3])
            if inner is not None:
                return f"decoder.layers.{block}.{inner[0]}", inner[1]
        found = re.fullmatch(r"helix_(c2f|f2c)_(q|k|v|out)\.weight", name)
        if found:
            block = self.settings.helix_stride + (found[1] == "f2c")
            return f"decoder.layers.{block}.self_attn.{_MAPS[found[2]]}.weight", None
        return self._of_loops(name)

    def _in_block(self, name: str) -> tuple[str, int | None] | None:
        if name in _BLOCK:
            return _BLOCK[name], None
        if found := re.fullmatch(r"mlp\.(choke_down|choke_up)\.(\d+)\.weight", name):
            return name, None
        found = re.fullmatch(r"mlp\.group_w\.(\d+)", name)
        return ("mlp.group_down", int(found[1])) if found else None

    def _of_loops(self, name: str) -> tuple[str, int | None] | None:
        if found := re.fullmatch(r"ve_(shared\.(?:embed\.weight|proj\.weight|scale)|layer_scales\.(\d+))", name):
            return self._of_values(found[1], found[2])
        if found := re.fullmatch(r"loop_pos\.(\d+)", name):
            return _LOOP + "embedding.weight", int(found[1])
        found = re.fullmatch(r"(\w+)\.(\d+)\.weight", name)
        check(found is not None, f"not a tensor of {SYSTEM.title}: {name!r}")
        assert found is not None
        kind, index = found[1], int(found[2])
        if kind == "anchor_read":  # the first loop reads zeros, and nobody reads what the last one writes
            return None if index == 0 else (f"{_LOOP}anchor.read.{index - 1}.weight", None)
        check(kind in _NUMBERED, f"not a tensor of {SYSTEM.title}: {name!r}")
        unread = kind == "anchor_write" and index == self.settings.crawler_loops - 1
        return None if unread else (f"{_LOOP}{_NUMBERED[kind]}.{index}.weight", None)

    def _of_values(self, name: str, row: str | None) -> tuple[str, int | None] | None:
        settings = self.settings
        blocks = settings.shared or settings.flats
        connected = any(index < blocks for index in settings.valued)
        if not connected and not settings.keep_unconnected:
            return None
        stem = "stem.value_embedding." if connected else "stem.unconnected_values."
        if row is None:
            return stem + name.removeprefix("shared."), None
        if not connected:
            return stem + "factors", int(row)
        check(int(row) < len(settings.valued), f"ve_layers {settings.ve_layers!r} has no number for ve_{name}")
        index = settings.valued[int(row)]
        if index >= blocks:
            return None
        block = settings.shared_block(index) if settings.shared else settings.flat_block(index)
        return f"decoder.layers.{block}.self_attn.value_scale", None


def our_layout(name: str, tensor: Tensor, settings: Published) -> Tensor:
    """The published tensor (or its gradient) ``name`` with our axes: the program rotates queries and keys the other way
    round, which is the same as exchanging the two halves of the channels that are rotated."""
    if not name.endswith(("attn.c_q.weight", "attn.c_k.weight")):
        return tensor
    head = settings.model_dim // settings.num_heads
    fits = tensor.ndim == 2 and tensor.shape[0] % head == 0
    check(fits, f"{name} has shape {tuple(tensor.shape)}, which heads of {head} channels do not divide")
    half = (settings.rope_dims or head) // 2
    rows = tensor.view(-1, head, tensor.shape[1])
    return rows[:, [*range(half, 2 * half), *range(half), *range(2 * half, head)]].reshape(tensor.shape)


def our_tensors(tensors: Mapping[str, Tensor], settings: Published) -> dict[str, Tensor]:
    """The published tensors (or their gradients) under our names, rows of a table put together.

    Raises:
        OuroborosError: a name that no published model has.
    """
    import torch

    names, found, rows = Names(settings), {}, {}
    for name, tensor in tensors.items():
        if name == "lm_head.weight":
            found[name] = tensor
            continue
        ours = names.ours(name)
        if ours is None:
            continue
        tensor = our_layout(name, tensor, settings)
        if ours[1] is None:
            found["model." + ours[0]] = tensor
        else:
            rows.setdefault("model." + ours[0], {})[ours[1]] = tensor
    for name, table in rows.items():
        check(len({row.shape for row in table.values()}) == 1, f"the rows of {name} have different shapes")
        whole = torch.stack([table[index] for index in sorted(table)])
        found[name] = whole.flatten() if name.endswith("factors") else whole
    return found


def to_model(
    tensors: Mapping[str, Tensor], settings: Published, *, context: int = 2048, eos_token_id: int | None = None
) -> OuroborosForCausalLM:
    """The published model with these tensors, float32, in evaluation mode.

    Args:
        tensors: published names to tensors.
        settings: of the model; sizes that the tensors show have to agree.
        context: tokens of a sequence, to which the rotation is scaled.
        eos_token_id: end-of-text token for the configuration.

    Raises:
        OuroborosError: names or shapes that do not belong together.
    """
    read = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    return model_of(settings.model(context), our_tensors(read, settings), eos_token_id=eos_token_id)


def convert(checkpoint: Checkpoint, *, config: Path | None = None, eos_token_id: int | None = None) -> Converted:
    """What the reader does (:class:`~ouroboros.convert.readers.Reader`) with the settings in the JSON file ``config``,
    by default ``config.json`` beside the weights.

    Raises:
        OuroborosError: no settings, or such as cannot be read; else as :func:`to_model`.
    """
    hint = ", and how often blocks are used, heads and slopes leave no trace in the weights"
    path, stored = checkpoint.settings(config, f"{hint}: write the settings there, or give --config FILE")
    context = stored.pop("train_seq_len", 2048)
    check(isinstance(context, int) and context > 0, f"settings {path}: train_seq_len must be a number of tokens")
    tensors = checkpoint.tensors()
    vocabulary, width = shape_of(tensors, "tok_emb.weight", 2)
    settings = Published.read({"vocab_size": vocabulary, "model_dim": width, **stored}, f"settings {path}")
    for name, tensor in tensors.items():
        check(bool(tensor.isfinite().all()), f"{checkpoint.path}: tensor {name!r} holds NaN or infinity")
    model = to_model(tensors, settings, context=context, eos_token_id=eos_token_id)
    sizes = {name: value for name, value in dataclasses.asdict(settings).items() if name in _SHOWN}
    kind = "Helix" if settings.helix_enabled else "crawler" if settings.shared else "plain"
    return Converted(
        model=model,
        sizes=sizes,
        summary=f"{kind}, width {width}, layout {settings.layout!r}, vocabulary {vocabulary:,}",
    )


_SHOWN = (
    "vocab_size",
    "model_dim",
    "num_layers",
    "num_flat_layers",
    "num_crawler_layers",
    "crawler_loops",
    "num_heads",
)


def _recognises(checkpoint: Checkpoint) -> bool:
    return all(checkpoint.has(name) for name in ("tok_emb.weight", "smear.gate"))


READER = Reader(
    system=SYSTEM.title,
    recognises=_recognises,
    convert=convert,
    options={"config": Option(Path, "File with its settings; by default config.json beside the weights is read.")},
)

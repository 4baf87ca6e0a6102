"""Caches: one entry per visit, in transformers' own cache objects.

The classes here are what :class:`~ouroboros.nn.memory.Memory` looks like on top of a transformers ``Cache``, and one
cache layer for mixers with a state of constant size.
Shapes: B batch, K key/value heads, T new and S all keys, C channels per head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    STATIC_LAYER_TYPE_MAPPING,
    Cache,
    CacheLayerMixin,
    LinearAttentionLayer,
    StaticLayer,
)

from ouroboros.errors import OuroborosError

CONSTANT_STATE = "ouroboros_constant_state"
"""``layer_types`` entry of a visit whose mixer keeps a state of constant size."""


class SlotMemory:
    """The keys and values of one visit, kept in entry ``slot`` of ``store``."""

    def __init__(self, store: Cache, slot: int) -> None:
        self.store, self.slot = store, slot

    def extend(self, k_BKTC: Tensor, v_BKTC: Tensor) -> tuple[Tensor, Tensor]:
        """Append and keep."""
        return self.store.update(k_BKTC, v_BKTC, self.slot)


class PeekMemory:
    """Reads entry ``slot`` without keeping the new keys and values (``share_last_kv``: loops before the last)."""

    def __init__(self, store: Cache, slot: int) -> None:
        self.store, self.slot = store, slot

    def extend(self, k_BKTC: Tensor, v_BKTC: Tensor) -> tuple[Tensor, Tensor]:
        """Append to a copy; the entry stays as it was."""
        if self.slot >= len(self.store.layers):  # a growing cache made without a configuration
            return k_BKTC, v_BKTC
        layer = self.store.layers[self.slot]
        assert isinstance(layer, CacheLayerMixin)
        static = isinstance(layer, StaticLayer)
        if static and not layer.is_initialized:
            layer.lazy_initialization(k_BKTC, v_BKTC)
        keys, values = layer.keys, layer.values
        if keys is None or values is None:
            return k_BKTC, v_BKTC
        if not static:
            return torch.cat((keys, k_BKTC), dim=2), torch.cat((values, v_BKTC), dim=2)
        at = torch.arange(k_BKTC.shape[2], device=k_BKTC.device) + layer.cumulative_length
        return keys.index_copy(2, at, k_BKTC), values.index_copy(2, at, v_BKTC)


class ConstantStateLayer(LinearAttentionLayer, CacheLayerMixin):  # pyrefly: ignore[inconsistent-inheritance]
    """Cache entry of a visit whose mixer keeps a state of constant size and no keys.

    Counts the tokens it has seen, because a cache made of such entries alone has to report its length to ``generate``.
    The state is whatever tensor (batch first) the mixer stores; masks are not sized by it.
    """

    is_sliding = False

    def __init__(self, number_of_states: int = 1, **_: Any) -> None:
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)
        self.keys = self.values = None
        self.is_initialized = True
        self.seen = 0

    def read(self) -> Tensor | None:
        """The state after the tokens seen so far, or None before the first."""
        return self.recurrent_states[0]

    def write(self, state: Tensor, new_tokens: int) -> None:
        """Replace the state (batch first) and count ``new_tokens`` more tokens."""
        if self.recurrent_states[0] is None:
            self.recurrent_states[0] = torch.empty_like(state)
            self.is_recurrent_states_initialized[0] = True
            self.device, self.dtype = state.device, state.dtype
        if self.recurrent_states[0].shape == state.shape:
            self.recurrent_states[0].copy_(state)  # in place, so that a compiled step sees one address
        else:
            self.recurrent_states[0] = state
        self.has_previous_state[0] = True
        self.seen += new_tokens

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Not for keys and values."""
        raise OuroborosError("a constant-state cache entry holds no keys or values: use read() and write()")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(key length, key offset) as if all tokens seen could be attended to."""
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return self.seen

    def get_max_length(self) -> int:
        """-1: no limit."""
        return -1

    def reset(self) -> None:
        """Forget state and count."""
        LinearAttentionLayer.reset(self)
        self.recurrent_states[0] = None
        self.is_recurrent_states_initialized[0] = False
        self.seen = 0

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Select sequences for beam search."""
        LinearAttentionLayer.reorder_cache(self, beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        """A summed state cannot forget its last tokens."""
        if tokens_to_remove != 0:
            raise OuroborosError("a constant-state cache cannot be rolled back; generate without an assistant model")

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence ``repeats`` times."""
        if self.recurrent_states[0] is not None:
            self.recurrent_states[0] = self.recurrent_states[0].repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the sequences ``indices``."""
        if self.recurrent_states[0] is not None:
            self.recurrent_states[0] = self.recurrent_states[0][indices]


def register_cache_layers() -> None:
    """Enter :class:`ConstantStateLayer` in transformers' maps of growing and preallocated caches."""
    DYNAMIC_LAYER_TYPE_MAPPING[CONSTANT_STATE] = ConstantStateLayer
    STATIC_LAYER_TYPE_MAPPING[CONSTANT_STATE] = ConstantStateLayer


def cache_bytes(store: Cache) -> int:
    """Bytes held by the keys, values and states of ``store``."""
    total = 0
    for layer in store.layers:
        states = [getattr(layer, "keys", None), getattr(layer, "values", None)]
        states += list(getattr(layer, "recurrent_states", {}).values())
        total += sum(t.numel() * t.element_size() for t in states if t is not None)
    return total


def check_cache_fits(store: Cache, entries: int, layout: str) -> None:
    """Refuse a cache made for other visits, and mark a new one as this layout's.

    Args:
        store: the cache.
        entries: how many the model fills.
        layout: the visits that fill them. Equal numbers do not suffice: ``(1)x2 1 (1)x4`` has the visits of
            ``(1)x3 1 (1)x3``, but the same entry belongs to other weights there.

    Raises:
        OuroborosError: names both and the fix.
    """
    made_for = getattr(store, "made_for", layout)
    if made_for == layout and len(store.layers) in (0, entries):
        store.made_for = layout  # pyrefly: ignore
    elif made_for != layout or len(store.layers) > entries or store.get_seq_length() > 0:
        raise OuroborosError(
            f"the cache has {len(store.layers)} entries"
            + (f" for layout {made_for!r}" if made_for != layout else "")
            + f" but layout {layout!r} fills {entries}:"
            " it was made for another loop count; make a new cache after with_loops()"
        )

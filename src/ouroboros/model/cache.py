"""Caches: one entry per visit, in transformers' own cache objects.

The classes here are what :class:`~ouroboros.nn.memory.Memory` looks like on top of a transformers ``Cache``, and the
cache layers that transformers lacks: for mixers with a state of constant size, and for visits whose filters over tokens
remember the last few entries beside keys and values.
Shapes: B batch, K key/value heads, T new and S all keys, C channels per head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    STATIC_LAYER_TYPE_MAPPING,
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    LinearAttentionLayer,
    StaticLayer,
)

from ouroboros.errors import OuroborosError, check
from ouroboros.model.configuration import CONSTANT_STATE, FILTERED
from ouroboros.nn.memory import Memory


class RecentEntries:
    """What a cache entry keeps for filters over tokens, beside keys and values: the last few entries, by name."""

    is_croppable = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.recent: dict[str, Tensor] = {}

    def remember(self, name: str, x: Tensor) -> None:
        """Keep ``x`` (B, count, ...) under ``name``."""
        self.recent[name] = x.clone()  # a copy, for ``x`` may be a view of all tokens

    def reset(self) -> None:
        """Forget everything."""
        super().reset()  # pyrefly: ignore[missing-attribute]
        self.recent.clear()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Select sequences for beam search."""
        super().reorder_cache(beam_idx)  # pyrefly: ignore[missing-attribute]
        self._each(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def crop(self, tokens_to_remove: int) -> None:
        """A filter cannot get back what it has forgotten."""
        if tokens_to_remove != 0:
            raise OuroborosError(
                "the cache of a model with filters over tokens (shifts of keys and values, convolutions) cannot be"
                " rolled back; generate without an assistant model"
            )

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        self.recent.update({name: change(x) for name, x in self.recent.items()})


class FilteredDynamicLayer(RecentEntries, DynamicLayer):
    """A growing cache entry with :class:`RecentEntries`."""

    _layer_type = FILTERED

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence ``repeats`` times."""
        super().batch_repeat_interleave(repeats)
        self._each(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the sequences ``indices``."""
        super().batch_select_indices(indices)
        self._each(lambda x: x[indices])


class FilteredStaticLayer(RecentEntries, StaticLayer):
    """A preallocated cache entry with :class:`RecentEntries`, which stay at their addresses for compiled steps."""

    _layer_type = FILTERED

    def remember(self, name: str, x: Tensor) -> None:
        """Keep ``x`` (B, count, ...) under ``name``."""
        kept = self.recent.get(name)
        if kept is not None and kept.shape == x.shape:
            kept.copy_(x)
            return
        super().remember(name, x)
        if not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(self.recent[name])


class SlotMemory(Memory):
    """What one visit remembers, in entry ``slot`` of ``store``.

    Without ``keeps`` the entry is read and stays as it was (``share_last_kv``: loops before the last).
    """

    def __init__(self, store: Cache, slot: int, *, keeps: bool = True) -> None:
        self.store, self.slot, self.keeps = store, slot, keeps

    def extend(self, k_BKTC: Tensor, v_BKTC: Tensor) -> tuple[Tensor, Tensor]:
        """Append to the entry, or to a copy of it."""
        if self.keeps:
            return self.store.update(k_BKTC, v_BKTC, self.slot)
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

    def state(self) -> Tensor | None:
        return _constant(self.store, self.slot).read()

    def carry(self, state: Tensor, new_tokens: int) -> None:
        if self.keeps:
            _constant(self.store, self.slot).write(state, new_tokens)

    def last(self, name: str) -> Tensor | None:
        return _filtered(self.store, self.slot).recent.get(name)

    def remember(self, name: str, x: Tensor) -> None:
        if self.keeps:
            _filtered(self.store, self.slot).remember(name, x)


def _filtered(store: Cache, slot: int) -> RecentEntries:
    layer = store.layers[slot]
    assert isinstance(layer, RecentEntries)
    return layer


def _constant(store: Cache, slot: int) -> ConstantStateLayer:
    layer = store.layers[slot]
    assert isinstance(layer, ConstantStateLayer)
    return layer


class ConstantStateLayer(RecentEntries, LinearAttentionLayer, CacheLayerMixin):  # pyrefly: ignore[inconsistent-inheritance]
    """Cache entry of a visit whose mixer keeps a state of constant size and no keys.

    Counts the tokens it has seen, because a cache made of such entries alone has to report its length to ``generate``.
    The state is whatever tensor (batch first) the mixer stores; masks are not sized by it.
    """

    is_sliding = False

    def __init__(self, number_of_states: int = 1, **_: Any) -> None:
        super().__init__(number_of_states=number_of_states)
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
        super().reset()
        self.recurrent_states[0] = None
        self.is_recurrent_states_initialized[0] = False
        self.seen = 0

    def crop(self, tokens_to_remove: int) -> None:
        """A summed state cannot forget its last tokens."""
        if tokens_to_remove != 0:
            raise OuroborosError("a constant-state cache cannot be rolled back; generate without an assistant model")

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence ``repeats`` times."""
        if self.recurrent_states[0] is not None:
            self.recurrent_states[0] = self.recurrent_states[0].repeat_interleave(repeats, dim=0)
        self._each(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the sequences ``indices``."""
        if self.recurrent_states[0] is not None:
            self.recurrent_states[0] = self.recurrent_states[0][indices]
        self._each(lambda x: x[indices])


def register_cache_layers() -> None:
    """Enter :class:`ConstantStateLayer` in transformers' maps of growing and preallocated caches.

    Layers of one map alone say so themselves, by ``_layer_type``.
    """
    DYNAMIC_LAYER_TYPE_MAPPING[CONSTANT_STATE] = ConstantStateLayer
    STATIC_LAYER_TYPE_MAPPING[CONSTANT_STATE] = ConstantStateLayer


def cache_bytes(store: Cache) -> int:
    """Bytes held by the keys, values and states of ``store``."""
    total = 0
    for layer in store.layers:
        states = [getattr(layer, "keys", None), getattr(layer, "values", None)]
        states += [*getattr(layer, "recurrent_states", {}).values(), *getattr(layer, "recent", {}).values()]
        total += sum(t.numel() * t.element_size() for t in states if t is not None)
    return total


def seen_tokens(store: Cache | None) -> int:
    """Tokens that ``store`` holds, declared as transformers does: a preallocated one counts in a tensor."""
    return 0 if store is None else store.get_seq_length()


def check_rolls(model: Any) -> None:
    """Refuse a model whose cache cannot forget its first tokens and go on.

    Raises:
        OuroborosError: says why.
    """
    spec = getattr(getattr(model, "config", None), "model_spec", None)
    if spec is None:
        raise OuroborosError(f"{type(model).__name__}: its cache is not one of this library; read each window anew")
    for part in spec.stem:
        limit = part.longest(spec)
        check(
            limit is None,
            f"the model's table of positions ends at {limit}, so it cannot go on behind a window; read each one anew",
        )


def keep_last(store: Cache, tokens: int) -> None:
    """Forget all keys and values but those of the last ``tokens`` tokens, of which the cache then says that it holds
    as many. States of constant size stay as they are.

    Whoever goes on gives the positions of new tokens in the text, which the cache no longer tells.
    """
    for layer in store.layers:
        if isinstance(layer, ConstantStateLayer):
            layer.seen = min(layer.seen, tokens)
        elif isinstance(layer, DynamicLayer) and layer.keys is not None and layer.values is not None:
            past = max(0, layer.keys.shape[-2] - tokens)
            layer.keys, layer.values = layer.keys[..., past:, :], layer.values[..., past:, :]


def add_rows(store: Cache, other: Cache) -> None:
    """Add the sequences of ``other`` behind those of ``store``; both belong to one model at one loop count.

    Where they differ in length, the shorter keys and values are padded on the left, which the attention mask of later
    calls has to hide. ``other`` is not to be used any more.
    """
    for layer, new in zip(store.layers, other.layers, strict=True):
        if isinstance(layer, RecentEntries) and isinstance(new, RecentEntries):
            layer.recent = {name: torch.cat((x, new.recent[name])) for name, x in layer.recent.items()}
        if isinstance(layer, ConstantStateLayer) and isinstance(new, ConstantStateLayer):
            layer.recurrent_states[0] = torch.cat([x for x in (layer.read(), new.read()) if x is not None])
            layer.seen = max(layer.seen, new.seen)
        elif isinstance(layer, DynamicLayer) and isinstance(new, DynamicLayer):
            layer.keys = _stacked(layer.keys, new.keys)
            layer.values = _stacked(layer.values, new.values)


def _stacked(x_BKSC: Tensor | None, y_BKSC: Tensor | None) -> Tensor:
    assert x_BKSC is not None and y_BKSC is not None
    longest = max(x_BKSC.shape[-2], y_BKSC.shape[-2])
    padded = [torch.nn.functional.pad(x, (0, 0, longest - x.shape[-2], 0)) for x in (x_BKSC, y_BKSC)]
    return torch.cat(padded)


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


_ENTRIES: dict[str, type] = {
    "full_attention": DynamicLayer,
    FILTERED: FilteredDynamicLayer,
    CONSTANT_STATE: ConstantStateLayer,
}
_NEEDED: dict[str, type] = {FILTERED: RecentEntries, CONSTANT_STATE: ConstantStateLayer}


def prepare_entries(store: Cache, kinds: list[str]) -> None:
    """Give a cache made without a configuration the entries that ``layer_types`` names.

    Raises:
        OuroborosError: it has entries of another kind; names them and the fix.
    """
    if not _NEEDED.keys() & set(kinds):
        return
    if not store.layers and store.layer_class_to_replicate is DynamicLayer:
        store.layers.extend(_ENTRIES[kind]() for kind in kinds)
    unfit = {
        kind: type(layer).__name__
        for kind, layer in zip(kinds, store.layers, strict=False)
        if not isinstance(layer, _NEEDED.get(kind, object))
    }
    if unfit or not store.layers:
        kept = {FILTERED: "what the model's filters over tokens remember", CONSTANT_STATE: "the model's constant state"}
        what = kept[next(iter(unfit), next(kind for kind in kinds if kind in kept))]
        raise OuroborosError(
            f"a cache of {', '.join(sorted(set(unfit.values()))) or type(store).__name__} has no room for {what}: make"
            " it with DynamicCache(config=model.config) or StaticCache(config=model.config, ...)"
        )

"""Cache entries: memories on top of transformers' caches, and the entry of constant size."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer, StaticCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from ouroboros.errors import OuroborosError
from ouroboros.model.cache import (
    CONSTANT_STATE,
    ConstantStateLayer,
    FilteredDynamicLayer,
    FilteredStaticLayer,
    SlotMemory,
    cache_bytes,
    check_cache_fits,
    prepare_entries,
    register_cache_layers,
    seen_tokens,
)
from ouroboros.model.configuration import FILTERED

VOCABULARY, WIDTH, EOS = 23, 8, 22


class ToyConfig(PreTrainedConfig):
    """Two recurrent layers."""

    model_type = "ouroboros_toy_recurrent"

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.vocab_size, self.hidden_size, self.num_hidden_layers = VOCABULARY, WIDTH, 2
        self.layer_types = [CONSTANT_STATE] * 2
        self.num_attention_heads = self.num_key_value_heads = 1
        self.eos_token_id = EOS


class DecayedSum(nn.Module):
    """``s_t = a s_(t-1) + W x_t``, with padded positions left out; state (B, D)."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(WIDTH, WIDTH)
        self.decay = nn.Parameter(torch.rand(WIDTH) * 0.5 + 0.4)

    def forward(self, x: Tensor, padding: Tensor | None, layer: ConstantStateLayer | None) -> Tensor:
        B, T, _ = x.shape
        real = torch.ones(B, T) if padding is None else padding.float()
        added = self.proj(x) * real[..., None]
        past = None if layer is None else layer.read()
        state = torch.zeros(B, WIDTH) if past is None else past.clone()
        out = []
        for t in range(T):
            # A padded position neither adds nor decays, so a padded and an unpadded prompt end in the same state.
            state = torch.where(real[:, t, None] > 0, self.decay * state, state) + added[:, t]
            out.append(state)
        if layer is not None:
            layer.write(state, T)
        return torch.stack(out, dim=1)


class ToyModel(PreTrainedModel, GenerationMixin):
    """A recurrent language model without keys and values."""

    config_class = ToyConfig
    main_input_name = "input_ids"
    _supports_sdpa = True

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(DecayedSum() for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.7)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = True,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        T = input_ids.shape[1]
        padding = None if attention_mask is None else attention_mask[:, -T:]
        x = self.embed(input_ids)
        for slot, mixer in enumerate(self.layers):
            x = x + torch.tanh(mixer(x, padding, past_key_values.layers[slot] if use_cache else None))
        return CausalLMOutputWithPast(logits=self.head(x), past_key_values=past_key_values if use_cache else None)


@pytest.fixture
def toy() -> ToyModel:
    register_cache_layers()
    return ToyModel(ToyConfig()).eval()


@pytest.fixture
def prompt() -> Tensor:
    return torch.randint(0, EOS, (2, 7))


def generate(model: Any, ids: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    """Six new tokens after the prompt."""
    given = {"attention_mask": torch.ones_like(ids) if mask is None else mask, "do_sample": False, "pad_token_id": EOS}
    return model.generate(ids, max_new_tokens=6, min_new_tokens=6, **given | options)


def test_dynamic_cache_is_made_of_constant_states(toy: ToyModel, prompt: Tensor) -> None:
    store = DynamicCache(config=toy.config)
    assert [type(layer) for layer in store.layers] == [ConstantStateLayer] * 2
    assert store.get_seq_length() == 0
    toy(prompt, past_key_values=store)
    assert store.get_seq_length() == 7
    held = cache_bytes(store)
    assert held == 2 * 2 * WIDTH * 4  # layers x sequences x state in float32
    toy(prompt, past_key_values=store)
    assert (store.get_seq_length(), cache_bytes(store)) == (14, held)


def test_chunks_equal_one_pass(toy: ToyModel, prompt: Tensor) -> None:
    store = DynamicCache(config=toy.config)
    parts = [toy(prompt[:, a:b], past_key_values=store).logits for a, b in ((0, 3), (3, 4), (4, 7))]
    torch.testing.assert_close(torch.cat(parts, dim=1), toy(prompt, use_cache=False).logits)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
def test_generate_equals_uncached(toy: ToyModel, prompt: Tensor, options: dict[str, Any]) -> None:
    uncached = {key: value for key, value in options.items() if key != "cache_implementation"}
    assert torch.equal(generate(toy, prompt, **options), generate(toy, prompt, use_cache=False, **uncached))


def test_several_sequences_for_one_prompt(toy: ToyModel, prompt: Tensor) -> None:
    beams = generate(toy, prompt, num_beams=4, num_return_sequences=3)
    assert beams.shape == (6, 13)
    assert torch.equal(beams, generate(toy, prompt, num_beams=4, num_return_sequences=3, use_cache=False))
    torch.manual_seed(1)
    sampled = generate(toy, prompt, do_sample=True, num_return_sequences=2)
    assert sampled.shape == (4, 13) and torch.equal(sampled[:2, :7], prompt[:1].expand(2, -1))


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
def test_left_padding(toy: ToyModel, prompt: Tensor, options: dict[str, Any]) -> None:
    padded = torch.cat((torch.full((2, 3), EOS), prompt), dim=1)
    mask = torch.ones_like(padded)
    mask[:, :3] = 0
    assert torch.equal(generate(toy, padded, mask, **options)[:, 10:], generate(toy, prompt, **options)[:, 7:])


def test_static_cache_object(toy: ToyModel, prompt: Tensor) -> None:
    store = StaticCache(config=toy.config, max_cache_len=32)
    assert [type(layer) for layer in store.layers] == [ConstantStateLayer] * 2
    first = toy(prompt, past_key_values=store).logits
    store.reset()
    assert store.get_seq_length() == 0 and store.layers[0].read() is None
    assert torch.equal(toy(prompt, past_key_values=store).logits, first)


def test_write_keeps_one_buffer() -> None:
    layer, state = ConstantStateLayer(), torch.randn(2, 3)
    layer.write(state, 4)
    kept = layer.read()
    assert kept is not None and kept is not state and torch.equal(kept, state)
    layer.write(2 * state, 1)
    assert layer.read() is kept and torch.equal(kept, 2 * state)
    assert layer.get_seq_length() == 5 and layer.get_mask_sizes(3) == (8, 0) and layer.get_max_length() == -1
    layer.write(torch.randn(5, 3), 1)
    now = layer.read()
    assert now is not None and now.shape == (5, 3)


def test_batch_operations() -> None:
    layer, state = ConstantStateLayer(), torch.arange(3.0)[:, None].expand(3, 2)
    for operation in (lambda: layer.batch_repeat_interleave(2), lambda: layer.batch_select_indices(torch.tensor([0]))):
        operation()  # before the first token there is nothing to select
        assert layer.read() is None
    layer.write(state, 1)
    layer.reorder_cache(torch.tensor([2, 0, 0]))
    assert layer.read()[:, 0].tolist() == [2, 0, 0]  # pyrefly: ignore
    layer.batch_repeat_interleave(2)
    assert layer.read()[:, 0].tolist() == [2, 2, 0, 0, 0, 0]  # pyrefly: ignore
    layer.batch_select_indices(torch.tensor([1, 5]))
    assert layer.read()[:, 0].tolist() == [2, 0]  # pyrefly: ignore


def test_a_state_and_recent_entries_are_kept_side_by_side() -> None:
    """As under a mixer with a state and a compressor over tokens."""
    layer, state, recent = ConstantStateLayer(), torch.randn(3, 2, 5), torch.randn(3, 4, 6)
    layer.write(state, 4)
    layer.remember("n", recent[:, 1:])
    assert layer.recent["n"].untyped_storage().nbytes() == 3 * 3 * 6 * 4  # not all that was seen
    store = DynamicCache()
    store.layers.append(layer)
    assert cache_bytes(store) == (3 * 2 * 5 + 3 * 3 * 6) * 4
    order = torch.tensor([2, 0, 0])
    layer.reorder_cache(order)
    layer.batch_repeat_interleave(2)
    layer.batch_select_indices(torch.tensor([1, 5]))
    chosen = order.repeat_interleave(2)[[1, 5]]
    assert torch.equal(layer.read(), state[chosen]) and torch.equal(layer.recent["n"], recent[chosen, 1:])
    layer.reset()
    assert layer.read() is None and layer.recent == {} and layer.get_seq_length() == 0


def test_slot_and_peek_memories_of_a_state() -> None:
    store = DynamicCache()
    prepare_entries(store, [CONSTANT_STATE] * 2)
    state = torch.randn(1, 4)
    slot, peek = SlotMemory(store, 1), SlotMemory(store, 1, keeps=False)
    assert slot.keeps and not peek.keeps and slot.state() is peek.state() is None
    slot.carry(state, 3)
    peek.carry(2 * state, 3)
    assert torch.equal(slot.state(), state) and torch.equal(peek.state(), state)
    assert store.layers[1].get_seq_length() == 3 and store.layers[0].read() is None


def test_constant_state_refuses_keys_and_rollback() -> None:
    layer = ConstantStateLayer()
    with pytest.raises(OuroborosError, match="no keys or values"):
        layer.update(torch.zeros(1), torch.zeros(1))
    with pytest.raises(OuroborosError, match="rolled back"):
        layer.crop(-1)
    layer.crop(0)


def static_store(length: int = 8) -> StaticCache:
    config = PreTrainedConfig()
    config.num_hidden_layers, config.layer_types = 2, ["full_attention"] * 2
    return StaticCache(config=config, max_cache_len=length)


@pytest.mark.parametrize("make", [DynamicCache, static_store])
def test_slot_keeps_and_peek_does_not(make: Any) -> None:
    store = make()
    k, v = torch.randn(2, 1, 2, 5, 4)
    SlotMemory(store, 0).extend(k[:, :, :3], v[:, :, :3])
    for _ in range(2):
        keys, values = SlotMemory(store, 0, keeps=False).extend(k[:, :, 3:], v[:, :, 3:])
        assert torch.equal(keys[:, :, :5], k) and torch.equal(values[:, :, :5], v)
        assert store.layers[0].get_seq_length() == 3
    keys, _ = SlotMemory(store, 0).extend(k[:, :, 3:], v[:, :, 3:])
    assert torch.equal(keys[:, :, :5], k) and store.layers[0].get_seq_length() == 5


@pytest.mark.parametrize("make", [DynamicCache, static_store])
def test_peek_into_an_empty_entry_sees_the_new_tokens(make: Any) -> None:
    k, v = torch.randn(2, 1, 2, 5, 4)
    keys, values = SlotMemory(make(), 1, keeps=False).extend(k, v)
    assert torch.equal(keys[:, :, :5], k) and torch.equal(values[:, :, :5], v)


def filtered_config() -> PreTrainedConfig:
    config = PreTrainedConfig()
    config.num_hidden_layers, config.layer_types = 2, [FILTERED] * 2
    return config


def filtered_store(kind: str) -> Any:
    """A cache of two entries that keep recent entries too."""
    if kind == "dynamic":
        return DynamicCache(config=filtered_config())
    return StaticCache(config=filtered_config(), max_cache_len=16)


def feed(store: Any, x: Tensor) -> Tensor:
    """Keys, values and the filter's window for entry 1; returns the latter."""
    keys = x[:, None].expand(-1, 2, -1, -1)
    memory = SlotMemory(store, 1)
    memory.extend(keys, keys)
    return memory.recent("n", x, 2)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
class TestRecentEntries:
    def test_layers(self, kind: str) -> None:
        expected = {"dynamic": FilteredDynamicLayer, "static": FilteredStaticLayer}[kind]
        store = filtered_store(kind)
        assert [type(layer) for layer in store.layers] == [expected] * 2
        assert not store.is_croppable and store.is_compileable == (kind == "static")

    def test_keeps_the_last(self, kind: str) -> None:
        store, x = filtered_store(kind), torch.randn(3, 6, 4)
        for chunk in ([0], [1, 2, 3, 4], [5]):
            longer = feed(store, x[:, chunk])
        assert torch.equal(longer, x[:, 3:]) and int(store.get_seq_length(1)) == 6
        assert store.layers[0].recent == {}

    def test_peek_reads_without_keeping(self, kind: str) -> None:
        store, x = filtered_store(kind), torch.randn(3, 6, 4)
        assert torch.equal(SlotMemory(store, 1, keeps=False).recent("n", x, 2)[:, 2:], x)
        feed(store, x)
        for _ in range(2):
            longer = SlotMemory(store, 1, keeps=False).recent("n", x[:, :1], 2)
            assert torch.equal(longer, torch.cat((x[:, 4:], x[:, :1]), dim=1))

    def test_keeps_no_more_than_it_needs(self, kind: str) -> None:
        store, x = filtered_store(kind), torch.randn(3, 6, 4)
        before = cache_bytes(store)
        longer = feed(store, x)
        kept = store.layers[1].recent["n"]
        assert kept.untyped_storage().nbytes() == 3 * 2 * 4 * 4
        keys = 2 * 3 * 2 * (16 if kind == "static" else 6) * 4 * 4
        assert cache_bytes(store) - before == keys + kept.untyped_storage().nbytes()
        longer.zero_()
        assert torch.equal(kept, x[:, 4:])

    def test_beams_and_selection(self, kind: str) -> None:
        store, x = filtered_store(kind), torch.randn(3, 4, 4)
        feed(store, x)
        order = torch.tensor([2, 0, 0])
        store.reorder_cache(order)
        assert torch.equal(store.layers[1].recent["n"], x[order][:, 2:])
        assert torch.equal(store.layers[1].keys[:, 0, :4], x[order])
        if kind == "static":  # transformers' own has no such operation
            return
        store.batch_repeat_interleave(2)
        assert torch.equal(store.layers[1].recent["n"], x[order].repeat_interleave(2, 0)[:, 2:])
        store.batch_select_indices(torch.tensor([1, 5]))
        assert torch.equal(store.layers[1].recent["n"], x[torch.tensor([2, 0])][:, 2:])

    def test_reset(self, kind: str) -> None:
        store, x = filtered_store(kind), torch.randn(3, 4, 4)
        first = feed(store, x)
        store.reset()
        assert int(seen_tokens(store)) == 0 and torch.equal(feed(store, x), first)

    def test_copies_are_apart(self, kind: str) -> None:
        store, x = filtered_store(kind), torch.randn(3, 4, 4)
        feed(store, x)
        one, two = copy.deepcopy(store), copy.deepcopy(store)
        expected = feed(one, x[:, :1])
        feed(one, x[:, 1:])
        assert torch.equal(feed(two, x[:, :1]), expected)
        assert torch.equal(store.layers[1].recent["n"], x[:, 2:])

    def test_no_rollback(self, kind: str) -> None:
        store = filtered_store(kind)
        feed(store, torch.randn(3, 4, 4))
        with pytest.raises(OuroborosError, match="filters over tokens .* cannot be rolled back"):
            store.crop(-1)
        store.crop(0)


def test_static_entries_stay_where_they_are() -> None:
    store, x = filtered_store("static"), torch.randn(3, 4, 4)
    feed(store, x)
    kept = store.layers[1].recent["n"]
    feed(store, x[:, :1])
    assert store.layers[1].recent["n"] is kept and torch.equal(kept[:, 1], x[:, 0])


def test_cache_without_a_configuration_gets_its_entries() -> None:
    store = DynamicCache()
    prepare_entries(store, [FILTERED] * 2)
    assert [type(layer) for layer in store.layers] == [FilteredDynamicLayer] * 2
    layers = list(store.layers)
    prepare_entries(store, [FILTERED] * 2)
    assert store.layers == layers
    store.layers[1] = DynamicLayer()
    with pytest.raises(
        OuroborosError, match=r"cache of DynamicLayer has no room .*DynamicCache\(config=model\.config\)"
    ):
        prepare_entries(store, [FILTERED] * 2)
    with pytest.raises(OuroborosError, match="cache of StaticLayer has no room"):
        prepare_entries(static_store(), [FILTERED] * 2)


def test_cache_without_a_configuration_gets_entries_for_states() -> None:
    store = DynamicCache()
    prepare_entries(store, [CONSTANT_STATE] * 2)
    assert [type(layer) for layer in store.layers] == [ConstantStateLayer] * 2
    layers = list(store.layers)
    prepare_entries(store, [CONSTANT_STATE] * 2)
    assert store.layers == layers and store.get_seq_length() == 0
    with pytest.raises(OuroborosError, match="cache of StaticLayer has no room for the model's constant state"):
        prepare_entries(static_store(), [CONSTANT_STATE] * 2)


def test_entries_may_differ() -> None:
    """Those of keys and values alone may be of any kind."""
    kinds, store = [FILTERED, "full_attention", CONSTANT_STATE], DynamicCache()
    prepare_entries(store, kinds)
    assert [type(layer) for layer in store.layers] == [FilteredDynamicLayer, DynamicLayer, ConstantStateLayer]
    prepare_entries(store, kinds)
    with pytest.raises(
        OuroborosError, match="cache of FilteredDynamicLayer has no room for the model's constant state"
    ):
        prepare_entries(store, [CONSTANT_STATE, "full_attention", CONSTANT_STATE])
    plain = DynamicCache()
    prepare_entries(plain, ["full_attention"] * 2)
    assert plain.layers == []


def test_seen_tokens() -> None:
    assert seen_tokens(None) == 0 and seen_tokens(filled(2)) == 3


def filled(entries: int) -> DynamicCache:
    store = DynamicCache()
    for slot in range(entries):
        store.update(*torch.randn(2, 1, 1, 3, 4), slot)
    return store


def test_cache_bytes() -> None:
    assert cache_bytes(DynamicCache()) == 0
    assert cache_bytes(filled(2)) == 2 * 2 * 3 * 4 * 4  # entries x (keys, values) x tokens x channels x float32


def test_cache_of_another_layout_is_refused() -> None:
    check_cache_fits(DynamicCache(), 3, "(1)x3")
    check_cache_fits(filled(3), 3, "(1)x3")
    for entries in (2, 4):
        with pytest.raises(OuroborosError, match=rf"has {entries} entries but layout '\(1\)x3' fills 3.*with_loops"):
            check_cache_fits(filled(entries), 3, "(1)x3")
    marked = filled(7)
    check_cache_fits(marked, 7, "(1)x2 1 (1)x4")
    check_cache_fits(marked, 7, "(1)x2 1 (1)x4")
    with pytest.raises(OuroborosError, match=r"for layout '\(1\)x2 1 \(1\)x4'"):
        check_cache_fits(marked, 7, "(1)x3 1 (1)x3")

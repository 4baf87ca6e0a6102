"""The transformers rim: loss, loop counts, initialisation, gradients, bad input. The harness checks the rest."""

from __future__ import annotations

import copy
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache, PreTrainedConfig, StaticCache

from ouroboros.config import AttentionSpec, LoopPart
from ouroboros.config.parts.delta import DeltaSpec
from ouroboros.config.parts.head import LinearHeadSpec
from ouroboros.config.parts.latent import BottleneckAttentionSpec
from ouroboros.config.parts.loop import (
    ContractiveStepSpec,
    InjectionSpec,
    LoopEmbeddingSpec,
    LoopNormSpec,
    RecurrenceGateSpec,
)
from ouroboros.config.parts.stem import EmbeddingNormSpec, LearnedPositionsSpec
from ouroboros.errors import OuroborosError
from ouroboros.model.modeling import OuroborosForCausalLM, OuroborosModel

Build = Callable[..., OuroborosForCausalLM]
PROMPT = {"do_sample": False, "pad_token_id": 30, "max_new_tokens": 5, "min_new_tokens": 5}


def test_labels_are_shifted_inside(build: Build, ids: Tensor) -> None:
    model, labels = build(), ids.clone()
    labels[0, :4] = -100
    output = model(ids, labels=labels)
    expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    torch.testing.assert_close(output.loss, expected)


def test_logits_to_keep(build: Build, ids: Tensor) -> None:
    model = build()
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, model(ids).logits[:, -2:])


def test_scale_and_softcap(build: Build, ids: Tensor) -> None:
    model, scaled = build(), build(head=LinearHeadSpec(logit_scale=3.0, logit_softcap=0.5))
    scaled.load_state_dict(model.state_dict())
    torch.testing.assert_close(scaled(ids).logits, 0.5 * torch.tanh(3.0 * model(ids).logits / 0.5))


def test_embeddings_instead_of_ids(build: Build, ids: Tensor) -> None:
    model = build()
    torch.testing.assert_close(model(inputs_embeds=model.model.embed_tokens(ids)).logits, model(ids).logits)
    for given in ({}, {"input_ids": ids, "inputs_embeds": torch.zeros(2, 9, 16)}):
        with pytest.raises(OuroborosError, match="exactly one of input_ids and inputs_embeds"):
            model(**given)


def test_tuple_output(build: Build, ids: Tensor) -> None:
    logits = build()(ids, use_cache=False, return_dict=False)[0]
    assert logits.shape == (2, 9, 31)


@pytest.mark.parametrize("tie", [True, False])
def test_head(build: Build, tie: bool) -> None:
    model = build(tie_embeddings=tie)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tie
    assert ("lm_head.weight" in dict(model.named_parameters())) != tie


def test_embedding_norm(build: Build, ids: Tensor) -> None:
    model = build(stem=(EmbeddingNormSpec(),))
    norms = model(ids, output_hidden_states=True).hidden_states[0].square().mean(-1)
    torch.testing.assert_close(norms, torch.ones_like(norms), rtol=1e-3, atol=1e-3)


def test_learned_positions(build: Build, ids: Tensor) -> None:
    """One block sees the earlier tokens as a set, but for the table."""
    model = build(layout="1", stem=(LearnedPositionsSpec(),), max_position_embeddings=12)
    table = model.model.stem["positions"]
    assert table.weight.shape == (12, 16) and [rope.rotated for rope in model.model.rotary] == [0]
    turned = torch.cat((ids[:, :-1].flip(1), ids[:, -1:]), dim=1)
    assert not torch.allclose(model(turned).logits[:, -1], model(ids).logits[:, -1], atol=1e-3)
    with torch.no_grad():
        table.weight.zero_()
    torch.testing.assert_close(model(turned).logits[:, -1], model(ids).logits[:, -1])
    with pytest.raises(OuroborosError, match="the text has 13 tokens but the model's table of positions 12"):
        model(torch.zeros(1, 13, dtype=torch.long))


FILTERS = {"residual": DeltaSpec(values=2, compressor="token", embedding_conv=True)}
SHIFTS = {"mixer": AttentionSpec(num_heads=2, k_shift=True, v_shift=True)}
EVERYWHERE = FILTERS | SHIFTS | {"registers": 2}


@pytest.mark.parametrize("changes", [FILTERS, SHIFTS, EVERYWHERE], ids=["filters", "shifts", "everywhere"])
class TestFiltersOverTokens:
    """What a filter needs of earlier tokens is kept with the cache, whatever the chunks, the padding and the cache."""

    @pytest.mark.parametrize("first", [1, 2, 3, 4, 9])
    def test_prompts_of_any_length(self, build: Build, ids: Tensor, first: int, changes: Any) -> None:
        model, store = build(**changes), None
        expected, parts = model(ids, use_cache=False).logits, []
        for start, end in ((0, first), *((t, t + 1) for t in range(first, 9))):
            output = model(ids[:, start:end], past_key_values=store, use_cache=True)
            store = output.past_key_values
            parts.append(output.logits)
        torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-5, atol=1e-5)

    def test_changes_what_is_seen(self, build: Build, ids: Tensor, changes: Any) -> None:
        """A cache that forgets what filters saw gives other logits: the comparisons above can fail."""
        model = build(**changes)
        with torch.no_grad():
            store = model(ids[:, :5], use_cache=True).past_key_values
            forgotten = copy.deepcopy(store)
            for layer in forgotten.layers:
                layer.recent.clear()
            found = [model(ids[:, 5:], past_key_values=s).logits for s in (store, forgotten)]
        assert (found[0] - found[1]).abs().max() > 1e-3

    @pytest.mark.parametrize("options", [{"cache_implementation": "static"}, {"prefill_chunk_size": 2}], ids=str)
    def test_generate_with_padding(self, build: Build, ids: Tensor, options: Any, changes: Any) -> None:
        model, mask = build(**changes), torch.ones_like(ids)
        mask[0, :5] = 0
        found = model.generate(ids, attention_mask=mask, **PROMPT, **options)
        alone = model.generate(ids[:1, 5:], **PROMPT)
        assert found[0, 9:].tolist() == alone[0, 4:].tolist()

    def test_two_continuations_of_one_past(self, build: Build, ids: Tensor, changes: Any) -> None:
        model = build(**changes)
        with torch.no_grad():
            past = model(ids[:, :4], use_cache=True).past_key_values
            for end in (ids[:, 4:], (ids[:, 4:] + 1) % 30):
                found = model(end, past_key_values=copy.deepcopy(past)).logits
                expected = model(torch.cat((ids[:, :4], end), dim=1), use_cache=False).logits[:, 4:]
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

    def test_a_cache_made_without_a_configuration(self, build: Build, ids: Tensor, changes: Any) -> None:
        model, store = build(**changes), DynamicCache()
        model(ids[:, :4], past_key_values=store)
        found = model(ids[:, 4:], past_key_values=store).logits
        torch.testing.assert_close(found, model(ids, use_cache=False).logits[:, 4:], rtol=1e-5, atol=1e-5)
        plain: Any = PreTrainedConfig()
        plain.num_hidden_layers, plain.layer_types = 4, ["full_attention"] * 4
        with pytest.raises(OuroborosError, match="cache of DynamicLayer has no room"):
            model(ids, past_key_values=DynamicCache(config=plain))

    def test_assistants_are_refused(self, build: Build, ids: Tensor, changes: Any) -> None:
        with pytest.raises(OuroborosError, match="cannot be rolled back"):
            build(**changes).generate(
                ids[:1].repeat(1, 3), prompt_lookup_num_tokens=2, **PROMPT | {"max_new_tokens": 9}
            )


@pytest.mark.parametrize("form", ["2-D", "4-D", "additive", "dictionary"])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("sizes", [(9,), (2, 2, 1, 4), (1,) * 9], ids=str)
def test_filters_under_left_padding(build: Build, ids: Tensor, form: str, static: bool, sizes: Any) -> None:
    """Also of any form of mask, and where the padding is longer than a chunk."""
    model, mask = build(**EVERYWHERE), torch.ones_like(ids)
    mask[0, :5] = 0
    store: Any = StaticCache(config=model.config, max_cache_len=12) if static else DynamicCache(config=model.config)
    parts, at = [], 0
    with torch.no_grad():
        for size in sizes:
            part, positions = ids[:, at : at + size], (mask.cumsum(-1) - 1).clamp(min=0)[:, at : at + size]
            at += size
            given: Any = mask[:, :at]
            if form != "2-D":
                embeds = torch.empty(2, size, 0)
                given = model.create_masks_for_generate(model.config, embeds, given, store, positions)
            if form in ("4-D", "additive"):
                given = given["full_attention"]
            if form == "additive" and given is not None:
                given = torch.zeros(given.shape).masked_fill(~given, torch.finfo(torch.float32).min)
            parts.append(model(part, given, positions, past_key_values=store).logits)
        expected = model(ids[:1, 5:], use_cache=False).logits
    found = torch.cat(parts, dim=1)
    torch.testing.assert_close(found[:1, 5:], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1:], model(ids[1:], use_cache=False).logits, rtol=1e-5, atol=1e-5)


class TestInitialisation:
    def test_weights(self, build: Build) -> None:
        model = build(noise=0.0, init_std=0.3, hidden_size=64, registers=40, mixer=AttentionSpec(qkv_bias=True))
        for name, parameter in model.named_parameters():
            if "norm" in name:
                assert (parameter == 1).all(), name
            elif name.endswith("bias"):
                assert (parameter == 0).all(), name
            else:
                assert abs(float(parameter.detach().std()) - 0.3) < 0.05, name

    def test_zero_outputs_make_every_block_the_identity(self, build: Build, ids: Tensor) -> None:
        model = build(noise=0.0, zero_init_outputs=True)
        assert torch.equal(model.model(ids).last_hidden_state, model.model.norm(model.model.embed_tokens(ids)))

    @pytest.mark.parametrize(
        ("part", "expected"),
        [
            (InjectionSpec(mode="concat"), {"proj.weight": torch.eye(16, 32)}),
            (InjectionSpec(mode="add"), {"scale": torch.zeros(16)}),
            (LoopEmbeddingSpec(), {"weight": torch.zeros(2, 16)}),
            (LoopNormSpec(), {"weight": torch.ones(2, 16)}),
            (RecurrenceGateSpec(), {"proj.weight": torch.zeros(16, 32), "proj.bias": torch.full((16,), -2.0)}),
        ],
        ids=str,
    )
    def test_each_loop_part_alone_starts_at_its_values(
        self, build: Build, part: LoopPart, expected: dict[str, Tensor]
    ) -> None:
        found = build(noise=0.0, loop=(part,)).model.decoder.loops[0][part.kind].state_dict()
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)

    def test_registers_have_a_deviation_of_their_own(self, build: Build) -> None:
        model = build(noise=0.0, registers=200, register_std=1.0)
        assert abs(float(model.model.registers.detach().std()) - 1.0) < 0.05
        assert abs(float(model.model.embed_tokens.weight.detach().std()) - 0.02) < 0.005

    def test_query_gain(self, build: Build) -> None:
        model = build(noise=0.0, mixer=AttentionSpec(num_heads=2, query_gain=1.5))
        assert all((block.self_attn.query_gain == 1.5).all() for block in model.model.decoder.layers)


class TestLoops:
    def test_view_shares_weights_and_leaves_the_model(self, build: Build, ids: Tensor) -> None:
        model = build()
        before = model(ids).logits
        view = model.with_loops(4)
        assert isinstance(view, OuroborosForCausalLM)
        assert (view.schedule.notation, model.schedule.notation) == ("1 (1)x4 1", "1 (1)x2 1")
        assert [p.data_ptr() for p in view.parameters()] == [p.data_ptr() for p in model.parameters()]
        assert torch.equal(view(ids).logits, model(ids, loops=4, use_cache=False).logits)
        assert torch.equal(model(ids).logits, before)
        assert not torch.allclose(view(ids).logits, before)
        with torch.no_grad():
            model.model.embed_tokens.weight.mul_(2)
        assert torch.equal(view.model.embed_tokens.weight, model.model.embed_tokens.weight)

    def test_view_masks_padding(self, build: Build, ids: Tensor) -> None:
        view = build(registers=2).with_loops(3)
        mask = torch.ones_like(ids)
        mask[:, :4] = 0
        torch.testing.assert_close(
            view(ids, attention_mask=mask).logits[:, 4:], view(ids[:, 4:]).logits, rtol=1e-4, atol=1e-5
        )

    def test_view_of_a_view(self, build: Build, ids: Tensor) -> None:
        model = build()
        assert torch.equal(model.with_loops(5).with_loops(2)(ids).logits, model(ids).logits)

    def test_other_loops_in_one_call(self, build: Build, ids: Tensor) -> None:
        model = build(loop=(LoopEmbeddingSpec(),))
        assert torch.equal(model(ids, loops=2, use_cache=False).logits, model(ids).logits)
        assert model(ids, loops=5).past_key_values is None
        with pytest.raises(OuroborosError, match=r"use model\.with_loops"):
            model(ids, loops=3, past_key_values=DynamicCache(config=model.config))

    @pytest.mark.parametrize("static", [False, True])
    def test_cache_of_another_loop_count_is_refused(self, build: Build, ids: Tensor, static: bool) -> None:
        model = build()
        store = StaticCache(model.config, max_cache_len=32) if static else None
        store = model(ids, past_key_values=store, use_cache=True).past_key_values
        for loops in (1, 3):
            with pytest.raises(OuroborosError, match="made for another loop count"):
                model.with_loops(loops)(ids[:, :1], past_key_values=store)

    def test_cache_of_equal_size_but_other_loops_is_refused(self, build: Build, ids: Tensor) -> None:
        model = build(layout="(1)x2 1 (1)x4")
        store = model(ids, use_cache=True).past_key_values
        view = model.with_loops(3)
        assert view.config.num_hidden_layers == model.config.num_hidden_layers
        with pytest.raises(OuroborosError, match="made for another loop count"):
            view(ids[:, :1], past_key_values=store)

    def test_share_last_kv_serves_all_loop_counts(self, build: Build, ids: Tensor) -> None:
        model = build(share_last_kv=True)
        store = model(ids, use_cache=True).past_key_values
        assert len(store.layers) == 3
        logits = model.with_loops(4)(ids[:, :1], past_key_values=store).logits
        assert logits.isfinite().all() and store.get_seq_length() == 10

    def test_layout_without_loop(self, build: Build) -> None:
        with pytest.raises(OuroborosError, match="layout '2' has no loop"):
            build(layout="2").with_loops(2)
        with pytest.raises(OuroborosError, match="loops must be >= 1"):
            build().with_loops(0)


class TestTraining:
    def test_truncated_backpropagation(self, build: Build, ids: Tensor) -> None:
        model = build()

        def gradient(window: int | None) -> Tensor:
            model.zero_grad()
            model(ids, labels=ids, loops=4, use_cache=False, backprop_loops=window).loss.backward()
            grad = model.model.decoder.layers[1].mlp.up_proj.weight.grad
            assert grad is not None
            return grad.clone()

        assert torch.equal(gradient(None), gradient(4))
        assert not torch.allclose(gradient(None), gradient(2))
        assert model.model.decoder.layers[0].mlp.up_proj.weight.grad is None

    @pytest.mark.parametrize("registers", [0, 2])
    def test_activation_checkpointing_gives_the_same_gradients(self, build: Build, ids: Tensor, registers: int) -> None:
        model = build(registers=registers).train()
        results = []
        for on in (False, True):
            if on:
                model.activation_checkpointing_enable()
            model.zero_grad()
            model(ids, labels=ids, use_cache=False).loss.backward()
            results.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        assert model.model.gradient_checkpointing
        assert len(results[0]) == len(list(model.parameters()))
        for name, grad in results[0].items():
            torch.testing.assert_close(results[1][name], grad, msg=name)

    def test_no_cache_in_training_unless_asked(self, build: Build, ids: Tensor) -> None:
        model = build().train()
        assert model(ids).past_key_values is None
        assert model.eval()(ids).past_key_values is not None


class TestRim:
    def test_everything_works_with_the_network_off(
        self, build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*_: Any, **__: Any) -> NoReturn:
            raise AssertionError("the network was used")

        monkeypatch.setattr(socket, "socket", refuse)
        monkeypatch.setattr(socket, "getaddrinfo", refuse)
        model, ids = build(), torch.randint(0, 30, (1, 4))
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=False)
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), **PROMPT)
        assert torch.equal(loaded.generate(ids, attention_mask=torch.ones_like(ids), **PROMPT), expected)

    def test_files_are_safetensors_and_json(self, build: Build, tmp_path: Path) -> None:
        build().save_pretrained(tmp_path)
        assert {p.name for p in tmp_path.iterdir()} == {"config.json", "generation_config.json", "model.safetensors"}

    def test_base_model_by_auto_class(self, build: Build, tmp_path: Path, ids: Tensor) -> None:
        model = build()
        model.save_pretrained(tmp_path)
        loaded = AutoModel.from_pretrained(tmp_path).eval()
        assert isinstance(loaded, OuroborosModel)
        assert torch.equal(loaded(ids).last_hidden_state, model.model(ids).last_hidden_state)

    @pytest.mark.parametrize("options", [{"top_p": 0.9, "temperature": 0.7}, {"top_k": 5, "repetition_penalty": 1.3}])
    def test_sampling_is_reproducible(self, build: Build, ids: Tensor, options: dict[str, Any]) -> None:
        model, given = build(), {**PROMPT, "do_sample": True, "attention_mask": torch.ones_like(ids), **options}
        outputs = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            outputs.append(model.generate(ids, **given))
        assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])

    def test_generation_stops_at_the_end_of_text(self, build: Build, ids: Tensor) -> None:
        model = build(tie_embeddings=False)
        with torch.no_grad():
            model.lm_head.weight.zero_()  # all logits equal: greedy takes token 0
        model.generation_config.eos_token_id = 0
        given = {**PROMPT, "min_new_tokens": 0, "attention_mask": torch.ones_like(ids)}
        assert model.generate(ids, **given).shape == (2, 10)

    def test_prepared_and_dictionary_masks(self, build: Build, ids: Tensor) -> None:
        model = build(registers=2)
        causal = torch.ones(9, 9).tril().bool()[None, None].expand(2, 1, 9, 9)
        expected = model(ids).logits
        torch.testing.assert_close(model(ids, attention_mask=causal).logits, expected)
        torch.testing.assert_close(model(ids, attention_mask={"full_attention": causal}).logits, expected)
        additive = torch.zeros(2, 1, 9, 9).masked_fill(~causal, torch.finfo(torch.float32).min)
        torch.testing.assert_close(model(ids, attention_mask=additive).logits, expected)

    def test_half_precision(self, build: Build, ids: Tensor) -> None:
        model = build(
            loop=(
                InjectionSpec(mode="concat"),
                LoopEmbeddingSpec(),
                LoopNormSpec(),
                RecurrenceGateSpec(),
                ContractiveStepSpec(),
            ),
            registers=2,
            mixer=AttentionSpec(num_heads=2, qk_norm="before_rope", query_gain=1.5),
        )
        expected = model(ids).logits
        logits = model.to(torch.bfloat16)(ids).logits
        assert logits.dtype == torch.bfloat16
        assert (logits.float() - expected).abs().max() < 0.1 * expected.abs().max()

    def test_padding_on_the_right(self, build: Build, ids: Tensor) -> None:
        """Positions of keys that are rebuilt from latents are those of their tokens."""
        model = build(mixer=BottleneckAttentionSpec(num_heads=2, cache="latent"), registers=2)
        mask = torch.ones_like(ids)
        mask[0, 4:] = 0
        found = model(ids, attention_mask=mask).logits
        torch.testing.assert_close(found[:1, :4], model(ids[:1, :4]).logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[1:], model(ids[1:]).logits, rtol=1e-4, atol=1e-5)

"""What loading leaves behind, formats of fewer bits, another vocabulary."""

from __future__ import annotations

import copy
import dataclasses
import json
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM

from ouroboros.config import AttentionSpec, FeedForwardSpec, ModelSpec, OsamSpec
from ouroboros.errors import OuroborosError
from ouroboros.eval.harness import build_perturbed
from ouroboros.model.configuration import OuroborosConfig
from ouroboros.model.modeling import OuroborosForCausalLM
from ouroboros.nn.osam import Osam

BASE = ModelSpec(
    layout="1 (1)x2",
    vocab_size=31,
    hidden_size=16,
    max_position_embeddings=64,
    mixer=AttentionSpec(num_heads=2),
    ffn=FeedForwardSpec(intermediate_size=24),
)
OSAM = dataclasses.replace(BASE, mixer=OsamSpec(buckets=64, readout_hidden=8, frequencies=2, decay=True))
IDS = torch.randint(0, 30, (2, 9), generator=torch.Generator().manual_seed(0))


def tensors(model: OuroborosForCausalLM) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


@pytest.mark.parametrize("offset", [8, 24, 56])
def test_weights_lie_where_products_are_the_same(tmp_path: Path, offset: int) -> None:
    """A header of any length puts the tensors of a file anywhere."""
    model = build_perturbed(OSAM)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header, data = raw[8 : 8 + length], raw[8 + length :]
    header += b" " * (-(8 + len(header)) % 64 + offset)
    file.write_bytes(struct.pack("<Q", len(header)) + header + data)
    for loaded in (
        AutoModelForCausalLM.from_pretrained(tmp_path),
        AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)[0],
        AutoModel.from_pretrained(tmp_path),
    ):
        assert [name for name, tensor in tensors(loaded) if tensor.data_ptr() % 64 != 0] == []
    loaded = OuroborosForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight, "still tied"
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_what_a_part_never_trains_stays_frozen(tmp_path: Path) -> None:
    spec = ModelSpec(layout="1", vocab_size=11, hidden_size=8, mixer=OsamSpec(buckets=9, readout_hidden=5))
    model = OuroborosForCausalLM(OuroborosConfig.from_spec(spec))
    model.save_pretrained(tmp_path)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert {name.rpartition("self_attn.")[2] for name in frozen} == {"k_proj.weight", "v_proj.weight", "theta_k_raw"}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {name for name, p in loaded.named_parameters() if not p.requires_grad} == frozen
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and {n for n, p in loaded.named_parameters() if not p.requires_grad} == frozen


class TestFewerBits:
    @pytest.mark.parametrize("spec", [BASE, OSAM], ids=["attention", "osam"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_loading_keeps_what_positions_multiply(self, spec: ModelSpec, dtype: torch.dtype, tmp_path: Path) -> None:
        """Rotary frequencies are in no file, and loading builds modules without memory."""
        model = build_perturbed(spec)
        model.save_pretrained(tmp_path / "wide")
        cast = copy.deepcopy(model).to(dtype)
        cast.save_pretrained(tmp_path / "narrow")
        for loaded in (
            cast,
            AutoModelForCausalLM.from_pretrained(tmp_path / "wide", dtype=dtype),
            AutoModelForCausalLM.from_pretrained(tmp_path / "narrow"),
        ):
            assert loaded.dtype == dtype
            before = dict(tensors(model))
            kept = {"inv_freq"} | (set(Osam.PRECISE) if spec is OSAM else set())
            found = {name: tensor for name, tensor in tensors(loaded) if name.rpartition(".")[2] in kept}
            assert len(found) == (1 if spec is BASE else 1 + 2 * len(Osam.PRECISE))
            assert all(
                torch.equal(tensor, before[name]) and tensor.dtype == torch.float32 for name, tensor in found.items()
            )
            assert torch.equal(loaded(IDS).logits, cast(IDS).logits)

    def test_compiled_and_copied(self) -> None:
        model = build_perturbed(BASE).bfloat16()
        positions = torch.tensor([[0, 4095]])
        expected = model.model.rotary(positions)
        compiled = torch.compile(copy.deepcopy(model.model.rotary), backend="eager", fullgraph=True)
        assert all(torch.equal(a, b) for a, b in zip(compiled(positions), expected, strict=True))


class TestAnotherVocabulary:
    @pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
    @pytest.mark.parametrize("size", [40, 20])
    def test_is_saved_and_loaded(self, size: int, tied: bool, tmp_path: Path) -> None:
        model = build_perturbed(dataclasses.replace(BASE, tie_embeddings=tied))
        ids, before = IDS % 20, model(IDS % 20).logits
        table = model.resize_token_embeddings(size)
        assert table is model.get_input_embeddings() and table.num_embeddings == size
        assert (model.lm_head.weight is table.weight) == tied
        kept = min(size, 31)
        torch.testing.assert_close(model(ids).logits[..., :kept], before[..., :kept])
        model.save_pretrained(tmp_path)
        assert json.loads((tmp_path / "config.json").read_text())["spec"]["vocab_size"] == size
        for loader in (AutoModelForCausalLM, OuroborosForCausalLM):
            loaded = loader.from_pretrained(tmp_path)
            assert loaded.config.vocab_size == loaded.model.spec.vocab_size == loaded.lm_head.out_features == size
            assert torch.equal(loaded(ids).logits, model(ids).logits)
        assert model.with_loops(3)(ids).logits.shape[-1] == size
        assert model(ids, labels=ids).loss > 0

    def test_of_the_model_without_a_head_and_of_a_loop_count(self, tmp_path: Path) -> None:
        model = build_perturbed(BASE).with_loops(3)
        model.resize_token_embeddings(33, pad_to_multiple_of=16, mean_resizing=False)
        assert (model.config.vocab_size, model.config.loops, model.config.num_hidden_layers) == (48, 3, 4)
        base = AutoModel.from_config(OuroborosConfig.from_spec(BASE))
        base.resize_token_embeddings(35)
        base.save_pretrained(tmp_path)
        assert AutoModel.from_pretrained(tmp_path).spec.vocab_size == 35

    def test_nothing_asked_changes_nothing(self) -> None:
        model = build_perturbed(BASE)
        config = model.config.to_dict()
        assert model.resize_token_embeddings().num_embeddings == 31 and model.config.to_dict() == config

    @pytest.mark.parametrize("size", [0, 1, -3])
    def test_too_few_are_refused_before_anything_changes(self, size: int) -> None:
        model = build_perturbed(BASE)
        with pytest.raises(OuroborosError, match="vocab_size must be >= 2"):
            model.resize_token_embeddings(size)
        assert model.config.vocab_size == 31 == model(IDS).logits.shape[-1]

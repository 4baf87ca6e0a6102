"""What loading leaves behind, formats of fewer bits, another vocabulary."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM

from ouroboros.config import ModelSpec
from ouroboros.config.parts.loop import InjectionSpec, LoopEmbeddingSpec, LoopNormSpec, RecurrenceGateSpec
from ouroboros.config.parts.osam import OsamSpec
from ouroboros.config.parts.stem import LearnedPositionsSpec
from ouroboros.errors import OuroborosError
from ouroboros.model.configuration import OuroborosConfig
from ouroboros.model.modeling import OuroborosForCausalLM
from ouroboros.nn.osam import Osam

OSAM = {"mixer": OsamSpec(buckets=64, readout_hidden=8, frequencies=2, decay=True)}
Build = Callable[..., OuroborosForCausalLM]


def tensors(model: OuroborosForCausalLM) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


@pytest.mark.parametrize("offset", [8, 24, 56])
def test_weights_lie_where_products_are_the_same(ids: Tensor, build: Build, tmp_path: Path, offset: int) -> None:
    """A header of any length puts the tensors of a file anywhere."""
    model = build(**OSAM)
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
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_what_a_part_never_trains_stays_frozen(build: Build, tmp_path: Path) -> None:
    model = build(layout="1", mixer=OsamSpec(buckets=9, readout_hidden=5))
    model.save_pretrained(tmp_path)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert {name.rpartition("self_attn.")[2] for name in frozen} == {"k_proj.weight", "v_proj.weight", "theta_k_raw"}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {name for name, p in loaded.named_parameters() if not p.requires_grad} == frozen
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and {n for n, p in loaded.named_parameters() if not p.requires_grad} == frozen


def test_names_of_earlier_versions(build: Build, ids: Tensor, tmp_path: Path) -> None:
    """Files with the names that parameters had are read, by every class and without a warning, and saved anew."""
    parts = (InjectionSpec(), LoopEmbeddingSpec(), LoopNormSpec(), RecurrenceGateSpec())
    model = build(loop=parts, stem=(LearnedPositionsSpec(),), eos=None)
    model.save_pretrained(tmp_path)
    of_old = {
        "model.embed_positions.weight": "model.stem.positions.weight",
        "model.decoder.loops.0.inject_scale": "model.decoder.loops.0.inject.scale",
        "model.decoder.loops.0.embedding": "model.decoder.loops.0.embedding.weight",
        "model.decoder.loops.0.norm": "model.decoder.loops.0.norm.weight",
        "model.decoder.loops.0.gate_proj.weight": "model.decoder.loops.0.gate.proj.weight",
        "model.decoder.loops.0.gate_proj.bias": "model.decoder.loops.0.gate.proj.bias",
    }
    names = {today: old for old, today in of_old.items()}
    file = tmp_path / "model.safetensors"
    today = load_file(file)
    save_file({names.get(name, name): value for name, value in today.items()}, file, metadata={"format": "pt"})
    assert names.keys() <= today.keys()
    for loader in (AutoModelForCausalLM, OuroborosForCausalLM):
        loaded, info = loader.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert torch.equal(AutoModel.from_pretrained(tmp_path)(ids).last_hidden_state, model.model(ids).last_hidden_state)
    loaded.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == today.keys()


class TestFewerBits:
    @pytest.mark.parametrize("changes", [{}, OSAM], ids=["attention", "osam"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_loading_keeps_what_positions_multiply(
        self, build: Build, ids: Tensor, changes: Any, dtype: torch.dtype, tmp_path: Path
    ) -> None:
        """Rotary frequencies are in no file, and loading builds modules without memory."""
        model = build(**changes)
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
            kept = {"inv_freq"} | (set(Osam.PRECISE) if changes else set())
            found = {name: tensor for name, tensor in tensors(loaded) if name.rpartition(".")[2] in kept}
            assert len(found) == (1 + 3 * len(Osam.PRECISE) if changes else 1)
            assert all(
                torch.equal(tensor, before[name]) and tensor.dtype == torch.float32 for name, tensor in found.items()
            )
            assert torch.equal(loaded(ids).logits, cast(ids).logits)

    def test_compiled_and_copied(self, build: Build) -> None:
        model = build().bfloat16()
        positions = torch.tensor([[0, 4095]])
        expected = model.model.rotary[0](positions)
        compiled = torch.compile(copy.deepcopy(model.model.rotary[0]), backend="eager", fullgraph=True)
        assert all(torch.equal(a, b) for a, b in zip(compiled(positions), expected, strict=True))


class TestAnotherVocabulary:
    @pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
    @pytest.mark.parametrize("size", [40, 20])
    def test_is_saved_and_loaded(self, ids: Tensor, build: Build, size: int, tied: bool, tmp_path: Path) -> None:
        model = build(tie_embeddings=tied)
        ids, before = ids % 20, model(ids % 20).logits
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

    def test_of_the_model_without_a_head_and_of_a_loop_count(
        self, base: ModelSpec, build: Build, tmp_path: Path
    ) -> None:
        model = build().with_loops(3)
        model.resize_token_embeddings(33, pad_to_multiple_of=16, mean_resizing=False)
        assert (model.config.vocab_size, model.config.loops, model.config.num_hidden_layers) == (48, 3, 5)
        base = AutoModel.from_config(OuroborosConfig.from_spec(base))
        base.resize_token_embeddings(35)
        base.save_pretrained(tmp_path)
        assert AutoModel.from_pretrained(tmp_path).spec.vocab_size == 35

    def test_nothing_asked_changes_nothing(self, build: Build) -> None:
        model = build()
        config = model.config.to_dict()
        assert model.resize_token_embeddings().num_embeddings == 31 and model.config.to_dict() == config

    @pytest.mark.parametrize("size", [0, 1, -3])
    def test_too_few_are_refused_before_anything_changes(self, ids: Tensor, build: Build, size: int) -> None:
        model = build()
        with pytest.raises(OuroborosError, match="vocab_size must be >= 2"):
            model.resize_token_embeddings(size)
        assert model.config.vocab_size == 31 == model(ids).logits.shape[-1]

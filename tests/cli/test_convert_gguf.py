"""GGUF files, as llama.cpp writes them: read, and refused in one line where they are damaged."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from ouroboros.api import load
from ouroboros.data.tokenize import byte_tokenizer, load_tokenizer

SIZES = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "max_position_embeddings": 128}
CONFIG = Qwen2Config(vocab_size=258, num_attention_heads=4, num_key_value_heads=2, **SIZES)
MERGE = "t h"


@pytest.fixture(scope="module")
def donor() -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG).eval().float()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module")
def whole(donor: Any, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A random Qwen2 with a tokenizer of bytes that knows one longer token."""
    path = tmp_path_factory.mktemp("gguf") / "whole.gguf"
    byte_tokenizer().save(path.parent)
    entries = sorted(load_tokenizer(path.parent).backend.get_vocab().items(), key=lambda entry: entry[1])
    tokens = [*(token for token, _ in entries), MERGE.replace(" ", "")]
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_block_count(CONFIG.num_hidden_layers)
    writer.add_context_length(CONFIG.max_position_embeddings)
    writer.add_embedding_length(CONFIG.hidden_size)
    writer.add_feed_forward_length(CONFIG.intermediate_size)
    writer.add_head_count(CONFIG.num_attention_heads)
    writer.add_head_count_kv(CONFIG.num_key_value_heads)
    writer.add_layer_norm_rms_eps(CONFIG.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(CONFIG.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges([MERGE])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(256)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, CONFIG.num_hidden_layers)
    for name, tensor in donor.state_dict().items():
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def test_a_file_with_its_tokenizer(cli: Any, donor: Any, whole: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(whole)
    result = cli("convert", tmp_path / "x.gguf", "--out", tmp_path / "out")
    assert "Qwen2" in result.out and "this is the donor" in result.out
    assert result.err == ""  # no loading bar either
    model, tokenizer = load(tmp_path / "out")
    ids = tokenizer("the thirty ways").input_ids
    assert ids.count(257) == 2 and tokenizer.decode(ids) == "the thirty ways"
    with torch.no_grad():
        want = donor(torch.tensor([ids])).logits
        assert (model(torch.tensor([ids])).logits - want).abs().max() <= 1e-4 * want.abs().max()


def cut(size: int) -> Callable[[bytes], bytes]:
    return lambda whole: whole[:size]


def header(seed: int) -> Callable[[bytes], bytes]:
    """Some bytes of what precedes the tensors are others; not all such changes can be noticed."""

    def changed(whole: bytes) -> bytes:
        chooser, data = random.Random(seed), bytearray(whole)
        for _ in range(20):
            data[chooser.randrange(4, 400)] = chooser.randrange(256)
        return bytes(data)

    return changed


def numbers(whole: bytes) -> bytes:
    """Weights that are no numbers any more, long before the end."""
    middle = len(whole) // 2 // 4 * 4
    return whole[:middle] + b"\xff" * 4000 + whole[middle + 4000 :]


@pytest.mark.parametrize(
    "damage",
    [*map(cut, (4, 9, 24, 300, 5000, 60_000, -1)), *map(header, range(6)), numbers],
    ids=lambda damage: damage.__qualname__.partition(".")[0],
)
def test_damaged_files_are_refused_in_one_line(
    damage: Callable[[bytes], bytes], cli: Any, whole: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(damage(whole))
    error = cli("convert", path, "--out", tmp_path / "out", "--no-tokenizer").error()
    assert error.startswith(str(path)) and not (tmp_path / "out").exists()


def test_the_real_command_refuses_in_one_line_too(command: Any, whole: bytes, tmp_path: Path) -> None:
    for name, damage in {"cut": cut(60_000), "corrupt": numbers}.items():
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(damage(whole))
        assert command("convert", path, "--out", tmp_path / "out").error().startswith(str(path))

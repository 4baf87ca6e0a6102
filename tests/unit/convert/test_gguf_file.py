"""GGUF files that are written: what is stored, how, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from ouroboros.api import build
from ouroboros.config import AttentionSpec, FeedForwardSpec, ModelSpec, Recipe, RopeSpec
from ouroboros.convert import donors
from ouroboros.convert.gguf_file import Ends, _split_of, new_file, read_tensors, write
from ouroboros.convert.gguf_form import LLAMA, unrolled
from ouroboros.data import bpe
from ouroboros.data.tokenize import TextTokenizer, byte_tokenizer, character_tokenizer
from ouroboros.errors import OuroborosError
from ouroboros.nn.rope import Rope

SPEC = ModelSpec(layout="2", vocab_size=257, hidden_size=16).replace(
    mixer=AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=6, rope=RopeSpec(base=300.0)),
    ffn=FeedForwardSpec(intermediate_size=24),
)


def tensors(dtype: torch.dtype, spec: ModelSpec = SPEC) -> dict[str, torch.Tensor]:
    """Numbers that ``dtype`` holds, apart from the norms, and types of fewer bits do not."""
    torch.manual_seed(0)
    model = build(Recipe(name="x", model=spec)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=1e6 if dtype == torch.bfloat16 else 0.4)
        if parameter.ndim > 1:
            parameter.data = parameter.data.to(dtype).float()
    return unrolled(model, model.schedule.visits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_transformers_reads_the_same_numbers(dtype: torch.dtype, tmp_path: Path) -> None:
    state, path = tensors(dtype), tmp_path / "x.gguf"
    stored = write(path, LLAMA, SPEC, state, byte_tokenizer())
    assert stored == str(dtype).removeprefix("torch.")
    donor = donors.find(path)
    assert donor is not None and donor.config.head_dim == 6 and donor.config.rope_parameters["rope_theta"] == 300.0
    theirs = donors.tensors_of(donor.family, donor.model())
    assert theirs.keys() == state.keys() and all(theirs[name].equal(tensor) for name, tensor in state.items())
    found = read_tensors(path)
    assert found["blk.1.ffn_up.weight"].equal(state["model.decoder.layers.1.mlp.up_proj.weight"])
    kinds = {tensor.name: tensor.tensor_type for tensor in gguf.GGUFReader(path).tensors}
    assert kinds["output_norm.weight"] == gguf.GGMLQuantizationType.F32
    text = donor.tokenizer()
    assert text.encode("naïve".encode()).tolist() == list("naïve".encode()) and text.eos_id == 256


def test_how_rotations_are_scaled(tmp_path: Path) -> None:
    """The file divides the plain frequencies by the factors, and positions by the scale."""
    rope = RopeSpec(base=300.0, scale=3.0, slowing=4.0, slowing_context=64)
    spec = SPEC.replace(mixer=SPEC.block.mixer.replace(rope=rope))
    write(tmp_path / "x.gguf", LLAMA, spec, tensors(torch.float32, spec), None)
    found = fields(tmp_path / "x.gguf")
    assert (found["llama.rope.scaling.type"], found["llama.rope.scaling.factor"]) == ("linear", 3.0)
    factors = read_tensors(tmp_path / "x.gguf")["rope_freqs.weight"]
    plain = 300.0 ** -(torch.arange(3) / 3) / 3
    torch.testing.assert_close(plain / factors, Rope(rope, 6).frequencies())
    assert factors[-1] == 4 and factors[0] < 4


def fields(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def test_what_is_said_of_the_tokenizer(tmp_path: Path) -> None:
    spec, text = SPEC.replace(vocab_size=259), byte_tokenizer()
    state = tensors(torch.float32, spec)
    write(tmp_path / "x.gguf", LLAMA, spec, state, text, more={"num_loops": 3, "skip_loop_final_norm": True})
    found = fields(tmp_path / "x.gguf")
    assert found["llama.num_loops"] == 3 and found["llama.skip_loop_final_norm"] is True
    assert found["tokenizer.ggml.tokens"][-3:] == ["<|endoftext|>", "<|unused257|>", "<|unused258|>"]
    assert found["tokenizer.ggml.token_type"] == [1] * 256 + [3] * 3
    assert found["tokenizer.ggml.merges"] == [] and found["tokenizer.ggml.pre"] == "qwen2"
    assert found["tokenizer.ggml.bos_token_id"] == 256 and found["tokenizer.ggml.add_bos_token"] is True
    write(tmp_path / "z.gguf", LLAMA, spec, state, text, ends=Ends(7, 8))
    found = fields(tmp_path / "z.gguf")
    assert (found["tokenizer.ggml.bos_token_id"], found["tokenizer.ggml.eos_token_id"]) == (7, 8)
    assert found["tokenizer.ggml.add_bos_token"] is False
    write(tmp_path / "y.gguf", LLAMA, spec, state, None)
    assert fields(tmp_path / "y.gguf")["tokenizer.ggml.model"] == "no_vocab"


def merging(steps: Any) -> TextTokenizer:
    """A tokenizer that knows ``ab``, and cuts texts as ``steps`` say."""
    alphabet = {char: index for index, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab={**alphabet, "ab": 256}, merges=[("a", "b")]))
    backend.pre_tokenizer, backend.decoder = steps, decoders.ByteLevel()
    backend.add_special_tokens(["<|end|>"])
    hf = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")
    return TextTokenizer(hf.backend_tokenizer, eos_id=257, hf=hf)


def parts(pattern: str, behavior: Any = "isolated") -> Any:
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), behavior=behavior), last])


WHOLE = pre_tokenizers.ByteLevel(add_prefix_space=False)


@pytest.mark.parametrize(
    ("steps", "name"),
    [
        (WHOLE, "gpt-2"),
        (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), WHOLE]), "smollm"),
        (parts(GGUF_PRE_TOKENIZER_SPLITS["llama-bpe"]), "llama3"),
        (parts(GGUF_PRE_TOKENIZER_SPLITS["qwen2"]), "qwen2"),
        (parts(bpe.QWEN), "qwen35"),
    ],
)
def test_ways_of_cutting_that_have_a_name(steps: Any, name: str) -> None:
    assert _split_of(json.loads(merging(steps).backend.to_str())) == name


def test_tokenizers_without_a_place_are_refused() -> None:
    named = "no name for the way in which this tokenizer cuts a text before it merges; write the model alone"
    odd = [
        parts("[0-9]+"),
        parts(GGUF_PRE_TOKENIZER_SPLITS["qwen2"], "removed"),
        pre_tokenizers.ByteLevel(add_prefix_space=True),
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=False), WHOLE]),
    ]
    for tokenizer in map(merging, (parts(bpe.OWN), *odd)):
        with pytest.raises(OuroborosError, match=named):
            _split_of(json.loads(tokenizer.backend.to_str()))
    folded = merging(WHOLE)
    folded.backend.normalizer = normalizers.Lowercase()
    for tokenizer in (folded, character_tokenizer([b"abc"])):
        with pytest.raises(
            OuroborosError, match="neither of bytes nor byte-level BPE; for GGUF, write .*--no-tokenizer"
        ):
            _split_of(json.loads(tokenizer.backend.to_str()))


def test_a_file_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(RuntimeError), new_file(out) as work:
        work.write_bytes(b"half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with new_file(out) as work:
        work.write_bytes(b"all")
    with pytest.raises(OuroborosError, match=r"out exists; choose another path"), new_file(out):
        pass
    with (
        pytest.raises(OuroborosError, match=r"cannot write .*missing.x: No such file"),
        new_file(tmp_path / "missing" / "x") as work,
    ):
        work.write_bytes(b"all")
    assert out.read_bytes() == b"all" and len(list(tmp_path.iterdir())) == 1

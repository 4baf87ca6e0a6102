"""A model as one file: what was given comes back, bytes are the same, what does not belong together is refused."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ouroboros.data.tokenize import byte_tokenizer
from ouroboros.errors import OuroborosError
from ouroboros.pack.artifact import Artifact, expected_tensors
from ouroboros.pack.coded import Coded
from ouroboros.pack.write import pack, write_artifact


def same(given: Coded | torch.Tensor, found: Coded | torch.Tensor) -> bool:
    """Whether two tensors are stored alike."""
    if isinstance(given, Coded) and isinstance(found, Coded):
        settings = (given.bits, given.shape) == (found.bits, found.shape)
        return settings and given.codes.equal(found.codes) and given.scales.equal(found.scales)
    return not isinstance(given, Coded) and not isinstance(found, Coded) and given.equal(found)


def test_everything_comes_back(packed, tensors, small):
    artifact = Artifact(packed)
    found = artifact.tensors()
    assert found.keys() == tensors.keys() and all(same(tensors[name], found[name]) for name in found)
    for name, weight in artifact.weights().items():
        assert weight.equal(tensors[name].dense() if isinstance(tensors[name], Coded) else tensors[name])
    assert artifact.spec == small.spec and artifact.header.facts == small.facts and artifact.header.eos_token_id == 256
    assert artifact.size == len(packed)


@settings(max_examples=25)
@given(data=st.data())
def test_any_widths_and_groups_come_back(small, data):
    """Every tensor in codes of its own, also single numbers; codes and steps are arbitrary."""
    spec = dataclasses.replace(small.spec, vocab_size=11)
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    given: dict[str, Coded | torch.Tensor] = {}
    for name, wanted in expected_tensors(spec).items():
        bits = data.draw(st.integers(2, 8))
        matrix = small.rounded(torch.zeros(wanted.shape), bits).codes
        low = data.draw(st.sampled_from([-(2 ** (bits - 1)), 0, -1]))
        codes = torch.randint(low, 2 ** (bits - 1), matrix.shape).to(torch.int8)
        groups = data.draw(st.sampled_from([n for n in (1, 2, 8, matrix.shape[1]) if matrix.shape[1] % n == 0]))
        scales = torch.rand(len(matrix), groups).half()
        given[name] = Coded(codes=codes, scales=scales, bits=bits, shape=tuple(wanted.shape))
    found = Artifact(pack(spec, given)).tensors()
    assert all(same(given[name], found[name]) for name in given)


def test_the_same_model_gives_the_same_bytes(packed, tensors, small):
    threads = torch.get_num_threads()
    shuffled = dict(reversed(tensors.items()))
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            assert pack(small.spec, shuffled, byte_tokenizer(), small.facts, eos_token_id=256) == packed
    finally:
        torch.set_num_threads(threads)


def test_tied_matrices_are_stored_once(tensors, small):
    both = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}
    assert len(pack(small.spec, both)) == len(pack(small.spec, tensors))
    untied = dataclasses.replace(small.spec, tie_embeddings=False)
    apart = small.content_of(untied)
    assert "lm_head.weight" in apart and Artifact(pack(untied, apart)).tensors().keys() == apart.keys()


def test_the_size_is_that_of_the_file(packed, tensors, tmp_path: Path, small):
    path = tmp_path / "model.ouro"
    size = write_artifact(path, small.spec, tensors, byte_tokenizer(), small.facts, eos_token_id=256)
    assert path.read_bytes() == packed and size == len(packed)
    assert [p.name for p in tmp_path.iterdir()] == ["model.ouro"]
    with pytest.raises(OuroborosError, match="cannot write"):
        write_artifact(tmp_path / "none" / "model.ouro", small.spec, tensors)


def test_what_does_not_belong_together_is_refused(tensors, small):
    name, vector = "model.decoder.layers.0.self_attn.q_proj.weight", "model.norm.weight"
    matrix = tensors[name]
    assert isinstance(matrix, Coded)
    for change, message in (
        ({name: None}, f"{name} are missing"),
        ({"extra.weight": tensors[vector], "more": tensors[vector]}, "no tensors extra.weight, more"),
        ({name: small.rounded(torch.rand(16, 8), 6)}, rf"{name} has shape \(16, 8\), the model's has \(16, 16\)"),
        ({name: Coded(codes=matrix.codes.T, scales=matrix.scales[:, :1], bits=8, shape=(16, 16))}, None),
        ({vector: torch.ones(16, dtype=torch.float64)}, "torch.float64; give codes or one of float16"),
        ({vector: torch.ones(16, dtype=torch.int64)}, "for numbers of torch.float32"),
        ({vector: torch.full((16,), math.nan)}, f"tensor '{vector}' holds NaN or infinity"),
        ({name: dataclasses.replace(matrix, scales=matrix.scales / 0)}, "scales.* holds NaN or infinity"),
        ({name: dataclasses.replace(matrix, bits=2)}, "codes that 2 bits cannot hold"),
    ):
        changed = {key: value for key, value in {**tensors, **change}.items() if value is not None}
        if message is None:
            pack(small.spec, changed)  # codes need not be contiguous
            continue
        with pytest.raises(OuroborosError, match=message):
            pack(small.spec, changed)
    with pytest.raises(OuroborosError, match="tokenizer has 257 entries and the model a vocabulary of 300"):
        spec = dataclasses.replace(small.spec, vocab_size=300)
        pack(spec, small.content_of(spec), byte_tokenizer())

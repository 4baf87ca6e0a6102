"""The standalone program against the library: the same weights, ids, logits and scores, or a refusal by name."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import brotli
import numpy as np
import pytest
import torch
from variants import BASE, VARIANTS, model

from ouroboros.api import build, open_model
from ouroboros.config import ModelSpec, Recipe, RopeSpec, to_dict
from ouroboros.config.parts.head import LinearHeadSpec
from ouroboros.config.parts.loop import InjectionSpec, LoopEmbeddingSpec, LoopNormSpec, RecurrenceGateSpec
from ouroboros.convert import standalone_run as program
from ouroboros.data.tokenize import TextTokenizer, byte_tokenizer, character_tokenizer, train_bpe
from ouroboros.eval.score import score
from ouroboros.pack.artifact import Artifact, expected_tensors
from ouroboros.pack.codec import encode
from ouroboros.pack.header import Facts
from ouroboros.pack.quantize import quantize
from ouroboros.pack.write import assembled, write_artifact
from ouroboros.recipes import recipe
from ouroboros.schedule import parse
from ouroboros.serve.sampling import Sampling
from ouroboros.serve.stream import Continuation

TEXT = "".join(f"{n} times {n % 7} is {n * (n % 7)}, caf\u00e9 <|endoftext|>\n" for n in range(60)).encode()
KNOWN_LOOP_PARTS = (
    InjectionSpec(mode="concat"),
    LoopEmbeddingSpec(rows=2),
    LoopNormSpec(eps=1e-3),
    RecurrenceGateSpec(),
)
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Packs a model of no part at its start: codes of 2 to 8 bits, in groups too, and every format of numbers."""

    def written(spec: ModelSpec, tokenizer: TextTokenizer | None = None, facts: Facts | None = None) -> Path:
        torch.manual_seed(0)
        weights, tensors = build(Recipe(name="x", model=spec)).state_dict(), {}
        for index, name in enumerate(expected_tensors(spec)):
            value = torch.randn_like(weights[name]) * (0.1 if weights[name].ndim == 1 else 0.3) + ("norm" in name)
            if value.ndim > 1:
                tensors[name] = quantize(value, 2 + index % 7, group=value.shape[1] // (1 + index % 2))
            else:
                tensors[name] = value.to((torch.float16, torch.bfloat16, torch.float32)[index % 3])
        path = tmp_path / "model.pack"
        end = None if tokenizer is None else tokenizer.eos_id
        write_artifact(path, spec, tensors, tokenizer, facts, eos_token_id=end)
        return path

    return written


def of_text(tokenizer: TextTokenizer) -> ModelSpec:
    return BASE.replace(vocab_size=tokenizer.vocab_size)


SPECS = {
    "gpt": recipe("gpt", "tiny").model,
    "loop": recipe("loop", "tiny").model,
    "known loop parts": model(loop=KNOWN_LOOP_PARTS, layout="1 a:(2)x3 1 (a)x2 a"),
    "window, logits": model(
        {"mixer": BASE.block.mixer.replace(num_kv_heads=2, window=5, score_channels=3.0, qk_norm="after_rope")},
        head=LinearHeadSpec(logit_scale=0.5, logit_softcap=5.0),
    ),
    "slower rotation": model(
        {"mixer": BASE.block.mixer.replace(rope=RopeSpec(slowing=8.0, slowing_context=20, slowing_high=3.0))}
    ),
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_weights_and_logits_are_the_library_s(spec: ModelSpec, write: Write) -> None:
    path = write(spec)
    runs, ours = program.Model(path), open_model(path).model
    weights = Artifact(path).weights()
    assert runs.weights.keys() == weights.keys()
    assert all(np.array_equal(runs.weights[name], value.float().numpy()) for name, value in weights.items())
    ids = torch.randint(spec.vocab_size, (1, 60), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = ours(ids).logits[0].numpy()
    found = runs.logits(ids[0].tolist())
    assert found.dtype == np.float32 and np.abs(found - want).max() < 1e-4 * np.abs(want).max()
    cache = program.Cache()
    pieces = [runs.logits(ids[0, a:b].tolist(), cache, keep=1)[0] for a, b in ((0, 20), (20, 21), (21, 22), (22, 60))]
    assert len(cache) == parse(spec.layout).num_visits
    assert np.abs(np.stack(pieces) - want[[19, 20, 21, 59]]).max() < 1e-4 * np.abs(want).max()


def test_every_part_and_option_is_known_or_refused(write: Write) -> None:
    """Of the variants that between them have all: nothing is left out silently."""
    refused, ids = {}, list(range(40))
    for name, spec in VARIANTS.items():
        try:
            program.check_known(to_dict(spec), "model", "model")
        except ValueError as error:
            refused[name] = str(error)
            continue
        path = write(spec)
        with torch.no_grad():
            want = open_model(path).model(torch.tensor([ids])).logits[0].numpy()
        assert np.abs(program.Model(path).logits(ids) - want).max() < 1e-4 * np.abs(want).max(), name
    assert len(VARIANTS) - len(refused) > 15
    assert all("standalone program" in line and "\n" not in line for line in refused.values())
    assert "model.registers is 3" in refused["registers"]
    assert "model.block.mixer is 'osam', where the standalone program knows attention" in refused["osam kupdate"]
    assert "model.block.mixer.k_shift is True" in refused["shifts"]
    assert "model.loop is 'flow'" in refused["loop flow, gain"]
    assert "model.overrides is [{" in refused["blocks that differ"]
    assert "model.share_last_kv is True" in refused["share last kv"]


def test_every_known_kind_is_tried() -> None:
    parts = [part for spec in [*SPECS.values(), *VARIANTS.values()] for part in spec.parts]
    tried = {part.kind for part in parts}
    known = {kind for kinds in program.KNOWN.values() for kind in kinds if kind}
    assert known <= tried


@pytest.mark.parametrize(
    "layout", ["12", "(1)x8", "8 (1)x8 8", "3 w:(1)x2", "a:2 3 a", "7 a-b:1 ( a-b ) x 3", "2(2)x3 2"]
)
def test_layouts(layout: str) -> None:
    found = program.segments_of(layout)
    want = [(segment.blocks, segment.loops, segment.looped) for segment in parse(layout).segments]
    assert found == want


@pytest.mark.parametrize("codec", ["brotli", "brotli-columns"])
def test_codes_of_brotli_are_the_library_s(codec: str) -> None:
    shapes = [[3, 5], [7], [2, 3, 4]]
    matrices = [np.arange(math.prod(s), dtype=np.int8).reshape(s[0] if len(s) > 1 else 1, -1) for s in shapes]
    data, _ = encode(codec, matrices, 8)
    section = {"codec": codec, "bits": 8, "dtype": None, "tensors": [{"shape": shape} for shape in shapes]}
    found = list(program.plain(data, section))
    assert all(np.array_equal(codes.reshape(-1), matrix.reshape(-1)) for codes, matrix in zip(found, matrices))


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_range_coder_is_the_library_s(bits: int) -> None:
    """Across many blocks, short rows, one row, and rows that are wider than columns are told apart."""
    random, limit = np.random.default_rng(bits), 2 ** (bits - 1)
    shapes = [(300, 130), (900, 3), (1, 70), (2, 17000)]
    normal = [random.normal(size=shape) * random.uniform(0.1, 0.4, (shape[0], 1)) * limit for shape in shapes]
    matrices = [np.clip(np.round(codes), -limit, limit - 1).astype(np.int8) for codes in normal]
    data, _ = encode("range", matrices, bits)
    section = {"bits": bits, "tensors": [{"shape": [70] if shape[0] == 1 else list(shape)} for shape in shapes]}
    found = list(program.decode_range(data, section))
    assert len(found) == len(matrices)
    assert all(np.array_equal(codes, matrix.reshape(-1)) for codes, matrix in zip(found, matrices))


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_ids_and_scores_are_the_library_s(kind: str, write: Write) -> None:
    tokenizer = byte_tokenizer() if kind == "bytes" else train_bpe([TEXT], 300)
    spec = of_text(tokenizer)
    trained = Recipe(name="x", model=spec)
    trained = to_dict(trained) | {"data": to_dict(trained.data) | {"sequence_length": 24}}
    path = write(spec, tokenizer, Facts(recipe=trained))
    runs = program.Model(path)
    text = program.Text(runs.files, runs.header["eos_token_id"])
    ids = text.encode(TEXT)
    assert ids == [tokenizer.eos_id, *tokenizer.encode(TEXT).tolist()]
    assert text.decode(ids) == TEXT
    ours = open_model(path).model
    sampling = Sampling(temperature=0.0, max_new_tokens=25)
    wanted = "".join(Continuation(ours, tokenizer, b"3 times", sampling))
    assert program.continued(runs, text, b"3 times", 25, 0.0, 0).decode(errors="replace") == wanted
    found, window = program.score(runs, text, TEXT)
    assert window == 24
    assert found == pytest.approx(score(ours, tokenizer, [TEXT], window=24).bits_per_byte, abs=1e-5)
    with pytest.raises(ValueError, match="the text is empty"):
        program.score(runs, text, b"")


def test_what_a_prompt_may_be(write: Write) -> None:
    tokenizer = byte_tokenizer()
    runs = program.Model(write(of_text(tokenizer)))
    text = program.Text({"tokenizer.json": tokenizer.backend.to_str().encode()}, tokenizer.eos_id)
    drawn = [
        program.continued(runs, text, b"ab", 30, temperature, seed) for temperature, seed in ((2, 1), (2, 1), (2, 2))
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert program.continued(runs, text, b"a" * 60, 30, 0.0, 0) == program.continued(runs, text, b"a" * 60, 3, 0.0, 0)
    with pytest.raises(ValueError, match="the prompt has 65 tokens, and the model's context holds 64"):
        program.continued(runs, text, b"a" * 64, 1, 0.0, 0)


def test_tokenizers_that_are_refused() -> None:
    state = character_tokenizer([TEXT]).backend.to_str()
    with pytest.raises(ValueError, match="knows tokenizers of bytes and byte-level BPE alone"):
        program.Text({"tokenizer.json": state.encode()}, 5)
    with pytest.raises(ValueError, match="holds no tokenizer"):
        program.Text({}, 5)


def test_damaged_files_are_refused(write: Write) -> None:
    path = write(BASE)
    data = path.read_bytes()
    for length in (0, 5, 47, 48, 300, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match="cut off"):
            program.read_packed(path)
    for place in range(0, len(data), 397):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(ValueError, match=r"damaged or cut off|not a packed model|version \d+ of the format"):
            program.read_packed(path)
    length = int.from_bytes(data[12:16], "little")
    header = brotli.decompress(data[48 : 48 + length]).replace(b'"codec":"range"', b'"codec":"other"')
    path.write_bytes(assembled(brotli.compress(header), data[48 + length :]))
    with pytest.raises(ValueError, match=r"section 'codes/2/range': unknown codec 'other'"):
        program.read_packed(path)


def test_an_option_of_a_later_version_is_refused_unless_it_is_off() -> None:
    values: dict[str, Any] = json.loads(json.dumps(to_dict(BASE)))
    values["block"]["mixer"]["rope"]["spiral"] = 0
    program.check_known(values, "model", "model")
    values["block"]["mixer"]["rope"]["spiral"] = 2.5
    with pytest.raises(
        ValueError, match=r"model.block.mixer.rope.spiral is 2.5, which the standalone program does not"
    ):
        program.check_known(values, "model", "model")

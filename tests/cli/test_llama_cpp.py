"""llama.cpp continues what was exported with the same tokens; needs the extra ``llama-cpp``, so not in CI."""

from __future__ import annotations

import dataclasses
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from ouroboros.api import build
from ouroboros.config import RopeSpec
from ouroboros.convert.gguf_export import to_gguf, to_nanbeige_gguf
from ouroboros.data.tokenize import byte_tokenizer, resolve_tokenizer
from ouroboros.recipes import recipe

pytestmark = [
    pytest.mark.llama_cpp,
    pytest.mark.skipif(find_spec("llama_cpp") is None, reason="the extra llama-cpp is not installed"),
    pytest.mark.filterwarnings("ignore"),  # of that package
]
PROMPT, FLOAT32 = "3 times 4, caf\u00e9", 0
GROUPED = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 10}
SLOWED = RopeSpec(slowing=4.0, slowing_context=64, slowing_high=8.0)
ODD_TEXT = (
    "It's I'VE we'Ll 'tis don\u2019t 12,345.67 + x2 = 9\u00b2; \u0939\u093f\u0928\u094d\u0926\u0940"
    " \u0e20\u0e32\u0e29\u0e32 e\u0301 \u65e5\u672c\u8a9e \U0001f600\u200d\U0001f525 \u0661\u0662\u0663\r\n\r\n\t"
    "  if (a[0] != b):\n        return {}  # done...\n\n\n \u00a0\u2003x  \n  y <|endoftext|> \u00e6\u0301 'S end "
)


def model_of(name: str, vocab_size: int = 257, **changes: Any) -> Any:
    """A tiny model of a recipe whose every number acts, in a layout with a loop."""
    made = recipe(name, "tiny")
    spec, mixer = made.model, made.model.block.mixer.replace(**changes.pop("mixer", {}))
    ffn = spec.block.ffn.replace(bias=changes.pop("bias", False))
    torch.manual_seed(0)
    model = build(
        dataclasses.replace(made, model=spec.replace(vocab_size=vocab_size, mixer=mixer, ffn=ffn, **changes))
    ).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def opened(path: Path) -> Any:
    import llama_cpp

    options: dict[str, Any] = {"n_gpu_layers": 0, "verbose": False, "logits_all": True, "flash_attn": False}
    return llama_cpp.Llama(str(path), n_ctx=256, type_k=FLOAT32, type_v=FLOAT32, **options)


def check_the_same(model: Any, theirs: Any, ids: list[int]) -> None:
    """The same logits but for rounding, and the same 40 tokens."""
    theirs.eval(ids)
    with torch.no_grad():
        want_TV = model(torch.tensor([ids])).logits[0]
    found_TV = torch.tensor(theirs.scores[: len(ids)])
    assert (found_TV - want_TV).abs().max() <= 1e-3 * want_TV.abs().max()
    # Without a mask, generate() takes the token that begins the text, which is also the one that pads, for padding.
    options: dict[str, Any] = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None, "pad_token_id": 256}
    ids_1T = torch.tensor([ids])
    want = model.generate(ids_1T, attention_mask=torch.ones_like(ids_1T), **options)[0, len(ids) :].tolist()
    stream = theirs.generate(ids, temp=0.0, repeat_penalty=1.0)
    assert [next(stream) for _ in want] == want


@pytest.mark.parametrize(
    ("write", "name", "changes"),
    [
        pytest.param(to_gguf, "loop-portable", {"layout": "(2)x3"}, id="unrolled"),
        pytest.param(to_nanbeige_gguf, "loop-portable", {"layout": "(2)x3"}, id="looped"),
        pytest.param(to_gguf, "loop", {}, id="loop"),
        pytest.param(to_gguf, "loop", {"tie_embeddings": False, "mixer": GROUPED}, id="loop-grouped"),
        pytest.param(to_gguf, "loop-portable", {"mixer": {**GROUPED, "qk_norm": "before_rope"}}, id="qk-norm"),
        pytest.param(
            to_gguf,
            "loop-portable",
            {"bias": True, "mixer": {**GROUPED, "qkv_bias": True, "out_bias": True}},
            id="biases",
        ),
        pytest.param(to_gguf, "loop-portable", {"mixer": {"rope": SLOWED}}, id="slowed"),
        pytest.param(to_nanbeige_gguf, "loop-portable", {"mixer": {"rope": SLOWED}}, id="looped-slowed"),
        pytest.param(to_gguf, "loop", {"mixer": {"rope": RopeSpec(base=500.0, scale=3.0)}}, id="loop-scaled"),
        pytest.param(to_nanbeige_gguf, "loop-portable", {"mixer": {"rope": RopeSpec(scale=3.0)}}, id="looped-scaled"),
    ],
)
def test_the_same_greedy_continuation(write: Any, name: str, changes: Any, tmp_path: Path) -> None:
    model, text = model_of(name, **changes), byte_tokenizer()
    write(tmp_path, model, tmp_path / "x.gguf", text)
    theirs = opened(tmp_path / "x.gguf")
    ids = theirs.tokenize(PROMPT.encode(), add_bos=True)
    assert ids == [text.eos_id, *text.encode(PROMPT.encode()).tolist()]
    check_the_same(model, theirs, ids)
    theirs.close()


def test_a_vocabulary_that_was_trained_here(tmp_path: Path) -> None:
    """With the model from text to text, and on a text that tokenizers cut in different ways."""
    text = resolve_tokenizer("bpe-qwen:420", [ODD_TEXT.encode() * 3 + PROMPT.encode() * 9])
    model = model_of("loop", text.vocab_size)
    to_gguf(tmp_path, model, tmp_path / "x.gguf", text)
    theirs = opened(tmp_path / "x.gguf")
    for sample in (ODD_TEXT, PROMPT, *ODD_TEXT.split(" ")):
        want = text.encode(sample.encode()).tolist()
        assert theirs.tokenize(sample.encode(), add_bos=False) == want, sample
        assert theirs.detokenize(want, special=False) == sample.encode()
    check_the_same(model, theirs, theirs.tokenize(PROMPT.encode(), add_bos=True))
    theirs.close()


def test_a_file_without_a_vocabulary(tmp_path: Path) -> None:
    model = model_of("loop")
    to_gguf(tmp_path, model, tmp_path / "x.gguf", None)
    theirs = opened(tmp_path / "x.gguf")
    check_the_same(model, theirs, list(range(40, 70)))
    theirs.close()

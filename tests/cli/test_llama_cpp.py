"""llama.cpp continues what was exported with the same tokens; needs the extra ``llama-cpp``, so not in CI."""

from __future__ import annotations

import dataclasses
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from ouroboros.api import build
from ouroboros.convert.gguf_export import to_gguf, to_nanbeige_gguf
from ouroboros.data.tokenize import byte_tokenizer
from ouroboros.recipes import recipe

pytestmark = [
    pytest.mark.llama_cpp,
    pytest.mark.skipif(find_spec("llama_cpp") is None, reason="the extra llama-cpp is not installed"),
    pytest.mark.filterwarnings("ignore"),  # of that package
]
PROMPT, FLOAT32 = "3 times 4, caf\u00e9", 0


@pytest.mark.parametrize("write", [to_gguf, to_nanbeige_gguf], ids=["unrolled", "looped"])
def test_the_same_greedy_continuation(write: Any, tmp_path: Path) -> None:
    import llama_cpp

    made = recipe("loop-portable", "tiny")
    torch.manual_seed(0)
    model, text = build(dataclasses.replace(made, model=made.model.replace(layout="(2)x3"))).eval(), byte_tokenizer()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    write(tmp_path, model, tmp_path / "x.gguf", text)
    theirs = llama_cpp.Llama(
        str(tmp_path / "x.gguf"), n_ctx=128, n_gpu_layers=0, verbose=False, type_k=FLOAT32, type_v=FLOAT32
    )
    ids = theirs.tokenize(PROMPT.encode(), add_bos=True)
    assert ids == [text.eos_id, *text.encode(PROMPT.encode()).tolist()]
    options: dict[str, Any] = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None}
    want = model.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist()
    stream = theirs.generate(ids, temp=0.0, repeat_penalty=1.0)
    assert [next(stream) for _ in want] == want
    theirs.close()

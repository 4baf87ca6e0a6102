"""A model that says what a test tells it to, through transformers' own ``generate``."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from ouroboros.api import build
from ouroboros.config import AttentionSpec, FeedForwardSpec, ModelSpec, Recipe
from ouroboros.data.tokenize import TextTokenizer, byte_tokenizer
from ouroboros.model.modeling import OuroborosForCausalLM

CONTEXT = 64


@pytest.fixture
def tokenizer() -> TextTokenizer:
    return byte_tokenizer()


@pytest.fixture
def model() -> OuroborosForCausalLM:
    """A small looped model with random weights; its context is 64 tokens."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    spec = ModelSpec(layout="1 (1)x2", hidden_size=16, max_position_embeddings=CONTEXT).replace(
        mixer=AttentionSpec(num_heads=2), ffn=FeedForwardSpec(intermediate_size=16)
    )
    return build(Recipe(name="small", model=spec)).eval()


@pytest.fixture
def scripted(model: OuroborosForCausalLM, monkeypatch: pytest.MonkeyPatch) -> Callable[..., OuroborosForCausalLM]:
    """The model, its logits replaced so that after a prompt it writes the given bytes, then the end of text."""

    def script(answer: bytes, prompt: bytes = b"") -> OuroborosForCausalLM:
        start = 1 + len(prompt)
        forward = type(model).forward

        def says(self, *arguments, **keywords):
            out = forward(self, *arguments, **keywords)
            written = keywords["past_key_values"].get_seq_length() - start
            following = answer[written] if written < len(answer) else 256
            out.logits = torch.full_like(out.logits, -100.0)
            out.logits[:, -1, following] = 100.0
            return out

        monkeypatch.setattr(type(model), "forward", says)
        return model

    return script

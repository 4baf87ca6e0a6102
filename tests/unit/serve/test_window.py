"""Decoding through a window: equal to a slow loop, to ``generate`` while the text fits, and to one sequence."""

from __future__ import annotations

import pytest
import torch

from ouroboros.errors import OuroborosError
from ouroboros.serve.sampling import Sampling
from ouroboros.serve.window import WindowDecoder


def prompt(length: int) -> torch.Tensor:
    return torch.randint(0, 256, (1, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("length", [1, 5, 6, 30])
def test_every_step_sees_the_last_tokens_from_position_0(length, model):
    ids = prompt(length)
    expected = ids
    with torch.no_grad():
        for _ in range(9):
            logits = model(expected[:, -6:]).logits[:, -1]
            expected = torch.cat((expected, logits.argmax(-1, keepdim=True)), dim=1)
    found = WindowDecoder(6).generate(model, ids, max_new_tokens=9, do_sample=False)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("sampling", [Sampling(temperature=0.0), Sampling(repetition_penalty=1.3, top_k=20)])
def test_a_text_that_fits_is_what_generate_writes(sampling, model):
    options = {**sampling.options(), "max_new_tokens": 12}
    torch.manual_seed(2)
    expected = model.generate(prompt(4), **options)
    torch.manual_seed(2)
    assert torch.equal(WindowDecoder(16).generate(model, prompt(4), **options), expected)


def test_penalties_see_the_whole_text(model):
    seen = []

    def watch(ids, scores):
        seen.append(ids.shape[1])
        return scores

    WindowDecoder(4).generate(model, prompt(10), max_new_tokens=3, do_sample=False, logits_processor=[watch])
    assert seen == [10, 11, 12]


def test_what_is_not_served(model):
    with pytest.raises(OuroborosError, match="the window is 65 tokens but the model's context holds 64"):
        WindowDecoder(65).generate(model, prompt(3), max_new_tokens=1)
    with pytest.raises(OuroborosError, match="one sequence at a time, got 2"):
        WindowDecoder(8).generate(model, prompt(3).repeat(2, 1), max_new_tokens=1)

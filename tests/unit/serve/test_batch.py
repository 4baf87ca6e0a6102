"""Sequences that join, leave and are padded get the logits that each gets alone."""

import pytest
import torch
from transformers.cache_utils import DynamicCache

from ouroboros.api import build
from ouroboros.config import Recipe
from ouroboros.recipes import recipe
from ouroboros.serve.batch import Batch

TEXTS = [[256, 1, 2, 3, 4, 5, 6], [256, 9], [256, 7, 7, 7, 7]]


def read(model, ids):
    store = DynamicCache(config=model.config)
    model(torch.tensor([ids]), past_key_values=store, use_cache=True, logits_to_keep=1)
    return store


def alone(model, ids):
    return model(torch.tensor([ids]), use_cache=False, logits_to_keep=1).logits[0, -1]


@pytest.mark.parametrize("name", ["loop", "osam", "rhrm", "crawler", "delta"])
@torch.no_grad()
def test_joining_and_leaving(name):
    """Of keys and values, of latents, of states of constant size and of filters over tokens."""
    torch.manual_seed(0)
    model = build(Recipe(name=name, model=recipe(name, "tiny").model)).eval()
    texts = [list(text) for text in TEXTS]
    batch = Batch(model)

    def step(rows):
        for row in rows:
            texts[row].append(20 + row)
        logits = batch.step(torch.tensor([texts[row][-1:] for row in rows]))
        for got, row in zip(logits, rows, strict=True):
            torch.testing.assert_close(got, alone(model, texts[row]), atol=2e-4, rtol=1e-4)

    batch.add(read(model, texts[1]), 1)
    step([1])
    batch.add(read(model, texts[0]), 1)  # longer than what is there
    step([1, 0])
    batch.add(read(model, texts[2]), 1)
    step([1, 0, 2])
    batch.keep([0, 2])  # the longest one leaves, and with it the padding that it made
    assert batch.lengths == [len(texts[1]), len(texts[2])]
    step([1, 2])
    batch.keep([0, 1])  # nobody leaves
    step([1, 2])


@torch.no_grad()
def test_several_answers_to_one_prompt(model):
    batch = Batch(model)
    batch.add(read(model, TEXTS[0]), 3)
    logits = batch.step(torch.tensor([[1], [2], [3]]))
    for row, token in enumerate((1, 2, 3)):
        torch.testing.assert_close(logits[row], alone(model, [*TEXTS[0], token]), atol=1e-5, rtol=1e-4)
    batch.keep([])
    assert batch.lengths == []
    batch.add(read(model, TEXTS[1]), 1)
    torch.testing.assert_close(batch.step(torch.tensor([[5]]))[0], alone(model, [*TEXTS[1], 5]), atol=1e-5, rtol=1e-4)

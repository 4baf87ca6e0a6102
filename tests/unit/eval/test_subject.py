"""What the harness checks, and how it compares logits and continuations."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ouroboros.config import AttentionSpec, FeedForwardSpec, ModelSpec
from ouroboros.eval.finding import Mismatch
from ouroboros.eval.subject import (
    Continuation,
    build_perturbed,
    close,
    fed,
    perturb,
    prepare,
    same_continuation,
)

SPEC = ModelSpec().replace(
    layout="1 (1)x2",
    vocab_size=31,
    hidden_size=16,
    mixer=AttentionSpec(num_heads=2),
    ffn=FeedForwardSpec(intermediate_size=24),
)


def test_perturb_moves_every_parameter() -> None:
    layer = nn.Linear(3, 2)
    before = [parameter.clone() for parameter in layer.parameters()]
    perturb(layer, 0.1)
    assert all((new != old).all() for new, old in zip(layer.parameters(), before))


@pytest.mark.parametrize(("context", "length", "new"), [(1, 1, 1), (2, 1, 1), (12, 4, 8), (100, 17, 8)])
def test_inputs_fit_the_context(context: int, length: int, new: int) -> None:
    prepared = prepare(build_perturbed(SPEC.replace(max_position_embeddings=context)))
    assert prepared.ids.shape == (3, length) and prepared.new_tokens == new


def test_views() -> None:
    def views(layout: str) -> list[tuple[int | None, str]]:
        prepared = prepare(build_perturbed(SPEC.replace(layout=layout)))
        return [(loops, view.schedule.notation) for loops, view in prepared.views.items()]

    assert views("2") == [(None, "2")]
    assert views("(1)x2") == [(1, "(1)x1"), (2, "(1)x2"), (4, "(1)x4")]
    assert views("(1)x1") == [(1, "(1)x1"), (3, "(1)x3")]
    unequal = views("(1)x2 (1)x3")
    assert unequal[0] == (None, "(1)x2 (1)x3") and [loops for loops, _ in unequal] == [None, 1, 3, 5]


def test_chunks_repeat_the_last_size() -> None:
    subject = prepare(build_perturbed(SPEC))
    outputs = fed(subject.model, subject.ids, [7, 1, 4])
    assert [output.logits.shape[1] for output in outputs] == [7, 1, 4, 4, 1]
    assert outputs[-1].past_key_values.get_seq_length() == 17


def test_close() -> None:
    small = torch.tensor([[0.5, 0.25]])
    assert close(small + 5e-6, small, "x") == pytest.approx(5e-6, rel=0.1)
    close(100 * small + 3e-4, 100 * small, "x")  # relative to the largest logit
    for other in (small + 2e-5, small[:, :1], small * torch.nan):
        with pytest.raises(Mismatch):
            close(other, small, "x")


def test_same_continuation_forgives_ties_alone() -> None:
    logits = torch.randn(2, 4, 5)
    one = Continuation(logits.argmax(-1), logits)
    assert same_continuation(one, one, "x") == 0
    tokens, other = one.tokens.clone(), logits.clone()
    tokens[1, 2] = (tokens[1, 2] + 1) % 5
    other[1, 3] += 1
    same_continuation(Continuation(tokens, other), one, "x")  # logits differ only after another token was taken
    with pytest.raises(Mismatch, match="x, sequence 1, new token 3: logits differ"):
        same_continuation(Continuation(one.tokens, other), one, "x")
    with pytest.raises(Mismatch, match="shape"):
        same_continuation(one.sequence(0), one, "x")

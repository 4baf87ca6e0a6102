"""Hashed n-gram embedding against Python's own integers, which do not overflow."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ouroboros.config import AttentionSpec, FeedForwardSpec, ModelSpec
from ouroboros.config.part import build
from ouroboros.config.parts.stem import NgramSpec
from ouroboros.errors import OuroborosError
from ouroboros.model.configuration import OuroborosConfig
from ouroboros.model.modeling import OuroborosForCausalLM
from ouroboros.nn.memory import Recorder
from ouroboros.nn.ngram import Ngram
from ouroboros.nn.visit import VisitContext

NOWHERE: Any = None
D, V = 8, 200_000
HERE = VisitContext(NOWHERE)
TRIGRAM = NgramSpec(buckets=31, width=5, trigram=True)


def part_of(spec: NgramSpec, vocabulary: int = V) -> Ngram:
    """The part with a table in which every row differs."""
    part = build(spec, ModelSpec(hidden_size=D, vocab_size=vocabulary))
    torch.nn.init.normal_(part.table.weight)
    return part


def row(document: list[int], buckets: int) -> int:
    """The row of the table for the last tokens, of which ``None`` stands for one that is not there."""
    if None in document:
        return buckets - 1
    hashed = 0
    for multiplier, token in zip((36313, 27191, 51497), reversed(document), strict=False):
        hashed ^= multiplier * token
    return hashed % (buckets - 1)


def expected(part: Ngram, spec: NgramSpec, x: Tensor, ids: list[int]) -> Tensor:
    """What the part makes of one sequence (T, D)."""
    before: list[Any] = [None, None]
    rows = []
    for t, token in enumerate(ids):
        before = [None, None] if token == spec.boundary else before
        e = part.table.weight[row([before[1], token], spec.buckets)]
        if spec.trigram:
            e = e + part.table.weight[row([*before, token], spec.buckets)]
        rows.append(x[t] + 0.05 * (e @ part.proj.weight.T if spec.width != D else e))
        before = [before[1], token]
    return torch.stack(rows)


@pytest.mark.parametrize(
    "spec",
    [
        NgramSpec(),
        NgramSpec(buckets=2, width=3),
        NgramSpec(buckets=97, width=D, boundary=V - 1),
        TRIGRAM,
        TRIGRAM.replace(boundary=V - 1),
    ],
    ids=str,
)
def test_formula(spec: NgramSpec) -> None:
    """Ids far above 59,138, where 32 bits overflow, and documents of one, two and more tokens."""
    part, ids = part_of(spec), torch.randint(59_139, V, (2, 30))
    ids[0, torch.tensor([0, 7, 9, 10])] = V - 1
    ids[1, torch.tensor([1, 4])] = torch.tensor([0, 1])
    x = torch.randn(2, 30, D)
    found = part(x, ids, HERE)
    for b in range(2):
        torch.testing.assert_close(found[b], expected(part, spec, x[b], ids[b].tolist()))


def test_hashes_are_those_of_unbounded_integers() -> None:
    part = part_of(NgramSpec(buckets=65_537, width=1), 2**31 - 1)
    ids = [2**31 - 2, 59_139, 2**31 - 3, 0, 1]
    found = part.hashes(torch.tensor([[0, *(i + 1 for i in ids)]]), 2)
    assert found.tolist() == [[row([a, b], 65_537) for a, b in zip([None, *ids], ids, strict=False)]]


def test_neutral_at_the_start_and_alive() -> None:
    model = ModelSpec(hidden_size=D)
    part, x, ids = build(TRIGRAM, model), torch.randn(2, 5, D), torch.randint(0, 257, (2, 5))
    y = part(x, ids, HERE)
    assert torch.equal(y, x)
    y.square().sum().backward()
    assert part.table.weight.grad.any() and part.proj.weight.any()


@pytest.mark.parametrize("spec", [NgramSpec(buckets=31, width=5), TRIGRAM, TRIGRAM.replace(boundary=3)], ids=str)
def test_pieces_with_a_memory_and_padding_are_the_whole(spec: NgramSpec) -> None:
    part, ids, x = part_of(spec), torch.randint(0, 9, (2, 7)), torch.randn(2, 7, D)
    whole = part(x, ids, HERE)

    class Kept(Recorder):
        def last(self, name: str) -> Any:
            return self.ends.get(name)

    memory = Kept()
    pieces = [part(x[:, a:b], ids[:, a:b], HERE._replace(memory=memory)) for a, b in ((0, 1), (1, 2), (2, 6), (6, 7))]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole)
    assert memory.ends["ngram"].dtype == torch.int32, "a cache counts numbers of four bytes"
    padded = torch.cat((torch.full((2, 3), 4), ids), dim=1)
    padding = torch.tensor([[0] * 3 + [1] * 7])
    found = part(torch.cat((x[:, :3], x), dim=1), padded, HERE._replace(padding=padding))
    torch.testing.assert_close(found[:, 3:], whole)


def test_a_model_off_and_absent_are_the_same_and_embeddings_are_refused() -> None:
    spec = ModelSpec(layout="1", vocab_size=19, hidden_size=16).replace(
        mixer=AttentionSpec(num_heads=2), ffn=FeedForwardSpec(intermediate_size=8)
    )
    absent = OuroborosForCausalLM(OuroborosConfig.from_spec(spec)).eval()
    model = OuroborosForCausalLM(OuroborosConfig.from_spec(spec.replace(stem=(NgramSpec(),)))).eval()
    model.load_state_dict(absent.state_dict(), strict=False)
    ids = torch.randint(0, 19, (2, 6))
    assert torch.equal(model(ids).logits, absent(ids).logits)
    with pytest.raises(OuroborosError, match="model.stem.ngram needs token ids: give input_ids, not inputs_embeds"):
        model(inputs_embeds=model.get_input_embeddings()(ids))
    with pytest.raises(OuroborosError, match="stem.ngram.boundary is 19, but the vocabulary has 19 tokens"):
        OuroborosForCausalLM(OuroborosConfig.from_spec(spec.replace(stem=(NgramSpec(boundary=19),))))


def test_low_precision_states_keep_their_dtype() -> None:
    part = part_of(TRIGRAM)
    part.proj.bfloat16(), part.table.bfloat16()
    assert part(torch.randn(1, 2, D, dtype=torch.bfloat16), torch.tensor([[1, 2]]), HERE).dtype == torch.bfloat16

"""Documents packed into one row. The harness checks on every recipe and variant that they do not see each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DataCollatorWithFlattening

from ouroboros.config import AttentionSpec
from ouroboros.config.parts.delta import DeltaSpec
from ouroboros.config.parts.latent import BottleneckAttentionSpec
from ouroboros.config.parts.osam import OsamSpec
from ouroboros.errors import OuroborosError
from ouroboros.model.executor import observe
from ouroboros.model.modeling import OuroborosForCausalLM
from ouroboros.model.packing import document_starts, documents, packed

Build = Callable[..., OuroborosForCausalLM]
OSAM = OsamSpec(buckets=64, readout_hidden=8, detach_state=False)
MODELS: dict[str, dict[str, Any]] = {
    "attention": {},
    "osam": {"mixer": OSAM},
    "shifts": {"mixer": AttentionSpec(num_heads=2, k_shift=True, v_shift=True)},
    "filters": {"residual": DeltaSpec(values=2, compressor="token", embedding_conv=True)},
    "latent cache, registers": {"mixer": BottleneckAttentionSpec(num_heads=2, cache="latent"), "registers": 2},
}
SIZES = [3, 6, 1, 4]
POSITIONS = torch.cat([torch.arange(size) for size in SIZES])[None]
IDS = torch.randint(0, 30, (2, sum(SIZES)), generator=torch.Generator().manual_seed(0))


def alone(model: OuroborosForCausalLM, ids: Tensor, sizes: list[int]) -> Tensor:
    """Logits of documents that have a row each, joined."""
    return torch.cat([model(part, use_cache=False).logits for part in ids.split(sizes, dim=1)], dim=1)


@pytest.fixture(params=MODELS.values(), ids=list(MODELS))
def model(request: pytest.FixtureRequest, build: Build) -> OuroborosForCausalLM:
    return build(**request.param)


class TestDocumentsDoNotSeeEachOther:
    def test_with_and_without_a_mask_of_padding(self, model: OuroborosForCausalLM) -> None:
        expected = alone(model, IDS, SIZES)
        assert (model(IDS).logits - expected).abs().max() > 1e-3, "without positions they are one document"
        torch.testing.assert_close(model(IDS, position_ids=POSITIONS).logits, expected, rtol=1e-4, atol=1e-5)
        masked = model(IDS, position_ids=POSITIONS, attention_mask=torch.ones_like(IDS)).logits
        torch.testing.assert_close(masked, expected, rtol=1e-4, atol=1e-5)

    def test_padding_before_between_and_behind(self, model: OuroborosForCausalLM) -> None:
        mask = torch.tensor([[0, 0, 1, 1, 1, 0, 1, 1, 1, 1, 1, 0, 0, 0], [1] * 5 + [0] + [1] * 8])
        positions = torch.tensor([[0, 0, 0, 1, 2, 0, 0, 1, 2, 3, 4, 0, 0, 0], [0, 1, 2, 3, 4, 0, *range(8)]])
        found = model(IDS, attention_mask=mask, position_ids=positions).logits
        for row, start, end in ((0, 2, 5), (0, 6, 11), (1, 0, 5), (1, 6, 14)):
            expected = model(IDS[row : row + 1, start:end]).logits
            torch.testing.assert_close(found[row : row + 1, start:end], expected, rtol=1e-4, atol=1e-5)

    def test_gradients(self, model: OuroborosForCausalLM) -> None:
        model.train()
        grads = []
        for logits in (model(IDS, position_ids=POSITIONS).logits, alone(model, IDS, SIZES)):
            model.zero_grad()
            logits.square().mean().backward()
            grads.append([None if p.grad is None else p.grad.clone() for p in model.parameters()])
        for found, expected in zip(*grads, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)

    def test_transformers_collator(self, model: OuroborosForCausalLM) -> None:
        texts = [row[:size].tolist() for row, size in zip(IDS, (9, 5), strict=True)]
        batch = DataCollatorWithFlattening()([{"input_ids": text} for text in texts])
        assert "attention_mask" not in batch
        losses = [model(torch.tensor([text]), labels=torch.tensor([text])).loss for text in texts]
        found = model(**batch).loss
        torch.testing.assert_close(found, (losses[0] * 8 + losses[1] * 4) / 12, rtol=1e-4, atol=1e-5)


def test_options_reach_every_document(build: Build) -> None:
    model = build(mixer=OSAM)
    expected = alone(model.with_loops(3), IDS, SIZES)
    found = model(IDS, position_ids=POSITIONS, loops=3, output_hidden_states=True)
    torch.testing.assert_close(found.logits, expected, rtol=1e-4, atol=1e-5)
    assert [state.shape for state in found.hidden_states] == [(2, 14, 16)] * 6
    parts = [model.model(part, loops=3, output_hidden_states=True).hidden_states for part in IDS.split(SIZES, dim=1)]
    for state, pieces in zip(found.hidden_states, zip(*parts, strict=True), strict=True):
        torch.testing.assert_close(state, torch.cat(pieces, dim=1), rtol=1e-4, atol=1e-5)


class TestRefused:
    @pytest.mark.parametrize("options", [{"use_cache": True}, {"past_key_values": True}], ids=str)
    def test_a_cache(self, model: OuroborosForCausalLM, options: dict[str, Any]) -> None:
        if "past_key_values" in options:
            options = {"past_key_values": model(IDS[:, :2], use_cache=True).past_key_values}
        with pytest.raises(OuroborosError, match="packed by position_ids cannot share a cache"):
            model(IDS, position_ids=POSITIONS, **options)

    def test_a_prepared_mask_where_something_else_carries_over(self, build: Build) -> None:
        mask = torch.ones(14, 14, dtype=torch.bool).tril()[None, None]
        with pytest.raises(OuroborosError, match="a prepared attention mask does not keep documents"):
            build(mixer=OSAM)(IDS, position_ids=POSITIONS, attention_mask=mask, use_cache=False)
        document = torch.arange(4).repeat_interleave(torch.tensor(SIZES))
        apart = mask & (document[:, None] == document)
        attention = build()
        found = attention(IDS, position_ids=POSITIONS, attention_mask=apart, use_cache=False).logits
        torch.testing.assert_close(found, alone(attention, IDS, SIZES), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("part", ["osam", "attention"])
    def test_compiled_programs_that_cannot_tell(self, build: Build, part: str) -> None:
        """Positions are not known when a program is made; where a mask made of them suffices, it is made."""
        model = build(**MODELS[part])
        program = torch.compile(model, backend="eager", fullgraph=True)
        on = torch.arange(14)[None]
        expected = model(IDS, position_ids=on).logits
        torch.testing.assert_close(program(IDS, position_ids=on).logits, expected, rtol=1e-4, atol=1e-5)
        with pytest.raises(RuntimeError, match="packed by position_ids cannot be kept apart by this compiled program"):
            program(IDS, position_ids=POSITIONS)
        if part == "attention":
            found = program(IDS, position_ids=POSITIONS, use_cache=False).logits
            torch.testing.assert_close(found, alone(model, IDS, SIZES), rtol=1e-4, atol=1e-5)

    def test_an_observer(self, build: Build) -> None:
        model = build()
        with observe(model, on_loop=lambda *given: None), pytest.raises(OuroborosError, match="observe"):
            model(IDS, position_ids=POSITIONS)


def test_positions_that_go_on_are_one_document(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ouroboros.model.modeling.separately", lambda *given: pytest.fail("packed"))
    model = build(mixer=OSAM)
    on = torch.arange(14)[None] + 5
    model(IDS, position_ids=on)
    store = model(IDS, position_ids=on - 5, use_cache=True).past_key_values
    model(IDS[:, :1], position_ids=on[:, -1:] - 4, past_key_values=store)
    padded = torch.ones_like(IDS)
    padded[0, :4] = 0
    model(IDS, attention_mask=padded, position_ids=(padded.cumsum(-1) - 1).clamp(min=0))
    model.generate(IDS, attention_mask=padded, max_new_tokens=3, pad_token_id=0)
    monkeypatch.setattr("ouroboros.model.modeling.find_starts", lambda *given, **rest: pytest.fail("looked for"))
    model(IDS)
    model(IDS, attention_mask=padded)


@pytest.mark.parametrize(
    ("positions", "real", "starts"),
    [
        ([0, 1, 2, 3], None, []),
        ([7, 8, 9, 10], None, []),
        ([0, 1, 0, 1], None, [2]),
        ([0, 1, 5, 6], None, [2]),
        ([0, 0, 0, 1], None, [1, 2]),
        ([0, 1, 5, 6], [1, 1, 1, 1], []),
        ([0, 0, 0, 1], [0, 0, 1, 1], []),
        ([0, 1, 1, 1], [1, 1, 0, 0], []),
        ([0, 1, 0, 0], [1, 1, 0, 1], [3]),
        ([0, 0, 1, 1], [1, 1, 1, 0], [1]),
    ],
)
def test_starts(positions: list[int], real: list[int] | None, starts: list[int]) -> None:
    found = document_starts(torch.tensor([positions]), None if real is None else torch.tensor([real]))
    assert found[0].nonzero().flatten().tolist() == starts


def test_groups_hold_every_real_token_once_and_little_padding() -> None:
    sizes = [1, 2, 3, 4, 5, 8, 9, 30, 33]
    positions = torch.cat([torch.arange(size) for size in sizes])[None]
    real = torch.ones_like(positions)
    real[0, -1] = 0
    groups = list(documents(document_starts(positions, real), real))
    assert sorted(torch.cat([group.token_S for group in groups]).tolist()) == list(range(positions.numel() - 1))
    for group in groups:
        rows = group.unpacked(torch.ones_like(positions))
        assert rows.sum() > rows.numel() / 2
        assert torch.equal(rows, rows.sort(dim=1, descending=True).values), "padded on the right"
    numbers = torch.rand(1, positions.numel(), 2)
    expected = numbers * real[..., None]
    assert torch.equal(packed(groups, [group.unpacked(numbers) for group in groups], positions), expected)

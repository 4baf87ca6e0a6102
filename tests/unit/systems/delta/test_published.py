"""The published Python interface."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import ouroboros.recipes.delta as earlier
from ouroboros import systems
from ouroboros.config.parts.delta import DeltaSpec
from ouroboros.errors import OuroborosError
from ouroboros.model.configuration import OuroborosConfig as ModelConfig
from ouroboros.model.modeling import OuroborosForCausalLM
from ouroboros.systems.delta import OuroborosConfig, OuroborosModel, published

V, T = 31, 9
CONFIG = OuroborosConfig(
    vocab_size=V, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, head_dim=8, block_size=12
)


@pytest.fixture
def model() -> OuroborosModel:
    torch.manual_seed(0)
    return OuroborosModel(CONFIG).eval()


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(0, V, (2, T), generator=torch.Generator().manual_seed(1))


def test_targets_are_already_shifted(model, ids) -> None:
    targets = torch.roll(ids, -1, dims=1)
    targets[:, -1] = -1
    logits, loss = model(ids, targets=targets)
    assert logits.shape == (2, T, V) and logits.dtype == torch.float32
    chosen = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])
    torch.testing.assert_close(loss, -chosen.mean())
    shifted_inside = model(ids, labels=ids)
    assert torch.equal(shifted_inside[0], logits)
    torch.testing.assert_close(shifted_inside[1], loss)
    assert abs(loss.item() - math.log(V)) < 0.5
    masked = ids.clone()
    masked[:, 3:] = -100
    torch.testing.assert_close(model(ids, labels=masked)[1], -chosen[:, :2].mean())


def test_without_targets_the_last_position(model, ids) -> None:
    last, loss = model(ids)
    every, none = model(ids, output_all_seq=True)
    assert loss is None and none is None
    assert last.shape == (2, 1, V) and every.shape == (2, T, V)
    torch.testing.assert_close(last, every[:, -1:])
    assert model.to(torch.bfloat16)(ids)[0].dtype == torch.float32


def test_padding_on_the_left_changes_nothing(model, ids) -> None:
    padded = torch.cat((torch.zeros(2, 2, dtype=torch.long), ids), dim=1)
    mask = torch.ones_like(padded)
    mask[:, :2] = 0
    torch.testing.assert_close(model(padded, attention_mask=mask)[0], model(ids)[0])


def test_a_copy_of_the_input_is_reported(model, ids) -> None:
    partly = ids.clone()
    partly[:, :4] = -1
    for targets in (ids, partly, ids.int()):
        with pytest.warns(UserWarning, match="learns to copy its input: pass labels=input_ids") as caught:
            model(ids, targets=targets)
        assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(ids, targets=torch.roll(ids, -1, dims=1))
        model(ids[:, :1], targets=ids[:, :1])


def test_random_tokens_are_not_learnt_by_shifted_labels(ids) -> None:
    """The published quick start falls far below ln V here, because it copies."""
    torch.manual_seed(0)
    model = OuroborosModel(CONFIG)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        batch = torch.randint(0, V, (8, 12))
        loss = model(batch, labels=batch)[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-20:]) / 20 > math.log(V) - 0.05


def fresh(**changes: Any) -> OuroborosForCausalLM:
    """The model of a published configuration with changes of its specification."""
    spec = OuroborosConfig(vocab_size=500, hidden_size=64, num_hidden_layers=4, num_attention_heads=2, head_dim=32).spec
    torch.manual_seed(0)
    return OuroborosForCausalLM(ModelConfig.from_spec(spec.replace(**changes)))


@pytest.mark.parametrize("layout", ["9", "1 (1)x8"])
def test_weights_start_with_the_published_deviations(layout: str) -> None:
    """Outputs are scaled by the root of the visits; an untied head is a table."""
    for name, parameter in fresh(layout=layout, tie_embeddings=False).named_parameters():
        if parameter.ndim == 2 and parameter.shape[0] > 1:
            table, output = "embed" in name or "lm_head" in name, "o_proj" in name or "down_proj" in name
            expected = 0.02 if table else 0.5 / 8 / 3 if output else 0.5 / 8
            assert float(parameter.detach().std()) == pytest.approx(expected, rel=0.1), name


@pytest.mark.parametrize("compressor", ["channel", "token"])
def test_delta_parts_start_at_their_values(compressor: Any) -> None:
    for start in ("average", "normal"):
        delta = DeltaSpec(values=4, beta_init=0.5, compressor=compressor, compressor_init=start)
        model = fresh(residual=delta)
        block = model.model.decoder.layers[0]
        assert block.mixer_residual.gate.proj.bias.item() == pytest.approx(-1.0986, abs=1e-4)
        assert 0 < block.mlp_residual.value_proj.bias.abs().max() <= 64**-0.5
        for part in (block.compressor, model.model.readout):
            assert (part.read == 0.25).all()
            if start == "average":
                assert set(part.weight.unique().tolist()) == {0.0, 1.0}
            else:
                assert float(part.weight.detach().std()) == pytest.approx(0.5 / 8, rel=0.2)


def test_bad_calls(model, ids) -> None:
    for arguments, message in (
        ({"input_ids": ids.repeat(1, 2)}, r"input_ids must be \(batch, up to 12 tokens\), got \(2, 18\)"),
        ({"input_ids": ids[0]}, r"input_ids must be \(batch, up to 12 tokens\)"),
        ({"input_ids": ids, "targets": ids, "labels": ids}, "not both"),
        ({"input_ids": ids, "targets": ids[:, 1:]}, r"must have the shape of input_ids \(2, 9\)"),
    ):
        with pytest.raises(OuroborosError, match=message):
            model(**arguments)


def test_the_classes_are_offered_on_first_use() -> None:
    """At the system's folder, and where they were offered first."""
    for module in (systems.delta, earlier):
        assert module.OuroborosModel is published.OuroborosModel and module.OuroborosConfig is OuroborosConfig
        with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
            _ = module.Nothing


def test_going_on(model, ids, tmp_path) -> None:
    inner = model.model
    assert model.get_num_params() == sum(p.numel() for p in inner.parameters())
    assert inner.model.embed_tokens.weight is inner.lm_head.weight
    inner.save_pretrained(tmp_path)
    again = type(inner).from_pretrained(tmp_path).eval()
    assert all(torch.equal(tensor, inner.state_dict()[name]) for name, tensor in again.state_dict().items())
    torch.testing.assert_close(again(ids).logits[:, -1:], model(ids)[0])  # which multiplies the last position alone

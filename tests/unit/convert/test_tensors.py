"""Published names and ours; weights that fit and weights that do not."""

from __future__ import annotations

import pytest
import torch

from ouroboros.config import ModelSpec
from ouroboros.convert.tensors import RenameTable, model_of, shape_of
from ouroboros.errors import OuroborosError
from ouroboros.model.configuration import OuroborosConfig
from ouroboros.model.modeling import OuroborosForCausalLM

SPEC = ModelSpec(layout="1", hidden_size=16, vocab_size=9)


def test_weights_and_misfits() -> None:
    state = OuroborosForCausalLM(OuroborosConfig.from_spec(SPEC)).state_dict()
    made = model_of(SPEC, state, eos_token_id=3)
    assert not made.training and made.config.eos_token_id == 3
    assert all(torch.equal(tensor, state[name]) for name, tensor in made.state_dict().items())
    state["model.norm.weight"] = torch.ones(7)
    with pytest.raises(OuroborosError, match=r"do not belong together: .*model\.norm\.weight") as caught:
        model_of(SPEC, state, eos_token_id=None)
    assert "\n" not in str(caught.value)


def test_the_output_matrix_of_tied_embeddings_may_be_left_out() -> None:
    state = dict(OuroborosForCausalLM(OuroborosConfig.from_spec(SPEC)).state_dict())
    embedding = state["model.embed_tokens.weight"]
    del state["lm_head.weight"]
    assert torch.equal(model_of(SPEC, state).lm_head.weight, embedding)


TABLE = RenameTable(
    system="Toy",
    names={"wte": "embed", "norm.2.gain": "norm", "extra": "extra", "h.{}.q": "layers.{}.q_proj"},
    optional=("extra",),
    repeated={"head": "wte"},
    derived=("inv_freq",),
)


def toy(**changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Tensors of the table's system; a change of None removes one."""
    found = {"wte": torch.ones(2, 3), "norm.2.gain": torch.ones(3), "h.0.q": torch.ones(1), "h.11.q": torch.ones(1)}
    found |= {"head": torch.ones(2, 3), "h.0.inv_freq": torch.tensor(torch.inf)}
    return {name: tensor for name, tensor in {**found, **changes}.items() if tensor is not None}


def test_names_are_translated_block_by_block() -> None:
    TABLE.check(toy())
    TABLE.check(toy(head=None, extra=torch.ones(1)))
    assert TABLE.renamed(toy()).keys() == {"embed", "norm", "layers.0.q_proj", "layers.11.q_proj"}
    assert TABLE.ours("h.x.q") is None and TABLE.ours("h.1.k") is None and TABLE.ours("norm.3.gain") is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"wte": None, "head": None}, "not the tensors of a model of Toy: wte missing"),
        ({"h.0.k": torch.ones(1), "b": torch.ones(1)}, "not the tensors of a model of Toy: b, h.0.k unknown"),
        ({"head": torch.zeros(2, 3)}, "head differs from wte: a published model has one matrix for both"),
        ({"head": torch.ones(2)}, "head differs from wte"),
        ({"h.11.q": torch.tensor([torch.nan])}, "tensor 'h.11.q' holds NaN or infinity"),
    ],
)
def test_tensors_of_another_model_are_refused(changes: dict[str, torch.Tensor | None], words: str) -> None:
    with pytest.raises(OuroborosError, match=words):
        TABLE.check(toy(**changes))


def test_shapes_are_read_or_refused() -> None:
    assert shape_of(toy(), "wte", 2) == (2, 3) and shape_of(toy(), "wte", 1, 2) == (2, 3)
    for given, name, words in (
        (toy(), "x", "x is missing"),
        (toy(), "norm.2.gain", r"norm.2.gain has shape \(3,\), expected 2 axes, none empty"),
        (toy(wte=torch.ones(0, 3)), "wte", r"wte has shape \(0, 3\)"),
    ):
        with pytest.raises(OuroborosError, match=words):
            shape_of(given, name, 2)

"""Weights that fit and weights that do not."""

from __future__ import annotations

import pytest
import torch

from ouroboros.config import ModelSpec
from ouroboros.convert.tensors import model_of
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

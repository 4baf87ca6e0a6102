"""A model from tensors that were renamed to ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from ouroboros.config import ModelSpec
from ouroboros.errors import OuroborosError

if TYPE_CHECKING:
    from ouroboros.model.modeling import OuroborosForCausalLM


def model_of(spec: ModelSpec, state: Mapping[str, Tensor], *, eos_token_id: int | None) -> OuroborosForCausalLM:
    """The model of ``spec`` with the weights ``state``, float32, in evaluation mode.

    Raises:
        OuroborosError: names or shapes that do not belong together; says which.
    """
    from ouroboros.model.configuration import OuroborosConfig
    from ouroboros.model.modeling import OuroborosForCausalLM

    model = OuroborosForCausalLM(OuroborosConfig.from_spec(spec, eos_token_id=eos_token_id))
    try:
        model.load_state_dict(state)
    except RuntimeError as error:  # torch lists the misfits over several lines
        misfits = "; ".join(line.strip() for line in str(error).splitlines()[1:])
        raise OuroborosError(f"the tensors do not belong together: {misfits}") from None
    return model.eval()

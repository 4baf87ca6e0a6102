"""From a published model's tensors to a model of this library: a table of names, the checks, and the weights."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ouroboros.config import ModelSpec
from ouroboros.errors import OuroborosError, check

if TYPE_CHECKING:
    from torch import Tensor

    from ouroboros.model.modeling import OuroborosForCausalLM

EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
"""Our names of the token embedding and of the output matrix, which are one matrix in a model with tied embeddings."""


@dataclass(frozen=True, kw_only=True)
class RenameTable:
    """What the tensors of a published system are called there and here."""

    system: str
    """The system's name in messages."""
    names: Mapping[str, str]
    """Published name: ours. In both, ``{}`` stands for the number of a block."""
    optional: Collection[str] = ()
    """Published names outside numbered blocks that some of the system's models lack."""
    repeated: Mapping[str, str] = field(default_factory=dict)
    """Published names of tensors that are stored twice, and the name of the other one, which is read."""
    derived: tuple[str, ...] = ()
    """Endings of published names whose tensors follow from others and are not read."""

    def ours(self, name: str) -> str | None:
        """Our name of the published tensor ``name``, None if the system has no such tensor."""
        if name in self.names:
            return self.names[name]
        block = re.search(r"\.(\d+)\.", name)
        if block is None:
            return None
        found = self.names.get(f"{name[: block.start(1)]}{{}}{name[block.end(1) :]}")
        return None if found is None else found.format(block[1])

    def check(self, tensors: Mapping[str, Tensor]) -> None:
        """Refuse names that are missing or unknown, two tensors that should be one, and numbers that are not finite.
        Names in numbered blocks, which depend on a model's settings, are missed by :func:`model_of`."""
        used = [name for name in tensors if name not in self.repeated and not name.endswith(self.derived)]
        unknown = sorted(name for name in used if self.ours(name) is None)
        missing = sorted(name for name in self.names.keys() - tensors.keys() - {*self.optional} if "{}" not in name)
        for names, problem in ((missing, "missing"), (unknown, "unknown")):
            check(not names, f"not the tensors of a model of {self.system}: {', '.join(names[:5])} {problem}")
        for name in used:
            check(bool(tensors[name].isfinite().all()), f"tensor {name!r} holds NaN or infinity")
        for name, other in self.repeated.items():
            check(
                name not in tensors or tensors[name].equal(tensors[other]),
                f"{name} differs from {other}: a published model has one matrix for both",
            )

    def renamed(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors that :meth:`check` has passed under our names, without those that are not read."""
        ours = {self.ours(name): tensor for name, tensor in tensors.items()}
        return {name: tensor for name, tensor in ours.items() if name is not None}


def shape_of(tensors: Mapping[str, Tensor], name: str, *axes: int) -> tuple[int, ...]:
    """The shape of the tensor ``name``, which must be there, not empty, and have one of these numbers of ``axes``."""
    check(name in tensors, f"{name} is missing")
    shape = tuple(tensors[name].shape)
    expected = " or ".join(map(str, axes))
    check(len(shape) in axes and min(shape) > 0, f"{name} has shape {shape}, expected {expected} axes, none empty")
    return shape


def model_of(spec: ModelSpec, state: Mapping[str, Tensor], *, eos_token_id: int | None = None) -> OuroborosForCausalLM:
    """The model of ``spec`` with the weights ``state``, float32, in evaluation mode; names or shapes that do not belong
    together are refused by name. With tied embeddings the output matrix may be left out of ``state``."""
    from ouroboros.model.configuration import OuroborosConfig
    from ouroboros.model.modeling import OuroborosForCausalLM

    if spec.tie_embeddings and EMBEDDING in state:
        state = {OUTPUT: state[EMBEDDING], **state}
    model = OuroborosForCausalLM(OuroborosConfig.from_spec(spec, eos_token_id=eos_token_id))
    try:
        model.load_state_dict(state)
    except RuntimeError as error:  # torch lists the misfits over several lines
        misfits = "; ".join(line.strip() for line in str(error).splitlines()[1:])
        raise OuroborosError(f"the tensors do not belong together: {misfits}") from None
    return model.eval()

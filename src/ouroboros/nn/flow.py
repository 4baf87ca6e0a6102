"""Loop parts that hand something from loop to loop, or tell loops apart by maps of the state.

Shapes: D model width, R rank or width of what is handed on, ``...`` the leading axes. Sources: the crawler submissions
to openai/parameter-golf, which call these FLOW, loop smear and ANCHOR.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ouroboros.config.parts import loop as specs
from ouroboros.nn.part import Init, LoopModule, Projection, Started, ZeroProjection

INSTRUCTION_STD = 0.01
"""Standard deviation of the shared map of instructions at the start, as published."""


class Flow(LoopModule):
    """``x + U_l P x``; ``U_l`` is zero at the start, and P is not, so that ``U_l`` learns from the first step."""

    PARAMETERS_BY_LOOP = True

    def __init__(self, spec: specs.FlowSpec, width: int, loops: int, norm_eps: float) -> None:
        super().__init__()
        self.down = _SmallStart(width, spec.rank)
        self.up = nn.ModuleList(ZeroProjection(spec.rank, width) for _ in range(loops))

    def enter(self, x: Tensor, carried: dict[str, Tensor], loop: int) -> Tensor:
        """The state with the loop's instruction; later loops than there are maps take the last."""
        return x + self.up[min(loop, len(self.up) - 1)](self.down(x)).to(x.dtype)


class LoopSmear(LoopModule):
    """``y_l = (1 - g) z_l + g y_{l-1}`` with ``g = sigmoid(gate)``; ``y_{-1}`` is the state before the first loop."""

    def __init__(self, spec: specs.LoopSmearSpec, width: int, loops: int, norm_eps: float) -> None:
        super().__init__()
        self.start = spec.start
        self.gate = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self, init: Init | None = None) -> None:
        """The gate at its starting value."""
        nn.init.constant_(self.gate, self.start)

    def leave(self, x: Tensor, z: Tensor, carried: dict[str, Tensor], loop: int) -> Tensor:
        """The mixture, which the next loop gets too, whatever parts behind this one do to the state."""
        gate_D = torch.sigmoid(self.gate).to(z.dtype)
        carried["loop_smear"] = (1 - gate_D) * z + gate_D * carried.get("loop_smear", carried["x0"])
        return carried["loop_smear"]


class Anchor(LoopModule):
    """``x_l + R_l W_{l-1} z_{l-1}``; R is zero at the start, and W is not, so that R learns from the first step.

    ``z`` is the state at this part's place in the list, before what later parts do to it. It is mapped when the next
    loop begins: nothing would read what the last loop writes.
    """

    PARAMETERS_BY_LOOP = True

    def __init__(self, spec: specs.AnchorSpec, width: int, loops: int, norm_eps: float) -> None:
        super().__init__()
        self.write = nn.ModuleList(Projection(width, spec.width, bias=False) for _ in range(loops - 1))
        self.read = nn.ModuleList(ZeroProjection(spec.width, width) for _ in range(loops - 1))

    def enter(self, x: Tensor, carried: dict[str, Tensor], loop: int) -> Tensor:
        """The state with what the loop before handed on; later loops than there are maps take the last."""
        if loop == 0:
            return x
        last = min(loop, len(self.read)) - 1
        return x + self.read[last](self.write[last](carried["anchor"])).to(x.dtype)

    def leave(self, x: Tensor, z: Tensor, carried: dict[str, Tensor], loop: int) -> Tensor:
        """As it is; the next loop is told of it."""
        carried["anchor"] = z
        return z


class _SmallStart(Started, Projection):
    """A linear map that starts at small numbers, whatever the model's own start is."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def reset_parameters(self, init: Init | None = None) -> None:
        """Drawn with :data:`INSTRUCTION_STD`."""
        nn.init.normal_(self.weight, std=INSTRUCTION_STD)

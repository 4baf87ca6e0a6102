"""What the module of a part has in common with every other; how each family is built and called.

==================  ==========================================  ====================================================
family              built with                                  called with
==================  ==========================================  ====================================================
mixer               ``(spec, width, norm_eps)``                 ``(x_BTD, visit)``, the normalised stream
feed-forward        ``(spec, width)``                           ``(x_BTD, visit)``
norm                ``(spec, width)``                           ``(x)``
residual            ``(spec, width, dropout)``                  ``(x, update, context, read)``
loop part           ``(spec, width, loops, norm_eps)``          ``enter``, ``hand``, ``leave``, ``finish``, and others
stem part           ``(spec, model)``                           ``(x_BTD, ids_BT or None, visit)``
head                ``(spec, model)``                           ``(logits)``
topology            ``(spec, model)``                           ``steps(schedule)``
==================  ==========================================  ====================================================

``width`` is the model's ``hidden_size`` and ``visit`` a :class:`~ouroboros.nn.visit.VisitContext`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from torch import Tensor, nn

if TYPE_CHECKING:
    from ouroboros.nn.visit import VisitContext


class Init(NamedTuple):
    """How parameters are drawn at the start."""

    std: float
    """Standard deviation of weight matrices."""


class Started(nn.Module):
    """A module that sets its own parameters at the start, beside those of the modules inside.

    ``PARAMETER_ROLES`` names parameters that the optimiser treats as something else than a matrix.
    """

    PARAMETER_ROLES: ClassVar[Mapping[str, str]] = {}
    PARAMETERS_BY_LOOP: ClassVar[bool] = False
    """Whether some parameters act in some loops alone, so that a step of fewer loops gives them no gradient."""
    folds: bool = True
    """Whether a map may be worked into another operation, so that its input is never formed. Who wants to see what all
    maps read sets it to False meanwhile; the results differ in their rounding alone."""

    def reset_parameters(self, init: Init | None = None) -> None:
        """Set the parameters that are not of modules inside to their start.

        Args:
            init: of the model; None while the module is built, when parameters that are drawn may stay as they are.
        """


class Projection(nn.Linear):
    """A linear map of a part: the place where converters put low-rank additions or fake quantisation."""


class ZeroProjection(Started, Projection):
    """A linear map that starts at zero, or at the same number ``bias`` everywhere, so that it tells nothing apart.

    Args:
        inputs: channels that it reads.
        outputs: channels that it makes.
        bias: the start of a learned bias; None leaves the bias out.
    """

    def __init__(self, inputs: int, outputs: int, bias: float | None = None) -> None:
        self.starting_bias = bias
        super().__init__(inputs, outputs, bias=bias is not None)

    def reset_parameters(self, init: Init | None = None) -> None:
        """Weight zero, bias at its start."""
        nn.init.zeros_(self.weight)
        if self.starting_bias is not None:
            nn.init.constant_(self.bias, self.starting_bias)


class Residual(Started):
    """A residual connection, and what makes and reads the form of stream that it joins to."""

    @classmethod
    def start(cls, spec: Any, width: int) -> nn.Module | None:
        """What makes the stream of the embeddings, called with ``(x_BTD, memory, padding)``; None: they are it."""
        return None

    @classmethod
    def reader(cls, spec: Any, width: int) -> nn.Module | None:
        """What makes one vector of the stream for a sublayer or the head, called with ``(x, memory, padding, name)``;
        None: the stream is one."""
        return None

    @classmethod
    def entrance(cls, spec: Any, width: int) -> nn.Module | None:
        """What is done to the stream before a block's first sublayer, called with ``(x, visit)``; None: nothing."""
        return None


class LoopModule(Started):
    """A part that acts at the boundaries of a loop.

    ``carried`` holds what parts of a segment hand on from loop to loop, by name, (B, T, ...) each and of the same shape
    in all loops; ``x0`` is the state before the first. Where positions stop before the last loop, later loops may be
    given those alone that go on, so a part treats each position by itself, unless its specification says otherwise.
    """

    stops: bool = False
    """Whether :meth:`goes_on` may end positions before the last loop."""

    def enter(self, x: Tensor, carried: dict[str, Tensor], loop: int) -> Tensor:
        """The state that enters loop ``loop``, (..., D) to the same."""
        return x

    def hand(self, x: Tensor, visit: VisitContext, loop: int) -> dict[str, Tensor]:
        """What the visits of loop ``loop`` find in ``visit.handed``, by name: (B, T, ...), (B, 1, ...) where all
        positions get the same, or at most two axes where all texts do.

        Args:
            x: the state that its first block is given, (B, T, D).
            visit: what the visit of that block is given.
            loop: counted from 0.
        """
        return {}

    def leave(self, x: Tensor, z: Tensor, carried: dict[str, Tensor], loop: int) -> Tensor:
        """The state after loop ``loop``, of ``x`` that was before it and ``z`` that its blocks made."""
        return z

    def finish(self, z: Tensor, carried: dict[str, Tensor]) -> Tensor:
        """What leaves the last loop instead of ``z``."""
        return z

    def goes_on(self, carried: dict[str, Tensor]) -> Tensor:
        """Which positions go on to the next loop, (B, T) boolean; asked behind every loop of a part that ``stops``.

        The others are as they are from there on, see :mod:`ouroboros.model.stopping`.
        """
        raise NotImplementedError

    def scales(self, x: Tensor, z: Tensor, carried: dict[str, Tensor], loop: int) -> dict[str, Tensor]:
        """What the part multiplies channels with behind loop ``loop``, by name: (..., D), or what broadcasts to it.

        Those who watch are told its mean over the channels; it is given what :meth:`leave` is given, before that.
        """
        return {}

    def tell(self, carried: dict[str, Tensor]) -> dict[str, Tensor]:
        """What those who watch are told of each position behind a loop, (B, T) each by name."""
        return {}

    def auxiliary_loss(self, carried: dict[str, Tensor]) -> Tensor | None:
        """What training adds to the loss for each position, (B, T), behind the last loop; None: nothing."""
        return None

"""Published styles: how the program that was published with a system chooses tokens.

A system enters a :class:`Style` in the place ``styles`` of the registry. The style tells by a model's specification
whether the model is of its system, and holds the controls of the published program as default values. A control that
only this program has is a field of a subclass of :class:`~ouroboros.serve.sampling.Sampling`, whose ``options`` and
``read`` carry it out; the command line offers it for models of the system.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ouroboros.config import ModelSpec
from ouroboros.errors import check
from ouroboros.registry import found, load
from ouroboros.serve.sampling import Sampling

PLACE = "styles"
"""The registry's place for values of :class:`Style`."""


@dataclass(frozen=True, kw_only=True)
class Style:
    """How the program published with one system chooses tokens."""

    recognises: Callable[[ModelSpec], bool]
    """Whether a model with this specification is of the system."""
    sampling: Sampling
    """The controls, at the values of the published program."""


def published_sampling(model: ModelSpec) -> Sampling:
    """The controls of the program that was published with the system of a model with this specification.

    Raises:
        OuroborosError: the model is of no published system with a style.
    """
    styles: dict[str, Style] = {name: load(target) for name, target in found(PLACE).items()}
    fitting = [style for style in styles.values() if style.recognises(model)]
    check(
        bool(fitting),
        f"--style published: the model is of no system that has a published style ({', '.join(styles)}); leave it out",
    )
    return fitting[0].sampling

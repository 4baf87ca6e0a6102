"""Training of matrices by low-rank additions.

Shapes: O outputs (rows of a matrix), I inputs (its columns), R the rank.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ouroboros.config import LowRankTraining
from ouroboros.optim import chosen_matrices, untrained_parameters
from ouroboros.train.state import copy_tensors


class LowRank:
    """Keeps the chosen matrices of a model at ``W + alpha / rank * B A`` while A and B are trained.

    W (O, I) is the start of the matrix, A (R, I) is drawn with variance ``1 / I``, and B (O, R) is zero at first. The
    model itself always holds the sum in float32: it computes, is averaged, evaluated and saved as one that is trained
    as usual, and a block that is visited several times forms the sum once. With the gradient G of the sum, those of the
    factors are ``alpha / rank * B^T G`` and ``alpha / rank * G A^T``, whatever G was summed over.

    Args:
        model: on its device, with the weights that the run begins from.
        spec: which matrices, and how; with rank 0 there is none.
        seed: of the run. A depends on it alone, so all processes have the same.

    Raises:
        OuroborosError: a pattern that no two-dimensional parameter has, or no matrix at all.
    """

    def __init__(self, model: nn.Module, spec: LowRankTraining, seed: int) -> None:
        never = untrained_parameters(model)
        named = chosen_matrices(model, spec.where, "train.low_rank") if spec.rank else []
        chosen = [name for name in named if name not in never]
        self.scale = spec.alpha / max(spec.rank, 1)
        self.matrices = {name: model.get_parameter(name) for name in chosen}
        self.starts = {name: matrix.detach().clone() for name, matrix in self.matrices.items()}
        generator = torch.Generator().manual_seed(seed % 2**63)
        self.factors: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}
        """A and B of each matrix by its name in the model."""
        for name, w_OI in self.starts.items():
            # Drawn on the CPU, so that every device draws the same.
            a_RI = torch.randn(spec.rank, w_OI.shape[1], generator=generator) * w_OI.shape[1] ** -0.5
            self.factors[name] = nn.Parameter(a_RI.to(w_OI)), nn.Parameter(w_OI.new_zeros(len(w_OI), spec.rank))

    @property
    def names(self) -> dict[nn.Parameter, str]:
        """The name of every factor."""
        return {factor: f"{name}.{letter}" for name, pair in self.factors.items() for letter, factor in zip("AB", pair)}

    @torch.no_grad()
    def take_gradients(self) -> None:
        """Give the factors the gradients that follow from those of the matrices, which are freed."""
        for name, (A, B) in self.factors.items():
            g_OI, self.matrices[name].grad = self.matrices[name].grad, None
            # A step of fewer loops may leave a matrix of later loops out.
            A.grad = None if g_OI is None else self.scale * (B.T @ g_OI)
            B.grad = None if g_OI is None else self.scale * (g_OI @ A.T)

    @torch.no_grad()
    def merge(self) -> None:
        """Set the matrices to the sums."""
        for name, (A, B) in self.factors.items():
            torch.addmm(self.starts[name], B, A, alpha=self.scale, out=self.matrices[name])

    def state_tensors(self) -> dict[str, Tensor]:
        """Factors and starts by name, not copied."""
        factors = {name: factor.detach() for factor, name in self.names.items()}
        return factors | {f"{name}.start": start for name, start in self.starts.items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore :meth:`state_tensors`; the model has the sums.

        Raises:
            OuroborosError: names or shapes differ.
        """
        copy_tensors(self.state_tensors(), tensors, "low-rank factors")

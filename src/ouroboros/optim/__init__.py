"""Optimisers by parameter role, and learning-rate schedules as pure functions of the run's progress."""

from ouroboros.optim.groups import (
    ROLES,
    build_optimizers,
    choose_muon_dtype,
    chosen_matrices,
    clip_and_norm,
    leave_out,
    left_out_parameters,
    matching,
    parameter_roles,
    untrained_parameters,
)
from ouroboros.optim.muon import BatchedMuon, muon_coefficients, muon_momentum, orthogonalize, set_muon_momentum
from ouroboros.optim.rates import first_beta, learning_rate, set_first_beta, set_learning_rate

__all__ = [
    "ROLES",
    "BatchedMuon",
    "build_optimizers",
    "choose_muon_dtype",
    "chosen_matrices",
    "clip_and_norm",
    "first_beta",
    "learning_rate",
    "leave_out",
    "left_out_parameters",
    "matching",
    "muon_coefficients",
    "muon_momentum",
    "orthogonalize",
    "parameter_roles",
    "set_first_beta",
    "set_learning_rate",
    "set_muon_momentum",
    "untrained_parameters",
]

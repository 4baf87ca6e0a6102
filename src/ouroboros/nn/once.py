"""Backward passes written by hand, for gradients that are asked for once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Let the ``backward`` of an autograd function refuse to be part of a second derivative.

    torch's decorator of this name lets it pass as a constant where the incoming gradient has no graph of its own.
    """

    @functools.wraps(backward)
    def checked(ctx: Any, *gradients: Any) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("the fast ways of training have no second derivatives: call model.eval() for those")
        return backward(ctx, *gradients)

    return checked

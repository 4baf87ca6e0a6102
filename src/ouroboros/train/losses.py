"""The loss of training from logits, in nats; the model's own chunked form is :mod:`ouroboros.model.loss`.

Shapes: B sequences, T positions of a window, V tokens of the vocabulary, N = B T.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from ouroboros.data.masks import IGNORED


def cross_entropy(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Mean negative log-likelihood in nats, computed in float32."""
    return nn.functional.cross_entropy(logits_BTV.float().flatten(0, 1), targets_BT.flatten(), ignore_index=IGNORED)


def smoothed_cross_entropy(logits_BTV: Tensor, targets_BT: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """The mean cross-entropy with smoothed targets, and without smoothing and gradient; nats, computed in float32.

    A target has probability ``1 - smoothing`` besides its share of the rest, which all V tokens have alike (Szegedy et
    al. 2016, section 7), as ``label_smoothing`` of torch; targets that are ignored count in neither.
    """
    log_p_NV = nn.functional.log_softmax(logits_BTV.float().flatten(0, 1), dim=-1)
    targets_N = targets_BT.flatten()
    plain = nn.functional.nll_loss(log_p_NV, targets_N, ignore_index=IGNORED)
    counts_N = targets_N != IGNORED
    spread = -(log_p_NV.mean(dim=-1) * counts_N).sum() / counts_N.sum()
    return (1 - smoothing) * plain + smoothing * spread, plain.detach()


def criterion(smoothing: float) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """From logits (B, T, V) and targets (B, T) to what is minimised and the loss that is reported."""

    def criterion_of(logits_BTV: Tensor, targets_BT: Tensor) -> tuple[Tensor, Tensor]:
        if smoothing:
            return smoothed_cross_entropy(logits_BTV, targets_BT, smoothing)
        loss = cross_entropy(logits_BTV, targets_BT)
        return loss, loss

    return criterion_of

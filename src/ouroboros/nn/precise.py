"""Tensors whose rounding changes what they mean, kept in float32 when a model is cast to fewer bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Self

from torch import Tensor, nn


class Precise(nn.Module):
    """A module whose tensors named in ``PRECISE`` are never cast to fewer bits than float32 has.

    An angle per token is multiplied by positions in the thousands: eight bits of it leave nothing of the product.
    ``to``, ``half``, ``bfloat16`` and moves between devices all come through here, on this module or on one around it.
    What transformers reads from a file is cast on its own way, see ``OuroborosPreTrainedModel``.
    """

    PRECISE: ClassVar[tuple[str, ...]] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        named = [getattr(self, name) for name in self.PRECISE if hasattr(self, name)]
        precise = {id(x) for tensor in named for x in (tensor, tensor.grad)}

        def careful(x: Tensor) -> Tensor:
            changed = fn(x)
            if id(x) in precise and changed.is_floating_point() and changed.dtype.itemsize < 4:
                return x.float().to(changed.device)
            return changed

        return super()._apply(careful, recurse)

"""Hyper-connections between loops. Shapes: D model width, N streams, L loops, ``...`` the leading axes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ouroboros.config.parts.loop import HyperSpec
from ouroboros.nn.part import Init, LoopModule
from ouroboros.nn.small import ZeroLinear


class HyperConnections(LoopModule):
    """Streams S that every loop writes to and reads from, after Hyperloop Transformers (Zeitoun et al., arXiv
    2604.21254)::

        z <- z + e_l
        keep, write = sigmoid(A_l h + a_l + offsets), 2 sigmoid(B_l h + b_l)    with h = S / |S| over all N D numbers
        S_i <- keep_i S_i + write_i z
        x = z + sum_i read_i S_i                                                with read = C_l S / |S| + c_l

    All streams begin as the state before the first loop. As published are the vector ``e_l`` of each loop, the
    diagonal gate ``keep``, and weights that depend on all streams. Two things differ, so that the part is neutral at
    the start, when everything learned is zero: the state goes on beside the streams, which are added to it (published:
    blocks read the streams alone, and the last state is their mean); and ``offsets`` let the streams fade at N
    different rates (keep_i = i / (N + 1)), because equal streams would stay equal. ``h`` has length 1 (published: a
    mean square of 1), so that one step of the optimiser, which moves every weight by about the learning rate, moves a
    gate by no more than ``sqrt(N D)`` times that: with the published norm it is ``N D`` times, and gates are at their
    ends after a few steps of the rates that matrices need.
    """

    PARAMETER_ROLES = {"embedding": "vector"}
    PARAMETERS_BY_LOOP = True

    def __init__(self, spec: HyperSpec, width: int, loops: int, norm_eps: float) -> None:
        super().__init__()
        self.streams, self.eps = spec.streams, norm_eps
        self.embedding = nn.Parameter(torch.zeros(loops, width))
        self.gates = nn.ModuleList(ZeroLinear(spec.streams * width, 2 * spec.streams, bias=0.0) for _ in range(loops))
        self.read = nn.ModuleList(ZeroLinear(spec.streams * width, spec.streams, bias=0.0) for _ in range(loops))

    def reset_parameters(self, init: Init | None = None) -> None:
        """Zero; so are the maps inside."""
        nn.init.zeros_(self.embedding)

    def leave(self, x: Tensor, z: Tensor, carried: dict[str, Tensor], loop: int) -> Tensor:
        """Write to the streams and add what is read of them; later loops than there are weights take the last."""
        at = min(loop, len(self.embedding) - 1)
        before = carried["hyper"] if loop else carried["x0"].unsqueeze(-2).expand(*z.shape[:-1], self.streams, -1)
        z = z + self.embedding[at].to(z.dtype)
        keep, write = self.gates[at](self._normed(before)).unflatten(-1, (2, self.streams)).unbind(-2)
        rank = torch.arange(1, self.streams + 1, device=z.device, dtype=torch.float32)
        keep = torch.sigmoid(keep + torch.log(rank / rank.flip(0))).to(z.dtype)
        write = 2 * torch.sigmoid(write).to(z.dtype)
        streams = carried["hyper"] = keep.unsqueeze(-1) * before + write.unsqueeze(-1) * z.unsqueeze(-2)
        read = self.read[at](self._normed(streams)).to(z.dtype)
        # A sum, and not a product of matrices: with so few streams it costs a pass over them in either case.
        return z + (read.unsqueeze(-1) * streams).sum(dim=-2)

    def _normed(self, streams: Tensor) -> Tensor:
        """All streams (..., N, D) as one vector (..., N D) of length 1."""
        flat = streams.flatten(-2)
        return nn.functional.rms_norm(flat, flat.shape[-1:], eps=self.eps) * flat.shape[-1] ** -0.5

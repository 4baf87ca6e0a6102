"""One-shot algebraic map (OSAM v0.1, 2025): two readings of a memory of constant size (docs/systems/osam.md).

A token adds its phased key ``k~ = k exp(i theta_k k)``, and ``v k~^T``, to sums that turn by a frequency at each token.
It reads what came before it: the feature ``psi = Re(S q~ * S kappa) / sqrt(m)``, a circular convolution of the sketched
query with the sketched sum of keys ``kappa``, and ``u = Re(M G q~)`` from the sum of values ``M``, ``G = S^T S``. The
published state is the image of ``kappa`` and ``M`` under the sketch ``S``, 32 times as large at the published sizes.
Shapes: B batch, T positions, D model width, R readout width, m buckets. Complex coordinates are pairs (..., 2, D).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ouroboros.config.parts.osam import OsamSpec
from ouroboros.nn.linear_memory import Keys, Turn, phased, read_and_write
from ouroboros.nn.part import Init, Projection, Started
from ouroboros.nn.precise import Precise
from ouroboros.nn.sketch import Sketch, convolution, draw_sketch, gram_matrix, map_of_convolution
from ouroboros.nn.visit import VisitContext

THETA_START, OMEGA_START = 0.05, 0.02
"""Raw values at the start, as published; several frequencies start otherwise."""
TURNS = (4.0, 4096.0)
"""Tokens in which the first and the last of several groups turn by 1.6 radians, a quarter and a bit, at the start."""
RMS_EPS = 1e-6


class Factors(NamedTuple):
    """What the tokens bring to the memory."""

    query: Tensor
    """Phased queries (B, R, 2, D) of the R tokens that read."""
    key: Keys
    """Of all tokens, 0 where padded."""
    value: Tensor | None
    """(B, T, D); None without the value path."""


class Osam(Precise, Started):
    """``g_f readout(psi) + g_v value_map(u)``; see the module's description."""

    PARAMETER_ROLES = dict.fromkeys(
        ("theta_q_raw", "theta_k_raw", "omega_raw", "decay_raw", "gate_feature_raw", "gate_value_raw"), "scalar"
    )

    OUTPUT_PROJECTIONS = ("readout_out", "value_out")

    PRECISE = ("theta_q_raw", "theta_k_raw", "omega_raw", "decay_raw")

    def __init__(self, spec: OsamSpec, hidden_size: int, norm_eps: float) -> None:
        super().__init__()
        self.spec = spec
        width, groups = hidden_size, spec.frequencies
        self.q_proj = Projection(width, width, bias=False)
        self.k_proj = Projection(width, width, bias=False)
        self.theta_q_raw = nn.Parameter(torch.empty(1))
        self.theta_k_raw = nn.Parameter(torch.empty(1))
        self.omega_raw = nn.Parameter(torch.empty(groups))
        if spec.decay:
            self.decay_raw = nn.Parameter(torch.empty(groups))
        self.gate_feature_raw = nn.Parameter(torch.empty(1))
        self.readout_in = Projection(spec.buckets, spec.readout_hidden)
        self.readout_out = Projection(spec.readout_hidden, width)
        if spec.value_path:
            self.v_proj = Projection(width, width, bias=False)
            self.gate_value_raw = nn.Parameter(torch.empty(1))
            self.value_norm = nn.LayerNorm(width, eps=norm_eps)
            self.value_in = Projection(width, width)
            self.value_out = Projection(width, width)
        key = draw_sketch(width, spec.buckets, spec.hash_seed)
        query = draw_sketch(width, spec.buckets, spec.hash_seed + 1) if spec.independent_hashes else key
        # Kept in checkpoints: those of other programs may have been drawn differently.
        self.register_buffer("key_buckets", key.bucket_D)
        self.register_buffer("key_signs", key.sign_D)
        if spec.independent_hashes:
            self.register_buffer("query_buckets", query.bucket_D)
            self.register_buffer("query_signs", query.sign_D)
        self.untrained = _untrained(spec)
        """Parameters that no gradient reaches, by what the specification says."""
        for name in self.untrained:
            self.get_parameter(name).requires_grad_(False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, init: Init | None = None) -> None:
        """The published start: orthogonal queries, keys and values, everything else as torch starts it."""
        spec = self.spec
        for name in ("q_proj", "k_proj", "v_proj"):
            if hasattr(self, name):
                nn.init.orthogonal_(getattr(self, name).weight)
        for name in ("readout_in", "readout_out", "value_norm", "value_in", "value_out"):
            if hasattr(self, name):
                getattr(self, name).reset_parameters()
        nn.init.constant_(self.theta_q_raw, THETA_START)
        nn.init.constant_(self.theta_k_raw, THETA_START)
        nn.init.constant_(self.gate_feature_raw, spec.gate_start)
        if spec.value_path:
            nn.init.constant_(self.gate_value_raw, spec.gate_start)
        if spec.frequencies == 1:
            nn.init.constant_(self.omega_raw, OMEGA_START)
        else:
            _start(self.omega_raw, torch.atanh(2 * 1.6 / _between(*TURNS, spec.frequencies)))
        if spec.decay:
            _start(self.decay_raw, torch.logit(1 / _between(*spec.time_scales, spec.frequencies)))

    @property
    def key_sketch(self) -> Sketch:
        """The table of keys, and of queries that read values."""
        return Sketch(self.key_buckets, self.key_signs)

    @property
    def query_sketch(self) -> Sketch:
        """The table of queries in the feature."""
        if not self.spec.independent_hashes:
            return self.key_sketch
        return Sketch(self.query_buckets, self.query_signs)

    def turn(self, dtype: torch.dtype = torch.float32) -> Turn:
        """How the memory turns and fades: frequencies in (-0.5, 0.5) radians, decays in (0, 1), per token."""
        omega_D = self._spread(0.5 * torch.tanh(self._phase(self.omega_raw, dtype)))
        decay_D = self._spread(torch.sigmoid(self._phase(self.decay_raw, dtype))) if self.spec.decay else None
        return Turn(decay_D, omega_D)

    def gates(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor | None]:
        """Those of the feature and of the value path, each (1,), in (0, ``gate_cap``)."""
        cap = self.spec.gate_cap
        value = cap * torch.sigmoid(self.gate_value_raw.to(dtype)) if self.spec.value_path else None
        return cap * torch.sigmoid(self.gate_feature_raw.to(dtype)), value

    def phases(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """``theta_q`` and ``theta_k`` in (-0.5, 0.5), each (1,)."""
        query, key = self._phase(self.theta_q_raw, dtype), self._phase(self.theta_k_raw, dtype)
        return 0.5 * torch.tanh(query), 0.5 * torch.tanh(key)

    def forward(self, x_BTD: Tensor, visit: VisitContext) -> Tensor:
        """Mix (B, T, D) over time.

        Args:
            x_BTD: the (normalised) stream.
            visit: padding, positions, and the state, which is read and replaced; rotary tables and masks are not used.
        """
        # Sums over a whole text need float32 whatever the products are computed in.
        T, dtype = x_BTD.shape[1], torch.promote_types(x_BTD.dtype, torch.float32)
        factors = self.factors(x_BTD, visit, dtype)
        low = self._product_dtype(x_BTD)
        with torch.autocast(x_BTD.device.type, enabled=False):
            sums, read = self.remembered(factors, visit)
            count_BR1 = (self._positions(visit, x_BTD, dtype) + 1)[..., None]
            hidden_BRF = self._hidden(factors.query, sums, count_BR1, low, alone=T == 1 or not self.folds)
        skipped = F.gelu(self.readout_in.bias)  # where nothing is read, the readout maps 0
        feature_BTD = self.readout_out(self._drop(self._everywhere(hidden_BRF, skipped, visit, T)))
        gate_feature, gate_value = self.gates(dtype)
        y_BTD = gate_feature * feature_BTD
        if read is not None and gate_value is not None:
            w_BRD = self.value(read, count_BR1)
            y_BTD = y_BTD + gate_value * self._everywhere(w_BRD, torch.zeros_like(self.value_out.bias), visit, T)
        return y_BTD.to(x_BTD.dtype)

    def factors(self, x_BTD: Tensor, visit: VisitContext, dtype: torch.dtype) -> Factors:
        """Phased queries and keys, and values."""
        spec = self.spec
        q_BRD = self.q_proj(x_BTD[:, self._rows(visit)]).to(dtype)
        theta_q, theta_k = self.phases(dtype)
        angle = theta_q * q_BRD
        if spec.detach_state and spec.frequencies == 1 and torch.is_grad_enabled():
            # The published frequency turns queries as well as keys, and is trained by the queries alone. Here the
            # memory turns, so that this term is 0 and has the gradient of the queries' phase.
            omega_D = self.turn(dtype).frequency_D
            angle = angle - (omega_D - omega_D.detach()) * self._positions(visit, x_BTD, dtype)[..., None]
        query = phased(q_BRD, angle)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not spec.detach_state):
            k_BTD = self.k_proj(x_BTD).to(dtype)
            v_BTD = self.v_proj(x_BTD).to(dtype) if spec.value_path else None
            if visit.padding is not None:
                k_BTD = k_BTD * visit.padding[..., None]
            key = Keys(k_BTD, theta_k * k_BTD)
        return Factors(query, key, v_BTD)

    def remembered(self, factors: Factors, visit: VisitContext) -> tuple[Tensor, Tensor | None]:
        """Sums of keys (B, R, 2, D) before each token that reads, and what it reads of values (B, R, D) or None."""
        spec, memory = self.spec, visit.memory
        with torch.set_grad_enabled(torch.is_grad_enabled() and not spec.detach_state):
            query = None
            if factors.value is not None:
                query = factors.query
                if spec.sketch_values:
                    query = query @ gram_matrix(self.key_sketch, query.dtype)
            sums, read, state = read_and_write(
                query,
                factors.key,
                factors.value,
                self.turn(factors.query.dtype),
                None if memory is None else memory.state(),
                visit.padding,
                wants_state=memory is not None and memory.keeps,
                every=self._rows(visit).step,
            )
        if memory is not None and memory.keeps:
            assert state is not None
            memory.carry(state, factors.key.size.shape[1])
        return sums, read

    def normalised(self, sums: Tensor, count_BT1: Tensor) -> Tensor:
        """Sums of keys (..., 2, D) at the scale of one key, by the number of tokens or by their own size."""
        if self.spec.normalisation == "count":
            return sums * count_BT1[..., None].rsqrt()
        groups = sums.unflatten(-1, (self.spec.frequencies, -1))
        size = groups.square().mean(dim=(-3, -1), keepdim=True)
        return (groups * (size + RMS_EPS).rsqrt()).flatten(-2)

    def feature(self, query: Tensor, sums: Tensor, count_BR1: Tensor) -> Tensor:
        """``psi`` (B, R, m), which is formed for single tokens, for pictures and for who asks to see it."""
        memory = self.normalised(sums, count_BR1)
        psi = convolution(
            query.flatten(0, 1), memory.flatten(0, 1), self.query_sketch, self.key_sketch, self.spec.buckets
        )
        return psi.unflatten(0, sums.shape[:2]) * self.spec.buckets**-0.5

    def value(self, read: Tensor, count_BR1: Tensor) -> Tensor:
        """What was read of values, through its own norm and network (B, R, D)."""
        if self.spec.normalisation == "count":  # felt by the norm's eps alone
            read = read * count_BR1.rsqrt()
        normed = self.value_norm(read.to(self.value_norm.weight.dtype))
        return self.value_out(self._drop(F.gelu(self.value_in(normed))))

    def _hidden(self, query: Tensor, sums: Tensor, count_BR1: Tensor, low: torch.dtype, *, alone: bool) -> Tensor:
        """The readout's hidden layer (B, R, F) behind its activation; ``alone``: a product with the feature itself, as
        is right for one token per sequence."""
        weight, bias = self.readout_in.weight, self.readout_in.bias
        # Only the largest product is worth a shorter format; sums and spectra are not.
        if alone:
            return F.gelu(F.linear(self.feature(query, sums, count_BR1).to(low), weight.to(low), bias.to(low)))
        z_NF = map_of_convolution(
            query.flatten(0, 1) * self.spec.buckets**-0.5,
            self.normalised(sums, count_BR1).flatten(0, 1),
            weight,
            self.query_sketch,
            self.key_sketch,
            shared=not self.spec.independent_hashes,
            dtype=low,
        )
        return F.gelu(z_NF.unflatten(0, sums.shape[:2]) + bias)

    def _product_dtype(self, x: Tensor) -> torch.dtype:
        """What the readout's matrix product is computed in: autocast's type, or the weights'."""
        device = x.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.readout_in.weight.dtype

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.spec.dropout, self.training)

    def _positions(self, visit: VisitContext, x_BTD: Tensor, dtype: torch.dtype) -> Tensor:
        """Tokens before each that reads, (B or 1, R)."""
        if visit.positions is not None:
            return visit.positions.to(dtype)
        return torch.arange(0, x_BTD.shape[1], self.spec.kupdate, device=x_BTD.device, dtype=dtype)[None]

    def _rows(self, visit: VisitContext) -> slice:
        """Positions whose reading is worked out: those that read, where that is known before the call runs."""
        return slice(None, None, self.spec.kupdate if visit.positions is None else 1)

    def _everywhere(self, rows: Tensor, skipped: Tensor, visit: VisitContext, T: int) -> Tensor:
        """(B, T, X) from what was worked out for some rows (B, N, X), and what the others have, (X,)."""
        every = self.spec.kupdate
        if every == 1:
            return rows
        if visit.positions is not None:
            return torch.where((visit.positions % every == 0)[..., None], rows, skipped)
        full = skipped.to(rows.dtype).expand(rows.shape[0], T, -1).clone()
        full[:, ::every] = rows
        return full

    def _phase(self, raw: Tensor, dtype: torch.dtype) -> Tensor:
        return (raw.detach() if self.spec.freeze_phase else raw).to(dtype)

    def _spread(self, per_group: Tensor) -> Tensor:
        """(groups,) to (D,): groups are runs of neighbouring coordinates."""
        return per_group.repeat_interleave(self.q_proj.in_features // self.spec.frequencies)


def _untrained(spec: OsamSpec) -> frozenset[str]:
    names = {"k_proj.weight", "v_proj.weight", "theta_k_raw"} if spec.detach_state else set[str]()
    if spec.detach_state and spec.decay:
        names.add("decay_raw")
    if spec.freeze_phase:
        names |= {"theta_q_raw", "theta_k_raw", "omega_raw"} | ({"decay_raw"} if spec.decay else set())
    if spec.detach_state and spec.frequencies > 1:
        names.add("omega_raw")  # they turn the memory alone
    return frozenset(names if spec.value_path else names - {"v_proj.weight"})


def _between(first: float, last: float, count: int) -> Tensor:
    """``count`` lengths at equal ratios, (count,); a single one is the first."""
    return torch.logspace(math.log10(first), math.log10(last), count, dtype=torch.float64)


def _start(parameter: Tensor, values: Tensor) -> None:
    """Set a parameter, unless transformers has loaded it (``nn.init`` itself is told so)."""
    if not getattr(parameter, "_is_hf_initialized", False):
        parameter.copy_(values)

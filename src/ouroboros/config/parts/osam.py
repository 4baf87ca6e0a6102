"""OSAM's memory of constant size."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from ouroboros.config.needs import needs
from ouroboros.config.part import MixerPart, part
from ouroboros.errors import check

if TYPE_CHECKING:
    from ouroboros.config.model import ModelSpec

CHUNK, FADING_CHUNK = 128, 64
"""Tokens that a constant-size memory works on at a time, without and with decay: with decays of at most 1 per token the
powers within a chunk stay far inside float32."""
BAND = 16
"""Coordinates of one band of a bilinear map: where it is symmetric, only products of a band with itself and with later
coordinates are formed."""


@part(module="ouroboros.nn.osam:Osam")
@dataclass(frozen=True, kw_only=True)
class OsamSpec(MixerPart):
    """One-shot algebraic map: a memory of constant size, summed key by key and read in two ways (OSAM v0.1, 2025).

    ``y = g_f readout(Re(Sq * Sk) / sqrt(m)) + g_v v_proj(M G q)``: the circular convolution of the sketched query with
    the running sum of sketched keys, and linear attention without softmax or denominator. The defaults are the
    published ones.
    """

    keeps = "state"

    kind: Literal["osam"] = "osam"
    buckets: int = 2048
    """Length m of the sketches; more than d (d + 1) / 2 add nothing (twice as many with ``independent_hashes``)."""
    readout_hidden: int = 128
    """Width of the readout's hidden layer."""
    kupdate: int = 1
    """The memory is read at every kupdate-th position only, in training and in decoding; elsewhere a token sees nothing
    but itself."""
    value_path: bool = True
    """False leaves out the memory of values, its parameters and its state."""
    freeze_phase: bool = False
    """Keep phases, frequencies and decays at their starting values."""
    detach_state: bool = True
    """No gradient flows through what is remembered, so that keys, values and the phase of keys are never trained; False
    trains them, at the same cost."""
    independent_hashes: bool = False
    """Sketch queries by a table of their own; with a shared one the pairs (i, j) and (j, i) always collide."""
    sketch_values: bool = field(default=True, metadata=needs("value_path", True))
    """The memory of values sees keys through the sketch, where coordinates of one bucket are added up; False keeps them
    apart."""
    frequencies: int = 1
    """Groups of coordinates that each turn with a frequency of their own; one alone cancels after a full turn."""
    decay: bool = False
    """Each group forgets at a learned rate."""
    time_scales: tuple[float, float] = field(default=(4.0, 4096.0), metadata=needs("decay", True))
    """Tokens after which the first and the last group have forgotten all but 1/e at the start of training; the others
    lie between them at equal ratios."""
    normalisation: Literal["count", "rms"] = "count"
    """Divide by the square root of the tokens seen, or by the root mean square of what is remembered, which stays the
    same however long the text and however alike its keys."""
    gate_cap: float = 0.25
    """Upper end of the two gates ``cap * sigmoid(raw)``."""
    gate_start: float = -2.5
    """Raw value of both gates at the start of training."""
    hash_seed: int = 42
    """Of the tables of buckets and signs, which are not trained."""
    dropout: float = 0.0
    """Dropout in the readout and in the map of values, behind their activations."""

    def __post_init__(self) -> None:
        for name in ("buckets", "readout_hidden", "kupdate", "frequencies"):
            check(getattr(self, name) >= 1, f"mixer.{name} must be >= 1, got {getattr(self, name)}")
        first, last = self.time_scales
        check(
            1 < first <= last < math.inf,
            f"mixer.time_scales must be two lengths in tokens, longer than 1 and in order, got {first:g}, {last:g}",
        )
        check(self.gate_cap > 0, f"mixer.gate_cap must be > 0, got {self.gate_cap}")
        check(math.isfinite(self.gate_start), f"mixer.gate_start must be a finite number, got {self.gate_start}")
        check(0 <= self.hash_seed < 2**63, f"mixer.hash_seed must be in [0, 2^63), got {self.hash_seed}")
        check(0 <= self.dropout < 1, f"mixer.dropout must be in [0, 1), got {self.dropout}")

    def check(self, model: ModelSpec) -> None:
        check(
            model.hidden_size % self.frequencies == 0,
            f"mixer.frequencies ({self.frequencies}) must divide hidden_size ({model.hidden_size})",
        )
        check(
            not (model.registers and self.detach_state),
            "registers reach the text through the memory alone, where mixer.detach_state lets no gradient pass:"
            " set one of them off",
        )

    def warnings(self, model: ModelSpec) -> Iterator[str]:
        width = model.hidden_size
        products = width * width if self.independent_hashes else width * (width + 1) // 2
        if self.buckets > products:
            yield (
                f"mixer.buckets is {self.buckets:,} and a width of {width} has {products:,} products of coordinates:"
                f" the buckets beyond are never reached, and their weights are not trained; {products:,} or fewer do"
                " the same"
            )

    @property
    def freezes(self) -> bool:
        return self.detach_state or self.freeze_phase

    def parameters(self, width: int) -> int:
        matrices = 2 * width * width + self.readout_hidden * (self.buckets + width)
        numbers = 3 + self.frequencies * (2 if self.decay else 1)  # two phases and a gate
        vectors = self.readout_hidden + width + numbers
        if self.value_path:
            matrices, vectors = matrices + 3 * width * width, vectors + 4 * width + 1
        return matrices + vectors

    def flops(self, width: int, context: int, registers: int = 0) -> int:
        """Of the form that training uses: products of coordinates times a gathered matrix, or spectra times a folded
        one. A token meets those of its chunk, and behind the first chunk the state."""
        every = 1 if registers else self.kupdate  # which positions read is then told by the call
        most = FADING_CHUNK if self.decay else CHUNK
        chunk = min(context, most)
        symmetric = not self.independent_hashes and width > BAND
        if direct_is_faster(width, self.buckets, symmetric=symmetric):
            read = bilinear_flops(width, self.readout_hidden, symmetric=symmetric)
        else:
            read = 2 * (2 * (self.buckets // 2 + 1)) * self.readout_hidden
        read += 2 * width * width  # queries
        look, total = 2 * chunk * 2 * width, 2 * width * width + 2 * self.readout_hidden * width  # sums of keys
        if self.value_path:
            read += 2 * 2 * width * width + (2 * 2 * width * width if self.sketch_values else 0)
            look += 2 * chunk * 3 * width
            total += 2 * width * width
        if context > most:
            write, between = self.prefix_flops(width)
            total, look = total + write, look + between
        reads = -(-context // every)
        looks = context if self.decay and most < min(every, context) else reads
        return total + (read * reads + look * looks) // context

    def prefix_flops(self, width: int) -> tuple[int, int]:
        """Of adding a token to the state, and of reading the state in front of a chunk."""
        state = 2 * 2 * width * width if self.value_path else 0
        return state, state

    @property
    def flops_are_rounded(self) -> bool:
        return self.kupdate > 1

    def state_values(self, width: int) -> int:
        """Sums of keys, and of keys times values."""
        return 2 * width * (width + 1) if self.value_path else 2 * width


def direct_is_faster(width: int, buckets: int, *, symmetric: bool) -> bool:
    """Whether a map behind the convolution of two sketches works on products of coordinates, or on spectra: a product
    costs about a third of a bucket (measured: docs/benchmarks.md)."""
    return bilinear_columns(width, symmetric=symmetric) <= 3 * buckets


def bilinear_columns(width: int, *, symmetric: bool) -> int:
    """Products of two vectors' coordinates that a bilinear map forms: all, or where it is symmetric bands of them."""
    if not symmetric:
        return width * width
    return sum(min(BAND, width - low) * (width - low) for low in range(0, width, BAND))


def bilinear_flops(width: int, outputs: int, *, symmetric: bool) -> int:
    """Operations of a bilinear map of two complex vectors, of which a symmetric one forms bands of products alone."""
    return 2 * bilinear_columns(width, symmetric=symmetric) * ((4 if symmetric else 2) + outputs)

"""What mixes tokens over time: attention of several kinds, and a memory of constant size."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from ouroboros.errors import check


@dataclass(frozen=True, kw_only=True)
class RopeSpec:
    """Rotary position embedding (Su et al. 2021, eq. 15), half-split layout as in Llama."""

    base: float = 10_000.0
    """Wavelength base theta."""
    fraction: float = 1.0
    """Share of each head's channels that is rotated; the rest passes through."""
    scale: float = 1.0
    """Positions are divided by this number before rotation."""

    def __post_init__(self) -> None:
        check(self.base > 1, f"rope.base must be > 1, got {self.base}")
        check(0 <= self.fraction <= 1, f"rope.fraction must be in [0, 1], got {self.fraction}")
        check(self.scale > 0, f"rope.scale must be > 0, got {self.scale}")


Activation = Literal["none", "silu", "relu", "elu+1"]


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """Grouped-query causal self-attention (Ainslie et al. 2023)."""

    kind: Literal["attention"] = "attention"
    num_heads: int = 4
    num_kv_heads: int | None = None
    """Key/value heads; None means one per query head."""
    head_dim: int | None = None
    """Channels per head; None means hidden_size // num_heads."""
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: Literal["none", "before_rope", "after_rope"] = "none"
    """RMS-normalise queries and keys per head, before or after the rotation."""
    query_gain: float | None = None
    """Initial value of a learned gain per query head; None leaves it out."""
    q_activation: Activation = "none"
    """Function of the queries, before rotation and norm."""
    k_activation: Activation = "none"
    """The same of the keys, after ``k_shift``."""
    v_activation: Activation = "none"
    """The same of the values, after ``v_shift``."""
    k_shift: bool = False
    """Mix each key with the previous token's: ``a u_{t-1} + (1 - a) u_t`` per head, ``a`` from the present token."""
    v_shift: bool = False
    """The same of the values."""
    head_norm: bool = False
    """RMS-normalise what each head returns."""
    output_gate: bool = False
    """Multiply what each head returns, RMS-normalised, by ``silu`` of a linear map of the input."""
    dropout: float = 0.0
    """Dropout of attention probabilities in training."""
    rope: RopeSpec = field(default_factory=RopeSpec)

    def __post_init__(self) -> None:
        check(self.num_heads >= 1, f"mixer.num_heads must be >= 1, got {self.num_heads}")
        kv = self.kv_heads
        check(kv >= 1, f"mixer.num_kv_heads must be >= 1, got {kv}")
        check(
            self.num_heads % kv == 0,
            f"mixer.num_heads ({self.num_heads}) must be a multiple of mixer.num_kv_heads ({kv})",
        )
        check(0 <= self.dropout < 1, f"mixer.dropout must be in [0, 1), got {self.dropout}")

    @property
    def kv_heads(self) -> int:
        """Key/value heads, resolved."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    def width(self, hidden_size: int) -> int:
        """Channels per head, resolved for a model of ``hidden_size``."""
        return hidden_size // self.num_heads if self.head_dim is None else self.head_dim

    def rotary_width(self, hidden_size: int) -> int:
        """Channels per head that positions rotate: all of them, before ``rope.fraction``."""
        return self.width(hidden_size)

    def cached_heads(self) -> int:
        """Heads of what a cache keeps."""
        return self.kv_heads

    @property
    def normalises_heads(self) -> bool:
        """Whether what a head returns is normalised: the output gate includes it."""
        return self.head_norm or self.output_gate


@dataclass(frozen=True, kw_only=True)
class LatentAttentionSpec:
    """Multi-head latent attention with decoupled rotary keys (DeepSeek-V2, section 2.1).

    A cache keeps the normalised latent and one rotary key for all heads: ``kv_rank + rope_dim`` numbers per token.
    """

    kind: Literal["latent_attention"] = "latent_attention"
    num_heads: int = 4
    head_dim: int | None = None
    """Content channels per head, of queries, keys and values; None means hidden_size // num_heads."""
    kv_rank: int | None = None
    """Width of the key/value latent; None means hidden_size // 4."""
    query_rank: int | None = None
    """Width of the query latent; None means ``kv_rank``, 0 means none: queries come from the stream itself."""
    rope_dim: int | None = None
    """Rotary channels per head, beside the content channels; None means half of ``head_dim``, made even."""
    dropout: float = 0.0
    """Dropout of attention probabilities in training."""
    rope: RopeSpec = field(default_factory=RopeSpec)

    def __post_init__(self) -> None:
        check(self.num_heads >= 1, f"mixer.num_heads must be >= 1, got {self.num_heads}")
        for name, least in (("head_dim", 1), ("kv_rank", 1), ("query_rank", 0), ("rope_dim", 2)):
            value = getattr(self, name)
            check(value is None or value >= least, f"mixer.{name} must be >= {least} or null, got {value}")
        check(self.rope_dim is None or self.rope_dim % 2 == 0, f"mixer.rope_dim must be even, got {self.rope_dim}")
        check(0 <= self.dropout < 1, f"mixer.dropout must be in [0, 1), got {self.dropout}")

    def width(self, hidden_size: int) -> int:
        """Content channels per head, resolved for a model of ``hidden_size``."""
        return hidden_size // self.num_heads if self.head_dim is None else self.head_dim

    def rank(self, hidden_size: int) -> int:
        """Width of the key/value latent, resolved."""
        return max(hidden_size // 4, 1) if self.kv_rank is None else self.kv_rank

    def latent_of_queries(self, hidden_size: int) -> int:
        """Width of the query latent, resolved; 0 without one."""
        return self.rank(hidden_size) if self.query_rank is None else self.query_rank

    def rotary_width(self, hidden_size: int) -> int:
        """Rotary channels per head, resolved."""
        return max(self.width(hidden_size) // 4 * 2, 2) if self.rope_dim is None else self.rope_dim

    def cached_heads(self) -> int:
        """Heads of what a cache keeps: one for all."""
        return 1


@dataclass(frozen=True, kw_only=True)
class BottleneckAttentionSpec:
    """Multi-head attention whose queries, keys and values pass through low-rank latents (R-HRM as published).

    Per-head norm and rotation come after the up-projection, so keys cannot be absorbed into queries.
    """

    kind: Literal["bottleneck_attention"] = "bottleneck_attention"
    num_heads: int = 4
    head_dim: int | None = None
    """Channels per head; None means hidden_size // num_heads."""
    latent_rank: int | None = None
    """Width of the query and of the key/value latent; None means hidden_size // 4."""
    qk_norm: Literal["none", "before_rope"] = "before_rope"
    """RMS-normalise queries and keys per head, before the rotation."""
    cache: Literal["keys_values", "latent"] = "keys_values"
    """Keep keys and values, or the latent alone: 8 times smaller at the published sizes, keys rebuilt at each step."""
    dropout: float = 0.0
    """Dropout of attention probabilities in training."""
    rope: RopeSpec = field(default_factory=RopeSpec)

    def __post_init__(self) -> None:
        check(self.num_heads >= 1, f"mixer.num_heads must be >= 1, got {self.num_heads}")
        for name in ("head_dim", "latent_rank"):
            value = getattr(self, name)
            check(value is None or value >= 1, f"mixer.{name} must be >= 1 or null, got {value}")
        check(0 <= self.dropout < 1, f"mixer.dropout must be in [0, 1), got {self.dropout}")

    def width(self, hidden_size: int) -> int:
        """Channels per head, resolved for a model of ``hidden_size``."""
        return hidden_size // self.num_heads if self.head_dim is None else self.head_dim

    def rank(self, hidden_size: int) -> int:
        """Width of the latents, resolved."""
        return max(hidden_size // 4, 1) if self.latent_rank is None else self.latent_rank

    def rotary_width(self, hidden_size: int) -> int:
        """Channels per head that positions rotate: all of them, before ``rope.fraction``."""
        return self.width(hidden_size)

    def cached_heads(self) -> int:
        """Heads of what a cache keeps."""
        return 1 if self.cache == "latent" else self.num_heads


@dataclass(frozen=True, kw_only=True)
class OsamSpec:
    """One-shot algebraic map: a memory of constant size, summed key by key and read in two ways (OSAM v0.1, 2025).

    ``y = g_f readout(Re(Sq * Sk) / sqrt(m)) + g_v v_proj(M G q)``: the circular convolution of the sketched query with
    the running sum of sketched keys, and linear attention without softmax or denominator. The defaults are the
    published ones.
    """

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
    freq_cache: bool = False
    """Accepted for published models: the running spectrum it keeps is a linear map of the state and is computed where a
    published state is written, nowhere else."""
    independent_hashes: bool = False
    """Sketch queries by a table of their own; with a shared one the pairs (i, j) and (j, i) always collide."""
    sketch_values: bool = True
    """The memory of values sees keys through the sketch, where coordinates of one bucket are added up; False keeps them
    apart."""
    frequencies: int = 1
    """Groups of coordinates that each turn with a frequency of their own; one alone cancels after a full turn."""
    decay: bool = False
    """Each group forgets at a learned rate."""
    time_scales: tuple[float, float] = (4.0, 4096.0)
    """Tokens after which the first and the last group have forgotten all but 1/e at the start of training; the others
    lie between them at equal ratios. Used with ``decay`` alone."""
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


MixerSpec = AttentionSpec | LatentAttentionSpec | BottleneckAttentionSpec | OsamSpec

"""What a model is: its schedule, the parts of a block, and what surrounds them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ouroboros.errors import check
from ouroboros.schedule import parse


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


MixerSpec = AttentionSpec | LatentAttentionSpec | BottleneckAttentionSpec


@dataclass(frozen=True, kw_only=True)
class FeedForwardSpec:
    """Position-wise feed-forward network."""

    kind: Literal["swiglu", "relu2", "leaky_relu2", "gelu"] = "swiglu"
    intermediate_size: int = 512
    bias: bool = False
    negative_slope: float = 0.5
    """Slope of ``leaky_relu2`` below zero."""
    dropout: float = 0.0
    """Dropout of the network's output in training, besides that of every sublayer (``model.dropout``)."""

    def __post_init__(self) -> None:
        check(self.intermediate_size >= 1, f"ffn.intermediate_size must be >= 1, got {self.intermediate_size}")
        check(0 <= self.dropout < 1, f"ffn.dropout must be in [0, 1), got {self.dropout}")


@dataclass(frozen=True, kw_only=True)
class NormSpec:
    """RMS normalisation (Zhang & Sennrich 2019)."""

    placement: Literal["pre", "sandwich"] = "pre"
    """``sandwich`` also normalises each sublayer's output before the residual addition."""
    eps: float = 1e-6

    def __post_init__(self) -> None:
        check(self.eps > 0, f"norm.eps must be > 0, got {self.eps}")


@dataclass(frozen=True, kw_only=True)
class DeltaSpec:
    """The delta residual ``X + b k (v - k.X)``: along the sublayer's direction ``k``, erase and write (Deep Delta
    Learning, arXiv 2601.00417; used when ``residual`` is ``delta``)."""

    values: int = 1
    """Value channels of the state: 1 is a vector of hidden_size, more are as many of them (the paper's d_v)."""
    compressor: Literal["channel", "token"] = "channel"
    """What a sublayer reads of an expanded state: a mixture of its value channels, or of the last tokens too."""
    kernel: int = 4
    """Taps of the compressor: along the value channels, or over tokens."""
    compressor_init: Literal["average", "normal"] = "average"
    """The compressors' filters at the start: the mean of the value channels, or drawn like every weight (as published,
    which makes the first states so small that the norms' eps decides their size)."""
    embedding_conv: bool = False
    """Start an expanded state with a causal convolution over the embeddings instead of copies of each."""
    embedding_kernel: int = 4
    """Taps of that convolution, tokens."""
    gate: Literal["linear", "two_layer"] = "linear"
    gate_hidden: int = 128
    """Width of the two-layer gate's hidden layer."""
    beta_init: float = 1.0
    """The gate b in (0, 2) at the start: 0 keeps, 1 overwrites along k, 2 reflects."""
    value: Literal["sigmoid", "linear", "constant"] = "sigmoid"
    """The target v: ``value_scale * sigmoid(W x)``, ``W x``, or ``value_constant``."""
    value_scale: float = 4.0
    value_constant: float = 2.0
    guard: Literal["additive", "clamped"] = "additive"
    """Of the direction: ``h / sqrt(|h|^2 + eps^2)``, or ``h / max(|h|, eps)`` (the earliest form)."""
    eps: float = 1e-6
    erase: bool = True
    """False writes ``b k v`` and erases nothing: the control arm."""

    def __post_init__(self) -> None:
        for name in ("values", "kernel", "embedding_kernel", "gate_hidden"):
            check(getattr(self, name) >= 1, f"delta.{name} must be >= 1, got {getattr(self, name)}")
        check(0 <= self.beta_init <= 2, f"delta.beta_init must be in [0, 2], got {self.beta_init}")
        check(self.eps > 0, f"delta.eps must be > 0, got {self.eps}")
        check(self.value_scale > 0, f"delta.value_scale must be > 0, got {self.value_scale}")
        check(
            self.values == 1 or self.compressor == "token" or self.kernel >= self.values,
            f"delta.kernel ({self.kernel}) must be at least delta.values ({self.values}) with the channel compressor:"
            " a smaller one leaves value channels unread",
        )
        check(
            self.values > 1 or not (self.embedding_conv or self.compressor == "token"),
            "delta.embedding_conv and delta.compressor are parts of the expanded state: set delta.values to more than 1"
            " (published: 4) or leave them out",
        )

    @property
    def frozen_gate(self) -> bool:
        """Whether the gate starts where its derivative is almost 0, so that it hardly learns."""
        return min(self.beta_init, 2 - self.beta_init) < 1e-3

    @property
    def expanded(self) -> bool:
        """Whether the state has several value channels."""
        return self.values > 1


@dataclass(frozen=True, kw_only=True)
class LoopSpec:
    """What enters at loop boundaries. Everything is off by default, and off is the same as absent."""

    norm: bool = False
    """Per-loop RMS norm of the state a loop has produced (Controller, section 2.5)."""
    embedding: bool = False
    """Per-loop learned vector added to the state that enters a loop; zero at the start."""
    inject: Literal["none", "add", "concat"] = "none"
    """Re-inject the state that entered the first loop: ``x + s * x0`` with a learned per-channel ``s`` (zero
    at the start), or a learned map of ``[x; x0]`` (identity on ``x`` at the start)."""
    gate: bool = False
    """Gated recurrence ``x <- g * z + (1 - g) * x`` with ``g = sigmoid(W [z; x] + b)``, W = 0 at the start."""
    gate_bias: float = -2.0
    contractive: float = 1.0
    """Contractive step ``x <- (1 - dt) x + dt z``; 1 is off."""
    share_last_kv: bool = False
    """Cache the keys and values of the last loop only; earlier loops read them for positions cached before
    the call. Smaller cache, approximate decoding (its cost is measured in docs/benchmarks.md)."""
    max_loops: int | None = None
    """Rows of per-loop tables; None means the layout's loops. Later loops use the last row."""

    def __post_init__(self) -> None:
        check(0 < self.contractive <= 1, f"loop.contractive must be in (0, 1], got {self.contractive}")
        check(self.max_loops is None or self.max_loops >= 1, f"loop.max_loops must be >= 1, got {self.max_loops}")


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A language model: a schedule of visits, the parts of a block, and what surrounds them."""

    layout: str = "6"
    """Schedule notation, for example ``"2 (2)x3 2"``; see docs/concepts/schedules.md."""
    vocab_size: int = 257
    hidden_size: int = 256
    max_position_embeddings: int = 4096
    """Longest context the model accepts, in tokens."""
    mixer: MixerSpec = field(default_factory=AttentionSpec)
    ffn: FeedForwardSpec = field(default_factory=FeedForwardSpec)
    norm: NormSpec = field(default_factory=NormSpec)
    residual: Literal["additive", "delta"] = "additive"
    delta: DeltaSpec = field(default_factory=DeltaSpec)
    loop: LoopSpec = field(default_factory=LoopSpec)
    registers: int = 0
    """Learned prefix tokens that every position can see; they never see the text."""
    register_std: float | None = None
    """Standard deviation of the registers at the start; None means ``init_std``."""
    positions: Literal["rope", "learned"] = "rope"
    """``rope`` rotates queries and keys as the mixer says; ``learned`` adds a table of ``max_position_embeddings`` rows
    to the text's embeddings instead."""
    tie_embeddings: bool = True
    embedding_norm: bool = False
    """RMS norm of the token embeddings before the first block."""
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    """Logits become ``c * tanh(logits / c)``."""
    dropout: float = 0.0
    """Dropout of each sublayer's output in training."""
    init_std: float = 0.02
    """Standard deviation of every weight matrix at the start."""
    embedding_std: float | None = None
    """That of embeddings and the untied head; None means ``init_std``."""
    output_init: Literal["normal", "depth_scaled"] = "normal"
    """Output projections of mixers and feed-forward networks start as every matrix, or divided by the square root of
    the number of visits."""
    zero_init_outputs: bool = False
    """Start output projections at zero, so that every block starts as the identity."""

    def __post_init__(self) -> None:
        check(self.vocab_size >= 2, f"vocab_size must be >= 2, got {self.vocab_size}")
        check(self.hidden_size >= 1, f"hidden_size must be >= 1, got {self.hidden_size}")
        check(
            self.max_position_embeddings >= 1,
            f"max_position_embeddings must be >= 1, got {self.max_position_embeddings}",
        )
        check(self.registers >= 0, f"registers must be >= 0, got {self.registers}")
        check(
            self.register_std is None or self.register_std >= 0,
            f"register_std must be >= 0 or null, got {self.register_std}",
        )
        check(0 <= self.dropout < 1, f"dropout must be in [0, 1), got {self.dropout}")
        check(self.init_std > 0, f"init_std must be > 0, got {self.init_std}")
        check(
            self.embedding_std is None or self.embedding_std > 0,
            f"embedding_std must be > 0 or null, got {self.embedding_std}",
        )
        check(
            not (self.zero_init_outputs and self.output_init != "normal"),
            f"zero_init_outputs and output_init {self.output_init!r} exclude each other",
        )
        check(
            self.logit_softcap is None or self.logit_softcap > 0,
            f"logit_softcap must be > 0 or null, got {self.logit_softcap}",
        )
        if self.mixer.head_dim is None:
            check(
                self.hidden_size % self.mixer.num_heads == 0,
                f"hidden_size ({self.hidden_size}) must be a multiple of mixer.num_heads ({self.mixer.num_heads})"
                " unless mixer.head_dim is given",
            )
        check(
            not (self.residual == "delta" and self.zero_init_outputs),
            "zero_init_outputs starts every sublayer's output at 0, where the delta residual's direction has a gradient"
            " of 1 / delta.eps: leave it off",
        )
        parse(self.layout)  # the notation's own errors, at construction

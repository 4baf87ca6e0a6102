"""What a model is: its schedule, the parts of a block, and what surrounds them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ouroboros.config.mixers import AttentionSpec, MixerSpec, OsamSpec
from ouroboros.errors import check
from ouroboros.schedule import parse


@dataclass(frozen=True, kw_only=True)
class FeedForwardSpec:
    """Position-wise feed-forward network."""

    kind: Literal["swiglu", "relu2", "leaky_relu2", "gelu", "none"] = "swiglu"
    """``none`` leaves the network and its norm out: a block is its mixer alone."""
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
    """Normalisation of the stream before each sublayer and before the head."""

    kind: Literal["rms", "layer"] = "rms"
    """RMS norm (Zhang & Sennrich 2019), or layer norm with a bias (Ba et al. 2016)."""
    placement: Literal["pre", "sandwich", "final"] = "pre"
    """``sandwich`` also normalises each sublayer's output before the residual addition; ``final`` leaves the norm
    before the head alone."""
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
    head_std: float | None = None
    """That of the untied head alone; None means as embeddings."""
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
        check(self.head_std is None or self.head_std > 0, f"head_std must be > 0 or null, got {self.head_std}")
        check(self.head_std is None or not self.tie_embeddings, "head_std needs tie_embeddings false: the head is tied")
        check(
            not (self.zero_init_outputs and self.output_init != "normal"),
            f"zero_init_outputs and output_init {self.output_init!r} exclude each other",
        )
        check(
            self.logit_softcap is None or self.logit_softcap > 0,
            f"logit_softcap must be > 0 or null, got {self.logit_softcap}",
        )
        if isinstance(self.mixer, OsamSpec):
            check(
                self.hidden_size % self.mixer.frequencies == 0,
                f"mixer.frequencies ({self.mixer.frequencies}) must divide hidden_size ({self.hidden_size})",
            )
            check(
                not (self.registers and self.mixer.detach_state),
                "registers reach the text through the memory alone, where mixer.detach_state lets no gradient pass:"
                " set one of them off",
            )
        elif self.mixer.head_dim is None:
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

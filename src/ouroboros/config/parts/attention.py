"""Grouped-query causal self-attention."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from ouroboros.config.needs import needs
from ouroboros.config.part import Heads, MixerPart, part
from ouroboros.config.parts.rope import RopeSpec
from ouroboros.errors import check

if TYPE_CHECKING:
    from ouroboros.config.model import ModelSpec

Activation = Literal["none", "silu", "relu", "elu+1"]


@dataclass(frozen=True, kw_only=True)
class HeadedPart(MixerPart):
    """What every attention over heads has: their number, their width, dropout and the rotation of positions."""

    num_heads: int = 4
    """Query heads."""
    head_dim: int | None = None
    """Channels per head; None means hidden_size // num_heads."""
    dropout: float = 0.0
    """Dropout of attention probabilities in training."""
    rope: RopeSpec = field(default_factory=RopeSpec)
    """How positions rotate queries and keys."""

    def __post_init__(self) -> None:
        check(self.num_heads >= 1, f"mixer.num_heads must be >= 1, got {self.num_heads}")
        check(self.head_dim is None or self.head_dim >= 1, f"mixer.head_dim must be >= 1 or null, got {self.head_dim}")
        check(0 <= self.dropout < 1, f"mixer.dropout must be in [0, 1), got {self.dropout}")

    def check(self, model: ModelSpec) -> None:
        check(
            self.head_dim is not None or model.hidden_size % self.num_heads == 0,
            f"hidden_size ({model.hidden_size}) must be a multiple of mixer.num_heads ({self.num_heads})"
            " unless mixer.head_dim is given",
        )

    def head_width(self, width: int) -> int:
        """Content channels per head, resolved for a model of ``width``."""
        return width // self.num_heads if self.head_dim is None else self.head_dim

    def rotary_width(self, width: int) -> int:
        """Channels per head that positions rotate, before ``rope.fraction``."""
        return self.head_width(width)

    def rotary(self, width: int) -> tuple[RopeSpec, int]:
        return self.rope, self.rotary_width(width)

    def matrices(self, width: int) -> int:
        """Numbers in weight matrices, which each token meets once."""
        raise NotImplementedError

    def vectors(self, width: int) -> int:
        """Numbers in biases, norms and gains."""
        return 0

    def parameters(self, width: int) -> int:
        return self.matrices(width) + self.vectors(width)

    def score_width(self, width: int) -> int:
        """Channels of all heads that scores, and as many that sums of values, are computed over."""
        return self.num_heads * self.head_width(width)

    def flops(self, width: int, context: int, registers: int = 0) -> int:
        return 2 * self.matrices(width) + 2 * (context + registers) * 2 * self.score_width(width)


@part(module="ouroboros.nn.attention:Attention")
@dataclass(frozen=True, kw_only=True)
class AttentionSpec(HeadedPart):
    """Grouped-query causal self-attention (Ainslie et al. 2023)."""

    kind: Literal["attention"] = "attention"
    num_kv_heads: int | None = None
    """Key/value heads; None means one per query head."""
    window: int | None = None
    """Each token sees this many tokens, itself included, and registers; None: all that precede it. A cache keeps them
    all the same, and operations are counted for all, because the others are masked, not left out."""
    score_channels: float | None = None
    """Scores are divided by the square root of this number; None means of the channels per head."""
    qkv_bias: bool = False
    """Add biases to queries, keys and values."""
    out_bias: bool = False
    """Add a bias to what the mixer returns."""
    qk_norm: Literal["none", "before_rope", "after_rope"] = "none"
    """RMS-normalise queries and keys per head, before or after the rotation."""
    qk_norm_gain: bool = field(default=True, metadata=needs("qk_norm", "before_rope", "after_rope"))
    """Learn a factor for each channel of those norms."""
    query_gain: float | None = None
    """Initial value of a learned gain per query head; None leaves it out."""
    q_activation: Activation = "none"
    """Function of the queries, before rotation and norm."""
    k_activation: Activation = "none"
    """Function of the keys, after ``k_shift``."""
    v_activation: Activation = "none"
    """Function of the values, after ``v_shift``."""
    k_shift: bool = False
    """Mix each key with the previous token's: ``a u_{t-1} + (1 - a) u_t`` per head, ``a`` from the present token."""
    v_shift: bool = False
    """Mix each value with the previous token's in the same way."""
    head_norm: bool = False
    """RMS-normalise what each head returns."""
    output_gate: bool = False
    """Multiply what each head returns, RMS-normalised, by ``silu`` of a linear map of the input."""
    head_gate: bool = False
    """Multiply what each head returns by ``2 sigmoid`` of a linear map of the input to one number, which is 1 at the
    start (gated attention, arXiv 2505.06708)."""
    exclusive: bool = False
    """Exclusive self-attention: take from what each head returns its component along the token's own value."""
    value_embedding: bool = False
    """Add to the values what the stem part ``value_embedding`` looks up for the token, with a learned factor."""
    value_residual: float | None = None
    """Mix the first block's values into each later visit's, with learned factors that start at this number and one
    minus it (value residual, arXiv 2410.17897); None leaves it out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        kv = self.kv_heads
        check(kv >= 1, f"mixer.num_kv_heads must be >= 1, got {kv}")
        check(
            self.num_heads % kv == 0,
            f"mixer.num_heads ({self.num_heads}) must be a multiple of mixer.num_kv_heads ({kv})",
        )
        check(self.window is None or self.window >= 1, f"mixer.window must be >= 1 or null, got {self.window}")
        check(
            self.score_channels is None or self.score_channels > 0,
            f"mixer.score_channels must be > 0 or null, got {self.score_channels}",
        )

    def check(self, model: ModelSpec) -> None:
        super().check(model)
        width = model.hidden_size
        if self.value_embedding:
            check(
                any(part.provides == "values" for part in model.stem),
                "mixer.value_embedding needs the stem part that looks values up: --model.stem.value_embedding",
            )
            check(
                self.heads(width)[1:] == model.block.mixer.heads(width)[1:],
                "mixer.value_embedding needs the key/value heads of the other blocks: the table is made for those",
            )
        if self.value_residual is not None:
            first = model.blocks[0].mixer
            fits = isinstance(first, AttentionSpec) and first.value_residual is not None
            check(
                fits and first.heads(width)[1:] == self.heads(width)[1:],
                "mixer.value_residual needs it in the first block too, with the same key/value heads",
            )

    @property
    def looks_back(self) -> int | None:
        return self.window

    @property
    def own_attention(self) -> str:
        return "" if self.window is None else f"has a window of {self.window} tokens, which its own mask alone knows"

    @property
    def reads(self) -> tuple[str, ...]:
        return ("values",) if self.value_embedding else ()

    @property
    def kv_heads(self) -> int:
        """Key/value heads, resolved."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def normalises_heads(self) -> bool:
        """Whether what a head returns is normalised: the output gate includes it."""
        return self.head_norm or self.output_gate

    def heads(self, width: int) -> Heads:
        return Heads(self.num_heads, self.kv_heads, self.head_width(width))

    def matrices(self, width: int) -> int:
        queries, keys = self.num_heads * self.head_width(width), self.kv_heads * self.head_width(width)
        gates = self.kv_heads * (self.k_shift + self.v_shift) + (queries if self.output_gate else 0)
        gates += self.num_heads if self.head_gate else 0
        return width * (queries + 2 * keys + gates) + queries * width

    def vectors(self, width: int) -> int:
        head = self.head_width(width)
        norms = (2 * head if self.qk_norm != "none" and self.qk_norm_gain else 0) + (
            head if self.normalises_heads else 0
        )
        gains = self.num_heads if self.query_gain is not None else 0
        biases = (self.num_heads + 2 * self.kv_heads) * head if self.qkv_bias else 0
        values = self.value_embedding + 2 * (self.value_residual is not None)
        return norms + gains + biases + values + (width if self.out_bias else 0)

    def cache_values(self, width: int) -> int:
        return 2 * self.kv_heads * self.head_width(width)

    def recent_values(self, width: int) -> int:
        return (self.k_shift + self.v_shift) * self.kv_heads * self.head_width(width)

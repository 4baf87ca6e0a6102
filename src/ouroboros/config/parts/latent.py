"""Attention through low-rank latents: DeepSeek-V2's form, and R-HRM's published one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ouroboros.config.part import Heads, part
from ouroboros.config.parts.attention import HeadedPart
from ouroboros.errors import check


@part(module="ouroboros.nn.latent:LatentAttention")
@dataclass(frozen=True, kw_only=True)
class LatentAttentionSpec(HeadedPart):
    """Multi-head latent attention with decoupled rotary keys (DeepSeek-V2, section 2.1).

    A cache keeps the normalised latent and one rotary key for all heads: ``kv_rank + rope_dim`` numbers per token.
    """

    kind: Literal["latent_attention"] = "latent_attention"
    kv_rank: int | None = None
    """Width of the key/value latent; None means hidden_size // 4."""
    query_rank: int | None = None
    """Width of the query latent; None means ``kv_rank``, 0 means none: queries come from the stream itself."""
    rope_dim: int | None = None
    """Rotary channels per head, beside the content channels; None means half of ``head_dim``, made even."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("kv_rank", 1), ("query_rank", 0), ("rope_dim", 2)):
            value = getattr(self, name)
            check(value is None or value >= least, f"mixer.{name} must be >= {least} or null, got {value}")
        check(self.rope_dim is None or self.rope_dim % 2 == 0, f"mixer.rope_dim must be even, got {self.rope_dim}")

    def rank(self, width: int) -> int:
        """Width of the key/value latent, resolved."""
        return max(width // 4, 1) if self.kv_rank is None else self.kv_rank

    def latent_of_queries(self, width: int) -> int:
        """Width of the query latent, resolved; 0 without one."""
        return self.rank(width) if self.query_rank is None else self.query_rank

    def rotary_width(self, width: int) -> int:
        return max(self.head_width(width) // 4 * 2, 2) if self.rope_dim is None else self.rope_dim

    def heads(self, width: int) -> Heads:
        return Heads(self.num_heads, 1, self.head_width(width))

    def matrices(self, width: int) -> int:
        content, rotary = self.num_heads * self.head_width(width), self.rotary_width(width)
        rank, query_rank = self.rank(width), self.latent_of_queries(width)
        queries = content + self.num_heads * rotary
        made = query_rank * (width + queries) if query_rank else width * queries
        return made + width * (rank + rotary) + rank * 2 * content + content * width

    def vectors(self, width: int) -> int:
        return self.latent_of_queries(width) + self.rank(width)

    def score_width(self, width: int) -> int:
        # The rotary channels are added to the keys, and the values padded to their width for the fused kernels.
        return self.num_heads * (self.head_width(width) + self.rotary_width(width))

    def cache_values(self, width: int) -> int:
        return self.rank(width) + self.rotary_width(width)

    def prefix_flops(self, width: int) -> tuple[int, int]:
        return _rebuilding(self, width), 0

    @property
    def own_attention(self) -> str:
        return "keeps latents in place of keys and values"


@part(module="ouroboros.nn.latent:BottleneckAttention")
@dataclass(frozen=True, kw_only=True)
class BottleneckAttentionSpec(HeadedPart):
    """Multi-head attention whose queries, keys and values pass through low-rank latents (R-HRM as published).

    Per-head norm and rotation come after the up-projection, so keys cannot be absorbed into queries.
    """

    kind: Literal["bottleneck_attention"] = "bottleneck_attention"
    latent_rank: int | None = None
    """Width of the query and of the key/value latent; None means hidden_size // 4."""
    qk_norm: Literal["none", "before_rope"] = "before_rope"
    """RMS-normalise queries and keys per head, before the rotation."""
    cache: Literal["keys_values", "latent"] = "keys_values"
    """Keep keys and values, or the latent alone: 8 times smaller at the published sizes, keys rebuilt at each step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            self.latent_rank is None or self.latent_rank >= 1,
            f"mixer.latent_rank must be >= 1 or null, got {self.latent_rank}",
        )

    @property
    def rebuilds_keys(self) -> bool:
        return self.cache == "latent"

    @property
    def own_attention(self) -> str:
        return "makes its keys and values of latents itself"

    def rank(self, width: int) -> int:
        """Width of the latents, resolved."""
        return max(width // 4, 1) if self.latent_rank is None else self.latent_rank

    def heads(self, width: int) -> Heads:
        return Heads(self.num_heads, 1 if self.rebuilds_keys else self.num_heads, self.head_width(width))

    def matrices(self, width: int) -> int:
        content = self.num_heads * self.head_width(width)
        return self.rank(width) * (2 * width + 3 * content) + content * width

    def vectors(self, width: int) -> int:
        return 2 * self.head_width(width) if self.qk_norm != "none" else 0

    def cache_values(self, width: int) -> int:
        return self.rank(width) if self.rebuilds_keys else 2 * self.num_heads * self.head_width(width)

    def prefix_flops(self, width: int) -> tuple[int, int]:
        return (_rebuilding(self, width) if self.rebuilds_keys else 0), 0


def _rebuilding(spec: LatentAttentionSpec | BottleneckAttentionSpec, width: int) -> int:
    """Operations that make keys and values of one position of which the latent alone is remembered."""
    return 2 * spec.rank(width) * 2 * spec.num_heads * spec.head_width(width)

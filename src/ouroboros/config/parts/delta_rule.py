"""The delta-rule memory of constant size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ouroboros.config.part import Heads, MixerPart, part
from ouroboros.errors import check

if TYPE_CHECKING:
    from ouroboros.config.model import ModelSpec

CHUNK = 64
"""Tokens that the memory works on at a time, at most."""


def chunks(tokens: int) -> tuple[int, int]:
    """How many chunks a text has, and how many tokens each; the last may have fewer."""
    count = -(-tokens // CHUNK)
    return count, -(-tokens // count)


@part(module="ouroboros.nn.delta_rule:DeltaRule")
@dataclass(frozen=True, kw_only=True)
class DeltaRuleSpec(MixerPart):
    """A memory of constant size that corrects what it holds (delta rule: Schlag et al. 2021).

    Each head keeps a matrix ``S`` that maps keys to values. A token reads ``S q``, and then moves ``S k`` towards its
    own value: ``S <- S + b (v - S k) k^T``. Queries and keys have length 1, and ``b`` in (0, 1) comes from the token.
    Every visit starts with an empty matrix: one that is carried from the end of a loop into the next shows the first
    tokens what comes after them.
    """

    keeps = "state"

    kind: Literal["delta_rule"] = "delta_rule"
    num_heads: int = 4
    """Heads, each with a matrix of its own."""
    head_dim: int | None = None
    """Channels per head; None means hidden_size // num_heads."""
    conv: int = 0
    """Taps of a causal filter over tokens for each channel of queries, keys and values, before they are normalised; the
    usual number is 4, and 0 leaves the filter out."""

    def __post_init__(self) -> None:
        check(self.num_heads >= 1, f"mixer.num_heads must be >= 1, got {self.num_heads}")
        check(self.head_dim is None or self.head_dim >= 1, f"mixer.head_dim must be >= 1 or null, got {self.head_dim}")
        check(self.conv >= 0, f"mixer.conv must be >= 0, got {self.conv}")

    def check(self, model: ModelSpec) -> None:
        check(
            self.head_dim is not None or model.hidden_size % self.num_heads == 0,
            f"hidden_size ({model.hidden_size}) must be a multiple of mixer.num_heads ({self.num_heads})"
            " unless mixer.head_dim is given",
        )

    def heads(self, width: int) -> Heads:
        channels = width // self.num_heads if self.head_dim is None else self.head_dim
        return Heads(self.num_heads, self.num_heads, channels)

    def inner(self, width: int) -> int:
        """Channels of all heads."""
        return self.num_heads * self.heads(width).width

    def matrices(self, width: int) -> int:
        """Numbers in weight matrices, which each token meets once."""
        return width * (4 * self.inner(width) + self.num_heads)

    def parameters(self, width: int) -> int:
        return self.matrices(width) + self.num_heads + 3 * self.conv * self.inner(width)

    def flops(self, width: int, context: int, registers: int = 0) -> int:
        """Products within chunks, and with the state between them, over the tokens of the text. Triangular systems are
        not solved by products: what that takes, for each head and token the square of a chunk's length, is left out."""
        count, size = chunks(context)
        channels = self.heads(width).width
        within = count * 2 * 4 * size * channels
        read = (count if registers else count - 1) * 2 * 2 * channels**2
        write = (count - 1) * 2 * channels**2
        return 2 * self.matrices(width) + self.num_heads * size * (within + read + write) // context

    @property
    def flops_are_rounded(self) -> bool:
        return True

    def prefix_flops(self, width: int) -> tuple[int, int]:
        """Of leaving a state; that the text reads it is in :meth:`flops`."""
        return 2 * self.state_values(width), 0

    def state_values(self, width: int) -> int:
        """One matrix for each head."""
        return self.num_heads * self.heads(width).width ** 2

    def recent_values(self, width: int) -> int:
        """What the filter needs of earlier tokens."""
        return 3 * max(0, self.conv - 1) * self.inner(width)

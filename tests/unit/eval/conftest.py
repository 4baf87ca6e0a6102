"""Small stand-ins: a byte tokenizer, and models whose scores are known in closed form."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ouroboros.errors import OuroborosError

VOCABULARY = 257


class ByteTokenizer:
    """Ids are byte values; 256 ends a text."""

    kind, is_lossless, eos_id, vocab_size = "bytes", True, 256, VOCABULARY
    unknown_id, unknown_nats = None, 0.0

    def unknown(self, text: bytes) -> dict[str, int]:
        return {}

    def encode(self, text: bytes) -> np.ndarray:
        return np.frombuffer(text, dtype=np.uint8).astype(np.int32)

    def decode(self, ids: np.ndarray) -> bytes:
        return np.asarray(ids)[np.asarray(ids) < 256].astype(np.uint8).tobytes()

    def token_bytes(self) -> np.ndarray:
        return np.array([1] * 256 + [0], dtype=np.int32)


class PairTokenizer(ByteTokenizer):
    """Merges the UTF-8 pair ``th`` into token 0 (NUL is not in its alphabet) and refuses invalid UTF-8."""

    kind = "bpe"

    def encode(self, text: bytes) -> np.ndarray:
        try:
            text.decode()
        except UnicodeDecodeError:
            raise OuroborosError("text: invalid UTF-8") from None
        return super().encode(text.replace(b"th", b"\0"))

    def decode(self, ids: np.ndarray) -> bytes:
        return super().decode(ids).replace(b"\0", b"th")

    def token_bytes(self) -> np.ndarray:
        return np.array([2] + [1] * 255 + [0], dtype=np.int32)


class Model(nn.Module):
    """``logits(ids)`` from the subclass; counts calls and records the modes it ran in."""

    def __init__(self, longest: int = 512, vocabulary: int = VOCABULARY) -> None:
        super().__init__()
        self.config = SimpleNamespace(max_position_embeddings=longest, vocab_size=vocabulary)
        self.inner = nn.Dropout(0.5)
        self.weight = nn.Parameter(torch.zeros(1))
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, input_ids: Tensor) -> Any:
        assert not self.training and not self.inner.training and not torch.is_grad_enabled()
        self.shapes.append(tuple(input_ids.shape))
        return SimpleNamespace(logits=self.logits(input_ids) + self.weight)

    def logits(self, ids: Tensor) -> Tensor:
        raise NotImplementedError


class Uniform(Model):
    """Every token alike: ln V nats each."""

    def logits(self, ids: Tensor) -> Tensor:
        return torch.zeros(*ids.shape, self.config.vocab_size)


class Bigram(Model):
    """A table of logits by the current token, and by the one before it times ``reach`` (0 at a window's start)."""

    def __init__(self, seed: int = 0, reach: float = 0.5, **options: Any) -> None:
        super().__init__(**options)
        size = self.config.vocab_size
        self.table = torch.randn(2, size, size, generator=torch.Generator().manual_seed(seed))
        self.reach = reach

    def logits(self, ids: Tensor) -> Tensor:
        logits = self.table[0][ids]
        logits[:, 1:] += self.reach * self.table[1][ids[:, :-1]]
        return logits


class LookAhead(Bigram):
    """Cheats: sees the target, by ``gain`` logits."""

    gain = 3.0

    def logits(self, ids: Tensor) -> Tensor:
        logits = super().logits(ids)
        peek = nn.functional.one_hot(ids[:, 1:], self.config.vocab_size)
        logits[:, :-1] += self.gain * peek
        return logits


class Looped(Bigram):
    """Loops sharpen the logits; cheats at ``bad_loops``."""

    def __init__(self, loops: int = 2, bad_loops: int | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.schedule = SimpleNamespace(loops=loops)
        self.bad_loops = bad_loops

    def with_loops(self, loops: int) -> Looped:
        view = Looped(loops, self.bad_loops)
        view.table = self.table
        return view

    def logits(self, ids: Tensor) -> Tensor:
        logits = super().logits(ids) * (1 - 0.5**self.schedule.loops)
        if self.schedule.loops == self.bad_loops:
            logits = logits + logits.mean(dim=1, keepdim=True)
        return logits


@pytest.fixture
def fakes() -> SimpleNamespace:
    """The stand-ins by name."""
    return SimpleNamespace(
        ByteTokenizer=ByteTokenizer,
        PairTokenizer=PairTokenizer,
        Uniform=Uniform,
        Bigram=Bigram,
        LookAhead=LookAhead,
        Looped=Looped,
    )


@pytest.fixture
def texts() -> list[bytes]:
    """Documents of many lengths, from random words; the same in every test."""
    rng = np.random.default_rng(7)
    words = [bytes(rng.integers(97, 123, size=size).tolist()) for size in rng.integers(1, 9, size=200)]

    def document(size: int) -> bytes:
        return b" ".join(words[i] for i in rng.integers(0, 200, size=size // 3 + 2))[:size]

    return [document(size) for size in (700, 1, 64, 65, 63, 128, 9_000, 0, 333)]

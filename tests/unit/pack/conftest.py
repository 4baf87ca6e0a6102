"""A small model as a packed file, and the same file as someone else might make it, with right checksums."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import brotli
import pytest
import torch
from torch import Tensor

from ouroboros.api import build
from ouroboros.config import AttentionSpec, BlockSpec, FeedForwardSpec, ModelSpec, Recipe, to_dict
from ouroboros.data.tokenize import byte_tokenizer
from ouroboros.pack.artifact import PREFIX, expected_tensors
from ouroboros.pack.coded import Coded
from ouroboros.pack.header import Claim, Facts
from ouroboros.pack.write import assembled, pack

SPEC = ModelSpec(
    vocab_size=257,
    hidden_size=16,
    layout="(1)x2",
    max_position_embeddings=64,
    block=BlockSpec(mixer=AttentionSpec(num_heads=2), ffn=FeedForwardSpec(intermediate_size=24)),
)
FACTS = Facts(
    recipe=to_dict(Recipe(name="small", model=SPEC)),
    provenance={"run": "runs/7"},
    method={"name": "nearest"},
    score=Claim(bits_per_byte=2.5, bytes=1000, loops=2, window=64, stride=64, data_sha256="00"),
)


def rounded(tensor: Tensor, bits: int, groups: int = 1) -> Coded:
    """A tensor as the nearest codes of steps from the largest number of each group."""
    matrix = tensor.detach().reshape(len(tensor) if tensor.ndim > 1 else 1, groups, -1)
    limit = 2 ** (bits - 1) - 1
    steps = (matrix.abs().amax(2) / limit).half().clamp_min(1e-4)
    codes = (matrix / steps.float()[:, :, None]).round().clamp(-limit - 1, limit).to(torch.int8)
    return Coded(codes=codes.reshape(len(matrix), -1), scales=steps, bits=bits, shape=tuple(tensor.shape))


def content_of(spec: ModelSpec) -> dict[str, Coded | Tensor]:
    """Every tensor of a fresh model: matrices as codes of several widths, the rest in several number formats."""
    torch.manual_seed(0)
    weights = build(Recipe(name="small", model=spec)).state_dict()
    found: dict[str, Coded | Tensor] = {}
    for number, name in enumerate(expected_tensors(spec)):
        value = weights[name]
        if value.ndim > 1:
            found[name] = rounded(value, (6, 8, 4)[number % 3], groups=1 + number % 2)
        else:
            found[name] = value.to((torch.float16, torch.bfloat16, torch.float32)[number % 3])
    return found


@dataclass(frozen=True)
class Small:
    """A small model, and how to make others."""

    spec: ModelSpec = SPEC
    facts: Facts = FACTS
    content_of: Callable[[ModelSpec], dict[str, Coded | Tensor]] = content_of
    rounded: Callable[..., Coded] = rounded


@pytest.fixture(scope="session")
def small() -> Small:
    """The model of the packed file."""
    return Small()


@pytest.fixture(scope="session")
def tensors() -> dict[str, Coded | Tensor]:
    """What the packed file holds."""
    return content_of(SPEC)


@pytest.fixture(scope="session")
def packed(tensors: dict[str, Coded | Tensor]) -> bytes:
    """A packed file."""
    return pack(SPEC, tensors, byte_tokenizer(), FACTS, eos_token_id=256)


@dataclass
class Opened:
    """A packed file in pieces that can be changed and put together again."""

    header: dict[str, Any]
    content: list[bytes]

    def number(self, name: str) -> int:
        """Which section has this name."""
        return [section["name"] for section in self.header["sections"]].index(name)

    def section(self, name: str) -> dict[str, Any]:
        """What the header says of a section."""
        return self.header["sections"][self.number(name)]

    def replace(self, name: str, content: bytes) -> None:
        """Give a section another content, with everything that the header says of it right."""
        section, number = self.section(name), self.number(name)
        for place, tensor in enumerate(section["tensors"]):
            tensor["bytes"] = 0 if place else len(content)
        self.content[number] = content
        offset = 0
        for section, piece in zip(self.header["sections"], self.content, strict=True):
            section |= {"offset": offset, "bytes": len(piece), "sha256": hashlib.sha256(piece).hexdigest()}
            offset += len(piece)

    def sealed(self, text: bytes | None = None) -> bytes:
        """The file; ``text`` in place of the header."""
        text = json.dumps(self.header).encode() if text is None else text
        return assembled(brotli.compress(text, quality=1), b"".join(self.content))


@pytest.fixture
def opened(packed: bytes) -> Callable[[], Opened]:
    """Makes pieces of the packed file."""
    end = PREFIX.size + PREFIX.unpack(packed[: PREFIX.size])[2]
    header = json.loads(brotli.decompress(packed[PREFIX.size : end]))

    def make() -> Opened:
        pieces = [packed[end + s["offset"] :][: s["bytes"]] for s in header["sections"]]
        return Opened(copy.deepcopy(header), pieces)

    return make

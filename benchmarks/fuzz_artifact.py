"""Mutated packed files: each must be read as it is or end in the documented error, in bounded time and memory.

The mutations of a file are those of its number, so a run is repeatable, and one that was stopped goes on where it was
(``--state FILE``). A third are damages as they happen: bytes that are flipped, cut, doubled or moved. The others are
made on purpose and bear right checksums, see ``MUTATIONS``.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import lzma
import random
import resource
import signal
import time
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import brotli
import torch
from common import load, parser, progress, report, set_threads

from ouroboros.api import build
from ouroboros.config import AttentionSpec, BlockSpec, FeedForwardSpec, ModelSpec, Recipe
from ouroboros.convert.tensors import model_of
from ouroboros.data.tokenize import byte_tokenizer
from ouroboros.errors import OuroborosError
from ouroboros.pack import artifact
from ouroboros.pack.quantize import quantize
from ouroboros.pack.write import assembled, pack
from ouroboros.recipes import recipe

SECONDS = 2
"""Of the processor, after which a file counts as a hang."""
ODD = (None, True, -1, 0, 1, 2**31, 2**63, 10**30, 1e308, -0.5, "", "x", "\x1b[2J", "a" * 5000, [], {}, [[]], [0] * 9)
CODECS = ("brotli", "brotli-columns", "range")
CODES = tuple(f"codes/{bits}/{codec}" for bits in (2, 6, 8) for codec in CODECS)
NAMES = (*CODES, *CODECS, "scales", "plain/float16", "plain/int64", "tokenizer", "zstd", "xz", "zlib")
HUGE = (0, 2**16, 2**20, 2**31, 2**39, 2**40, 2**62)


def originals() -> list[bytes]:
    """Packed models of a few thousand numbers that hold every kind of section and every codec."""
    looped = ModelSpec(
        vocab_size=257,
        hidden_size=8,
        layout="(1)x2",
        max_position_embeddings=64,
        block=BlockSpec(mixer=AttentionSpec(num_heads=2), ffn=FeedForwardSpec(intermediate_size=12)),
        tie_embeddings=False,
    )
    made = []
    for spec in (looped, recipe("osam-published", "tiny").model):
        torch.manual_seed(0)
        weights = build(Recipe(name="fuzzed", model=spec)).state_dict()
        if spec is looped:  # rows that repeat and columns that do, which brotli is chosen for
            weights["model.embed_tokens.weight"][1:] = weights["model.embed_tokens.weight"][0]
            weights["lm_head.weight"][:, 1:] = weights["lm_head.weight"][:, :1]
        tensors: dict[str, Any] = {}
        for number, key in enumerate(artifact.expected_tensors(spec)):
            value = weights[key]
            if value.ndim > 1 and value.is_floating_point():
                tensors[key] = quantize(value, 8 if len(value) == 257 else (2, 6, 8)[number % 3])
            else:
                tensors[key] = value.half() if value.is_floating_point() and number % 2 else value
        made.append(pack(spec, tensors, byte_tokenizer() if spec.vocab_size == 257 else None, eos_token_id=0))
    stored = {section.name for data in made for section in artifact.Artifact(data).header.sections}
    assert stored >= {"codes/8/brotli", "codes/8/brotli-columns", "codes/6/range", "plain/int64", "tokenizer"}, stored
    return made


def parts(data: bytes) -> tuple[dict[str, Any], list[bytes]]:
    """The header as JSON values, and the sections."""
    begin = artifact.PREFIX.size + artifact.PREFIX.unpack(data[: artifact.PREFIX.size])[2]
    header, content = json.loads(brotli.decompress(data[artifact.PREFIX.size : begin])), data[begin:]
    return header, [content[section["offset"] :][: section["bytes"]] for section in header["sections"]]


def joined(header: Any, pieces: list[bytes]) -> bytes:
    """The file of a header as it is, with the right sum of its own."""
    return assembled(brotli.compress(json.dumps(header).encode(), quality=1), b"".join(pieces))


def sealed(header: dict[str, Any], pieces: list[bytes]) -> bytes:
    """The file of these sections, with everything that the header says of places, lengths and sums made right."""
    offset = 0
    for section, piece in zip(header["sections"], pieces, strict=True):
        if len(piece) != section["bytes"]:
            for place, tensor in enumerate(section["tensors"]):
                tensor["bytes"] = 0 if place else len(piece)
        section |= {"offset": offset, "bytes": len(piece), "sha256": hashlib.sha256(piece).hexdigest()}
        offset += len(piece)
    return joined(header, pieces)


def damaged(data: bytes, chance: random.Random) -> bytes:
    """What happens to files: bytes flipped, cut, doubled, moved, zeroed."""
    at, length = chance.randrange(len(data)), chance.choice((1, 1, 1, 2, 16, 4096))
    kind = chance.randrange(6)
    if kind == 0:
        flipped = bytearray(data)
        for place in range(at, min(at + length, len(data))):
            flipped[place] ^= chance.randrange(1, 256)
        return bytes(flipped)
    piece = data[at : at + length]
    return (
        data[:at],
        data[:at] + piece + data[at:],
        data[:at] + data[at + length :],
        data[:at] + bytes(len(piece)) + data[at + length :],
        data[at:] + data[:at],
    )[kind - 1]


def nodes(value: Any, path: tuple = ()) -> list[tuple]:
    """Paths to everything in JSON values."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, item in inner for found in nodes(item, (*path, key)))]


def other_value(header: dict[str, Any], chance: random.Random) -> None:
    """Change something in the header: a value, a key, the order or number of entries."""
    places = [path for path in nodes(header) if path]
    path = chance.choice(places)
    parent: Any = functools.reduce(lambda value, key: value[key], path[:-1], header)
    key, kind = path[-1], chance.randrange(6)
    value = parent[key]
    if kind == 0:
        del parent[key]
    elif kind == 1 and isinstance(parent, list):
        parent.insert(chance.randrange(len(parent) + 1), copy.deepcopy(value))
    elif kind == 2 and isinstance(parent, dict):
        parent[chance.choice(("x", "name", "shape", "kind", key + "x"))] = parent.pop(key)
    elif kind == 3 and isinstance(value, int):
        parent[key] = value + chance.choice((-1, 1, 7, -value, 10**6, 10**9, 2**40))
    elif kind == 4 and isinstance(value, str):
        parent[key] = chance.choice((*NAMES, "9" * 50, f"({value})x99999", "100000", "(1)x100000", value[:-1]))
    else:
        parent[key] = copy.deepcopy(chance.choice(ODD))  # the next mutation may change what is inside


def other_values(header: dict[str, Any], pieces: list[bytes], chance: random.Random) -> bytes:
    """Up to three other values in the header."""
    for _ in range(chance.choice((1, 1, 2, 3))):
        other_value(header, chance)
    return joined(header, pieces)


def other_text(header: dict[str, Any], pieces: list[bytes], chance: random.Random) -> bytes:
    """A header that need not be JSON."""
    text = bytearray(json.dumps(header).encode())
    at = chance.randrange(len(text))
    text[at : at + chance.randrange(3)] = chance.choice(
        (b"[" * 5000, b"{", b'"', b"NaN", b"\xff", b"1e999", b",", b"9" * 5000)
    )
    return assembled(brotli.compress(bytes(text), quality=1), b"".join(pieces))


def other_places(header: dict[str, Any], pieces: list[bytes], chance: random.Random) -> bytes:
    """Sections that stand there twice, overlap, leave gaps, are swapped or missing."""
    sections, kind = header["sections"], chance.randrange(6)
    one, other = chance.randrange(len(sections)), chance.randrange(len(sections))
    if kind == 0:  # twice, with content of its own
        sections.insert(other, copy.deepcopy(sections[one]))
        pieces.insert(other, pieces[one])
        return sealed(header, pieces)
    if kind == 1:  # the content of another one
        sections[one] |= {key: sections[other][key] for key in ("offset", "bytes", "sha256")}
    elif kind == 2:
        sections[one]["offset"] += chance.choice((-1, 1, -sections[one]["offset"], 2**31, 2**62))
    elif kind == 3:
        sections[one]["bytes"] += chance.choice((-1, 1, -sections[one]["bytes"], 2**31, 2**62))
    elif kind == 4:
        sections[one], sections[other] = sections[other], sections[one]
    else:
        del sections[one], pieces[one]
        return sealed(header, pieces)
    return joined(header, pieces)


def other_sizes(header: dict[str, Any], pieces: list[bytes], chance: random.Random) -> bytes:
    """Huge dimensions, of tensors and of the model."""
    tensors = [tensor for section in header["sections"] for tensor in section["tensors"]]
    for _ in range(chance.choice((1, 2))):
        kind, huge = chance.randrange(4), chance.choice(HUGE)
        shape = chance.choice(tensors)["shape"]
        if kind == 0:
            shape[chance.randrange(len(shape))] = huge
        elif kind == 1:
            shape[:] = [huge] * chance.randrange(1, 10)
        elif kind == 2:
            chance.choice(tensors)["groups"] = huge
        else:
            header["spec"][chance.choice(("vocab_size", "hidden_size", "max_position_embeddings"))] = huge
    return joined(header, pieces)


def other_beginning(header: dict[str, Any], pieces: list[bytes], chance: random.Random) -> bytes:
    """Another version of the format or length of the header."""
    whole = joined(header, pieces)
    magic, version, length, _ = artifact.PREFIX.unpack(whole[: artifact.PREFIX.size])
    version = chance.choice((version, 0, 2, 2**32 - 1, chance.randrange(2**32)))
    length = chance.choice((length, 0, length - 1, length + 1, len(whole), 1 << 21, 2**32 - 1))
    begin, rest = artifact.PREFIX.pack(magic, version, length, b"")[:16], whole[artifact.PREFIX.size :]
    return begin + hashlib.sha256(begin + rest[:length]).digest() + rest


def other_content(header: dict[str, Any], pieces: list[bytes], chance: random.Random) -> bytes:
    """A damaged section."""
    number = chance.randrange(len(pieces))
    pieces[number] = damaged(pieces[number], chance) if pieces[number] else b"x"
    return sealed(header, pieces)


def bomb(header: dict[str, Any], pieces: list[bytes], chance: random.Random) -> bytes:
    """A section or the header in another container, or one that expands to far more than it should."""
    content = chance.choice(containers())
    number = chance.randrange(len(pieces) + 1)
    if number == len(pieces):
        return assembled(content, b"".join(pieces))
    pieces[number] = content
    return sealed(header, pieces)


@functools.cache
def containers() -> tuple[bytes, ...]:
    """Zeros in several containers, up to 10 GB; made piece by piece, for memory is what is measured."""
    compressor = brotli.Compressor(quality=5, lgwin=24)
    first, more = (compressor.process(bytes(10**6)) + compressor.flush() for _ in range(2))
    end = compressor.finish()
    # One block of zstd that repeats a byte 131,072 times, and a last one.
    block, last = ((kind | 131_072 << 3).to_bytes(3, "little") + b"\0" for kind in (2, 3))
    zstd = b"\x28\xb5\x2f\xfd\xe0" + (131_072 * 80_000).to_bytes(8, "little") + block * 79_999 + last
    zeros = bytes(10**6)
    return (
        *(first + more * millions + end for millions in (0, 100, 10_000)),
        zlib.compress(zeros),
        lzma.compress(zeros, preset=0),
        zstd,
        zstd[:400],
    )


MUTATIONS: dict[str, Callable[[dict[str, Any], list[bytes], random.Random], bytes]] = {
    "values": other_values,
    "text": other_text,
    "places": other_places,
    "sizes": other_sizes,
    "beginning": other_beginning,
    "content": other_content,
    "bombs": bomb,
}


def mutated(data: bytes, chance: random.Random) -> tuple[str, bytes]:
    """What is done to a file, in a word, and what becomes of it."""
    if chance.random() < 1 / 3:
        return "damages", damaged(data, chance)
    name = chance.choice(list(MUTATIONS))
    return name, MUTATIONS[name](*parts(data), chance)


def outcome(data: bytes) -> str:
    """``read`` or ``refused``; anything else is a fault, in words."""
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        opened = artifact.Artifact(data)
        weights = opened.weights()
        opened.tokenizer_files()
        model_of(opened.spec, weights, eos_token_id=opened.header.eos_token_id)
        return "read"
    except OuroborosError as error:
        return "refused" if "\n" not in str(error) else f"several lines: {error}"
    except Hang:
        return "a hang"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"[:300]
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


class Hang(BaseException):
    """A file has taken too long; no error of the library is made of it."""


def interrupt(*_: Any) -> None:
    """Called when the time is over."""
    raise Hang


def main() -> None:
    """Run the mutations that are left."""
    options = parser(__doc__)
    options.add_argument("--files", type=int, help="how many files; by default 100,000")
    options.add_argument("--state", type=Path, help="where a run that was stopped goes on")
    chosen = options.parse_args()
    started, files = load(), chosen.files or (400 if chosen.quick else 100_000)
    set_threads(chosen.threads or 1)
    signal.signal(signal.SIGPROF, interrupt)
    # The model of a specification is made once, not for each file.
    artifact.expected_tensors = functools.lru_cache(maxsize=256)(artifact.expected_tensors)
    sources = originals()
    for data in sources:
        assert outcome(data) == "read"
    containers()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    state: dict[str, Any] = {"done": 0, "slowest": 0.0, "seconds": 0.0, "outcomes": {}, "faults": {}}
    if chosen.state is not None and chosen.state.exists():
        state = json.loads(chosen.state.read_text())
    counts = {name: Counter(state["outcomes"].get(name, {})) for name in ("damages", *MUTATIONS)}
    begun = time.process_time() - state["seconds"]
    for number in range(state["done"], files):
        name, data = mutated(sources[number % len(sources)], random.Random(number))
        since = time.process_time()
        found = outcome(data)
        state["slowest"] = max(state["slowest"], time.process_time() - since)
        counts[name][found if found in ("read", "refused") else "faults"] += 1
        if found not in ("read", "refused"):
            state["faults"][str(number)] = found
        if (number + 1) % 1000 == 0 or number + 1 == files:
            outcomes = {name: dict(count) for name, count in counts.items()}
            state |= {"done": number + 1, "seconds": time.process_time() - begun, "outcomes": outcomes}
            if chosen.state is not None:
                chosen.state.write_text(json.dumps(state))
            progress(f"{number + 1:,} files: {sum(counts.values(), Counter())}, slowest {state['slowest']:.2f} s")
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1000
    results = {"files": state["done"], "outcomes": state["outcomes"], "faults": state["faults"]}
    seconds = {"processor_seconds": round(state["seconds"], 1), "slowest_seconds": round(state["slowest"], 3)}
    report("fuzz_artifact", started, **results, **seconds, memory_growth_MB=round(grown, 1))


if __name__ == "__main__":
    main()

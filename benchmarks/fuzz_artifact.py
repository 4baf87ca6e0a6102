"""Mutated packed files: each must be read as it is or end in the documented error, in bounded time and memory.

The mutations of a file are those of its number, so a run is repeatable, and one that was stopped goes on where it was
(``--state FILE``). A third are damages as they happen: bytes that are flipped, cut, doubled or moved. The others are
made on purpose and bear right checksums: other values in the header, other text of it, other content of sections.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import random
import resource
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import brotli
import torch
from common import load, parser, progress, report, set_threads

from ouroboros.api import build
from ouroboros.convert.tensors import model_of
from ouroboros.data.tokenize import byte_tokenizer
from ouroboros.errors import OuroborosError
from ouroboros.pack import artifact
from ouroboros.pack.coded import Coded
from ouroboros.pack.write import assembled, pack
from ouroboros.recipes import recipe

SECONDS = 10
"""After which a file counts as a hang."""
ODD = (None, True, -1, 0, 1, 2**31, 2**63, 10**30, 1e308, -0.5, "", "x", "\x1b[2J", "a" * 5000, [], {}, [[]], [0] * 9)
CODES = tuple(f"codes/{bits}/{codec}" for bits in (2, 6, 8) for codec in ("brotli", "range"))
NAMES = (*CODES, "scales", "plain/float16", "plain/int64", "tokenizer", "brotli", "range", "zstd", "xz", "zlib")


def coded(tensor: torch.Tensor, bits: int, groups: int = 1) -> Coded:
    """A matrix rounded to the nearest codes."""
    matrix = tensor.detach().reshape(len(tensor), groups, -1)
    limit = 2 ** (bits - 1) - 1
    steps = (matrix.abs().amax(2) / limit).half().clamp_min(1e-4)
    codes = (matrix / steps.float()[:, :, None]).round().clamp(-limit - 1, limit).to(torch.int8)
    return Coded(codes=codes.reshape(len(tensor), -1), scales=steps, bits=bits, shape=tuple(tensor.shape))


def originals() -> list[bytes]:
    """Small packed models that hold every kind of section."""
    made = []
    for name in ("loop", "osam"):
        spec = recipe(name, "tiny").model
        torch.manual_seed(0)
        weights = build(recipe(name, "tiny")).state_dict()
        tensors: dict[str, Any] = {}
        for number, key in enumerate(artifact.expected_tensors(spec)):
            value = weights[key]
            if value.ndim > 1 and value.is_floating_point():
                tensors[key] = coded(value, (2, 6, 8)[number % 3])
            else:
                tensors[key] = value.half() if value.is_floating_point() and number % 2 else value
        made.append(pack(spec, tensors, byte_tokenizer() if spec.vocab_size == 257 else None, eos_token_id=0))
    return made


def parts(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The header as JSON values, and the sections."""
    length = artifact.PREFIX.unpack(data[: artifact.PREFIX.size])[2]
    end = artifact.PREFIX.size + length
    return json.loads(brotli.decompress(data[artifact.PREFIX.size : end])), data[end:]


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
        parent[key] = chance.choice(ODD)


def forged(data: bytes, chance: random.Random) -> bytes:
    """What someone could make on purpose, with right checksums."""
    header, content = parts(data)
    kind = chance.randrange(4)
    if kind == 0:
        text = bytearray(json.dumps(header).encode())
        at = chance.randrange(len(text))
        text[at : at + chance.randrange(3)] = chance.choice(
            (b"[" * 5000, b"{", b'"', b"NaN", b"\xff", b"1e999", b",", b"9" * 5000)
        )
        return assembled(brotli.compress(bytes(text), quality=1), content)
    if kind == 1:
        for _ in range(chance.choice((1, 1, 2, 3))):
            other_value(header, chance)
        return assembled(brotli.compress(json.dumps(header).encode(), quality=1), content)
    pieces = [content[section["offset"] :][: section["bytes"]] for section in header["sections"]]
    number = chance.randrange(len(pieces))
    if kind == 2:
        pieces[number] = damaged(pieces[number], chance)
    else:
        pieces[number] = brotli.compress(bytes(chance.choice((0, 1000, 10**6, 10**7))), quality=1)
    offset = 0
    for section, piece in zip(header["sections"], pieces, strict=True):
        if len(piece) != section["bytes"]:
            for place, tensor in enumerate(section["tensors"]):
                tensor["bytes"] = 0 if place else len(piece)
        section |= {"offset": offset, "bytes": len(piece), "sha256": hashlib.sha256(piece).hexdigest()}
        offset += len(piece)
    return assembled(brotli.compress(json.dumps(header).encode(), quality=1), b"".join(pieces))


def outcome(data: bytes) -> str:
    """``read`` or ``refused``; anything else is a fault, in words."""
    signal.alarm(SECONDS)
    try:
        opened = artifact.Artifact(data)
        weights = opened.weights()
        opened.tokenizer_files()
        model_of(opened.spec, weights, eos_token_id=opened.header.eos_token_id)
        return "read"
    except OuroborosError as error:
        return "refused" if "\n" not in str(error) else f"several lines: {error}"
    except TimeoutError:
        return "a hang"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"[:300]
    finally:
        signal.alarm(0)


def interrupt(*_: Any) -> None:
    """A file has taken too long."""
    raise TimeoutError


def main() -> None:
    """Run the mutations that are left."""
    options = parser(__doc__)
    options.add_argument("--files", type=int, help="how many files; by default 100,000")
    options.add_argument("--state", type=Path, help="where a run that was stopped goes on")
    chosen = options.parse_args()
    started, files = load(), chosen.files or (400 if chosen.quick else 100_000)
    set_threads(chosen.threads or 1)
    signal.signal(signal.SIGALRM, interrupt)
    # The model of a specification is made once, not for each file.
    artifact.expected_tensors = functools.lru_cache(maxsize=256)(artifact.expected_tensors)
    sources = originals()
    for data in sources:
        assert outcome(data) == "read"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    state: dict[str, Any] = {"done": 0, "slowest": 0.0, "outcomes": {}, "faults": {}}
    if chosen.state is not None and chosen.state.exists():
        state = json.loads(chosen.state.read_text())
    counts = Counter(state["outcomes"])
    for number in range(state["done"], files):
        chance = random.Random(number)
        data = sources[number % len(sources)]
        data = damaged(data, chance) if chance.random() < 1 / 3 else forged(data, chance)
        begun = time.perf_counter()
        found = outcome(data)
        state["slowest"] = max(state["slowest"], time.perf_counter() - begun)
        counts[found if found in ("read", "refused") else "faults"] += 1
        if counts["faults"] and found not in ("read", "refused"):
            state["faults"][str(number)] = found
        if (number + 1) % 1000 == 0 or number + 1 == files:
            state |= {"done": number + 1, "outcomes": dict(counts)}
            if chosen.state is not None:
                chosen.state.write_text(json.dumps(state))
            progress(f"{number + 1:,} files: {dict(counts)}, slowest {state['slowest']:.2f} s")
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1000
    results = {"files": state["done"], "outcomes": state["outcomes"], "faults": state["faults"]}
    slowest = round(state["slowest"], 3)
    report("fuzz_artifact", started, **results, slowest_seconds=slowest, memory_growth_MB=round(grown, 1))


if __name__ == "__main__":
    main()

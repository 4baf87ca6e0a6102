"""Runs the packed language model that lies beside this file, without the library that made it.

    python run.py "Once upon" --tokens 50       continues a text
    python run.py --score notes.txt             prints bits per byte of a text

It needs numpy, brotli and constriction, and tokenizers where the model's tokenizer is not one of bytes. The model is
model.pack: a header of JSON, codes of a few bits for each weight, and the tokenizer. What this program does not know of
a model, it refuses by name.

Shapes: T new tokens, S tokens so far, D model width, V vocabulary, K key/value heads, C channels per head, R rows and N
columns of a matrix of codes.
"""

import argparse
import hashlib
import itertools
import json
import math
import re
import struct
import sys
from collections.abc import Iterator, Sequence
from decimal import Decimal, localcontext
from pathlib import Path
from typing import Any

import brotli
import numpy as np
from constriction import stream  # pyrefly: ignore[missing-module-attribute] (it is compiled)

Cache = dict[int, tuple[np.ndarray, np.ndarray]]
"""Keys and values (K, S, C) of every visit of a block, by the visit's number."""


# The packed file: a prefix of 48 bytes, the header, and sections behind it, all of them with checksums.


def read_packed(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray], dict[str, bytes]]:
    """The header of a packed file, its tensors by name (float32), and the tokenizer's files."""
    data = path.read_bytes()
    if data[:8] != b"OUROPACK" or len(data) < 48:
        raise ValueError(f"{path}: not a packed model, or cut off after {len(data)} bytes")
    version, length, digest = struct.unpack("<II32s", data[8:48])
    if version != 1:
        raise ValueError(f"{path}: version {version} of the format; this program reads 1")
    if hashlib.sha256(data[:16] + data[48 : 48 + length]).digest() != digest:
        raise ValueError(f"{path}: the header is damaged or cut off")
    header = json.loads(brotli.decompress(data[48 : 48 + length]))
    contents = dict[str, bytes]()
    for section in header["sections"]:
        begin = 48 + length + section["offset"]
        contents[section["name"]] = content = data[begin : begin + section["bytes"]]
        if hashlib.sha256(content).hexdigest() != section["sha256"]:
            raise ValueError(f"{path}: section {section['name']!r} is damaged or cut off")
        if section["codec"] not in ("brotli", "brotli-columns", "range"):
            raise ValueError(f"{path}: section {section['name']!r}: unknown codec {section['codec']!r}")
    weights, files, at = dict[str, np.ndarray](), dict[str, bytes](), 0
    scales = from_planes(brotli.decompress(contents["scales"]), "<f2") if "scales" in contents else np.empty(0)
    for section in header["sections"]:
        tensors, content = section["tensors"], contents[section["name"]]
        coded = decode_range(content, section) if section["codec"] == "range" else plain(content, section)
        for tensor, numbers in zip(tensors, coded):
            if section["bits"] is not None:  # codes: each is multiplied by the step of its row, or of its group
                rows = tensor["shape"][0] if len(tensor["shape"]) > 1 else 1
                steps = scales[at : at + rows * tensor["groups"], None].astype(np.float32)
                numbers, at = numbers.reshape(len(steps), -1) * steps, at + len(steps)
            weights[tensor["name"]] = numbers.astype(np.float32).reshape(tensor["shape"])
        content = brotli.decompress(content) if section["files"] else b""
        for file in section["files"]:
            files[file["name"]], content = content[: file["bytes"]], content[file["bytes"] :]
    return header, weights, files


def plain(content: bytes, section: dict[str, Any]) -> Iterator[np.ndarray]:
    """The numbers of each tensor that brotli alone has compressed: codes of a byte each, by rows or columns, or numbers
    in some format."""
    known = {None: "<i1", "float16": "<f2", "bfloat16": "<u2", "float32": "<f4"}
    if section["dtype"] not in known:
        raise ValueError(f"tensors of {section['dtype']}, which the standalone program does not know")
    data, dtype = brotli.decompress(content), known[section["dtype"]]
    for tensor in section["tensors"]:
        size = math.prod(tensor["shape"]) * np.dtype(dtype).itemsize
        numbers, data = from_planes(data[:size], dtype), data[size:]
        if section["codec"] == "brotli-columns":
            numbers = numbers.reshape(-1, tensor["shape"][0] if len(tensor["shape"]) > 1 else 1).T
        # A bfloat16 is the upper half of a float32.
        yield (numbers.astype(np.uint32) << 16).view(np.float32) if section["dtype"] == "bfloat16" else numbers


def from_planes(data: bytes, dtype: str) -> np.ndarray:
    """Numbers that are stored as planes: first the lowest byte of all of them, and so on."""
    planes = np.frombuffer(data, np.uint8).reshape(np.dtype(dtype).itemsize, -1)
    return np.ascontiguousarray(planes.T).reshape(-1).view(dtype)


# The range coder for codes: adaptive, with statistics of whole numbers, which are the same on every machine.

BLOCK, WIDEST, SPAN, UNIT, TRUSTED, TOTAL = 4096, 16384, 64, 256, 4, 1 << 16
LEVELS = np.array([(16 << (i // 4)) * (256, 304, 362, 431)[i % 4] >> 8 for i in range(45)], dtype=np.int64)
BETWEEN = (LEVELS[1:] + LEVELS[:-1]) // 2


def decode_range(data: bytes, section: dict[str, Any]) -> Iterator[np.ndarray]:
    """The codes (R N,) of each tensor. The mean magnitude of each span of codes was sent, that of a column is learned:
    together they choose the statistics of a code, which learn from it."""
    decoder, half = stream.queue.RangeDecoder(np.frombuffer(data, "<u4").astype(np.uint32)), 1 << section["bits"] - 1
    sent, counts = np.full((1, len(LEVELS)), 4096 // len(LEVELS), dtype=np.int64), bell_curves(half)
    for shape in (tensor["shape"] for tensor in section["tensors"]):
        codes, columns = np.zeros(math.prod(shape), np.int64), math.prod(shape[1:]) if len(shape) > 1 else shape[0]
        width = columns if columns <= WIDEST else BLOCK
        span = width * -(-SPAN // width)
        seen, weight = np.zeros(width, np.int64), 0
        stride = span * max(1, BLOCK // span)
        for begin in range(0, len(codes), stride):
            block = codes[begin : begin + stride]
            lengths = np.diff(np.arange(0, len(block), span), append=len(block))
            sizes = np.repeat(LEVELS[decode_symbols(decoder, np.zeros(len(lengths), np.int64), sent)], lengths)
            by_column = np.resize((seen + TRUSTED * UNIT) * UNIT // (weight + TRUSTED), len(block))
            contexts = np.searchsorted(BETWEEN, sizes * by_column // UNIT**2)
            block[:] = decode_symbols(decoder, contexts, counts) - half
            relative = np.abs(block) * UNIT**2 // sizes
            seen += np.pad(relative, (0, -len(block) % width)).reshape(-1, width).sum(0)
            weight += -(-len(block) // width)
        yield codes


def decode_symbols(decoder: Any, contexts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The next symbols, those of each context (n,) by its row of ``counts``, which then learns them."""
    symbols, order = np.zeros(len(contexts), np.int64), np.argsort(contexts, kind="stable")
    used, starts = np.unique(contexts[order], return_index=True)
    for context, places in zip(used, np.split(order, starts[1:])):
        row = counts[context]
        frequencies = row * (TOTAL - len(row)) // row.sum() + 1
        frequencies[row.argmax()] += TOTAL - frequencies.sum()
        model = stream.model.Categorical(frequencies.astype(np.float64), perfect=False)
        symbols[places] = decoder.decode(model, len(places))
        row += 32 * np.bincount(symbols[places], minlength=len(row))
        if row.sum() > 1 << 20:
            row[:] = row + 1 >> 1
    return symbols


def bell_curves(half: int) -> np.ndarray:
    """Counts to begin with, a normal distribution of codes for each magnitude; in decimal numbers, which are exact."""
    curves = []
    with localcontext() as context:
        context.prec = 12
        for level in LEVELS.tolist():
            factor = (Decimal(-(UNIT**2)) / (Decimal("3.14159265359") * level * level)).exp()
            heights, step = [Decimal(1)], factor
            for _ in range(half):
                heights.append(heights[-1] * step)
                step *= factor * factor
            both = [heights[abs(code)] for code in range(-half, half)]
            total = sum(both)
            curves.append([int(4096 * height / total) + 1 for height in both])
    return np.array(curves, dtype=np.int64)


# What this program knows: for each kind of part the options that it reads. Every other option has to be off, but for
# those that act in training alone.

TRAINING = "register_std init_std embedding_std head_std output_init zero_init_outputs dropout"
KNOWN = {
    "model": {"": "layout vocab_size hidden_size max_position_embeddings block topology stem loop head tie_embeddings"},
    "block": {"": "mixer ffn norm residual"},
    "mixer": {
        "attention": "num_heads head_dim num_kv_heads rope window score_channels qkv_bias out_bias qk_norm qk_norm_gain"
    },
    "rope": {"": "base fraction scale slowing slowing_context slowing_low slowing_high"},
    "ffn": dict.fromkeys(("swiglu", "relu2"), "intermediate_size bias negative_slope"),
    "norm": {"rms": "placement eps gain"},
    "residual": {"additive": ""},
    "topology": {"chain": ""},
    "head": {"linear": "logit_scale logit_softcap"},
    "stem": {"norm": ""},
    "loop": {"inject": "mode", "embedding": "rows", "norm": "rows eps", "gate": "bias"},
}


def check_known(values: dict[str, Any], family: str, place: str) -> None:
    """Refuse a part of another kind, or with another option that is not off; parts inside too."""
    kinds, kind = KNOWN[family], values.get("kind", "")
    if kind not in kinds:
        raise ValueError(f"{place} is {kind!r}, where the standalone program knows {', '.join(kinds)}")
    read = f"kind {TRAINING} {kinds[kind]}".split()
    for name, value in values.items():
        if name not in read and value and value != "none":
            raise ValueError(f"{place}.{name} is {value!r}, which the standalone program does not know")
        if name in KNOWN:
            for inner in value if isinstance(value, list) else [value]:
                check_known(inner, name, f"{place}.{name}")


def segments_of(layout: str) -> list[tuple[range, int, bool]]:
    """The layout, as in ``2 middle:(2)x3 2``: runs of blocks, how often each runs in a row, and whether it is a loop; a
    name that was given before stands for the same blocks again."""
    form = r"(?:([A-Za-z_][\w-]*):\s*)?(?:\(\s*([\w-]+)\s*\)\s*x\s*(\d+)|([\w-]+))"
    found, named, stored = [], dict[str, range](), 0
    for name, inside, loops, once in re.findall(form, layout):
        what = inside or once
        blocks = named[what] if what in named else range(stored, stored + int(what))
        named[name], stored = blocks, max(stored, blocks.stop)
        found.append((blocks, int(loops or 1), bool(loops)))
    return found


class Model:
    """The language model of a packed file."""

    def __init__(self, path: Path) -> None:
        self.header, self.weights, self.files = read_packed(path)
        self.spec = self.header["spec"]
        check_known(self.spec, "model", "model")
        self.segments = segments_of(self.spec["layout"])
        self.eps: float = self.spec["block"]["norm"]["eps"]
        self.context: int = self.spec["max_position_embeddings"]

    def logits(self, ids: Sequence[int], cache: Cache | None = None, keep: int = 0) -> np.ndarray:
        """Logits (T, V) of the tokens behind each of ``ids``; with ``keep`` of the last so many alone. ``cache`` holds
        what stands before them, and is extended."""
        embedding, head = self.weights["model.embed_tokens.weight"], self.spec["head"]
        x = embedding[np.asarray(ids)]
        for _ in self.spec["stem"]:  # a norm, which is all that it may be
            x = rms_norm(x, self.eps)
        x = self._norm("model.norm", self._decoded(x, {} if cache is None else cache)[-keep:])
        logits = x @ self.weights.get("lm_head.weight", embedding).T * head["logit_scale"]
        cap = head["logit_softcap"]
        return logits if cap is None else cap * np.tanh(logits / cap)

    def _decoded(self, x: np.ndarray, cache: Cache) -> np.ndarray:
        """The state (T, D) behind all blocks and loops."""
        slots, loops = itertools.count(), itertools.count()
        past = cache[0][0].shape[1] if cache else 0
        for blocks, times, looped in self.segments:
            parts, first = self.spec["loop"] if looped else [], x
            name = f"model.decoder.loops.{next(loops)}" if looped else ""
            for loop in range(times):
                before = x
                for part in parts:
                    x = self._entered(part, f"{name}.{part['kind']}", x, first, loop)
                for number in blocks:
                    x = self._block(f"model.decoder.layers.{number}", x, past, next(slots), cache)
                for part in parts:
                    x = self._left(part, f"{name}.{part['kind']}", before, x, loop)
        return x

    def _entered(self, part: dict[str, Any], name: str, x: np.ndarray, first: np.ndarray, loop: int) -> np.ndarray:
        """What a loop part makes of the state before a loop; ``first`` is the one before the first loop."""
        if part["kind"] == "embedding":
            return x + self._row(name, loop)
        if part["kind"] == "inject" and part["mode"] == "add":
            return x + self.weights[f"{name}.scale"] * first
        return self._linear(f"{name}.proj", x, first) if part["kind"] == "inject" else x

    def _left(self, part: dict[str, Any], name: str, x: np.ndarray, z: np.ndarray, loop: int) -> np.ndarray:
        """What a loop part makes of the state ``z`` behind a loop; ``x`` is the one before it."""
        if part["kind"] == "norm":
            return rms_norm(z, part["eps"] or self.eps) * self._row(name, loop)
        return x + sigmoid(self._linear(f"{name}.proj", z, x)) * (z - x) if part["kind"] == "gate" else z

    def _row(self, name: str, loop: int) -> np.ndarray:
        """The row of a loop in a table; later loops have the last one."""
        table = self.weights[f"{name}.weight"]
        return table[min(loop, len(table) - 1)]

    def _block(self, name: str, x: np.ndarray, past: int, slot: int, cache: Cache) -> np.ndarray:
        """One visit of a block: attention and feed-forward network, each between its norms, added to the state."""
        placement = self.spec["block"]["norm"]["placement"]
        for before, after in (("input", "mixer_output"), ("post_attention", "mlp_output")):
            y = x if placement == "final" else self._norm(f"{name}.{before}_layernorm", x)
            if before == "input":
                y = self._attended(f"{name}.self_attn", y, past, slot, cache)
            else:
                y = self._hidden(f"{name}.mlp", y)
            x = x + (self._norm(f"{name}.{after}_layernorm", y) if placement == "sandwich" else y)
        return x

    def _attended(self, name: str, x: np.ndarray, past: int, slot: int, cache: Cache) -> np.ndarray:
        """Causal attention, softmax(q k / sqrt(C)) v; several query heads may share a head of keys and values."""
        mixer, T = self.spec["block"]["mixer"], len(x)
        C = mixer["head_dim"] or x.shape[1] // mixer["num_heads"]
        q, k, v = (self._linear(f"{name}.{p}_proj", x).reshape(T, -1, C).swapaxes(0, 1) for p in "qkv")
        if mixer["qk_norm"] == "before_rope":
            q, k = self._norm(f"{name}.q_norm", q), self._norm(f"{name}.k_norm", k)
        q, k = rotate(mixer["rope"], past, q, k)
        if mixer["qk_norm"] == "after_rope":
            q, k = self._norm(f"{name}.q_norm", q), self._norm(f"{name}.k_norm", k)
        if slot in cache:
            k, v = (np.concatenate(pair, axis=1) for pair in zip(cache[slot], (k, v)))
        cache[slot] = k, v
        K, S, _ = k.shape
        ahead = np.arange(S) - np.arange(S - T, S)[:, None]  # how far each key lies ahead of each query
        hidden = (ahead > 0) | (ahead <= -(mixer["window"] or S))
        scores = q.reshape(K, -1, T, C) @ k[:, None].swapaxes(2, 3) * (mixer["score_channels"] or C) ** -0.5
        y = softmax(np.where(hidden, np.float32(-np.inf), scores)) @ v[:, None]
        return self._linear(f"{name}.o_proj", y.transpose(2, 0, 1, 3).reshape(T, -1))

    def _hidden(self, name: str, x: np.ndarray) -> np.ndarray:
        """The feed-forward network: down(silu(gate x) * up x), or down(relu(up x)^2)."""
        y = self._linear(f"{name}.up_proj", x)
        if self.spec["block"]["ffn"]["kind"] == "relu2":
            return self._linear(f"{name}.down_proj", np.maximum(y, 0) ** 2)
        gate = self._linear(f"{name}.gate_proj", x)
        return self._linear(f"{name}.down_proj", gate * sigmoid(gate) * y)

    def _linear(self, name: str, *inputs: np.ndarray) -> np.ndarray:
        """A linear map of one input, or of two side by side, with its bias if it has one."""
        x = np.concatenate(inputs, axis=1)
        return x @ self.weights[f"{name}.weight"].T + self.weights.get(f"{name}.bias", np.float32(0))

    def _norm(self, name: str, x: np.ndarray) -> np.ndarray:
        """An RMS norm, with its gain if it has one."""
        return rms_norm(x, self.eps) * self.weights.get(f"{name}.weight", np.float32(1))


def rms_norm(x: np.ndarray, eps: float) -> np.ndarray:
    """``x / sqrt(mean(x^2) + eps)`` over the last axis."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)


def sigmoid(x: np.ndarray) -> np.ndarray:
    """``1 / (1 + exp(-x))``, without overflow."""
    return 1 / (1 + np.exp(-np.maximum(x, -80)))


def softmax(x: np.ndarray) -> np.ndarray:
    """Probabilities over the last axis."""
    found = np.exp(x - x.max(axis=-1, keepdims=True))
    return found / found.sum(axis=-1, keepdims=True)


def rotate(rope: dict[str, Any], past: int, *heads: np.ndarray) -> list[np.ndarray]:
    """The first n channels of heads (H, T, C) turned by their position, their first half paired with the second."""
    _, T, C = heads[0].shape
    n = int(C * rope["fraction"] + 1e-9) // 2 * 2
    speed = rope["base"] ** -(np.arange(0, n, 2, dtype=np.float32) / np.float32(n or 1)) / np.float32(rope["scale"])
    if rope["slowing"] != 1:  # slow rotations are slower by this factor, as in Llama 3.1
        turns, low = rope["slowing_context"] * speed / (2 * math.pi), rope["slowing_low"]
        kept = np.clip((turns - low) / (rope["slowing_high"] - low), 0, 1)
        speed = speed * (kept + (1 - kept) / rope["slowing"])
    angles = np.arange(past, past + T, dtype=np.float32)[:, None] * speed
    cos, sin, found = np.cos(angles), np.sin(angles), []
    for x in heads:
        a, b = x[..., : n // 2], x[..., n // 2 : n]
        found.append(np.concatenate((a * cos - b * sin, b * cos + a * sin, x[..., n:]), axis=-1))
    return found


class Text:
    """The tokenizer: bytes, or byte-level BPE by the library tokenizers."""

    def __init__(self, files: dict[str, bytes], end: int | None) -> None:
        if "tokenizer.json" not in files or end is None:
            raise ValueError("the packed file holds no tokenizer with an end-of-text token")
        self.end, self.bpe, state = end, None, json.loads(files["tokenizer.json"])
        if (state["decoder"] or {}).get("type") != "ByteLevel":
            raise ValueError("the standalone program knows tokenizers of bytes and byte-level BPE alone")
        if state["model"]["merges"]:
            from tokenizers import Tokenizer

            self.bpe = Tokenizer.from_str(files["tokenizer.json"].decode())
            self.bpe.encode_special_tokens = True  # text that spells one is text

    def encode(self, data: bytes) -> list[int]:
        """The ids of a text, behind the end-of-text token that begins every document."""
        return [self.end, *(data if self.bpe is None else self.bpe.encode(data.decode(), add_special_tokens=False).ids)]

    def decode(self, ids: Sequence[int]) -> bytes:
        """The bytes of ids; special tokens have none."""
        return bytes(i for i in ids if i < 256) if self.bpe is None else self.bpe.decode(ids).encode()


def continued(model: Model, text: Text, prompt: bytes, most: int, temperature: float, seed: int) -> bytes:
    """At most ``most`` new tokens behind a prompt; temperature 0 always takes the most probable one."""
    ids, random, cache = text.encode(prompt), np.random.default_rng(seed), Cache()
    room, new = model.context - len(ids), list[int]()
    if room < 1:
        raise ValueError(f"the prompt has {len(ids)} tokens, and the model's context holds {model.context}")
    while len(new) < min(most, room) and text.end not in new:
        (row,) = model.logits(new[-1:] or ids, cache, keep=1)
        share = softmax(row.astype(np.float64) / temperature) if temperature > 0 else None
        new.append(int(row.argmax() if share is None else random.choice(len(row), p=share)))
    return text.decode(new)


def score(model: Model, text: Text, data: bytes) -> tuple[float, int]:
    """Bits per byte of a text, and the window: as many tokens are read at a time as in training, and all are scored."""
    recipe, ids, nats = model.header["facts"]["recipe"], text.encode(data), 0.0
    window = min(recipe["data"]["sequence_length"] if recipe else 512, model.context)
    if not data or text.decode(ids) != data:
        raise ValueError("the text is empty, or its tokens do not give it back")
    for start in range(0, len(ids) - 1, window):
        targets = np.array(ids[start + 1 : start + 1 + window])
        logits = model.logits(ids[start : start + len(targets)]).astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        nats += (np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(targets)), targets]).sum()
    return float(nats) / math.log(2) / len(data), window


def main() -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Run the packed language model beside this file.")
    parser.add_argument("prompt", nargs="?", help="the text to continue; an empty one begins a document")
    parser.add_argument("--tokens", type=int, default=200, help="write at most this many")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the most probable token")
    parser.add_argument("--seed", type=int, default=0, help="of the draws, with a temperature")
    parser.add_argument("--score", type=Path, metavar="FILE", help="print the bits per byte of a text")
    options = parser.parse_args()
    if (options.prompt is None) == (options.score is None):
        parser.error("give a prompt, or --score FILE")
    try:
        model = Model(Path(__file__).with_name("model.pack"))
        text = Text(model.files, model.header["eos_token_id"])
        if options.score is None:
            prompt = options.prompt.encode("utf-8", "surrogateescape")
            new = continued(model, text, prompt, options.tokens, options.temperature, options.seed)
            sys.stdout.buffer.write(prompt + new + b"\n")
            return 0
        data = options.score.read_bytes()
        found, window = score(model, text, data)
        sys.stdout.write(f"{len(data):,} bytes, window {window}: {found:.6f} bits/byte\n")
        return 0
    except (OSError, ValueError, KeyError, ImportError, brotli.error) as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())

"""Codes, scales and plain numbers as bytes, and back exactly.

Three codecs hold codes. ``brotli`` compresses them row by row, one byte each, and ``brotli-columns`` column by column;
they win where rows or columns resemble each other. ``range``, an adaptive range coder (the library ``constriction``),
wins elsewhere: it knows how large a code is likely to be, from the mean magnitude of its row, which is sent along, and
from that of its column in the rows before. Bits are never packed together first, which hides equal symbols from a
compressor. Rows and columns sorted by magnitude are measured by benchmarks/codecs.py and not offered
(docs/concepts/packed-file.md).

All statistics are whole numbers that sum to a power of two, so that the coder rounds nothing and every machine decodes
the same. How many symbols there are is known before the first one is decoded, and brotli stops at the size expected.

Shapes: R rows, C columns, A symbols of an alphabet, L levels of magnitude.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from decimal import Decimal, localcontext
from typing import Any, NamedTuple

import brotli
import numpy as np
from constriction import stream  # pyrefly: ignore[missing-module-attribute] (it is compiled)

from ouroboros.errors import OuroborosError, check

_BLOCK = 4096
"""Symbols that are coded before the statistics are adapted: enough for whole arrays to be handled at once."""
_WIDEST = 16384
"""Columns that have a magnitude of their own; wider rows are read as if they were narrower ones."""
_SPAN = 64
"""A sent magnitude is that of so many codes at least: of several rows, where rows are short."""
_UNIT = 256
"""Magnitudes are whole numbers of so many to a code."""
_TOTAL = 1 << 16
"""What the frequencies of an alphabet sum to."""
_GAIN = 32
"""What a symbol adds to its count."""
_START = 4096
"""What the counts of an alphabet sum to before the first symbol, about."""
_MEMORY = 1 << 20
"""The sum at which counts are halved."""
_LEVELS = np.array([(16 << (i // 4)) * (256, 304, 362, 431)[i % 4] >> 8 for i in range(45)], dtype=np.int64)
"""(L,) magnitudes, four to an octave, from a sixteenth to 128."""
_BETWEEN = (_LEVELS[1:] + _LEVELS[:-1]) // 2
_TRUSTED = 4
"""A column is believed to be like the mean of all columns until so many rows say otherwise."""

_SAMPLE = 1 << 18
"""Codes of a tensor by which its codec is chosen, about; all of them, where there are no more."""
_FOUND = 0.995
"""Brotli is tried in earnest where its fast setting makes the codes smaller than so much of the same ones shuffled."""
_SECTION = 100
"""Bytes that a tensor has to save by another codec than ``range``, because a section of its own takes about as many."""

Transfer = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Symbols (n,) and the frequencies (A,) of each to the symbols: an encoder writes them, a decoder ignores what it is
given and reads them."""


def encode(codec: str, matrices: Sequence[np.ndarray], bits: int) -> tuple[bytes, list[int]]:
    """Matrices of codes (int8, within ``bits``) as bytes, and how many of the bytes each takes."""
    _check_fit(matrices, bits)
    return _CODECS[codec][0](matrices, bits)


def decode(codec: str, data: bytes, shapes: Sequence[tuple[int, int]], bits: int) -> list[np.ndarray]:
    """What :func:`encode` was given.

    Raises:
        OuroborosError: an unknown codec, or bytes that are not of these shapes.
    """
    check(codec in _CODECS, f"unknown codec {codec!r} (this version reads {', '.join(_CODECS)})")
    matrices = _CODECS[codec][1](data, shapes, bits)
    _check_fit(matrices, bits)
    return matrices


def _check_fit(matrices: Sequence[np.ndarray], bits: int) -> None:
    limit = 1 << (bits - 1)
    fits = all(m.size == 0 or (m.min() >= -limit and m.max() < limit) for m in matrices)
    check(fits, f"holds codes that {bits} bits cannot hold")


class Encoded(NamedTuple):
    """Some of several matrices in one codec."""

    codec: str
    chosen: list[int]
    """Which of the matrices."""
    data: bytes
    sizes: list[int]
    """Bytes of ``data`` that each of them takes."""


def encode_best(matrices: Sequence[np.ndarray], bits: int) -> list[Encoded]:
    """Each matrix in the codec that makes it smallest, by a sample of its rows or columns if it is large."""
    parts: dict[str, list[int]] = {codec: [] for codec in _CODECS}
    _, sizes = encode("range", matrices, bits)
    for number, (matrix, size) in enumerate(zip(matrices, sizes)):
        parts[_smallest(matrix, size)].append(number)
    return [Encoded(c, part, *encode(c, [matrices[n] for n in part], bits)) for c, part in parts.items() if part]


def _smallest(matrix: np.ndarray, size: int) -> str:
    """The codec for a matrix that has ``size`` bytes by ``range``, among those that share its statistics.

    The setting of brotli that is used takes seconds for a million codes, and on most tensors it finds nothing. The fast
    one sees where there is something to be found, if it is compared with itself: how far it is above the entropy of
    single codes depends on how few codes there are.
    """
    orders = {"brotli": _sampled(matrix), "brotli-columns": _sampled(matrix.T)}
    shuffled = np.random.RandomState(0).permutation(orders["brotli"].reshape(-1))  # this generator never changes
    found = min(len(brotli.compress(sample.tobytes(), quality=5)) / sample.size for sample in orders.values())
    if found > _FOUND * len(brotli.compress(shuffled.tobytes(), quality=5)) / shuffled.size:
        return "range"
    sizes = {"range": size / matrix.size}
    for codec, sample in orders.items():
        sizes[codec] = len(squeeze([sample.tobytes()])[0]) / sample.size + _SECTION / matrix.size
    return min(sizes, key=lambda codec: sizes[codec])


def _sampled(matrix: np.ndarray) -> np.ndarray:
    """Rows at equal distances."""
    return matrix[:: -(-matrix.size // _SAMPLE), :_SAMPLE]


def squeeze(parts: Sequence[bytes]) -> tuple[bytes, list[int]]:
    """Bytes compressed by brotli one behind the other, and how many compressed bytes each part takes."""
    compressor, out, sizes = brotli.Compressor(quality=11, lgwin=24), [], []
    for part in parts:
        out.append(compressor.process(part) + compressor.flush())
        sizes.append(len(out[-1]))
    end = compressor.finish()
    if sizes:
        sizes[-1] += len(end)
    return b"".join(out) + end, sizes


def expand(data: bytes, most: int) -> bytearray:
    """What brotli made ``data`` of, if that is no more than ``most`` bytes; memory stays near that whatever comes.

    Raises:
        OuroborosError: there is more, or ``data`` is not one whole stream of brotli.
    """
    decompressor, out = brotli.Decompressor(), bytearray()
    try:
        piece = decompressor.process(data, output_buffer_limit=1 << 16)
        while True:
            out += piece
            check(len(out) <= most, f"expands to more than the {most:,} bytes that are expected")
            if decompressor.is_finished():
                return out
            check(bool(piece) or not decompressor.can_accept_more_data(), "the compressed stream is cut off")
            piece = decompressor.process(b"", output_buffer_limit=1 << 16)
    except brotli.error:
        raise OuroborosError("not one stream of brotli") from None


def planes(values: np.ndarray) -> bytes:
    """Numbers as bytes: first the lowest byte of all of them, and so on, because like bytes compress better."""
    little = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<")).reshape(-1)
    return little.view(np.uint8).reshape(little.size, values.itemsize).T.tobytes()


def from_planes(data: bytes | bytearray, dtype: np.dtype) -> np.ndarray:
    """The numbers (n,) that :func:`planes` was given; ``data`` must be whole numbers long."""
    columns = np.frombuffer(data, dtype=np.uint8).reshape(dtype.itemsize, -1)
    return np.ascontiguousarray(columns.T).reshape(-1).view(dtype.newbyteorder("<")).astype(dtype)


def _encode_brotli(matrices: Sequence[np.ndarray], bits: int) -> tuple[bytes, list[int]]:
    return squeeze([matrix.tobytes() for matrix in matrices])


def _decode_brotli(data: bytes, shapes: Sequence[tuple[int, int]], bits: int) -> list[np.ndarray]:
    sizes = [rows * columns for rows, columns in shapes]
    raw = np.frombuffer(expand(data, sum(sizes)), dtype=np.int8)
    check(raw.size == sum(sizes), f"holds {raw.size:,} codes in place of {sum(sizes):,}")
    return [part.reshape(shape) for part, shape in zip(np.split(raw, np.cumsum(sizes)[:-1]), shapes)]


def _encode_columns(matrices: Sequence[np.ndarray], bits: int) -> tuple[bytes, list[int]]:
    return _encode_brotli([matrix.T for matrix in matrices], bits)


def _decode_columns(data: bytes, shapes: Sequence[tuple[int, int]], bits: int) -> list[np.ndarray]:
    turned = _decode_brotli(data, [(columns, rows) for rows, columns in shapes], bits)
    return [np.ascontiguousarray(part.T) for part in turned]


def _encode_range(matrices: Sequence[np.ndarray], bits: int) -> tuple[bytes, list[int]]:
    encoder, statistics, ends = stream.queue.RangeEncoder(), _Statistics(bits), [0]

    def write(symbols: np.ndarray, frequencies: np.ndarray) -> np.ndarray:
        encoder.encode(symbols, stream.model.Categorical(frequencies, perfect=False))
        return symbols

    for matrix in matrices:
        _transfer(matrix.reshape(-1).copy(), matrix.shape[1], statistics, write)
        ends.append(encoder.num_bits() // 8 if matrix.size else ends[-1])
    data = encoder.get_compressed().astype("<u4").tobytes()
    sizes = [end - begin for begin, end in itertools.pairwise(ends)]
    if sizes:
        sizes[-1] += len(data) - ends[-1]
    return data, sizes


def _decode_range(data: bytes, shapes: Sequence[tuple[int, int]], bits: int) -> list[np.ndarray]:
    check(len(data) % 4 == 0, "the compressed stream is cut off")
    words = np.frombuffer(data, dtype="<u4").astype(np.uint32)
    decoder, statistics = stream.queue.RangeDecoder(words), _Statistics(bits)

    def read(symbols: np.ndarray, frequencies: np.ndarray) -> np.ndarray:
        return decoder.decode(stream.model.Categorical(frequencies, perfect=False), len(symbols))

    matrices = []
    try:
        for rows, columns in shapes:
            codes = np.zeros(rows * columns, dtype=np.int8)
            _transfer(codes, columns, statistics, read)
            matrices.append(codes.reshape(rows, columns))
    except AssertionError:  # so the library reports a stream that no encoder writes
        raise OuroborosError("not one stream of the range coder") from None
    check(decoder.maybe_exhausted(), "more data than codes")
    return matrices


_CODECS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "brotli": (_encode_brotli, _decode_brotli),
    "brotli-columns": (_encode_columns, _decode_columns),
    "range": (_encode_range, _decode_range),
}


class _Statistics:
    """What has been seen of the codes of one width, over all of their tensors."""

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self.codes = _bell_curves(bits).copy()
        """(L, A): counts of codes by expected magnitude."""
        self.levels = np.full((1, len(_LEVELS)), _START // len(_LEVELS), dtype=np.int64)
        """(1, L): counts of sent magnitudes."""


def _transfer(codes: np.ndarray, columns: int, statistics: _Statistics, transfer: Transfer) -> None:
    """Bring the codes of one tensor (R * C,) through ``transfer``, block by block, and learn from each."""
    width = max(columns, 1) if columns <= _WIDEST else _BLOCK
    span = width * -(-_SPAN // width)
    stride = span * max(1, _BLOCK // span)
    offset = 1 << (statistics.bits - 1)
    seen, weight = np.zeros(width, dtype=np.int64), 0
    for begin in range(0, len(codes), stride):
        block = codes[begin : begin + stride]
        starts = np.arange(0, len(block), span)
        lengths = np.diff(starts, append=len(block))
        totals = np.add.reduceat(np.abs(block.astype(np.int64)), starts)
        levels = np.searchsorted(_BETWEEN, totals * _UNIT // lengths).astype(np.int32)
        _coded(levels, np.zeros(len(levels), dtype=np.int64), statistics.levels, transfer)
        sizes = np.repeat(_LEVELS[levels], lengths)

        by_column = np.resize((seen + _TRUSTED * _UNIT) * _UNIT // (weight + _TRUSTED), len(block))
        contexts = np.searchsorted(_BETWEEN, sizes * by_column // _UNIT**2)
        symbols = block.astype(np.int32) + offset
        _coded(symbols, contexts, statistics.codes, transfer)
        block[:] = symbols - offset

        relative = np.abs(block.astype(np.int64)) * _UNIT**2 // sizes
        seen += np.pad(relative, (0, -len(block) % width)).reshape(-1, width).sum(0)
        weight += -(-len(block) // width)


def _coded(symbols: np.ndarray, contexts: np.ndarray, counts: np.ndarray, transfer: Transfer) -> None:
    """Bring ``symbols`` (n,) through ``transfer``, those of each context (n,) by its counts, which then learn them."""
    order = np.argsort(contexts, kind="stable")
    used, starts = np.unique(contexts[order], return_index=True)
    for context, places in zip(used, np.split(order, starts[1:])):
        row = counts[context]
        symbols[places] = found = transfer(symbols[places], _frequencies(row))
        row += _GAIN * np.bincount(found, minlength=len(row))
        if row.sum() > _MEMORY:
            row[:] = row + 1 >> 1


def _frequencies(counts: np.ndarray) -> np.ndarray:
    """Whole numbers (A,) above 0 that sum to 2^16, in the form that the coder takes: it computes with these exactly."""
    found = counts * (_TOTAL - len(counts)) // counts.sum() + 1
    found[counts.argmax()] += _TOTAL - found.sum()
    return found.astype(np.float64)


@functools.cache
def _bell_curves(bits: int) -> np.ndarray:
    """(L, A): counts to begin with, a normal distribution for each mean magnitude; decimal arithmetic, which is the
    same everywhere."""
    half, curves = 1 << (bits - 1), []
    with localcontext() as context:
        context.prec = 12
        for level in _LEVELS.tolist():
            factor = (Decimal(-(_UNIT**2)) / (Decimal("3.14159265359") * level * level)).exp()
            heights, step = [Decimal(1)], factor
            for _ in range(half):  # factor ** (code ** 2)
                heights.append(heights[-1] * step)
                step *= factor * factor
            both = [heights[abs(code)] for code in range(-half, half)]
            total = sum(both)
            curves.append([int(_START * height / total) + 1 for height in both])
    return np.array(curves, dtype=np.int64)

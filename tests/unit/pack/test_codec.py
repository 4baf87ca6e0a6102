"""Codes to bytes and back: exactly, whatever they are; deterministic; bounded; small."""

from __future__ import annotations

import hashlib

import brotli
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ouroboros.errors import OuroborosError
from ouroboros.pack import codec as own
from ouroboros.pack.codec import decode, encode, encode_best, expand, from_planes, planes, squeeze

EVERY = pytest.mark.parametrize("codec", ["brotli", "brotli-columns", "range"])


@st.composite
def some_matrices(draw: st.DrawFn) -> tuple[int, list[np.ndarray]]:
    """Up to four matrices of any shape, empty ones included, with codes of 2 to 8 bits."""
    bits = draw(st.integers(2, 8))
    limit = 2 ** (bits - 1)
    shape = st.tuples(st.integers(0, 9), st.one_of(st.integers(0, 20), st.integers(60, 300)))
    codes = st.one_of(st.integers(-limit, limit - 1), st.sampled_from([-limit, 0, limit - 1]))
    matrix = shape.flatmap(lambda s: arrays(np.int8, s, elements=codes, fill=st.just(draw(codes))))
    return bits, draw(st.lists(matrix, max_size=4))


def bells(bits: int, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Codes as weights have: normal, rows and columns of several sizes."""
    random = np.random.default_rng(seed)
    limit = 2 ** (bits - 1) - 1
    sizes = random.uniform(0.1, 0.4, (rows, 1)) * random.uniform(0.5, 1.5, columns)
    return np.clip(np.round(random.normal(size=(rows, columns)) * sizes * limit), -limit, limit).astype(np.int8)


def entropy(codes: np.ndarray) -> float:
    """Bits of all codes, each by how often it occurs among them."""
    counts = np.bincount(codes.reshape(-1).astype(int) + 128)
    counts = counts[counts > 0]
    return float((counts * np.log2(counts.sum() / counts)).sum())


@EVERY
@given(some=some_matrices())
def test_codes_come_back(codec: str, some: tuple[int, list[np.ndarray]]) -> None:
    bits, matrices = some
    data, sizes = encode(codec, matrices, bits)
    assert sum(sizes) == len(data) or not matrices
    back = decode(codec, data, [m.shape for m in matrices], bits)
    assert all(a.dtype == np.int8 and np.array_equal(a, b) for a, b in zip(matrices, back, strict=True))


@EVERY
@pytest.mark.parametrize("shape", [(1, 1), (1, 40_000), (40_000, 1), (3, 17_001), (5, 4096), (0, 7), (7, 0)])
@pytest.mark.parametrize("value", [-128, 0, 127, None])
def test_unusual_shapes_and_values_come_back(codec: str, shape: tuple[int, int], value: int | None) -> None:
    codes = bells(8, *shape) if value is None else np.full(shape, value, dtype=np.int8)
    data, _ = encode(codec, [codes, codes[:1]], 8)
    first, second = decode(codec, data, [codes.shape, codes[:1].shape], 8)
    assert np.array_equal(first, codes) and np.array_equal(second, codes[:1])


def alike(bits: int, rows: int, columns: int) -> np.ndarray:
    """A matrix with rows that repeat one of a few, but for single codes."""
    random = np.random.default_rng(3)
    codes = bells(bits, 7, columns)[random.integers(7, size=rows)]
    return np.where(random.random(codes.shape) < 0.02, bells(bits, rows, columns), codes)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("sample", [1 << 18, 1 << 13])
def test_each_matrix_gets_the_codec_that_makes_it_smallest(bits: int, sample: int, monkeypatch) -> None:
    monkeypatch.setattr(own, "_SAMPLE", sample)
    matrices = [bells(bits, 200, 300, 1), alike(bits, 200, 256), alike(bits, 200, 256).T, bells(bits, 64, 64, 2)]
    made = encode_best(matrices, bits)
    assert {part.codec: part.chosen for part in made} == {"brotli": [1], "brotli-columns": [2], "range": [0, 3]}
    for part in made:
        back = decode(part.codec, part.data, [matrices[n].shape for n in part.chosen], bits)
        assert all(np.array_equal(a, matrices[n]) for a, n in zip(back, part.chosen, strict=True))
        (first, *_), others = part.chosen, {"brotli", "brotli-columns", "range"} - {part.codec}
        assert all(part.sizes[0] < len(encode(other, [matrices[first]], bits)[0]) for other in others)
    assert encode_best([], bits) == []


def test_a_small_gain_is_not_worth_a_section() -> None:
    """These rows are smaller by brotli, but a section of its own would cost more than that."""
    codes = alike(6, 4, 128)
    sizes = {c: len(encode(c, [codes], 6)[0]) for c in ("brotli", "range")}
    assert sizes["range"] - 100 < sizes["brotli"] < sizes["range"]
    assert [part.codec for part in encode_best([codes], 6)] == ["range"]


def test_choosing_takes_no_longer_for_large_matrices(monkeypatch) -> None:
    """What the slow compressor is shown is a sample, whatever the shape; the rest is counted here."""
    shown = []
    monkeypatch.setattr(own, "_SAMPLE", 1000)
    monkeypatch.setattr(own, "squeeze", lambda parts: shown.extend(map(len, parts)) or squeeze(parts))
    for shape in ((1, 9000), (9000, 1), (3, 3000), (3000, 3), (95, 95)):
        shown.clear()
        assert own._smallest(np.resize(bells(4, 1, 97), shape), 9000) != "range"
        assert len(shown) == 2 and all(0 < length <= 2000 for length in shown)


@pytest.mark.parametrize("bits", [2, 4, 6, 8])
def test_the_range_coder_is_below_the_entropy_of_the_codes(bits: int) -> None:
    codes = bells(bits, 512, 384)
    data, _ = encode("range", [codes], bits)
    assert 8 * len(data) < entropy(codes)


def test_even_codes_without_structure_cost_their_entropy() -> None:
    codes = np.random.default_rng(0).integers(-32, 32, (512, 512)).astype(np.int8)
    assert 8 * len(encode("range", [codes], 6)[0]) < 1.005 * entropy(codes)


def test_bytes_are_the_same_everywhere() -> None:
    """The statistics are whole numbers; a change of these bytes is a change of the format."""
    data, _ = encode("range", [bells_of_integers(48, 96), bells_of_integers(5, 200)], 6)
    assert hashlib.sha256(data).hexdigest() == "b9da73b8dea08b4a5df5f9970d459feb98455df6961ea8869f2f0ce67359efb0"


def bells_of_integers(rows: int, columns: int) -> np.ndarray:
    """Codes that no arithmetic with fractions made."""
    state, found = 1, []
    for _ in range(rows * columns):
        total = 0
        for _ in range(4):
            state = state * 6364136223846793005 + 1442695040888963407 & (1 << 64) - 1
            total += (state >> 60) - 8
        found.append(max(-32, min(31, total)))
    return np.array(found, dtype=np.int8).reshape(rows, columns)


@EVERY
def test_other_bytes_are_refused_or_read_as_so_many_codes(codec: str) -> None:
    codes = bells(6, 20, 30)
    data, _ = encode(codec, [codes], 6)
    random = np.random.default_rng(1)
    for number in range(200):
        bad = bytearray(data)
        bad[random.integers(len(bad))] ^= random.integers(1, 256)
        bad = bytes(bad[: random.integers(len(bad))] if number % 2 else bad)
        try:
            (found,) = decode(codec, bad, [codes.shape], 6)
        except OuroborosError as error:
            assert "\n" not in str(error)
        else:
            assert found.shape == codes.shape and found.min() >= -32 and found.max() <= 31


@EVERY
def test_more_or_fewer_codes_than_expected_are_refused(codec: str) -> None:
    data, _ = encode(codec, [bells(6, 20, 300)], 6)
    for shape in ((20, 100), (1, 1)):
        with pytest.raises(OuroborosError):
            decode(codec, data, [shape], 6)
    with pytest.raises(OuroborosError, match="cut off|not one stream|in place of"):
        decode(codec, data[: len(data) // 2 - 1], [(20, 300)], 6)


def test_codes_out_of_range_and_unknown_codecs_are_refused() -> None:
    data, _ = encode("brotli", [np.full((2, 2), 5, dtype=np.int8)], 8)
    with pytest.raises(OuroborosError, match="codes that 3 bits cannot hold"):
        decode("brotli", data, [(2, 2)], 3)
    with pytest.raises(
        OuroborosError, match=r"unknown codec 'zstd' \(this version reads brotli, brotli-columns, range\)"
    ):
        decode("zstd", data, [(2, 2)], 8)


def test_a_stream_is_expanded_up_to_its_size_and_no_further() -> None:
    bomb = brotli.compress(bytes(50_000_000), quality=1)
    for most in (0, 1, 65_535, 65_536, 10_000_000):
        with pytest.raises(OuroborosError, match=f"more than the {most:,} bytes"):
            expand(bomb, most)
    assert expand(brotli.compress(b"abc"), 3) == b"abc"
    whole = brotli.compress(bytes(range(256)) * 300)
    for end in range(len(whole)):
        with pytest.raises(OuroborosError, match="cut off|not one stream"):
            expand(whole[:end], 256 * 300)
    for bad in (whole + b"\0", b"\xff" * 40):
        with pytest.raises(OuroborosError, match="not one stream"):
            expand(bad, 256 * 300)


@given(st.lists(st.binary(max_size=50), max_size=5))
def test_parts_are_squeezed_one_behind_the_other(some: list[bytes]) -> None:
    data, sizes = squeeze(some)
    assert expand(data, 250) == b"".join(some) and (sum(sizes) == len(data) or not some)


@pytest.mark.parametrize(("dtype", "count"), [(d, n) for d in ("i2", "i4", "i8", "f2") for n in (0, 1, 5)])
def test_numbers_become_planes_and_come_back(dtype: str, count: int) -> None:
    numbers = (np.arange(count) * 1000 - 1500).astype(dtype)
    data = planes(numbers)
    assert data[:count] == bytes(int(n) & 255 for n in numbers.view(f"u{numbers.itemsize}"))
    back = from_planes(data, np.dtype(dtype))
    assert back.dtype == numbers.dtype and np.array_equal(back, numbers)

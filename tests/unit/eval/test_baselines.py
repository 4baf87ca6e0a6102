"""N-grams against a direct computation, compressors against the standard library, and their refusals."""

from __future__ import annotations

import bz2
import lzma
import math
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ouroboros.errors import OuroborosError
from ouroboros.eval.baselines import NGram, compare_baselines, compressor, ngram
from ouroboros.eval.stats import ratio_interval

small_texts = st.lists(st.binary(max_size=12).map(lambda b: bytes(x % 3 + 97 for x in b)), max_size=5)


def direct(train: list[bytes], order: int, context: tuple[int, ...], symbol: int) -> float:
    """Witten-Bell by the recursion of its definition, with dictionaries."""
    p = 1 / 256
    for length in range(1, order + 2):
        counts: Counter[tuple[int, ...]] = Counter()
        for document in train:
            padded = [256] * order + list(document)
            for at in range(order, len(padded)):
                counts[tuple(padded[at - length + 1 : at + 1])] += 1
        h = context[len(context) - length + 1 :] if length > 1 else ()
        after = {gram[-1]: count for gram, count in counts.items() if gram[:-1] == h}
        if after:
            total, types = sum(after.values()), len(after)
            p = (after.get(symbol, 0) + types * p) / (total + types)
    return p


@settings(max_examples=40)
@given(small_texts, st.binary(min_size=1, max_size=6).map(lambda b: bytes(x % 4 + 97 for x in b)), st.integers(0, 3))
def test_probabilities_are_those_of_the_definition(train: list[bytes], text: bytes, order: int) -> None:
    found = np.exp(-NGram(train, order).nats([text]))
    padded = (256,) * order + tuple(text)
    expected = [direct(train, order, padded[at : at + order], text[at]) for at in range(len(text))]
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("order", [0, 1, 3, 6])
def test_probabilities_sum_to_one_in_every_context(order: int) -> None:
    model = NGram([b"abracadabra", b"cadabra", b""], order)
    for prefix in (b"", b"abra", b"abracad", b"zzzz"):
        last = [float(model.nats([prefix + bytes([value])])[-1]) for value in range(256)]
        assert sum(math.exp(-x) for x in last) == pytest.approx(1, abs=1e-12)


def test_no_training_text_is_uniform_and_documents_start_afresh() -> None:
    assert ngram([], [b"abc"], 3).bits_per_byte == pytest.approx(8)
    model = NGram([b"ab" * 50], 3)
    assert model.nats([b"aba", b"aba"])[3:] == pytest.approx(model.nats([b"aba"]))


def test_ngram_record_and_interval() -> None:
    train, held = [b"the cat sat on the mat. " * 30], [b"the mat sat on the cat. " * 400, b"", b"cat"]
    found = ngram(train, held, 3)
    assert (found.name, found.bytes, found.train_bytes) == ("order-3 n-gram", 9603, 720)
    bits = NGram(train, 3).nats(held) / math.log(2)
    sizes = [4800, 4800, 3]
    expected = ratio_interval([bits[:4800].sum(), bits[4800:9600].sum(), bits[9600:].sum()], sizes)
    assert found.bits_per_byte == pytest.approx(expected.mean) and found.bits_per_byte < 1
    assert found.stderr == pytest.approx(expected.stderr) and found.interval == pytest.approx(expected.bounds)
    assert set(found.to_dict()) == {"name", "bits_per_byte", "bytes", "train_bytes", "stderr", "interval", "detail"}


def prose(seed: int, size: int) -> bytes:
    chooser = random.Random(seed)
    words = [f"word{n * n % 997}" for n in range(300)]
    return " ".join(chooser.choice(words) for _ in range(size)).encode()


def test_xz_is_the_conditional_size() -> None:
    train, held = prose(0, 20_000), prose(1, 1500)
    found = compressor("xz", train, [held[:500], held[500:]])
    sizes = [len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) for data in (train + held, train)]
    assert found.bits_per_byte == pytest.approx(8 * (sizes[0] - sizes[1]) / len(held), abs=0.05)
    assert found.stderr is None and found.bytes == len(held) and found.train_bytes == len(train)
    assert found.bits_per_byte < compressor("xz", b"", [held]).bits_per_byte


def test_bz2_is_given_what_its_block_can_use() -> None:
    train, held = prose(0, 20_000), prose(1, 1500)
    expected = 8 * (len(bz2.compress(train + held)) - len(bz2.compress(train))) / len(held)
    assert compressor("bz2", train, [held]).bits_per_byte == pytest.approx(expected)
    # Text that only an earlier block holds cannot help; text at the end of training does.
    noise = random.Random(2).randbytes(900_000)
    lost = compressor("bz2", held + noise, [held]).bits_per_byte
    kept = compressor("bz2", noise[:500_000] + held, [held]).bits_per_byte
    assert kept < 0.7 * lost


def test_bz2_codes_every_piece_of_a_long_text() -> None:
    noise = random.Random(3).randbytes(500_000)
    assert compressor("bz2", b"", [noise]).bits_per_byte == pytest.approx(8, rel=0.02)


def test_compare_lists_both_amounts_of_training_text() -> None:
    train, held = [prose(0, 2000), prose(1, 2000)], [prose(2, 500)]
    names = ("order-4 n-gram", "bz2", "xz")
    found = compare_baselines(train, train[:1], held)
    assert [one.name for one in found] == [f"{name} ({given})" for given in ("seen", "all") for name in names]
    assert found[3].bits_per_byte < found[0].bits_per_byte
    for seen in (None, train):
        assert [one.name for one in compare_baselines(train, seen, held)] == [f"{name} (all)" for name in names]
    assert [one.name for one in compare_baselines(train, None, held, whole="head")] == [f"{n} (head)" for n in names]


def test_refusals() -> None:
    for call in (lambda: ngram([b"a"], [b""], 2), lambda: compressor("xz", b"a", [])):
        with pytest.raises(OuroborosError, match="no data"):
            call()


def test_shakespeare_against_published_figures(shared_data: Path) -> None:
    text = (shared_data / "text" / "tinyshakespeare.txt").read_bytes()
    cut = int(len(text) * 0.9)
    # Measured independently on this split.
    for order, figure in ((3, 2.559), (4, 2.408)):
        assert ngram([text[:cut]], [text[cut:]], order).bits_per_byte == pytest.approx(figure, abs=0.0015)

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ouroboros.data.published import (
    published_accepts,
    published_blocks,
    published_order,
    published_shares,
    published_starts,
    published_text,
)
from ouroboros.errors import OuroborosError


def test_a_row_that_no_rule_knows_becomes_its_repr() -> None:
    row = {"question": "What is 3+4?", "code": "def f():\n    return 7\n"}
    assert published_text(row) == str(row) + "\n<|endoftext|>\n"


def test_question_wins_over_query_and_text_is_appended() -> None:
    row = {"query": "Q2", "response": "R2", "answer": None, "question": "Q", "text": 5, "content": "C"}
    assert published_text(row) == "Q: Q\nA: None\n5\nC\n<|endoftext|>\n"


def test_filter_counts_ascii_letters_only() -> None:
    assert published_accepts("x" * 10_000)
    assert not published_accepts("x" * 10_001)
    assert not published_accepts("\u041f\u0440\u0438\u0432\u0435\u0442\u0441\u0442\u0432\u0443")


@given(st.integers(0, 500), st.integers(1, 64))
def test_blocks_by_the_formula(tokens: int, block: int) -> None:
    blocks = published_blocks(tokens, block)
    assert len(blocks) == max(math.ceil(tokens / block) - 1, 0)
    assert all(start + block < tokens for start in blocks)


def test_order_uses_the_numbers_of_the_random_module() -> None:
    random.seed(3)
    expected = [random.choices(range(2), weights=[0.3, 0.7], k=1)[0] for _ in range(50)]
    found = list(itertools.islice(published_order([0.3, 0.7], [2, 100], 3), 50))
    assert [source for source, _ in found] == expected
    assert [row for source, row in found if source == 0][:5] == [0, 1, 0, 1, 0]


def test_order_of_nothing_is_refused() -> None:
    with pytest.raises(OuroborosError, match="every source is empty"):
        next(published_order([1, 1], [0, 0], 0))


def test_shares_are_weight_times_acceptance_times_blocks() -> None:
    assert published_shares([2, 1], [0.5, 1.0], [3.0, 1.0]) == [0.75, 0.25]
    assert published_shares([0.4, 0.3], [1, 1], [0.0, 2.0]) == [0, 1]
    with pytest.raises(OuroborosError, match="no source yields a block"):
        published_shares([1], [0.0], [3.0])


def test_starts_are_uniform_below_a_bound_that_leaves_out_the_last_window() -> None:
    draws = np.concatenate(list(itertools.islice(published_starts(20, 8, 50, 3), 100)))
    assert draws.dtype == np.int64 and set(draws.tolist()) == set(range(20 - 8 - 1))
    assert np.bincount(draws).min() > 350
    again = next(published_starts(20, 8, 5000, 3))
    assert next(published_starts(20, 8, 5000, 4)).tolist() != again.tolist()
    assert next(published_starts(10, 8, 3, 0)).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((9, 8, 1, 0), "has 9 tokens; windows of 8 need at least 10"),
        ((9, 0, 1, 0), "sequence_length must be >= 1"),
        ((9, 2, 0, 0), "batch_size must be >= 1"),
    ],
)
def test_starts_of_nothing_are_refused(sizes: tuple[int, int, int, int], message: str) -> None:
    with pytest.raises(OuroborosError, match=message):
        published_starts(*sizes)

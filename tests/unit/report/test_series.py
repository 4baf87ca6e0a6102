from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ouroboros.report.series import at_steps, evenly, loop_series, points, smoothed, target_bits, thinned

numbers = st.lists(st.floats(-100, 100), min_size=1, max_size=50)


def test_points_takes_finite_pairs_of_one_kind() -> None:
    records = [
        {"kind": "train", "step": 1, "loss": 2.0},
        {"kind": "valid", "step": 1, "loss": 9.0},
        {"kind": "train", "step": 2, "loss": None},
        {"kind": "train", "step": 3},
        {"kind": "train", "step": 4, "loss": float("nan")},
        {"kind": "train", "step": 5, "loss": 1},
    ]
    assert points(records, "train", "step", "loss") == ([1.0, 5.0], [2.0, 1.0])


@given(numbers, st.floats(0.0, 100))
def test_smoothing_stays_within_the_values_seen(values: list[float], span: float) -> None:
    out = smoothed(values, span)
    assert len(out) == len(values)
    for i, mean in enumerate(out):
        assert min(values[: i + 1]) - 1e-9 <= mean <= max(values[: i + 1]) + 1e-9


def test_smoothing_is_the_corrected_average() -> None:
    assert smoothed([3.0, 3.0, 3.0], 5) == pytest.approx([3, 3, 3])
    # Two values: weights d(1-d) and (1-d), normalised.
    decay = 0.36787944117144233
    assert smoothed([0.0, 1.0], 1)[-1] == pytest.approx(1 / (1 + decay))
    assert smoothed([1.0, 5.0], 0) == pytest.approx([1, 5])


@given(st.integers(1, 1000), st.integers(2, 50))
def test_thinning_keeps_the_ends_and_the_order(length: int, limit: int) -> None:
    xs = [float(i) for i in range(length)]
    left, right = thinned(xs, xs, limit)
    assert left == right == sorted(set(left))
    assert len(left) == min(length, limit)
    assert left[0] == 0 and left[-1] == length - 1
    assert evenly(xs, limit) == left


def test_steps_are_placed_on_the_token_axis() -> None:
    records = [{"kind": "train", "step": s, "tokens": s * 100} for s in (10, 20, 30)]
    assert at_steps(records, [0, 5, 10, 15, 30, 40], "tokens") == [0, 500, 1000, 1500, 3000, 3000]
    assert at_steps([], [1], "tokens") == []


def test_loop_series_by_segment_and_loop() -> None:
    records = [
        {
            "kind": "telemetry",
            "step": 1,
            "loops": [{"segment": 1, "loop": 1, "cosine": 0.5}, {"segment": 1, "loop": 0}],
        },
        {"kind": "telemetry", "step": 2, "loops": [{"segment": 1, "loop": 1, "cosine": 0.4}]},
        {"kind": "telemetry", "step": 3, "loops": None},
        {"kind": "train", "step": 4},
    ]
    assert loop_series(records, "cosine") == {(1, 1): ([1.0, 2.0], [0.5, 0.4])}


def test_target_in_bits_per_byte_follows_the_validation_records() -> None:
    records = [{"kind": "valid", "step": s, "nats_per_token": 4.0 / s, "bits_per_byte": 2.0 / s} for s in (1, 2)]
    assert target_bits(records, 2.1) == pytest.approx(1.05)
    assert target_bits(records, None) is None
    assert target_bits([{"kind": "valid", "step": 1, "bits_per_byte": 2.0}], 2.1) is None
    assert target_bits([{"kind": "valid", "nats_per_token": 0.0, "bits_per_byte": 0.0}], 2.1) is None

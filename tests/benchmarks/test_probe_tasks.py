from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from probe_tasks import IGNORED, Batch, Copy, Needle, Probe, Recall

from ouroboros.errors import OuroborosError

SEEDS = st.one_of(st.integers(0, 2**40), st.tuples(st.integers(0, 9), st.integers(0, 9)))


@st.composite
def recalls(draw: st.DrawFn) -> Recall:
    pairs = draw(st.integers(1, 8))
    queries = draw(st.integers(1, pairs))
    length = 2 * (pairs + queries) + draw(st.integers(0, 20))
    keys, values = draw(st.integers(pairs, 12)), draw(st.integers(2, 9))
    return Recall(pairs=pairs, queries=queries, length=length, keys=keys, values=values)


@st.composite
def needles(draw: st.DrawFn) -> Needle:
    length = draw(st.integers(4, 40))
    distance = draw(st.one_of(st.none(), st.integers(2, length - 2)))
    return Needle(length=length, distance=distance, keys=draw(st.integers(1, 5)), values=draw(st.integers(2, 9)))


copies = st.builds(Copy, span=st.integers(1, 20), values=st.integers(2, 9))
probes = st.one_of(recalls(), copies, needles())


def well_formed(probe: Probe, batch: Batch, rows: int) -> None:
    for array in batch:
        assert array.shape == (rows, probe.length) and array.dtype == np.int64
    assert batch.inputs.min() >= 0 and batch.inputs.max() < probe.vocab_size
    is_answer = batch.labels != IGNORED
    assert is_answer.any(axis=1).all() and not is_answer[:, 0].any()
    assert np.array_equal(batch.labels[is_answer], batch.inputs[is_answer])
    assert batch.inputs[is_answer].max() < probe.values


@given(probes, st.integers(1, 5), SEEDS)
def test_labels_are_ids_at_answers_and_equal_seeds_give_equal_batches(probe: Probe, rows: int, seed: Any) -> None:
    batch, again = probe.sample(rows, seed), probe.sample(rows, seed)
    well_formed(probe, batch, rows)
    assert np.array_equal(batch.inputs, again.inputs) and np.array_equal(batch.labels, again.labels)


@pytest.mark.parametrize("probe", [Recall(), Copy(), Needle(), Needle(distance=100)])
def test_seeds_and_rows_differ(probe: Probe) -> None:
    first, second = probe.sample(4, 0).inputs, probe.sample(4, 1).inputs
    assert (first != second).any(axis=1).all()
    assert len({row.tobytes() for row in first}) == 4
    assert not np.array_equal(probe.sample(4, (3, 1)).inputs, probe.sample(4, (1, 3)).inputs)


@given(recalls(), SEEDS)
def test_recall_answers_follow_from_the_pairs_and_from_nothing_else(probe: Recall, seed: Any) -> None:
    batch = probe.sample(3, seed)
    head = 2 * probe.pairs
    for ids, labels in zip(batch.inputs.tolist(), batch.labels.tolist(), strict=True):
        keys, values = ids[0:head:2], ids[1:head:2]
        assert len(set(keys)) == probe.pairs and min(keys) >= probe.values > max(values)
        memory = dict(zip(keys, values, strict=True))
        places = [t for t, label in enumerate(labels) if label != IGNORED]
        assert len(places) == probe.queries and min(places) > head
        # Every query key occurs before, once, and is asked for once: no answer is given away by another.
        asked = [ids[t - 1] for t in places]
        assert [memory[key] for key in asked] == [labels[t] for t in places]
        counts = Counter(token for token in ids if token >= probe.values)
        assert counts == Counter(keys) + Counter(asked) and max(Counter(asked).values()) == 1


def test_recall_queries_lie_anywhere_in_any_order() -> None:
    probe = Recall(pairs=3, queries=2, length=6 + 2 * 2 + 3, keys=5, values=4)
    batch = probe.sample(20_000, 0)
    places = np.nonzero(batch.labels != IGNORED)[1].reshape(-1, 2)
    arrangements = Counter(map(tuple, places.tolist()))
    assert len(arrangements) == 10  # 2 queries among 5 units
    assert max(arrangements.values()) < 1.15 * min(arrangements.values())
    asked = np.take_along_axis(batch.inputs, places - 1, axis=1)
    orders = np.stack([np.argmax(batch.inputs[:, 0:6:2] == asked[:, [i]], axis=1) for i in range(2)], axis=1)
    found = Counter(map(tuple, orders.tolist()))
    assert len(found) == 6 and max(found.values()) < 1.15 * min(found.values())
    assert np.bincount(batch.inputs[:, 0] - 4).min() > 3_500


@given(copies, SEEDS)
def test_copy_is_the_string_again(probe: Copy, seed: Any) -> None:
    batch = probe.sample(2, seed)
    n = probe.span
    assert (batch.inputs[:, n] == probe.values).all() and (batch.inputs == probe.values).sum() == 2
    assert np.array_equal(batch.labels[:, n + 1 :], batch.inputs[:, :n])
    assert (batch.labels[:, : n + 1] == IGNORED).all()


@given(needles(), SEEDS)
def test_needle_has_one_pair_and_asks_at_the_end(probe: Needle, seed: Any) -> None:
    batch = probe.sample(3, seed)
    for ids, labels in zip(batch.inputs.tolist(), batch.labels.tolist(), strict=True):
        first, second = [t for t, token in enumerate(ids) if token >= probe.values]
        assert second == probe.length - 2 and ids[first] == ids[second] and first + 1 < second
        assert labels[:-1] == [IGNORED] * (probe.length - 1) and labels[-1] == ids[first + 1]
        distance = probe.length - 1 - (first + 1)
        assert 2 <= distance <= probe.length - 2 and probe.distance in (None, distance)


def test_needle_places_are_uniform() -> None:
    batch = Needle(length=12, keys=3, values=5).sample(9_000, 4)
    places = np.bincount(np.argmax(batch.inputs >= 5, axis=1))
    assert len(places) == 9 and places.min() > 880 and places.max() < 1120


def guesses(probe: Probe, batch: Batch, rng: np.random.Generator) -> tuple[float, float]:
    """Accuracy of any value, and of a value that is still to come, both at random."""
    right = [0, 0]
    count = 0
    for ids, labels in zip(batch.inputs.tolist(), batch.labels.tolist(), strict=True):
        if isinstance(probe, Recall):
            left = Counter(ids[1 : 2 * probe.pairs : 2])
        elif isinstance(probe, Copy):
            left = Counter(ids[: probe.span])
        else:
            left = Counter(token for token in ids[:-2] if token < probe.values)
        for label in (label for label in labels if label != IGNORED):
            right[0] += int(rng.integers(probe.values)) == label
            right[1] += int(rng.choice(list(left.elements()))) == label
            left[label] -= 1
            count += 1
    return right[0] / count, right[1] / count


@pytest.mark.parametrize(
    "probe",
    [Recall(pairs=4, queries=3, length=20, keys=6, values=5), Copy(span=4, values=5), Needle(length=9, values=5)],
)
def test_what_no_memory_and_no_binding_reach(probe: Probe) -> None:
    batch = probe.sample(3_000, 1)
    chance, unbound = guesses(probe, batch, np.random.default_rng(2))
    assert chance == pytest.approx(probe.chance, abs=0.025) == pytest.approx(0.2, abs=0.025)
    assert unbound == pytest.approx(probe.unbound, abs=0.025)
    assert probe.unbound > probe.chance


def test_the_loss_of_the_model_reads_the_labels_as_they_are() -> None:
    """A model that gives each answer at the position of its question has no loss."""
    torch = pytest.importorskip("torch")
    from transformers.loss.loss_utils import ForCausalLMLoss

    for probe in (Recall(), Copy(), Needle()):
        batch = probe.sample(2, 0)
        logits = torch.zeros(2, probe.length, probe.vocab_size)
        logits[:, :-1].scatter_(2, torch.from_numpy(batch.inputs[:, 1:, None]), 50.0)
        labels = torch.from_numpy(batch.labels)
        assert float(ForCausalLMLoss(logits, labels, probe.vocab_size)) == pytest.approx(0, abs=1e-6)
        late = logits.roll(1, dims=1)
        assert float(ForCausalLMLoss(late, labels, probe.vocab_size)) > 20


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (Recall, {"pairs": 0}, "recall: pairs must be >= 1, got 0"),
        (Recall, {"pairs": 65, "length": 999}, r"pairs must be <= keys \(64\)"),
        (Recall, {"queries": 9}, r"queries must be from 1 to pairs \(8\)"),
        (Recall, {"queries": 0}, "queries must be from 1"),
        (Recall, {"length": 31}, "8 pairs and 8 queries need a length of 32, got 31"),
        (Recall, {"values": 1}, "recall: values must be >= 2"),
        (Copy, {"span": 0}, "copy: span must be >= 1"),
        (Copy, {"values": 1}, "copy: values must be >= 2"),
        (Needle, {"length": 3}, "needle: length must be >= 4"),
        (Needle, {"keys": 0}, "needle: keys must be >= 1"),
        (Needle, {"values": 0}, "needle: values must be >= 2"),
        (Needle, {"length": 10, "distance": 9}, r"distance must be from 2 to length - 2 \(8\), got 9"),
        (Needle, {"distance": 1}, "distance must be from 2"),
    ],
)
def test_impossible_settings_are_named(make: Any, settings: dict[str, int], message: str) -> None:
    with pytest.raises(OuroborosError, match=message):
        make(**settings)


@settings(max_examples=5)
@given(probes)
def test_bad_batches_are_named(probe: Probe) -> None:
    with pytest.raises(OuroborosError, match="batch_size must be >= 1, got 0"):
        probe.sample(0, 0)
    for seed in (-1, (), (1, -2)):
        with pytest.raises(OuroborosError, match="seed must be a number >= 0 or several"):
            probe.sample(1, seed)

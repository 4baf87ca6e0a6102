from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ouroboros.config import DataSpec
from ouroboros.data.loader import WindowLoader, choose_source, seen_text, window_order
from ouroboros.data.prepared import PreparedData
from ouroboros.data.shards import prepare
from ouroboros.errors import OuroborosError

T = 16


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    """Three sources with 450, 225 and 45 training lines of 8 bytes."""
    path = tmp_path_factory.mktemp("data")
    sources = []
    for name, lines, weight in (("a", 500, 3), ("b", 250, 2), ("c", 50, 1)):
        (path / f"{name}.txt").write_text("".join(f"{name}{i:06d}\n" for i in range(lines)))
        sources.append(f"{path / name}.txt={weight}")
    return prepare(DataSpec(sources=tuple(sources)), path / "out")


def epochs(made: WindowLoader) -> list[float]:
    """How often each source has been read."""
    return [count / windows for count, windows in zip(made.state_dict()["counts"], made.windows, strict=True)]


def loader(prepared: PreparedData, batch_size: int = 8, **options: int) -> WindowLoader:
    return WindowLoader(prepared, **{"batch_size": batch_size, "sequence_length": T, "seed": 5, **options})


def test_batches_are_windows_of_the_stream(prepared: PreparedData) -> None:
    batch = loader(prepared).next_batch()
    assert batch.shape == (8, T + 1)
    assert batch.dtype == np.int64
    streams = [prepared.tokens("train", s) for s in range(3)]
    known = {tuple(s[w * T : w * T + T + 1].tolist()) for s in streams for w in range((len(s) - 1) // T)}
    known |= {tuple(s[-T - 1 :].tolist()) for s in streams}
    assert {tuple(row) for row in batch.tolist()} <= known


def test_every_token_is_a_target_in_every_epoch(tmp_path: Path) -> None:
    """Whatever is left after the last whole window, in each of two epochs; only overlapped tokens twice."""
    text = "".join(f"{n:07d}\n" for n in range(90))
    for extra in range(T):
        (tmp_path / f"{extra}.txt").write_text(text + "x" * extra)
        spec = DataSpec(sources=(str(tmp_path / f"{extra}.txt"),), valid_fraction=0, test_fraction=0)
        data = prepare(spec, tmp_path / f"out-{extra}")
        stream = np.array(data.tokens("train", 0)).tolist()
        made = loader(data, batch_size=1)
        for epoch in range(2):
            windows = [tuple(made.next_batch()[0].tolist()) for _ in range(made.windows[0])]
            assert epochs(made) == [epoch + 1] and len(set(windows)) == len(windows)
            *whole, last = [at for at in range(len(stream) - T) if tuple(stream[at : at + T + 1]) in windows]
            assert whole == list(range(0, T * len(whole), T)) and last == len(stream) - 1 - T
            assert last - whole[-1] <= T


@given(st.integers(0, 2**63), st.integers(0, 9), st.integers(0, 9), st.integers(1, 500))
def test_each_epoch_visits_each_window_once(seed: int, source: int, epoch: int, windows: int) -> None:
    assert sorted(window_order(seed, source, epoch, windows).tolist()) == list(range(windows))


def test_order_differs_by_seed_source_and_epoch() -> None:
    orders = {tuple(window_order(*key, 100).tolist()) for key in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))}
    assert len(orders) == 4


def test_order_is_the_documented_function() -> None:
    key = int.from_bytes(hashlib.sha256(b"7:1:2").digest()[:8], "little")

    def mix(window: int) -> int:
        mask = 2**64 - 1
        z = (key + (window + 1) * 0x9E3779B97F4A7C15) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    assert window_order(7, 1, 2, 50).tolist() == sorted(range(50), key=mix)
    assert window_order(0, 0, 0, 8).tolist() == [6, 7, 2, 0, 3, 1, 5, 4]


def test_epochs_wrap_and_repeat_nothing(prepared: PreparedData) -> None:
    made = loader(prepared, batch_size=1)
    rows: dict[str, list[bytes]] = {"a": [], "b": [], "c": []}
    while epochs(made)[2] < 3:
        row = made.next_batch()[0]
        data = bytes(row[row < 256].astype(np.uint8))
        rows["a" if b"a" in data else "b" if b"b" in data else "c"].append(data)
    windows = made.windows[2]
    passes = [rows["c"][i * windows : (i + 1) * windows] for i in range(3)]
    assert all(len(set(epoch)) == windows for epoch in passes)
    assert set(passes[0]) == set(passes[1]) == set(passes[2])
    assert passes[0] != passes[1]
    assert len(set(rows["b"][: made.windows[1]])) == min(len(rows["b"]), made.windows[1])


@given(st.lists(st.floats(1e-3, 1.0), min_size=1, max_size=8), st.integers(1, 300))
def test_mixture_is_always_within_one_sample(weights: list[float], samples: int) -> None:
    shares = [weight / sum(weights) for weight in weights]
    counts = [0] * len(shares)
    for drawn in range(1, samples + 1):
        counts[choose_source(shares, counts)] += 1
        assert all(abs(share * drawn - count) < 1 for share, count in zip(shares, counts))


def test_mixture_of_the_loader(prepared: PreparedData) -> None:
    made = loader(prepared, batch_size=6)
    for step in range(1, 20):
        made.next_batch()
        assert made.state_dict()["counts"] == [3 * step, 2 * step, step]


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_share_the_same_global_batches(prepared: PreparedData, world_size: int) -> None:
    alone = loader(prepared)
    ranks = [loader(prepared, rank=rank, world_size=world_size) for rank in range(world_size)]
    for _ in range(30):
        assert {rank.peek_hash() for rank in ranks} == {alone.peek_hash()}
        np.testing.assert_array_equal(np.concatenate([rank.next_batch() for rank in ranks]), alone.next_batch())


def test_batch_size_only_groups(prepared: PreparedData) -> None:
    small, large = loader(prepared, batch_size=4), loader(prepared, batch_size=12)
    rows = [row for _ in range(15) for row in small.next_batch().tolist()]
    assert rows == [row for _ in range(5) for row in large.next_batch().tolist()]


@settings(max_examples=20)
@given(st.integers(0, 40), st.integers(1, 10))
def test_restored_position_continues_exactly(prepared: PreparedData, before: int, after: int) -> None:
    straight = loader(prepared)
    for _ in range(before):
        straight.next_batch()
    state = json.loads(json.dumps(straight.state_dict()))
    peek = straight.peek_hash()
    resumed = loader(prepared)
    resumed.load_state_dict(state)
    assert resumed.state_dict()["samples"] == 8 * before
    assert resumed.peek_hash() == peek
    assert hashlib.sha256(straight.next_batch().astype("<i8").tobytes()).hexdigest() == peek
    resumed.next_batch()
    for _ in range(after):
        np.testing.assert_array_equal(resumed.next_batch(), straight.next_batch())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 6}, "saved with seed 6, not 5"),
        ({"sequence_length": 8}, "saved with sequence_length 8"),
        ({"fingerprint": "x"}, "saved with fingerprint"),
        ({"weights": [1.0]}, "saved with weights"),
        ({"samples": 9}, "do not fit samples 9"),
        ({"counts": [0, 0]}, "do not fit"),
        ({"counts": [-1, 1, 0]}, "do not fit"),
        ({"counts": None}, "lacks counts"),
    ],
)
def test_a_foreign_position_is_refused(prepared: PreparedData, change: dict, message: str) -> None:
    made = loader(prepared)
    state = {key: value for key, value in {**made.state_dict(), **change}.items() if value is not None}
    with pytest.raises(OuroborosError, match=message):
        made.load_state_dict(state)
    assert made.state_dict()["samples"] == 0


def test_a_source_shorter_than_a_window(prepared: PreparedData) -> None:
    tokens = len(prepared.tokens("train", 2))
    assert loader(prepared, sequence_length=tokens - 1).windows[2] == 1
    with pytest.raises(
        OuroborosError, match=rf"c\.txt': .* {tokens} tokens, but one window needs {tokens + 1}; set .*"
    ):
        loader(prepared, sequence_length=tokens)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 3, "world_size": 2}, r"batch_size \(3\) must be a positive multiple"),
        ({"batch_size": 0}, "must be a positive multiple"),
        ({"sequence_length": 0}, "sequence_length must be >= 1"),
    ],
)
def test_bad_sizes(prepared: PreparedData, options: dict, message: str) -> None:
    with pytest.raises(OuroborosError, match=message):
        loader(prepared, **options)


def test_bundled_text(tmp_path: Path) -> None:
    prepared = prepare(DataSpec(), tmp_path / "out")
    assert (
        0.8
        < prepared.count("train", "bytes") / sum(prepared.count(s, "bytes") for s in ("train", "valid", "test"))
        < 0.97
    )
    batch = loader(prepared, sequence_length=512).next_batch()
    assert batch.shape == (8, 513)
    assert b"def " in prepared.tokenizer.decode(batch)


def two_sources(folder: Path) -> PreparedData:
    for name in ("a", "b"):
        (folder / f"{name}.txt").write_text("".join(f"{name} line {n} of many\n" for n in range(400)))
    return prepare(DataSpec(sources=(str(folder / "a.txt"), f"{folder / 'b.txt'}=3")), folder / "data")


@pytest.mark.parametrize("steps", [1, 5])
def test_the_text_seen_is_the_text_of_the_windows_drawn(steps, tmp_path):
    data = two_sources(tmp_path)
    loader = WindowLoader(data, batch_size=4, sequence_length=32, seed=3)
    windows = [row for _ in range(steps) for row in loader.next_batch()]
    seen = seen_text(data, loader.state_dict())
    assert seen is not None and len(seen) == 4 * steps
    assert sorted(seen) == sorted(data.tokenizer.decode(row[:-1]) for row in windows)


def test_an_epoch_of_every_source_has_seen_everything(tmp_path):
    data = two_sources(tmp_path)
    loader = WindowLoader(data, batch_size=4, sequence_length=32, seed=3)
    while min(epochs(loader)) < 1:
        assert seen_text(data, loader.state_dict()) is not None
        loader.next_batch()
    assert seen_text(data, loader.state_dict()) is None


def test_the_end_of_a_text_is_seen_once_though_its_windows_overlap(tmp_path):
    data = two_sources(tmp_path)
    loader = WindowLoader(data, batch_size=4, sequence_length=97, seed=3)
    streams = [data.tokens("train", source) for source in range(2)]
    assert all((len(stream) - 1) % 97 for stream in streams)
    while epochs(loader)[1] < 1:
        loader.next_batch()
    seen = seen_text(data, loader.state_dict())
    assert seen is not None and epochs(loader)[0] < 1
    # Of the last window too, inputs are counted, not targets.
    assert b"".join(seen).endswith(data.tokenizer.decode(streams[1][:-1]))
    total = sum(map(len, seen[-loader.windows[1] :]))
    assert total == len(data.tokenizer.decode(streams[1][:-1]))

"""Streams: nothing lost, nothing twice, and the same batches after every interruption."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ouroboros.config import DataSpec, FilterSpec
from ouroboros.data import stream
from ouroboros.data.loader import WindowLoader, seen_text
from ouroboros.data.records import Document
from ouroboros.data.shards import prepare
from ouroboros.data.sources import SourceRef
from ouroboros.data.splits import part_of
from ouroboros.data.stream import BLOCK_BYTES, StreamLoader, open_loader
from ouroboros.data.textfile import StreamError
from ouroboros.data.tokenize import byte_tokenizer, train_bpe
from ouroboros.errors import OuroborosError

T = 8
EOS = 256


class Reader:
    """Stands for the reader of sources: documents in memory (None: one that a filter drops), failures on demand.

    ``failures[name]`` is the record before which each further reading of that source fails, None where it does not.
    """

    def __init__(self, **sources: Sequence[bytes | None]) -> None:
        self.sources = sources
        self.failures: dict[str, list[int | None]] = {}
        self.starts: list[tuple[str, int]] = []

    def __call__(self, ref: SourceRef, spec: DataSpec, *, start: int, anchor: None) -> Iterator[Document]:
        self.starts.append((ref.text, start))
        plan = self.failures.get(ref.text, [])
        fails = plan.pop(0) if plan else None
        for index, data in enumerate(self.sources[ref.text]):
            if fails is not None and index >= max(fails, start):
                raise ConnectionError("the line is dead\nmore words")
            if index < start:
                continue
            yield Document(f"{ref.text}:{index + 1}", data or b"", index, dropped="short" if data is None else None)


def make(monkeypatch: pytest.MonkeyPatch, reader: Reader, **options: Any) -> StreamLoader:
    """A loader over a stand-in; every document is training text unless ``valid_fraction`` says otherwise."""
    monkeypatch.setattr(stream, "judged_documents", reader)
    weights = options.pop("weights", [1.0] * len(reader.sources))
    share = options.pop("valid_fraction", 0.0)
    spec = DataSpec(sources=tuple(reader.sources), stream=True, valid_fraction=share, test_fraction=0)
    prepared: Any = SimpleNamespace(
        spec=spec,
        reading_spec=spec,
        sources=tuple(SourceRef(name, weight) for name, weight in zip(reader.sources, weights, strict=True)),
        weights=tuple(weights),
        tokenizer=options.pop("tokenizer", byte_tokenizer()),
        documents={"valid": options.pop("held", []), "test": []}.__getitem__,
    )
    return StreamLoader(prepared, **{"batch_size": 4, "sequence_length": T, "seed": 5, **options})


def epochs(made: StreamLoader) -> list[int]:
    """How often each source has been read."""
    return [source["epoch"] for source in made.sources()]


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What would have been waited, in seconds."""
    waited: list[float] = []
    monkeypatch.setattr(stream, "sleep", waited.append)
    return waited


@pytest.fixture
def loader(monkeypatch: pytest.MonkeyPatch) -> Callable[..., StreamLoader]:
    return lambda reader, **options: make(monkeypatch, reader, **options)


def ids(documents: Sequence[bytes | None]) -> list[int]:
    return [i for data in documents if data is not None for i in (EOS, *data)]


DOCUMENTS = [b"a", b"bcd", None, b"", b"long enough for several windows of eight tokens", b"xy", None]


@pytest.mark.parametrize("documents", [DOCUMENTS, [b"a"], [b"1234567"], [b"12345678"], [b"x" * 3 * BLOCK_BYTES, b"y"]])
def test_every_token_is_a_target_once_in_every_pass(loader, documents):
    made = loader(Reader(s=documents), batch_size=2)
    whole = ids(documents)
    steps = 4 + len(whole) // T
    found = np.concatenate([made.next_batch() for _ in range(steps)])
    expected = (whole * (2 + 2 * steps * T // len(whole)))[: 2 * steps * T + 1]
    assert found[0, 0] == EOS and found[:, 1:].flatten().tolist() == expected[1:]
    assert found[1:, 0].tolist() == found[:-1, -1].tolist()
    assert found.dtype == np.int64 and made.state_dict()["samples"] == 2 * steps
    assert epochs(made) == [2 * steps * T // len(whole)]


def test_a_source_that_ends_in_the_middle_of_a_batch_begins_again(loader):
    made = loader(Reader(s=[b"abc", b"defg"]))
    batch = made.next_batch()[:, :-1]
    assert bytes(batch[batch < 256].astype(np.uint8)).startswith(b"abcdefgabc") and epochs(made) == [3]


lengths = st.lists(st.one_of(st.none(), st.integers(0, 30)), min_size=1, max_size=9).filter(
    lambda drawn: any(length is not None for length in drawn)
)


@st.composite
def readings(draw: st.DrawFn) -> tuple[dict[str, list[bytes | None]], list[float], dict[str, list[int | None]]]:
    sources: dict[str, list[bytes | None]] = {}
    failures: dict[str, list[int | None]] = {}
    for name in "abc"[: draw(st.integers(1, 3))]:
        sizes = draw(lengths)
        sources[name] = [None if size is None else bytes(range(size)) + name.encode() for size in sizes]
        plan = st.lists(st.one_of(st.none(), st.integers(0, len(sizes))), max_size=4)
        failures[name] = [None, *draw(plan)]
    return sources, draw(st.lists(st.floats(0.1, 1), min_size=len(sources), max_size=len(sources))), failures


@settings(max_examples=60)
@given(readings(), st.integers(0, 12), st.integers(1, 8), st.booleans())
def test_restored_positions_continue_exactly(drawn, before, after, looked):
    """Random documents, sources and failures: what was read ahead, dropped or broken leaves no trace in the batches."""
    sources, weights, failures = drawn
    with pytest.MonkeyPatch.context() as patch:
        whole = make(patch, Reader(**sources), weights=weights)
        expected = [whole.next_batch() for _ in range(before + after)]
        reader = Reader(**sources)
        reader.failures = failures
        first = make(patch, reader, weights=weights)
        for batch in expected[:before]:
            np.testing.assert_array_equal(first.next_batch(), batch)
        if looked:
            first.peek_hash()
        state = json.loads(json.dumps(first.state_dict()))
        for plan in failures.values():
            plan.insert(0, None)  # at the start, a failure is an error
        second = make(patch, reader, weights=weights)
        second.load_state_dict(state)
        assert second.state_dict() == state and second.state_dict()["samples"] == 4 * before
        for batch in expected[before:]:
            digest = hashlib.sha256(batch.astype("<i8").tobytes()).hexdigest()
            assert second.peek_hash() == digest
            np.testing.assert_array_equal(second.next_batch(), batch)
        ends = [loader.state_dict()["positions"] for loader in (whole, second)]
        for position in (*ends[0], *ends[1]):
            position.pop("restarts")
        assert ends[0] == ends[1]  # the counts too


def test_restored_positions_with_merged_tokens(loader):
    documents = [f"record {n} says {n * n} again and again\n".encode() * (n % 5 + 1) for n in range(40)]
    tokenizer = train_bpe(documents, 300)
    first = loader(Reader(s=documents), tokenizer=tokenizer)
    for _ in range(7):
        first.next_batch()
    second = loader(Reader(s=documents), tokenizer=tokenizer)
    second.load_state_dict(first.state_dict())
    for _ in range(30):
        np.testing.assert_array_equal(second.next_batch(), first.next_batch())


def test_a_restored_loader_reads_from_the_document_it_stopped_in(loader):
    reader = Reader(s=[bytes([n]) * 9 for n in range(90)])
    first = loader(reader)
    for _ in range(10):
        first.next_batch()
    assert first.sources()[0]["record"] == 32 and first.sources()[0]["offset"] == 0
    assert first.sources()[0]["counts"] == {"read": 32, "kept": 32}
    second = loader(reader)
    second.load_state_dict(first.state_dict())
    reader.starts.clear()
    second.next_batch()
    assert reader.starts[0] == ("s", 32)


def test_looking_ahead_changes_nothing(loader):
    looked, plain = (loader(Reader(a=DOCUMENTS, b=[b"other"])) for _ in range(2))
    for _ in range(9):
        assert looked.peek_hash() == looked.peek_hash()
        np.testing.assert_array_equal(looked.next_batch(), plain.next_batch())
    assert looked.state_dict() == plain.state_dict()


def test_weights_are_shares_of_tokens(loader):
    made = loader(Reader(a=[b"a" * 200], b=[b"b"]), weights=[3.0, 1.0])
    for step in range(1, 9):
        batch = made.next_batch()
        assert made.state_dict()["counts"] == [3 * step, step]
        assert [97 in row for row in batch].count(True) == 3


def test_batch_size_only_groups(loader):
    small, large = (loader(Reader(a=DOCUMENTS, b=[b"other"]), batch_size=size) for size in (2, 6))
    rows = [row for _ in range(12) for row in small.next_batch().tolist()]
    assert rows == [row for _ in range(4) for row in large.next_batch().tolist()]


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_share_the_same_global_batches(loader, world_size):
    alone = loader(Reader(a=DOCUMENTS, b=[b"other"]))
    ranks = [loader(Reader(a=DOCUMENTS, b=[b"other"]), rank=rank, world_size=world_size) for rank in range(world_size)]
    for _ in range(12):
        assert {rank.peek_hash() for rank in ranks} == {alone.peek_hash()}
        np.testing.assert_array_equal(np.concatenate([rank.next_batch() for rank in ranks]), alone.next_batch())
    assert all(rank.state_dict() == alone.state_dict() for rank in ranks)


def test_a_source_that_breaks_is_opened_again_at_its_record(loader, waits, caplog):
    reader, whole = Reader(s=DOCUMENTS), loader(Reader(s=DOCUMENTS))
    expected = [whole.next_batch() for _ in range(6)]
    reader.failures["s"] = [4, 4, None, 1]
    made = loader(reader)
    with caplog.at_level(logging.WARNING):
        for batch in expected:
            np.testing.assert_array_equal(made.next_batch(), batch)
    assert reader.starts[:4] == [("s", 0), ("s", 4), ("s", 4), ("s", 0)] and waits[:3] == [0.5, 1.0, 0.5]
    assert "source 's': reading record 5 failed (ConnectionError: the line is dead)" in caplog.text
    found, wanted = made.sources()[0], whole.sources()[0]
    assert found.pop("restarts") == len(waits) == 3 and wanted.pop("restarts") == 0
    assert found == wanted  # a dropped document that was passed twice is counted once
    resumed = loader(reader)
    resumed.load_state_dict(made.state_dict())
    assert resumed.sources()[0]["restarts"] == 3


def test_a_source_that_breaks_for_ever_is_an_error(loader, waits):
    reader = Reader(s=[b"one", b"two", b"three"])
    reader.failures["s"] = [2] * 9
    made = loader(reader)
    with pytest.raises(OuroborosError, match=r"source 's': reading record 3 failed 8 times in a row: ConnectionError:"):
        made.next_batch()
    assert waits == [0.5, 1, 2, 4, 8, 16, 32] and made.state_dict()["samples"] == 0
    reader.failures["s"] = []
    whole = loader(Reader(s=reader.sources["s"]))
    for _ in range(5):  # the line is mended, and nothing that was read is lost
        np.testing.assert_array_equal(made.next_batch(), whole.next_batch())


def test_a_document_between_failures_forgives_them(loader, waits):
    reader = Reader(s=[bytes([n]) * 3 for n in range(20)])
    reader.failures["s"] = [record for record in range(1, 13) for _ in range(4)]
    loader(reader).next_batch()
    assert len(waits) > 20 and set(waits) == {0.5, 1.0, 2.0, 4.0}


@pytest.mark.parametrize("start", [0, 3])
def test_a_source_that_cannot_be_opened_is_an_error_at_once(loader, waits, start):
    reader = Reader(a=[b"x"], s=[b"one", b"two", b"three"] * 9)
    made = loader(reader)
    for _ in range(start):
        made.next_batch()
    state = made.state_dict()
    reader.failures["s"] = [0]
    again = loader(reader)
    again.load_state_dict(state)
    with pytest.raises(OuroborosError, match="source 's': cannot be opened: ConnectionError: the line is dead$"):
        again.next_batch()
    assert waits == [] and again.state_dict()["samples"] == 4 * start


@pytest.mark.parametrize("documents", [[], [None, None]])
def test_a_source_without_a_document_is_an_error(loader, documents):
    with pytest.raises(OuroborosError, match="source 's': a whole pass gave no training document; .* held out"):
        loader(Reader(a=[b"x"], s=documents)).next_batch()


def held_out(fraction: float) -> list[bytes]:
    documents = [f"document {n}".encode() for n in range(200)]
    return [data for data in documents if part_of(Document("", data), fraction, 0) != "train"]


def test_a_source_whose_documents_are_all_held_out_is_an_error(loader):
    with pytest.raises(OuroborosError, match="source 's': a whole pass gave no training document"):
        loader(Reader(s=held_out(0.4)), valid_fraction=0.4).next_batch()


def test_held_out_documents_are_never_read_to_the_model(loader):
    hidden = held_out(0.2)
    made = loader(Reader(s=[f"document {n}".encode() for n in range(200)]), valid_fraction=0.2)
    text = b""
    while not epochs(made)[0]:
        batch = made.next_batch()
        text += bytes(np.where(batch < 256, batch, 10)[:, 1:].astype(np.uint8).tobytes())
    assert 20 < len(hidden) < 60
    read = set(text.split(b"\n"))
    assert not read & set(hidden) and len(read) > 140
    assert made.sources()[0]["counts"]["held out"] >= len(hidden)


def test_a_copy_of_a_held_out_text_is_not_read_either(loader):
    batch = loader(Reader(s=[b"secret", b"open"]), held=[b"secret"]).next_batch()
    assert set(batch.flatten().tolist()) == {EOS, *b"open"}


def test_a_document_that_the_tokenizer_refuses_is_named(loader):
    tokenizer = train_bpe([b"some text"], 260)
    with pytest.raises(OuroborosError, match=r"source 's': s:2: invalid UTF-8 at byte 1"):
        loader(Reader(s=[b"fine", b"x\xff"]), tokenizer=tokenizer).next_batch()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 6}, "saved with seed 6, not 5"),
        ({"sequence_length": 9}, "saved with sequence_length 9"),
        ({"weights": [1.0]}, "saved with weights"),
        ({"tokenizer": "x"}, "saved with tokenizer 'x'"),
        ({"sources": ["a", "c"]}, "saved with sources"),
        ({"text_field": "body"}, "saved with text_field 'body'"),
        ({"filters": {}}, "saved with filters"),
        ({"held_out": [0.1, 0.0]}, "saved with held_out"),
        ({"samples": 9}, "do not fit samples 9"),
        ({"positions": None}, "lacks positions; it is of stored data"),
        ({"counts": None}, "lacks counts"),
    ],
)
def test_a_foreign_position_is_refused(loader, change, message):
    made = loader(Reader(a=[b"x"], b=[b"y"]))
    state = {key: value for key, value in {**made.state_dict(), **change}.items() if value is not None}
    with pytest.raises(OuroborosError, match=message):
        made.load_state_dict(state)
    made.next_batch()
    assert made.state_dict()["samples"] == 4


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([b"0123456789"] * 3, r"source 's': record 7 is not there any more; the source has changed"),
        ([b"0123456789"] * 6 + [None] + [b"0123456789"] * 9, r"record 7 is not there any more"),
        ([b"0123456789"] * 6 + [b"0"] * 9, r"source 's': s:7: has fewer tokens than were used of it"),
    ],
)
def test_a_source_that_has_changed_is_refused(loader, documents, message):
    made = loader(Reader(s=[b"0123456789"] * 20))
    for _ in range(2):
        made.next_batch()
    place = made.sources()[0]
    made.next_batch()
    state = made.state_dict()
    assert place["record"] < 6
    state["positions"][0] |= {"record": 6, "offset": 4}
    made = loader(Reader(s=documents))
    made.load_state_dict(state)
    with pytest.raises(OuroborosError, match=message):
        made.next_batch()


def lines(path: Path, count: int = 300) -> Path:
    rows = [{"text": f"Record {n} of the stream: {n} times {n} is {n * n}."} for n in range(count)]
    if path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=64)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_files_of_both_kinds_give_the_same_batches_and_resume(tmp_path):
    pytest.importorskip("pyarrow.parquet")
    loaders = []
    for kind in ("jsonl", "parquet"):
        spec = DataSpec(
            sources=(str(lines(tmp_path / f"r.{kind}")),),
            stream=True,
            max_bytes=4000,
            filters=FilterSpec(min_characters=42),
        )
        data = prepare(spec, tmp_path / kind)
        loaders.append(open_loader(data, batch_size=4, sequence_length=32, seed=0))
        assert isinstance(loaders[-1], StreamLoader)
    for step in range(250):
        batches = [loader.next_batch() for loader in loaders]
        np.testing.assert_array_equal(*batches)
        if step % 25 == 0:
            resumed = open_loader(data, batch_size=4, sequence_length=32, seed=0)
            resumed.load_state_dict(json.loads(json.dumps(loaders[1].state_dict())))
            assert resumed.peek_hash() == loaders[0].peek_hash()
    assert epochs(loaders[0])[0] >= 2
    counts = loaders[0].sources()[0]["counts"]
    assert counts["short"] >= 20 and counts["held out"] >= 40 and counts["read"] == counts["kept"] + counts["short"]


def test_the_prepared_text_that_a_stream_has_seen(tmp_path):
    data = prepare(DataSpec(sources=(str(lines(tmp_path / "r.jsonl")),), stream=True, max_bytes=4000), tmp_path / "out")
    head = data.documents("train")
    loader = open_loader(data, batch_size=1, sequence_length=100, seed=0)
    assert seen_text(data, loader.state_dict()) == []
    text = b""
    for _ in range(5):
        text += data.tokenizer.decode(loader.next_batch()[0, :-1])
    seen = seen_text(data, loader.state_dict())
    assert seen is not None and seen == head[: len(seen)]
    assert b"".join(seen).startswith(text) and len(b"".join(seen)) - len(text) <= len(seen[-1])
    for _ in range(80):
        loader.next_batch()
    assert seen_text(data, loader.state_dict()) is None  # all that was kept of it


def test_stored_data_has_the_loader_of_windows(tmp_path):
    data = prepare(DataSpec(sources=(str(lines(tmp_path / "r.jsonl")),)), tmp_path / "out")
    assert isinstance(open_loader(data, batch_size=2, sequence_length=32, seed=0), WindowLoader)


def test_what_will_fail_again_fails_at_once(loader, waits, monkeypatch):
    """A record that cannot be read is no failing line."""

    def broken(ref, spec, *, start, anchor):
        for index in range(start, 5):
            yield Document(f"s:{index + 1}", b"text", index)
        raise OuroborosError("s:6: not JSON")

    made = loader(Reader(s=[]))
    monkeypatch.setattr(stream, "judged_documents", broken)
    with pytest.raises(OuroborosError, match="^s:6: not JSON$"):
        made.next_batch()
    with pytest.raises(OuroborosError, match="^s:6: not JSON$"):
        made.look_ahead()
    assert waits == [] and made.state_dict()["samples"] == 0


class Odd(Exception):
    """Of a library."""


@pytest.mark.parametrize("error", [Odd("the same"), StreamError("cut off"), OSError(5, "input/output error")])
def test_errors_of_a_line_are_tried_again(loader, waits, monkeypatch, error):
    def broken(ref, spec, *, start, anchor):
        if start == 0:
            yield Document("s:1", b"text", 0)
        raise error

    made = loader(Reader(s=[]))
    monkeypatch.setattr(stream, "judged_documents", broken)
    with pytest.raises(OuroborosError, match=f"reading record 2 failed 8 times in a row: .*{str(error)[-5:]}"):
        made.next_batch()
    assert len(waits) == 7


def test_looking_ahead_leaves_nothing_to_fail(loader, monkeypatch):
    reader = Reader(a=DOCUMENTS, b=[b"other"])
    made, plain = loader(reader), loader(reader)
    for _ in range(5):
        made.look_ahead()
        with monkeypatch.context() as patch:
            patch.setattr(stream, "judged_documents", None)
            batch = made.next_batch()
        np.testing.assert_array_equal(batch, plain.next_batch())

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from ouroboros.config import DataSpec, FilterSpec
from ouroboros.data import documents as reading
from ouroboros.data import records
from ouroboros.data.documents import judged_documents, read_documents
from ouroboros.data.formats import TextFormat, find_format
from ouroboros.data.records import Document, document_of, read_rows
from ouroboros.data.shards import prepare
from ouroboros.data.sources import parse_source
from ouroboros.data.stream import StreamLoader, open_loader
from ouroboros.data.textfile import StreamError
from ouroboros.errors import OuroborosError

ROWS = [{"text": "one\r\n", "id": 1}, {"text": "", "id": 2}, {"text": "tw\u00f6", "id": 3}]
EXPECTED = [b"one\r\n", None, "tw\u00f6".encode()]
TEXT = TextFormat("data.text_field", "{text}")


def read_records(path: Path, form: TextFormat, leave_out: bool = False) -> Iterator[Document]:
    return (document_of(row, path.name, form, leave_out) for row in read_rows(path, form))


def epochs(made: StreamLoader) -> list[int]:
    """How often each source has been read."""
    return [source["epoch"] for source in made.sources()]


def write(path: Path, rows: list[dict]) -> Path:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    else:
        path.write_text("\n\n".join(json.dumps(row) for row in rows))
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_text_of_each_record(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"a{suffix}", ROWS)
    assert texts(path) == EXPECTED


def test_lines_in_a_json_file_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n{"text": "b"}\r\n')
    assert list(read_records(path, TEXT)) == [Document("a.json:1", b"a"), Document("a.json:2", b"b")]


@pytest.mark.parametrize(
    ("suffix", "place"),
    [(".jsonl", r"a\.jsonl:1"), (".json", r"a\.json: record 1"), (".parquet", r"a\.parquet: row 1")],
)
def test_missing_field_offers_the_nearest(tmp_path: Path, suffix: str, place: str) -> None:
    path = write(tmp_path / f"a{suffix}", [{"texts": "x"}])
    with pytest.raises(OuroborosError, match=rf"{place}: no column 'text' .*did you mean 'texts'"):
        list(read_records(path, TEXT))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{bad", "not JSON"),
        ("[1]", "expected an object"),
        ('{"text": 5}', "holds int, not text"),
        ('{"text": "a\\ud800"}', "unpaired surrogate at character 1"),
        ('{"id": 5}', "no column 'text'"),
    ],
)
def test_bad_records_name_the_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n\n' + line + "\n")
    with pytest.raises(OuroborosError, match=rf"a\.jsonl:3: .*{message}"):
        list(read_records(path, TEXT))


def test_invalid_utf8_in_a_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "\xff"}')
    with pytest.raises(OuroborosError, match=r"a\.jsonl:1: not JSON"):
        list(read_records(path, TEXT))


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_nulls_and_white_space_are_no_text(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"a{suffix}", [{"text": "x"}, {"text": " \n"}, {"text": None}])
    assert texts(path) == [b"x", None, None]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_formats_and_groups(tmp_path: Path, suffix: str) -> None:
    rows = [
        {"query": "q", "response": "r", "type": "t", "original_question": "o"},
        {"query": "q2", "response": None, "type": "t", "original_question": "o"},
        {"query": "q3", "response": "r3", "type": "t", "original_question": None},
    ]
    found = list(read_records(write(tmp_path / f"a{suffix}", rows), find_format("metamath")))
    assert [(record.data, record.group) for record in found] == [
        (b"Q: q\nA: r", b"o"),
        (b"Q: q2\nA: ", b"o"),
        (b"Q: q3\nA: r3", None),
    ]
    with pytest.raises(OuroborosError, match=rf"a\{suffix}.*: no column 'answer' \(format '{{title}}: {{answer}}'\)"):
        path = write(tmp_path / f"a{suffix}", [{"title": "x", "body": "y"}])
        list(read_records(path, find_format("{title}: {answer}")))


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize("start", [0, 1, 6, 7, 13])
def test_passing_over(tmp_path: Path, suffix: str, start: int) -> None:
    for name in "ab":
        write(tmp_path / f"{name}{suffix}", [{"text": f"{name}{i}"} for i in range(7)])
    ref, spec = parse_source(f"*{suffix}", base=tmp_path), DataSpec()
    everything = list(judged_documents(ref, spec))
    assert [record.data for record in everything] == [f"{name}{i}".encode() for name in "ab" for i in range(7)]
    assert list(judged_documents(ref, spec, start=start)) == everything[start:]


def test_lines_that_are_passed_over_are_not_parsed(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{bad\n\n{"text": "x"}\n')
    assert [record.name for record in judged_documents(parse_source(str(path)), DataSpec(), start=1)] == ["a.jsonl:3"]


def test_damaged_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 nothing")
    with pytest.raises(OuroborosError, match="not a readable parquet file"):
        list(read_records(path, TEXT))


def test_missing_file_of_records(tmp_path: Path) -> None:
    with pytest.raises(OuroborosError, match="cannot be read"):
        list(read_records(tmp_path / "a.jsonl", TEXT))


def texts(path: Path, form: TextFormat = TEXT) -> list[bytes | None]:
    """The text of each record, None where it has none."""
    return [None if record.dropped else record.data for record in read_records(path, form)]


def hub(spec: DataSpec, text: str = "hf:me/set:small:test") -> list[tuple[str, bytes]]:
    return [(document.name, document.data) for document in read_documents(parse_source(text), spec)]


def test_hub_stream_stops_at_max_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []

    def load(*args: object, **kwargs: object) -> list[dict]:
        seen.append((args, kwargs))
        return [{"text": "abc"}, {"text": ""}, {"text": "defg"}, {"text": 1}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert hub(DataSpec(max_bytes=5)) == [("me/set:1", b"abc"), ("me/set:3", b"de")]
    assert seen == [(("me/set", "small"), {"split": "test", "streaming": True})]
    hub(DataSpec(max_bytes=1), "hf:me/set")
    assert seen[1] == (("me/set", None), {"split": "train", "streaming": True})
    with pytest.raises(OuroborosError, match=r"row 1: no column 'body'"):
        hub(DataSpec(max_bytes=5, text_field="body"))


def test_hub_errors_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(StreamError, match=r"^source 'hf:me/set': cannot be streamed: ConnectionError: no route$"):
        hub(DataSpec(max_bytes=5), "hf:me/set")
    with pytest.raises(OuroborosError, match=r"needs data\.stream or data\.max_bytes"):
        hub(DataSpec(), "hf:me/set")
    with pytest.raises(OuroborosError, match="no name after 'hf:'"):
        hub(DataSpec(max_bytes=5), "hf:")


def rows(count: int, texts: str = "row {}") -> datasets.IterableDataset:
    def generate() -> Iterator[dict]:
        for index in range(count):
            yield {"query": texts.format(index), "response": "r", "original_question": f"o{index % 3}"}

    return datasets.IterableDataset.from_generator(generate)


def test_hub_rows_have_formats_groups_and_a_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: rows(6))
    ref = parse_source("hf:me/set@metamath")
    found = list(judged_documents(ref, DataSpec(stream=True), start=4))
    assert found == [
        Document("me/set:5", b"Q: row 4\nA: r", 4, b"o1", ((11, 13),)),
        Document("me/set:6", b"Q: row 5\nA: r", 5, b"o2", ((11, 13),)),
    ]


def shards(folder: Path, opened: list[str]) -> datasets.IterableDataset:
    """Sixty rows in three files; ``opened`` gets the names of those that are read."""

    def generate(paths: list[str]) -> Iterator[dict]:
        for path in paths:
            opened.append(Path(path).name)
            yield from map(json.loads, Path(path).read_text().splitlines())

    paths = [str(folder / f"{number}.jsonl") for number in range(3)]
    for number, path in enumerate(paths):
        lines = [json.dumps({"text": f"Row {number * 20 + row} of a stream."}) for row in range(20)]
        Path(path).write_text("\n".join(lines))
    return datasets.IterableDataset.from_generator(generate, gen_kwargs={"paths": paths})


def test_a_hub_stream_is_opened_again_without_the_files_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: shards(tmp_path, opened))
    monkeypatch.setattr(records, "ANCHOR_ROWS", 8)
    ref, spec = parse_source("hf:me/set"), DataSpec(stream=True)
    everything = list(judged_documents(ref, spec))
    assert [document.index + 1 for document in everything if document.anchor] == [8, 16, 24, 32, 40, 48, 56]
    for start, first in ((48, "2.jsonl"), (55, "2.jsonl"), (40, "1.jsonl"), (39, "1.jsonl"), (24, "1.jsonl")):
        anchor = next(document.anchor for document in everything[start - 1 :: -1] if document.anchor)
        opened.clear()
        assert list(judged_documents(ref, spec, start=start, anchor=anchor)) == everything[start:]
        assert opened[0] == first


def test_a_streamed_run_goes_on_at_an_anchor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: shards(tmp_path, opened))
    monkeypatch.setattr(records, "ANCHOR_ROWS", 8)
    spec = DataSpec(sources=("hf:me/set",), stream=True, valid_fraction=0.2, test_fraction=0.2)
    data = prepare(spec, tmp_path / "out")
    whole = open_loader(data, batch_size=2, sequence_length=32, seed=0)
    has_anchor = []
    for _ in range(40):
        state = json.loads(json.dumps(whole.state_dict()))
        has_anchor.append("anchor" in state["positions"][0])
        resumed = open_loader(data, batch_size=2, sequence_length=32, seed=0)
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state
        state["positions"][0].pop("anchor", None)  # as an earlier release wrote it
        plain = open_loader(data, batch_size=2, sequence_length=32, seed=0)
        plain.load_state_dict(state)
        expected = whole.next_batch()
        np.testing.assert_array_equal(resumed.next_batch(), expected)
        np.testing.assert_array_equal(plain.next_batch(), expected)
    assert epochs(whole)[0] >= 1 and 10 < sum(has_anchor) < 40


def test_a_hub_stream_that_breaks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def generate() -> Iterator[dict]:
        yield {"text": "one"}
        raise ConnectionError("reset")

    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: generate())
    documents = read_documents(parse_source("hf:me/set"), DataSpec(stream=True))
    assert next(documents).data == b"one"
    with pytest.raises(StreamError, match="source 'hf:me/set': cannot be streamed: ConnectionError: reset"):
        next(documents)


def test_a_hub_stream_of_dropped_rows_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_HOPELESS", 50)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: itertools.repeat({"text": "short"}))
    spec = DataSpec(stream=True, filters=FilterSpec(min_characters=100))
    with pytest.raises(OuroborosError, match=r"every document was dropped \(50 read, 0 kept, 50 short\)"):
        list(read_documents(parse_source("hf:me/set"), spec))


def test_what_a_parser_cannot_take_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "deep.jsonl").write_text("[" * 200_000 + "\n")
    (tmp_path / "deep.json").write_text('{"text": ' * 200_000)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1\x15\0 broken")
    for name, message in (
        ("deep.jsonl", "deep.jsonl:1: not JSON"),
        ("deep.json", "not JSON"),
        ("bad.parquet", "parquet"),
    ):
        with pytest.raises(OuroborosError, match=message) as caught:
            list(read_records(tmp_path / name, TEXT))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_columns_within_columns(tmp_path: Path, suffix: str) -> None:
    rows = [{"meta": {"n": "1"}, "data": {"text": "a"}}, {"meta": {"n": "2"}, "data": None}]
    path = write(tmp_path / f"a{suffix}", rows)
    assert texts(path, find_format("{data.text}")) == [b"a", None]
    assert texts(path, find_format("{meta.n}: {data.text}")) == [b"1: a", b"2: "]
    with pytest.raises(OuroborosError, match="no column 'dta.text'"):
        texts(path, find_format("{dta.text}"))


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_conversations_of_every_kind_of_file(tmp_path: Path, suffix: str) -> None:
    turns = [{"role": "user", "content": "h\u00e9"}, {"role": "assistant", "content": "\u4e16"}]
    (record,) = read_records(write(tmp_path / f"a{suffix}", [{"messages": turns}]), find_format("messages"))
    assert record.data == "User: h\u00e9\nAssistant: \u4e16".encode() and record.answers is not None
    assert [record.data[start:end].decode() for start, end in record.answers] == [" \u4e16"]


BAD = ["{bad", "[1]", '{"text": 5}', '{"text": "a\\ud800"}', '{"id": 5}', "[" * 9, "[" * 99_999]


def test_bad_records_are_handed_on_where_they_are_to_be_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(['{"text": "fine"}', *BAD, '{"text": "too"}']))
    found = list(read_records(path, TEXT, leave_out=True))
    assert [record.data for record in found] == [b"fine", *[b""] * len(BAD), b"too"]
    assert [record.dropped for record in found] == [None, *["bad record"] * len(BAD), None]
    for place, record in enumerate(found[1:-1], 2):
        assert record.fault is not None and record.fault.startswith(f"{path}:{place}: ")
    with pytest.raises(OuroborosError, match=r":2: not JSON: .*; data.skip_bad_records leaves such records out$"):
        list(read_records(path, TEXT))


def test_bad_records_are_left_out_of_every_pass_and_counted(tmp_path, caplog):
    path = tmp_path / "r.jsonl"
    rows = [json.dumps({"text": f"Record {n} of the stream: {n} times {n} is {n * n}."}) for n in range(300)]
    rows[200:202] = ['{"text": "cut off', '{"body": "x"}']
    path.write_text("\n".join(rows))
    spec = DataSpec(sources=(str(path),), stream=True, max_bytes=4000)
    strict = open_loader(prepare(spec, tmp_path / "out"), batch_size=4, sequence_length=32, seed=0)
    states = [strict.state_dict()]
    with pytest.raises(OuroborosError, match=r"r\.jsonl:201: not JSON"):
        for _ in range(99):
            strict.next_batch()
            states.append(strict.state_dict())
    assert len(states) > 20
    # The same preparation serves both ways of reading, and a run goes on from where it stopped.
    lenient = prepare(dataclasses.replace(spec, skip_bad_records=True), tmp_path / "out")
    whole, resumed = (open_loader(lenient, batch_size=4, sequence_length=32, seed=0) for _ in range(2))
    for _ in range(len(states) - 1):
        whole.next_batch()
    resumed.load_state_dict(json.loads(json.dumps(states[-1])))
    caplog.clear()
    for _ in range(250):
        np.testing.assert_array_equal(resumed.next_batch(), whole.next_batch())
    assert epochs(whole)[0] >= 2 and whole.sources() == resumed.sources()
    assert whole.sources()[0]["counts"]["bad record"] in (2 * epochs(whole)[0], 2 * epochs(whole)[0] + 2)
    named = [message for message in caplog.messages if "left out (data.skip_bad_records)" in message]
    assert any("r.jsonl:201: not JSON" in message for message in named) and len(named) <= 20

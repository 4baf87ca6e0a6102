from __future__ import annotations

import json
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from ouroboros.config import DataSpec
from ouroboros.data.records import read_records
from ouroboros.data.sources import parse_source, read_documents
from ouroboros.errors import OuroborosError

ROWS = [{"text": "one\r\n", "id": 1}, {"text": "", "id": 2}, {"text": "tw\u00f6", "id": 3}]
EXPECTED = [b"one\r\n", b"", "tw\u00f6".encode()]


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
    assert [data for _, data in read_records(path, "text")] == EXPECTED


def test_lines_in_a_json_file_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n{"text": "b"}\r\n')
    assert list(read_records(path, "text")) == [(1, b"a"), (2, b"b")]


@pytest.mark.parametrize(
    ("suffix", "place"), [(".jsonl", r"a\.jsonl:1"), (".json", r"a\.json: record 1"), (".parquet", r"a\.parquet")]
)
def test_missing_field_offers_the_nearest(tmp_path: Path, suffix: str, place: str) -> None:
    path = write(tmp_path / f"a{suffix}", [{"texts": "x"}])
    with pytest.raises(OuroborosError, match=rf"{place}: no (field|column) 'text' .*did you mean 'texts'"):
        list(read_records(path, "text"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{bad", "not JSON"),
        ("[1]", "expected an object"),
        ('{"text": null}', "holds null, not text"),
        ('{"text": 5}', "holds int, not text"),
        ('{"text": "a\\ud800"}', "unpaired surrogate at character 1"),
        ('{"id": 5}', "no field 'text'"),
    ],
)
def test_bad_records_name_the_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n\n' + line + "\n")
    with pytest.raises(OuroborosError, match=rf"a\.jsonl:3: .*{message}"):
        list(read_records(path, "text"))


def test_invalid_utf8_in_a_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "\xff"}')
    with pytest.raises(OuroborosError, match=r"a\.jsonl:1: not JSON"):
        list(read_records(path, "text"))


def test_parquet_nulls_and_damage(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", [{"text": "x"}, {"text": "y"}, {"text": None}])
    with pytest.raises(OuroborosError, match=r"a\.parquet: row 3: field 'text' holds null"):
        list(read_records(path, "text"))
    path.write_bytes(b"PAR1 nothing")
    with pytest.raises(OuroborosError, match="not a readable parquet file"):
        list(read_records(path, "text"))


def test_missing_file_of_records(tmp_path: Path) -> None:
    with pytest.raises(OuroborosError, match="cannot be read"):
        list(read_records(tmp_path / "a.jsonl", "text"))


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
    with pytest.raises(OuroborosError, match=r"row 1: no field 'body'"):
        hub(DataSpec(max_bytes=5, text_field="body"))


def test_hub_errors_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(OuroborosError, match=r"^source 'hf:me/set': cannot be streamed: ConnectionError: no route$"):
        hub(DataSpec(max_bytes=5), "hf:me/set")
    with pytest.raises(OuroborosError, match=r"needs data\.max_bytes"):
        hub(DataSpec(), "hf:me/set")
    with pytest.raises(OuroborosError, match="no name after 'hf:'"):
        hub(DataSpec(max_bytes=5), "hf:")

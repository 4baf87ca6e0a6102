from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ouroboros.config import DataSpec
from ouroboros.data.prepared import PreparedData, fingerprint_of, open_prepared
from ouroboros.data.records import Document
from ouroboros.data.shards import prepare
from ouroboros.errors import OuroborosError


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PreparedData:
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("".join(f"line {i}\n" for i in range(300)))
    Path("b.jsonl").write_text("".join(f'{{"text": "record {i}"}}\n' for i in range(200)))
    return prepare(DataSpec(sources=("a.txt", "b.jsonl=2")), "out")


def test_opens_the_same(prepared: PreparedData) -> None:
    again = open_prepared("out")
    again.verify()
    assert again.fingerprint == prepared.fingerprint
    assert again.spec == prepared.spec
    assert again.documents("test") == prepared.documents("test")
    assert again.tokenizer.kind == "bytes"
    again.check_sources()


def test_ids_are_a_read_only_map(prepared: PreparedData) -> None:
    ids = prepared.tokens("train", 0)
    assert isinstance(ids, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        ids[0] = 0


def test_bytes_are_those_of_the_original_text(prepared: PreparedData) -> None:
    assert len(b"".join(prepared.documents("valid"))) == prepared.count("valid", "bytes")


def test_an_empty_split_is_empty(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("word " * 100)
    prepared = prepare(DataSpec(sources=(str(tmp_path / "a.txt"),), valid_fraction=0), tmp_path / "out")
    assert prepared.documents("valid") == []
    assert len(prepared.tokens("valid", 0)) == 0


@pytest.mark.parametrize("name", ["a.txt", "b.jsonl"])
def test_changed_and_missing_sources_are_named(prepared: PreparedData, name: str) -> None:
    data = Path(name).read_bytes()
    Path(name).write_bytes(data.replace(b"2", b"3", 1))
    with pytest.raises(OuroborosError, match=f"source '{name}': has changed"):
        prepared.check_sources()
    Path(name).unlink()
    with pytest.raises(OuroborosError, match=f"source '{name}': no such file"):
        prepared.check_sources()
    Path(name).write_bytes(data)
    prepared.check_sources()


def test_sources_are_found_from_another_directory(prepared: PreparedData, monkeypatch: pytest.MonkeyPatch) -> None:
    out = Path("out").resolve()
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    open_prepared(out).check_sources()
    with pytest.raises(OuroborosError, match="no such file"):
        open_prepared(out).check_sources(Path.cwd())


@pytest.fixture
def elsewhere(prepared: PreparedData, monkeypatch: pytest.MonkeyPatch) -> PreparedData:
    """The prepared data, opened from another directory: what a run that goes on there has."""
    out = Path("out").resolve()
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    return open_prepared(out)


def test_a_run_that_goes_on_finds_its_sources(elsewhere: PreparedData, caplog: pytest.LogCaptureFixture) -> None:
    Path("a.txt").write_text("something else of the same name")
    elsewhere.find_sources()
    assert caplog.text == "" and elsewhere.sources == open_prepared("../out").sources
    Path("../a.txt").write_text("changed")
    with pytest.raises(OuroborosError, match=r"source 'a\.txt': has changed"):
        elsewhere.find_sources()


def test_sources_that_moved_along(elsewhere: PreparedData, caplog: pytest.LogCaptureFixture) -> None:
    Path("../a.txt").rename("a.txt")
    elsewhere.find_sources()
    assert caplog.text == ""
    assert [ref.base for ref in elsewhere.sources] == [Path(), elsewhere.base]


@pytest.mark.parametrize("other", [None, "", "another text " * 99])
def test_a_run_goes_on_without_its_text(
    elsewhere: PreparedData, other: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    Path("../a.txt").unlink()
    if other is not None:
        Path("a.txt").write_text(other)
    elsewhere.find_sources()
    (record,) = caplog.records
    assert record.getMessage() == (
        f"source 'a.txt' at {str(elsewhere.base / 'a.txt')!r}: not there any more; the run goes on with the text"
        " prepared from it, which is intact"
    )
    file = elsewhere.directory / "0-valid.raw"
    file.write_bytes(file.read_bytes()[::-1])
    with pytest.raises(OuroborosError, match=r"0-valid\.raw was altered"):
        elsewhere.find_sources()


def test_globs_and_directories_may_be_gone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("d/a.txt", "g/b.txt"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("".join(f"line {i} of {name}\n" for i in range(300)))
    prepared = prepare(DataSpec(sources=(f"{tmp_path}/d", f"{tmp_path}/g/*.txt")), tmp_path / "out")
    prepared.find_sources()
    for name in ("d/a.txt", "g/b.txt"):
        (tmp_path / name).unlink()
    (tmp_path / "d").rmdir()
    prepared.find_sources()
    assert "/d'" in caplog.text and "/g/*.txt'" in caplog.text and len(caplog.records) == 1


def test_a_streamed_run_needs_its_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("b.jsonl").write_text("".join(f'{{"text": "record {i}"}}\n' for i in range(200)))
    prepared = prepare(DataSpec(sources=("b.jsonl",), stream=True), "out")
    prepared.find_sources()
    Path("new").mkdir()
    Path("b.jsonl").rename("new/b.jsonl")
    with pytest.raises(OuroborosError, match=r"at '.*b\.jsonl': not there any more; a streamed run reads its text"):
        prepared.find_sources()
    directory = prepared.directory.resolve()
    monkeypatch.chdir("new")
    moved = open_prepared(directory)
    moved.find_sources()
    assert moved.sources[0].path.is_file() and caplog.text == ""


def test_streams_are_not_read_again(prepared: PreparedData) -> None:
    manifest = json.loads(Path("out/manifest.json").read_text())
    manifest["sources"][1]["text"] = "hf:me/set"
    PreparedData(Path("out"), manifest).check_sources()


def test_damage_is_found(prepared: PreparedData) -> None:
    path = Path("out/0-train.bin")
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    altered = open_prepared("out")
    with pytest.raises(OuroborosError, match=r"0-train\.bin was altered"):
        altered.verify()
    path.write_bytes(data[:-2])
    with pytest.raises(OuroborosError, match=r"0-train\.bin has \d+ bytes, not \d+"):
        open_prepared("out")
    path.unlink()
    with pytest.raises(OuroborosError, match=r"0-train\.bin is missing"):
        open_prepared("out")


def test_a_manifest_of_an_earlier_release_opens(prepared: PreparedData) -> None:
    path = Path("out/manifest.json")
    manifest = json.loads(path.read_text())
    for entry in manifest["sources"]:
        cut = {"block": 512, "blocks": 0, "documents_lost": 1, "tokens_lost": 9}
        entry |= {"lengths": [0, 1], "block_cut": cut}
    path.write_text(json.dumps(manifest))
    again = prepare(prepared.spec, "out")
    assert again.fingerprint == prepared.fingerprint and again.documents("test") == prepared.documents("test")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no prepared data there"),
        ("{", "cannot be read"),
        ("[]", "format version None"),
        ('{"format_version": 1}', "format version 1, this release reads 2"),
        ('{"format_version": 2, "spec": {}}', r"lacks base, dtype, files, sources, tokenizer"),
    ],
)
def test_bad_manifests(prepared: PreparedData, text: str | None, message: str) -> None:
    Path("out/manifest.json").unlink()
    if text is not None:
        Path("out/manifest.json").write_text(text)
    with pytest.raises(OuroborosError, match=message):
        open_prepared("out")


def test_fingerprint_depends_on_names_and_borders() -> None:
    prints = {
        fingerprint_of(documents)
        for documents in (
            [Document("a", b"xy")],
            [Document("b", b"xy")],
            [Document("a", b"x"), Document("", b"y")],
            [Document("a", b"xy", group=b"g")],
            [Document("ax", b"y")],
            [],
        )
    }
    assert len(prints) == 6


def test_formats_and_mixtures_are_opened_again(tmp_path: Path) -> None:
    for name, record in {
        "tinygsm": '{"question": "What is %d?", "code": "print(%d)"}',
        "tiny-codes": '{"prompt": "Write %d", "response": "print(%d)"}',
        "cosmopedia": '{"text": "The number %d is not %d."}',
        "metamath": '{"query": "%d?", "response": "It is %d", "original_question": "a"}',
    }.items():
        record = record.replace('"a"', '"problem %d"')
        lines = [record % ((i,) * record.count("%d")) for i in range(200)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    prepared = prepare(DataSpec(sources=(f"mix:rhrm:{tmp_path}",)), tmp_path / "out")
    again = open_prepared(tmp_path / "out")
    assert again.sources == prepared.sources
    assert again.weights == (0.4, 0.3, 0.15, 0.15)
    assert [ref.format for ref in again.sources] == ["tinygsm", "tiny-codes", "cosmopedia", "metamath"]
    assert all(text.startswith(b"Problem: What is ") for text in again.documents("valid", 0))
    again.check_sources()
    path = tmp_path / "metamath.jsonl"
    path.write_text(path.read_text().replace("problem 7", "problem 8", 1))
    with pytest.raises(OuroborosError, match=r"metamath\.jsonl': has changed"):
        again.check_sources()

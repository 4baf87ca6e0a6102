from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ouroboros.config import DataSpec, FilterSpec
from ouroboros.data.prepared import open_prepared
from ouroboros.data.shards import prepare
from ouroboros.errors import OuroborosError
from ouroboros.recipes import recipe
from ouroboros.report.content import Section
from ouroboros.report.data import data_section, held_out_sample
from ouroboros.report.run import Run
from ouroboros.report.text import MISSING
from ouroboros.train.checkpoint import save

BLOCK = 32
SPEC = DataSpec(sources=("long.jsonl=3", "short.jsonl@{a}-{b}"), sequence_length=BLOCK)


def write_sources() -> None:
    long = [{"text": f"{n} " + "words and more words " * (4 + n % 9)} for n in range(80)]
    short = [{"a": f"question {n}", "b": "answer"} for n in range(90)] + [{"a": "x", "b": "y"}] * 10
    for name, records in (("long", long), ("short", short)):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with sources and, by name, run directories that hold nothing but prepared data."""
    place = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        write_sources()
        Path("notes.txt").write_text("A plain text that is one document. " * 60)
        prepare(SPEC, "run/data")
        prepare(DataSpec(sources=SPEC.sources, sequence_length=BLOCK, filters=FilterSpec(min_characters=8)), "cut/data")
        prepare(DataSpec(sources=SPEC.sources, sequence_length=BLOCK, stream=True), "stream/data")
        prepare(DataSpec(sources=("notes.txt",), sequence_length=BLOCK), "plain/data")
    return place


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Gives a copy of a run directory, to be changed."""
    return lambda name: Path(shutil.copytree(made / name, tmp_path / name))


def write_position(run: Path, step: int, **loader: Any) -> None:
    save(run / "checkpoints", step, files={}, documents={"state.json": {"loader": loader}})


def place(read: int, restarts: int = 0, **counts: int) -> dict[str, Any]:
    return {"record": read, "epoch": 2, "offset": 0, "restarts": restarts, "counts": {"read": read, **counts}}


def change_manifest(run: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = run / "data" / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def section_of(directory: Path, metrics: list[dict[str, Any]] | None = None) -> Section:
    """The section of a run directory that has data."""
    section = data_section(Run(directory, recipe("gpt", "tiny"), metrics or []))
    assert section is not None
    return section


def column(section: Section, name: str) -> list[str]:
    """One column of the table, a cell for each source."""
    (table,) = section.tables
    return [row[list(table.head).index(name)] for row in table.rows]


def test_sources_as_they_were_prepared(made: Path) -> None:
    section = section_of(made / "run")
    assert column(section, "Source") == ["long.jsonl", "short.jsonl"]
    assert column(section, "weight") == ["75.0 %", "25.0 %"] and column(section, "this run") == [MISSING] * 2
    assert section.lead == "Read: 180 documents of 2 sources; kept: 180; dropped (0.0 %): none."
    assert column(section, "format")[1] == "{a}-{b}" and column(section, "read") == ["80", "100"]


def test_what_was_dropped_is_counted_by_reason(run: Callable[[str], Path]) -> None:
    place = run("cut")
    section = section_of(place)
    assert section.lead == "Read: 180 documents of 2 sources; kept: 170; dropped (5.6 %): short (10)."
    assert column(section, "dropped") == ["none", "short (10)"]
    change_manifest(place, lambda manifest: manifest["sources"][0].update(read=81, dropped={"no text": 1}))
    assert section_of(place).lead.endswith("dropped (6.1 %): short (10), no text (1).")


def test_shares_and_passes_are_the_newest_checkpoints(run: Callable[[str], Path]) -> None:
    place = run("run")
    write_position(place, 5, counts=[1, 1], sequence_length=BLOCK)
    write_position(place, 9, counts=[30, 10], sequence_length=BLOCK)
    section = section_of(place)
    assert column(section, "this run") == ["75.0 %", "25.0 %"]
    assert section.tables[0].note == "This run: tokens drawn by step 9."
    tokens = open_prepared(place / "data").manifest["sources"][0]["splits"]["train"]["tokens"]
    assert column(section, "passes")[0] == f"{30 / -(-(tokens - 1) // BLOCK):.2f}"


def test_a_position_that_does_not_fit_is_passed_over(
    run: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    place = run("run")
    write_position(place, 5, counts=[1], sequence_length=BLOCK)
    section = section_of(place)
    assert section.tables[0].note == "" and column(section, "passes") == [MISSING] * 2
    (place / "checkpoints" / "step-00000005" / "state.json").write_text("{")
    with caplog.at_level(logging.WARNING):
        assert section_of(place).tables == section.tables
    assert "the shares drawn so far are left out" in caplog.text


def test_streams_are_where_the_newer_record_says(run: Callable[[str], Path]) -> None:
    directory = run("stream")
    first = [place(10, kept=9, short=1), place(20, kept=20)]
    later = [place(50, kept=40, short=10, **{"held out": 4}), place(60, kept=60, restarts=2)]
    write_position(directory, 20, counts=[6, 2], sequence_length=BLOCK, positions=first)
    metrics = [{"kind": "stream", "step": 10, "sources": later}]
    section = section_of(directory, metrics)
    assert column(section, "read") == ["10", "20"] and section.lead.startswith("Read by step 20: 30 documents")
    section = section_of(directory, [*metrics, {"kind": "stream", "step": 30, "sources": later}])
    assert section.lead.startswith("Read by step 30: 110 documents of 2 sources; kept: 100; dropped (9.1 %)")
    assert section.tables[0].note.startswith("This run: tokens drawn by step 20. The sources are read while")
    assert column(section, "read") == ["50", "60"] and column(section, "dropped") == ["short (10)", "none"]
    assert column(section, "passes") == ["2.00", "2.00"]


def test_stream_without_a_position_shows_its_head(made: Path) -> None:
    section = section_of(made / "stream", [{"kind": "stream", "step": 1, "sources": []}])
    assert column(section, "read") == ["80", "100"] and section.lead.startswith("Read: 180 documents of 2 sources")


def test_manifest_without_counts_gives_what_it_has(run: Callable[[str], Path]) -> None:
    directory = run("run")

    def strip(manifest: dict[str, Any]) -> None:
        for entry in manifest["sources"]:
            for key in ("read", "kept", "dropped"):
                del entry[key]

    change_manifest(directory, strip)
    section = section_of(directory)
    assert section.lead == "" and column(section, "kept") == [MISSING] * 2


def test_no_data_is_none_and_damaged_data_is_an_error(run: Callable[[str], Path], tmp_path: Path) -> None:
    assert data_section(Run(tmp_path, recipe("gpt", "tiny"), [])) is None
    directory = run("run")
    (directory / "data" / "0-train.bin").write_bytes(b"")
    with pytest.raises(OuroborosError, match=r"0-train\.bin has 0 bytes"):
        section_of(directory)


def test_sample_is_seeded_and_does_not_overlap(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = open_prepared(made / "plain" / "data")
    split, sample = held_out_sample(data, 3, 8)
    assert split == "test" and sample.shape == (3, 8) and sample.dtype == np.int64
    assert np.array_equal(sample, held_out_sample(data, 3, 8)[1])
    blocks = {tuple(block) for block in data.tokens("test", 0)[: len(data.tokens("test", 0)) // 8 * 8].reshape(-1, 8)}
    assert {tuple(row) for row in sample} <= blocks
    whole = held_out_sample(data, 10**6, 10**6)[1]
    assert np.array_equal(whole[0], data.tokens("test", 0))
    parts: dict[str, Any] = {"valid": np.arange(9), "test": np.zeros(1, np.uint16)}
    monkeypatch.setattr(type(data), "tokens", lambda self, split, source: parts[split])
    assert held_out_sample(data, 2, 4)[0] == "valid"
    parts["valid"] = np.zeros(0, np.uint16)
    with pytest.raises(OuroborosError, match=r"no held-out text; set data\.test_fraction"):
        held_out_sample(data, 2, 4)

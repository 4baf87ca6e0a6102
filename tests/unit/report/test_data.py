from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from ouroboros.config import DataSpec, FilterSpec
from ouroboros.data.prepared import open_prepared
from ouroboros.data.shards import prepare
from ouroboros.errors import OuroborosError
from ouroboros.recipes import recipe
from ouroboros.report import Section
from ouroboros.report.data import (
    MAX_SOURCES,
    data_section,
    document_sizes,
    heaviest,
    held_out_sample,
    length_chart,
    share_chart,
    short_labels,
)
from ouroboros.report.drawing import LIGHT, Chart, drawn
from ouroboros.report.run import Run
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


def facts(section: Section, source: int) -> dict[str, str]:
    """The lines about one source."""
    return dict(section.cards[source].facts)


def texts(chart: Chart) -> list[str]:
    return [e.text or "" for e in ElementTree.fromstring(drawn(chart).svg).iter() if e.tag.endswith("text")]


def test_sources_as_they_were_prepared(made: Path) -> None:
    section = section_of(made / "run")
    long, short = section.cards
    assert (long.title, long.detail, short.title, short.detail) == ("long", "long.jsonl", "short", "short.jsonl")
    assert section.tables[0].rows == [("long", "75.0 %", chr(0x2013)), ("short", "25.0 %", chr(0x2013))]
    assert section.lead == "180 documents of 2 sources were read; nothing was dropped."
    assert [chart.title for chart in section.charts] == [
        "Share of the training tokens",
        "Length of the documents of long",
        "Length of the documents of short",
    ]
    assert list(facts(section, 1)) == ["format", "documents read", "kept", "training", "validation", "test"]
    assert facts(section, 0)["format"] == "column 'text'" and facts(section, 1)["format"] == "{a}-{b}"
    assert facts(section, 1)["documents read"] == "100" and facts(section, 1)["kept"] == "100 (100 %)"


def test_what_was_dropped_is_counted_by_reason(run: Callable[[str], Path]) -> None:
    place = run("cut")
    section = section_of(place)
    assert section.lead == "180 documents of 2 sources were read and 170 kept; 10 (5.6 %) were dropped: short (10)."
    assert facts(section, 1)["dropped: short"] == "10 (10.0 %)"
    change_manifest(place, lambda manifest: manifest["sources"][0].update(read=81, dropped={"no text": 1}))
    assert section_of(place).lead.endswith("11 (6.1 %) were dropped: short (10), no text (1).")


def test_shares_and_passes_are_the_newest_checkpoints(run: Callable[[str], Path]) -> None:
    place = run("run")
    write_position(place, 5, counts=[1, 1], sequence_length=BLOCK)
    write_position(place, 9, counts=[30, 10], sequence_length=BLOCK)
    section = section_of(place)
    assert section.tables[0].rows[0] == ("long", "75.0 %", "75.0 %")
    assert section.tables[0].note == "This run: tokens drawn by step 9."
    tokens = open_prepared(place / "data").manifest["sources"][0]["splits"]["train"]["tokens"]
    assert facts(section, 0)["drawn so far"] == "960 tokens"
    assert facts(section, 0)["passes"] == f"{30 / -(-(tokens - 1) // BLOCK):.2f}"


def test_a_position_that_does_not_fit_is_passed_over(
    run: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    place = run("run")
    write_position(place, 5, counts=[1], sequence_length=BLOCK)
    section = section_of(place)
    assert section.tables[0].note == "" and "drawn so far" not in facts(section, 0)
    (place / "checkpoints" / "step-00000005" / "state.json").write_text("{")
    with caplog.at_level(logging.WARNING):
        assert section_of(place).cards == section.cards
    assert "the shares drawn so far are left out" in caplog.text


def test_streams_are_where_the_newer_record_says(run: Callable[[str], Path]) -> None:
    directory = run("stream")
    first = [place(10, kept=9, short=1), place(20, kept=20)]
    later = [place(50, kept=40, short=10, **{"held out": 4}), place(60, kept=60, restarts=2)]
    write_position(directory, 20, counts=[6, 2], sequence_length=BLOCK, positions=first)
    metrics = [{"kind": "stream", "step": 10, "sources": later}]
    section = section_of(directory, metrics)
    assert facts(section, 0)["documents read"] == "10" and "read by step 20 and" in section.lead
    section = section_of(directory, [*metrics, {"kind": "stream", "step": 30, "sources": later}])
    assert section.lead.startswith("110 documents of 2 sources were read by step 30 and 100 kept; 10 (9.1 %)")
    assert section.lead.endswith("are of the head of each, which was read before.")
    assert section.tables[0].note == "This run: tokens drawn by step 20."
    one, two = facts(section, 0), facts(section, 1)
    assert (one["documents read"], one["kept"], one["held out of these"]) == ("50", "40 (80.0 %)", "4")
    assert one["dropped: short"] == "10 (20.0 %)" and one["whole passes"] == "2" and "passes" not in one
    assert one["opened again after a failure"] == "never" and two["opened again after a failure"] == "2 times"
    assert "head, training" in one


def test_stream_without_a_position_shows_its_head(made: Path) -> None:
    section = section_of(made / "stream", [{"kind": "stream", "step": 1, "sources": []}])
    assert facts(section, 0)["documents read"] == "80" and section.lead.startswith("180 documents of 2 sources were")
    assert "training" in facts(section, 0)


def test_one_plain_text_has_neither_lengths_nor_a_choice(made: Path) -> None:
    section = section_of(made / "plain")
    assert not section.charts and not section.tables and facts(section, 0)["format"] == "plain text"
    assert section.lead == "1 document of 1 source was read; nothing was dropped."


def test_manifest_without_counts_gives_what_it_has(run: Callable[[str], Path]) -> None:
    directory = run("run")

    def strip(manifest: dict[str, Any]) -> None:
        for entry in manifest["sources"]:
            for key in ("read", "kept", "dropped"):
                del entry[key]

    change_manifest(directory, strip)
    section = section_of(directory)
    assert section.lead == "" and list(facts(section, 0)) == ["format", "training", "validation", "test"]


def test_no_data_is_none_and_damaged_data_is_an_error(run: Callable[[str], Path], tmp_path: Path) -> None:
    assert data_section(Run(tmp_path, recipe("gpt", "tiny"), [])) is None
    directory = run("run")
    (directory / "data" / "0-train.bin").write_bytes(b"")
    with pytest.raises(OuroborosError, match=r"0-train\.bin has 0 bytes"):
        section_of(directory)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a/b/code.jsonl", "hf:org/maths"], ["code", "maths"]),
        (["x/a.txt", "y/a.txt", "b"], ["x/a.txt", "y/a.txt", "b"]),
        (["python:", ".hidden", "dir/"], ["python:", ".hidden", "dir"]),
    ],
)
def test_labels_are_short_and_distinct(names: list[str], expected: list[str]) -> None:
    data: Any = SimpleNamespace(sources=[SimpleNamespace(text=name) for name in names])
    assert short_labels(data) == expected


def test_shares_stand_side_by_side() -> None:
    found = texts(share_chart(["code", "maths"], {"weight": [0.7, 0.3], "this run": [0.69, 0.31]}))
    assert {"code", "maths", "weight", "this run", "70.0 %", "69.0 %", "31.0 %"} <= set(found)
    unknown = texts(share_chart(["<b>$x_1$ & so on and so on", "_b"], {"weight": [0.5, 0.5], "this run": [None, 0.5]}))
    assert "this run" not in unknown and "<b>$x_1$ & so on " + chr(0x2026) in unknown and "b" in unknown


def test_the_heaviest_sources_are_shown_in_their_order() -> None:
    weights = [0.01 * (i + 1) for i in range(MAX_SOURCES + 2)]
    assert heaviest(weights) == list(range(2, MAX_SOURCES + 2)) and heaviest([0.7, 0.3]) == [0, 1]
    found = texts(share_chart([f"s{i}" for i in range(len(weights))], {"weight": weights}))
    assert "s2" in found and "s1" not in found


def test_lengths_are_marked_at_the_block() -> None:
    sizes = np.array([4] * 4 + [9] * 8 + [20] * 2)
    plain = length_chart("Lengths", sizes, 8)
    assert {"documents", "8 tokens", "4", "16", "32"} <= set(texts(plain)) and "lost by the block cut" not in texts(
        plain
    )
    lost = length_chart("Lengths", sizes, 8, np.array([1.0] * 4 + [0.1] * 10))
    assert {"in a block", "lost by the block cut"} <= set(texts(lost)) and LIGHT["arm1"] in drawn(lost).svg
    found = texts(length_chart("Lengths", np.array([1, 2**20, 2**20]), 64))
    assert "1" in found and any(text.endswith(" Ki") for text in found)


def test_sizes_are_those_of_the_documents(made: Path) -> None:
    data = open_prepared(made / "run" / "data")
    assert document_sizes(data, 1).tolist() == [len(document) + 1 for document in data.documents("train", 1)]


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

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
from ouroboros.report import data as module
from ouroboros.report.data import data_facts, published_shares_of
from ouroboros.systems.rhrm import data as rhrm
from ouroboros.systems.rhrm.data import published_blocks
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
        prepare(DataSpec(sources=("notes.txt", "long.jsonl"), sequence_length=BLOCK), "mixed/data")
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


def test_sources_as_they_were_prepared(made: Path) -> None:
    found = data_facts(made / "run", [])
    assert found is not None and not found.streamed and found.step is None
    long, short = found.sources
    assert (long.name, long.label, long.format, long.weight) == ("long.jsonl", "long", "column 'text'", 0.75)
    assert (short.format, short.read, short.kept, short.dropped) == ("{a}-{b}", 100, 100, {})
    assert set(long.splits) == {"train", "valid", "test"} and long.splits["train"]["documents"] < 80
    assert long.drawn is None and long.passes is None and long.restarts is None
    assert found.summary == "180 documents of 2 sources were read; nothing was dropped."
    assert not any("dropped" in name for name, _ in short.facts)
    assert dict(short.facts)["kept"] == "100 (100 %)"


def test_what_was_dropped_is_counted_by_reason(run: Callable[[str], Path]) -> None:
    place = run("cut")
    found = data_facts(place, [])
    assert found is not None
    assert found.summary == ("180 documents of 2 sources were read and 170 kept; 10 (5.6 %) were dropped: short (10).")
    assert dict(found.sources[1].facts)["dropped: short"] == "10 (10.0 %)"
    change_manifest(place, lambda manifest: manifest["sources"][0].update(read=81, dropped={"no text": 1}))
    again = data_facts(place, [])
    assert again is not None and again.summary.endswith("11 (6.1 %) were dropped: short (10), no text (1).")


def test_shares_and_passes_are_the_newest_checkpoints(run: Callable[[str], Path]) -> None:
    place = run("run")
    write_position(place, 5, counts=[1, 1], sequence_length=BLOCK)
    write_position(place, 9, counts=[30, 10], sequence_length=BLOCK)
    found = data_facts(place, [])
    assert found is not None and found.step == 9
    long, _ = found.sources
    assert (long.drawn_share, long.drawn) == (0.75, 30 * BLOCK)
    windows = -(-(long.splits["train"]["tokens"] - 1) // BLOCK)
    assert long.passes == 30 / windows and dict(long.facts)["drawn so far"] == "960 tokens"


def test_a_position_that_does_not_fit_is_passed_over(
    run: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    place = run("run")
    write_position(place, 5, counts=[1], sequence_length=BLOCK)
    found = data_facts(place, [])
    assert found is not None and found.step is None and found.sources[0].drawn is None
    (place / "checkpoints" / "step-00000005" / "state.json").write_text("{")
    with caplog.at_level(logging.WARNING):
        assert data_facts(place, []) == found
    assert "the shares drawn so far are left out" in caplog.text


def test_streams_are_where_the_newer_record_says(run: Callable[[str], Path]) -> None:
    directory = run("stream")
    first = [place(10, kept=9, short=1), place(20, kept=20)]
    later = [place(50, kept=40, short=10, **{"held out": 4}), place(60, kept=60, restarts=2)]
    write_position(directory, 20, counts=[6, 2], sequence_length=BLOCK, positions=first)
    metrics = [{"kind": "stream", "step": 10, "sources": later}]
    found = data_facts(directory, metrics)
    assert found is not None and (found.streamed, found.step, found.read_step) == (True, 20, 20)
    assert found.sources[0].read == 10
    found = data_facts(directory, [*metrics, {"kind": "stream", "step": 30, "sources": later}])
    assert found is not None and (found.step, found.read_step) == (20, 30)
    one, two = found.sources
    assert (one.read, one.kept, one.held_out, one.dropped, one.passes) == (50, 40, 4, {"short": 10}, 2.0)
    assert found.summary.startswith("110 documents of 2 sources were read by step 30 and 100 kept; 10 (9.1 %)")
    facts = dict(two.facts)
    assert facts["opened again after a failure"] == "2 times" and facts["whole passes"] == "2"
    assert dict(one.facts)["opened again after a failure"] == "never" and "head, training" in facts


def test_stream_without_a_position_shows_its_head(made: Path) -> None:
    found = data_facts(made / "stream", [{"kind": "stream", "step": 1, "sources": []}])
    assert found is not None and found.read_step is None
    assert found.sources[0].read == 80 and found.summary.startswith("180 documents")


def test_published_shares_follow_the_documents_that_fill_blocks(made: Path) -> None:
    data = open_prepared(made / "run" / "data")
    blocks = [
        sum(len(published_blocks(size, BLOCK)) for size in sizes) / len(sizes)
        for sizes in (np.diff(data.offsets("train", index)).tolist() for index in (0, 1))
    ]
    assert blocks[1] == 0  # every document of this source is too short for a block
    assert published_shares_of(data) == [1.0, 0.0]
    found = data_facts(made / "run", [])
    assert found is not None and [source.published_share for source in found.sources] == [1.0, 0.0]


def test_published_filter_counts(run: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    data = open_prepared(run("mixed") / "data")
    shares = published_shares_of(data)
    sizes = [np.diff(data.offsets("train", index)).tolist() for index in (0, 1)]
    means = [sum(len(published_blocks(size, BLOCK)) for size in found) / len(found) for found in sizes]
    assert shares == pytest.approx([mean / sum(means) for mean in means])
    monkeypatch.setattr(rhrm, "published_accepts", lambda text: not text.startswith("A plain text"))
    assert published_shares_of(data) == [0.0, 1.0]
    monkeypatch.setattr(rhrm, "published_accepts", lambda text: False)
    assert published_shares_of(data) is None


def test_many_documents_are_sampled_evenly(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = open_prepared(made / "run" / "data")
    seen: list[str] = []
    monkeypatch.setattr(rhrm, "published_accepts", lambda text: seen.append(text) is None)
    monkeypatch.setattr(rhrm, "MAX_SAMPLED", 5)
    published_shares_of(data)
    documents = data.documents("train", 0)
    assert len(seen) == 10 and (seen[0].encode(), seen[4].encode()) == (documents[0], documents[-1])


def test_lengths_and_what_a_cut_would_have_lost(made: Path) -> None:
    found = data_facts(made / "run", [])
    assert found is not None
    data = open_prepared(made / "run" / "data")
    for index, source in enumerate(found.sources):
        lengths = source.lengths
        assert lengths is not None and lengths.block == BLOCK
        sizes = np.diff(data.offsets("train", index)).tolist()
        expected = [0.0] * len(lengths.documents)
        for size in sizes:
            expected[size.bit_length() - 1] += 1 - BLOCK * len(published_blocks(size, BLOCK)) / size
        assert lengths.lost == pytest.approx(expected)
        assert sum(lengths.documents) == len(sizes)
        assert all(lost <= count + 1e-9 for lost, count in zip(lengths.lost, lengths.documents, strict=True))
    long, short = (source.lengths for source in found.sources)
    assert long is not None and short is not None
    assert short.documents_lost == sum(short.documents) == pytest.approx(sum(short.lost))
    assert long.documents_lost == 0 < long.tokens_lost


def test_one_plain_text_has_neither_lengths_nor_a_choice(made: Path) -> None:
    found = data_facts(made / "plain", [])
    assert found is not None
    (source,) = found.sources
    assert (source.format, source.lengths, source.weight) == ("plain text", None, 1.0)
    assert found.summary == "1 document of 1 source was read; nothing was dropped."


def test_manifest_without_counts_gives_what_it_has(run: Callable[[str], Path]) -> None:
    directory = run("run")

    def strip(manifest: dict[str, Any]) -> None:
        for entry in manifest["sources"]:
            for key in ("read", "kept", "dropped"):
                del entry[key]

    change_manifest(directory, strip)
    found = data_facts(directory, [])
    assert found is not None and found.summary == ""
    source = found.sources[0]
    assert (source.read, source.weight) == (None, 0.75)
    assert [name for name, _ in source.facts] == ["format", "training", "validation", "test"]


def test_no_data_is_none_and_damaged_data_is_an_error(run: Callable[[str], Path], tmp_path: Path) -> None:
    assert data_facts(tmp_path, []) is None
    directory = run("run")
    (directory / "data" / "0-train.bin").write_bytes(b"")
    with pytest.raises(OuroborosError, match=r"0-train\.bin has 0 bytes"):
        data_facts(directory, [])


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a/b/code.jsonl", "hf:org/maths"], ["code", "maths"]),
        (["x/a.txt", "y/a.txt", "b"], ["x/a.txt", "y/a.txt", "b"]),
        (["python:", ".hidden", "dir/"], ["python:", ".hidden", "dir"]),
    ],
)
def test_labels_are_short_and_distinct(names: list[str], expected: list[str]) -> None:
    assert module._labels(names) == expected

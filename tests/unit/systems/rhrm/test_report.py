"""What the published R-HRM pipeline would have made of a run's data."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ouroboros.config import DataSpec
from ouroboros.data.prepared import open_prepared
from ouroboros.data.shards import prepare
from ouroboros.recipes import recipe
from ouroboros.report import Section
from ouroboros.report.drawing import drawn
from ouroboros.report.run import Run
from ouroboros.systems.rhrm import data as module
from ouroboros.systems.rhrm.data import published_blocks, shares_of
from ouroboros.systems.rhrm.report import section

BLOCK = 32


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with run directories that hold nothing but prepared data."""
    place = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        for name, count in (("long", 4), ("short", 0)):
            texts = [f"{name} {n} " + "words and more words " * (count and count + n % 9) for n in range(80)]
            Path(f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        Path("notes.txt").write_text("A plain text that is one document. " * 60)
        for name, sources in (("run", ("long.jsonl=3", "short.jsonl")), ("plain", ("notes.txt",))):
            prepare(DataSpec(sources=sources, sequence_length=BLOCK), f"{name}/data")
        prepare(DataSpec(sources=("notes.txt", "long.jsonl"), sequence_length=BLOCK), "mixed/data")
    return place


def section_of(directory: Path) -> Section | None:
    return section(Run(directory, recipe("gpt", "tiny"), []))


def test_documents_shorter_than_a_block_are_lost(made: Path) -> None:
    data, found = open_prepared(made / "run" / "data"), section_of(made / "run")
    assert found is not None
    for index, row in enumerate(found.tables[0].rows):
        sizes = np.diff(data.offsets("train", index)).tolist()
        blocks = [len(published_blocks(size, BLOCK)) for size in sizes]
        assert row[2] == f"{blocks.count(0)} of {len(sizes)}"
        assert row[3] == f"{sum(sizes) - BLOCK * sum(blocks):,} of {sum(sizes):,}"
    assert [row[:2] for row in found.tables[0].rows] == [("long", "100 %"), ("short", "0 %")]
    assert "of 32 tokens here" in found.lead
    assert [chart.title for chart in found.charts] == [
        "Share of the training tokens",
        "What the published cut loses of long",
        "What the published cut loses of short",
    ]
    assert all(drawn(chart).svg for chart in found.charts)


def test_runs_without_a_choice_have_no_section(made: Path, tmp_path: Path) -> None:
    assert section_of(tmp_path) is None and section_of(made / "plain") is None


def test_the_published_filter_counts(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = open_prepared(made / "mixed" / "data")
    means = [
        np.mean([len(published_blocks(size, BLOCK)) for size in np.diff(data.offsets("train", index)).tolist()])
        for index in (0, 1)
    ]
    assert shares_of(data) == pytest.approx([mean / sum(means) for mean in means])
    monkeypatch.setattr(module, "published_accepts", lambda text: not text.startswith("A plain text"))
    assert shares_of(data) == [0.0, 1.0]
    monkeypatch.setattr(module, "published_accepts", lambda text: False)
    assert shares_of(data) is None


def test_many_documents_are_sampled_evenly(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = open_prepared(made / "run" / "data")
    seen: list[str] = []
    monkeypatch.setattr(module, "published_accepts", lambda text: seen.append(text) is None)
    monkeypatch.setattr(module, "MAX_SAMPLED", 5)
    shares_of(data)
    documents = data.documents("train", 0)
    assert len(seen) == 10 and (seen[0].encode(), seen[4].encode()) == (documents[0], documents[-1])

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ouroboros.data.mixtures import MIXTURES, parse_sources
from ouroboros.data.sources import SourceRef
from ouroboros.errors import OuroborosError

NAMES = ("tinygsm", "tiny-codes", "cosmopedia", "metamath")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in NAMES[:3]:
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": "x"}))
    (tmp_path / "metamath.parquet").touch()
    return tmp_path


def test_rhrm_is_four_hub_sources() -> None:
    assert parse_sources(["mix:rhrm"]) == (
        SourceRef("hf:TinyGSM/TinyGSM", 0.40, None, "tinygsm"),
        SourceRef("hf:nampdn-ai/tiny-codes", 0.30, None, "tiny-codes"),
        SourceRef("hf:HuggingFaceTB/cosmopedia-100k", 0.15, None, "cosmopedia"),
        SourceRef("hf:meta-math/MetaMathQA", 0.15, None, "metamath"),
    )


@pytest.mark.parametrize("mixture", sorted(MIXTURES))
def test_weights_sum_to_one(mixture: str) -> None:
    assert sum(part.weight for part in MIXTURES[mixture]) == pytest.approx(1)


def test_files_of_a_directory(folder: Path) -> None:
    refs = parse_sources([f"mix:rhrm:{folder.name}=2", "notes.txt"], base=folder.parent)
    files = ("tinygsm.jsonl", "tiny-codes.jsonl", "cosmopedia.jsonl", "metamath.parquet")
    assert [ref.path for ref in refs[:4]] == [folder / name for name in files]
    assert [ref.weight for ref in refs] == [0.8, 0.6, 0.3, 0.3, 1.0]
    assert [ref.format for ref in refs] == [*NAMES, None]
    assert refs[0].text == f"{folder.name}/tinygsm.jsonl"


def test_weights_and_formats_without_files(tmp_path: Path) -> None:
    refs = parse_sources([f"mix:rhrm:{tmp_path / 'gone'}"], need_files=False)
    assert [(ref.weight, ref.format) for ref in refs] == list(zip((0.4, 0.3, 0.15, 0.15), NAMES, strict=True))


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["mix:rhmr"], "source 'mix:rhmr': unknown mixture 'rhmr'; did you mean 'rhrm'"),
        (["mix:"], "unknown mixture ''; known: rhrm"),
        (["mix:rhrm:"], "no directory after 'mix:rhrm:'"),
        (["mix:rhrm:none"], "source 'mix:rhrm:none': no such directory"),
        (["mix:rhrm=0"], "the weight must be > 0"),
        (["mix:rhrm", "mix:rhrm=2"], "source 'hf:TinyGSM/TinyGSM': named twice"),
        (["hf:a/b", "hf:a/b@qa"], "source 'hf:a/b': named twice"),
        (["mix:rhrm@qa"], "unknown mixture 'rhrm@qa'"),
    ],
)
def test_bad_mixtures(tmp_path: Path, texts: list[str], message: str) -> None:
    with pytest.raises(OuroborosError, match=message):
        parse_sources(texts, base=tmp_path)


def test_a_missing_part_is_named(folder: Path) -> None:
    (folder / "tiny-codes.jsonl").unlink()
    with pytest.raises(OuroborosError, match=r"part 'tiny-codes' is missing: no tiny-codes\.jsonl or tiny-codes\.parq"):
        parse_sources([f"mix:rhrm:{folder}"])

"""The doctor: what it finds here, and what it says is missing where something is."""

import math
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import torch

from ouroboros.verbs import doctor as module

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def little_memory(monkeypatch):
    monkeypatch.setattr(module, "COPIED", 1_000_000)


def test_json_has_versions_processor_peaks_and_what_is_missing(cli):
    found = cli("doctor", "--seconds", "0.01", "--json").json
    assert found["versions"]["torch"] == metadata.version("torch")
    assert found["processor"]["processors"] >= 1 and found["processor"]["torch_uses"]
    rows = found["peaks"]
    assert [row["threads"] for row in rows] == sorted({1, torch.get_num_threads()})
    assert all(math.isfinite(value) and value > 0 for row in rows for value in row.values())
    assert found["training"]["precision"] in ("float32", "bfloat16")
    assert all(one["fix"] for one in found["missing"])


def test_peaks_are_measured_with_one_thread_and_with_all(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    set_to = []
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    assert [row["threads"] for row in module.peaks(0.001)] == [1, 3]
    assert set_to == [1, 3, 3], "as many threads as before, afterwards"


def test_a_processor_that_emulates_bfloat16_is_measured_with_a_small_product(monkeypatch):
    asked = []

    def measure(device, dtype, seconds, size=None):
        asked.append((dtype, size))
        return 1e9 if dtype == torch.bfloat16 else 8e10

    monkeypatch.setattr("ouroboros.train.precision.matmul_peak.__wrapped__", measure)
    rows = module.peaks(0.001)
    assert rows[0]["bfloat16_gflops"] == 1.0 and rows[0]["float32_gflops"] == 80.0
    assert (torch.bfloat16, None) not in asked


def test_the_text_says_it_in_words(cli, monkeypatch):
    monkeypatch.setattr(module, "missing_packages", lambda: iter(()))
    monkeypatch.setattr("ouroboros.train.precision.missing_compiler", lambda device: None)
    text = cli("doctor", "--seconds", "0.001").out
    assert "nothing is missing" in text and "float32 GFLOP/s" in text and metadata.version("torch") in text
    monkeypatch.setattr("ouroboros.train.precision.missing_compiler", lambda device: "none here")
    missing = cli("doctor", "--seconds", "0.001").out.partition("missing:\n")[2]
    assert missing == "  a C++ compiler, for torch.compile, in long training: install g++\n"


def test_packages_that_are_missing_or_of_another_version_are_named(monkeypatch):
    needs = {
        "ouroboros-lm": [
            "torch>=9",
            'gguf>=1; extra == "gguf"',
            'absent; extra == "gguf"',
            'other; sys_platform == "nowhere" and extra == "gguf"',
            'big[part]; extra == "report"',
        ],
        "big": ['deep; extra == "part"', "never-asked"],
    }
    there = {"ouroboros-lm": "0.1.0", "torch": "8.1", "gguf": "1.2", "big": "3"}
    monkeypatch.setattr(metadata, "requires", needs.get)

    def version(name):
        if name not in there:
            raise metadata.PackageNotFoundError(name)
        return there[name]

    monkeypatch.setattr(metadata, "version", version)
    found = {one["for"]: (one["what"], one["fix"]) for one in module.missing_packages()}
    assert found == {
        "ouroboros": ("torch>=9 (installed: 8.1)", "pip install 'ouroboros-lm'"),
        "reading and writing GGUF files": ("absent", "pip install 'ouroboros-lm[gguf]'"),
        "pages about runs": ("deep", "pip install 'ouroboros-lm[report]'"),
    }
    del there["ouroboros-lm"]
    assert [one["what"] for one in module.missing_packages()] == ["ouroboros-lm"]
    assert module.versions()["python"]


def test_every_extra_that_is_named_exists():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert module.EXTRAS.keys() <= project["optional-dependencies"].keys()


def test_a_processor_that_linux_does_not_describe(monkeypatch):
    monkeypatch.setattr(Path, "is_file", lambda path: False)
    found = module.processor()
    assert found["features"] is None and found["name"]


def test_no_time_to_measure_is_refused(cli):
    assert "--seconds must be > 0" in cli("doctor", "--seconds", "0").error(2)

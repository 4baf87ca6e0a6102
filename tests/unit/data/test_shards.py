from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ouroboros.config import DataSpec
from ouroboros.data import shards
from ouroboros.data.shards import prepare
from ouroboros.data.tokenize import byte_tokenizer
from ouroboros.errors import OuroborosError


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a long file and a directory of many files."""
    monkeypatch.chdir(tmp_path)
    Path("long.txt").write_text("".join(f"line {i} of the file\n" for i in range(400)))
    Path("many").mkdir()
    for i in range(120):
        Path(f"many/{i}.py").write_text(f"def f{i}(x):\n    return x + {i}\n")
    return tmp_path


SPEC = DataSpec(sources=("long.txt", "many=0.5"), sequence_length=16)


def tree(path: Path) -> dict[str, str]:
    return {
        p.relative_to(path).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in path.rglob("*")
        if p.is_file()
    }


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_shards_hold_every_document_once(here: Path, tokenizer: str) -> None:
    prepared = prepare(DataSpec(sources=SPEC.sources, tokenizer=tokenizer), "out")
    everything = b""
    for split in ("train", "valid", "test"):
        for source in range(2):
            ids, starts = prepared.tokens(split, source), prepared.offsets(split, source)
            documents = prepared.documents(split, source)
            assert len(starts) == len(documents) + 1
            assert ids[starts[:-1]].tolist() == [prepared.tokenizer.eos_id] * len(documents)
            assert [prepared.tokenizer.decode(ids[a:b]) for a, b in itertools.pairwise(starts)] == documents
            assert (ids == prepared.tokenizer.eos_id).sum() == len(documents)
        everything += b"".join(prepared.documents(split, 0))
    assert everything == Path("long.txt").read_bytes()
    assert sum(prepared.count(split, "documents") for split in ("train", "valid", "test")) == 123
    assert prepared.train_bytes == sum(map(len, prepared.documents("train")))


def test_the_same_input_gives_the_same_bytes(here: Path) -> None:
    spec = DataSpec(sources=SPEC.sources, tokenizer="bpe:300")
    assert prepare(spec, "a").fingerprint == prepare(spec, "b").fingerprint
    assert tree(Path("a")) == tree(Path("b"))


def test_manifest_describes_the_files(here: Path) -> None:
    prepared = prepare(SPEC, "deep/er/out")
    manifest = json.loads(Path("deep/er/out/manifest.json").read_text())
    files = tree(Path("deep/er/out"))
    del files["manifest.json"]
    assert {name: entry["sha256"] for name, entry in manifest["files"].items()} == files
    first = manifest["sources"][0]
    assert (first["text"], first["weight"], first["kind"], first["cut"]) == ("long.txt", 1.0, "file", True)
    assert first["splits"]["train"]["tokens"] == first["splits"]["train"]["bytes"] + 1
    assert prepared.weights == (1.0, 0.5)
    assert prepared.tokens("train", 0).dtype == np.dtype("<u2")


def test_large_vocabularies_use_four_bytes(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.vocab_size = 65_537
    monkeypatch.setattr(shards, "resolve_tokenizer", lambda *args: tokenizer)
    prepared = prepare(SPEC, "out")
    assert prepared.tokens("train", 0).dtype == np.dtype("<u4")
    assert bytes(prepared.tokens("train", 0)[1:10].astype(np.uint8)) == b"line 0 of"


def test_reuse_and_its_refusals(here: Path) -> None:
    prepare(SPEC, "out")
    before = Path("out/0-train.bin").stat().st_mtime_ns
    prepare(DataSpec(sources=SPEC.sources, sequence_length=99), "out")
    assert Path("out/0-train.bin").stat().st_mtime_ns == before
    with pytest.raises(OuroborosError, match=r"prepared with data\.valid_fraction = 0\.05, not 0\.1"):
        prepare(DataSpec(sources=SPEC.sources, valid_fraction=0.1), "out")
    Path("many/7.py").write_text("changed = True\n")
    with pytest.raises(OuroborosError, match="source 'many': has changed"):
        prepare(SPEC, "out")


def test_reuse_notices_a_changed_tokenizer_directory(here: Path) -> None:
    byte_tokenizer().save("tok")
    spec = DataSpec(sources=("long.txt",), tokenizer="tok")
    prepare(spec, "out")
    prepare(spec, "out")
    shards.resolve_tokenizer("bpe:300", [Path("long.txt").read_bytes()]).save("tok")
    with pytest.raises(OuroborosError, match=r"data\.tokenizer 'tok': has changed"):
        prepare(spec, "out")


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (("long.txt", "long.txt=2"), "named twice"),
        (("tiny.txt",), r"source 'tiny\.txt': its training part has 46 bytes; at least 64"),
        (("single.txt",), r"source 'single\.txt': too little text"),
        (("none.txt",), r"source 'none\.txt': no such file"),
        (("long.txt", "whole"), "both held out and in training"),
    ],
)
def test_bad_sources_leave_nothing(here: Path, sources: tuple[str, ...], message: str) -> None:
    Path("tiny.txt").write_text("0123456789" * 5)
    Path("single.txt").write_text("x")
    Path("whole").mkdir()
    for i in range(120):
        Path(f"whole/{i}.txt").write_text(f"some other file {i}\n")
    Path("whole/a.txt").write_bytes(Path("long.txt").read_bytes())
    before = sorted(os.listdir())
    with pytest.raises(OuroborosError, match=message):
        prepare(DataSpec(sources=sources), "out")
    assert sorted(os.listdir()) == before


def test_binary_is_fine_for_bytes_and_named_for_bpe(here: Path) -> None:
    Path("many/99.py").write_bytes(b"ok\xff\xfe" + bytes(range(256)) * 8)
    prepare(DataSpec(sources=("many",)), "out")
    with pytest.raises(OuroborosError, match=r"source 'many': 99\.py: invalid UTF-8 at byte 2; the byte tokenizer"):
        prepare(DataSpec(sources=("many",), tokenizer="bpe:300"), "other")
    assert not Path("other").exists()


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", ["_write_tokens", "_write_manifest"])
def test_interruption_leaves_nothing(
    here: Path, monkeypatch: pytest.MonkeyPatch, step: str, error: BaseException
) -> None:
    before = sorted(os.listdir())

    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr(shards, step, fail)
    expected = OuroborosError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected, match="cannot be written: No space" if isinstance(error, OSError) else None):
        prepare(SPEC, "out")
    assert sorted(os.listdir()) == before


def test_what_a_killed_process_left_is_removed(here: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    dead = Path(f".out.tmp-{socket.gethostname()}-{child.pid}-x")
    alive = Path(f".out.tmp-{socket.gethostname()}-{os.getpid()}-x")
    for path in (dead, alive):
        path.mkdir()
        (path / "0-train.bin").touch()
    prepare(SPEC, "out")
    assert (dead.exists(), alive.exists()) == (False, True)


def test_two_processes_at_once(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The slower one finds the directory in place when it renames, and uses it."""
    write = shards._write_all

    def slow(spec: DataSpec, refs: list, work: Path) -> None:
        write(spec, refs, work)
        monkeypatch.setattr(shards, "_write_all", write)
        prepare(SPEC, "out")

    monkeypatch.setattr(shards, "_write_all", slow)
    assert prepare(SPEC, "out").train_bytes > 0
    assert [name for name in os.listdir() if "tmp" in name] == []


def test_occupied_directories(here: Path) -> None:
    Path("full").mkdir()
    Path("full/x").touch()
    Path("empty").mkdir()
    for name in ("full", "long.txt"):
        with pytest.raises(OuroborosError, match="exists and holds no prepared data"):
            prepare(SPEC, name)
    assert prepare(SPEC, "empty").train_bytes > 0
    with pytest.raises(OuroborosError, match="cannot be written"):
        prepare(SPEC, "long.txt/out")


def test_output_inside_a_source(here: Path) -> None:
    with pytest.raises(OuroborosError, match="'many/run/data': lies inside the source 'many'"):
        prepare(DataSpec(sources=("many",)), "many/run/data")
    assert not Path("many/run").exists()


def test_torch_is_not_imported(here: Path) -> None:
    code = (
        "import sys; from ouroboros.config import DataSpec; from ouroboros.data import prepare, WindowLoader;"
        "p = prepare(DataSpec(sources=('long.txt',)), 'out');"
        "WindowLoader(p, batch_size=2, sequence_length=8, seed=0).next_batch();"
        "sys.exit(' '.join({'torch', 'transformers', 'datasets', 'pyarrow'} & set(sys.modules)) or 0)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")

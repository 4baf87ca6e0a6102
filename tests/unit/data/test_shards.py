from __future__ import annotations

import errno
import gzip
import hashlib
import itertools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, normalizers
from transformers import PreTrainedTokenizerFast

from ouroboros.config import DataSpec, FilterSpec
from ouroboros.data import shards
from ouroboros.data.documents import read_documents
from ouroboros.data.records import Document
from ouroboros.data.shards import prepare
from ouroboros.data.sources import parse_source
from ouroboros.data.splits import part_of
from ouroboros.data.tokenize import byte_tokenizer, train_bpe
from ouroboros.errors import OuroborosError
from ouroboros.registry import found


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


@pytest.mark.parametrize("tokenizer", ["bytes", "chars", "bpe:300"])
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
    assert prepared.count("train", "bytes") == sum(map(len, prepared.documents("train")))


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
    assert (first["text"], first["weight"], first["kind"]) == ("long.txt", 1.0, "file")
    assert first["splits"]["train"]["tokens"] == first["splits"]["train"]["bytes"] + 1
    assert prepared.weights == (1.0, 0.5)
    assert prepared.tokens("train", 0).dtype == np.dtype("<u2")


def records(path: str, texts: list[str | None]) -> None:
    Path(path).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def test_manifest_counts_what_was_dropped(here: Path, caplog: pytest.LogCaptureFixture) -> None:
    records("r.jsonl", [*(f"record number {i}" for i in range(200)), None, "ab", "x" * 99, "", "cd"])
    caplog.set_level("INFO")
    spec = DataSpec(sources=("r.jsonl",), filters=FilterSpec(min_characters=3, max_characters=50))
    entry = prepare(spec, "out").manifest["sources"][0]
    assert (entry["read"], entry["kept"]) == (205, 200)
    assert entry["dropped"] == {"long": 1, "no text": 2, "short": 2}
    assert "source 'r.jsonl': 205 read, 200 kept, 2 no text, 2 short, 1 long" in caplog.text
    assert "more than half" not in caplog.text


def test_whatever_is_dropped_is_said(here: Path, caplog: pytest.LogCaptureFixture) -> None:
    records("full.jsonl", [f"record number {i}" for i in range(200)])
    records("r.jsonl", [*(f"number {i} of the records" for i in range(200)), None])
    prepare(DataSpec(sources=("full.jsonl", "r.jsonl")), "out")
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warnings == ["source 'r.jsonl': 201 read, 200 kept, 1 no text"]


def test_losing_most_of_a_source_is_warned_of(here: Path, caplog: pytest.LogCaptureFixture) -> None:
    records("r.jsonl", [*(f"record number {i}" for i in range(50)), *("x" * 60 for _ in range(51))])
    prepare(DataSpec(sources=("r.jsonl",), filters=FilterSpec(max_characters=50)), "out")
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1
    assert "source 'r.jsonl': 101 read, 50 kept, 51 long; more than half was dropped" in warnings[0]


def test_filters_off_change_nothing(here: Path) -> None:
    off = prepare(DataSpec(sources=SPEC.sources, filters=FilterSpec(symbol_rule="ascii")), "off")
    assert off.fingerprint == prepare(SPEC, "plain").fingerprint


def test_only_the_head_of_a_stream_is_read(here: Path) -> None:
    records("r.jsonl", [f"record number {i}" for i in range(1000)])
    spec = DataSpec(sources=("r.jsonl",), stream=True, max_bytes=5000, tokenizer="bpe:300")
    prepared = prepare(spec, "out")
    entry = prepared.manifest["sources"][0]
    everything = [text for split in ("train", "valid", "test") for text in prepared.documents(split)]
    assert len(everything) == entry["read"] == entry["kept"] < 400
    assert 5000 <= sum(map(len, everything)) < 5020
    assert sorted(everything) == sorted(b"record number %d" % i for i in range(len(everything)))
    for split in ("train", "valid", "test"):
        documents = [Document("", text) for text in prepared.documents(split)]
        assert {part_of(document, 0.05, 0.05) for document in documents} == {split}
    assert prepare(spec, "again").fingerprint == prepared.fingerprint
    records("r.jsonl", [f"record number {i}" for i in range(900)])
    prepared.check_sources()


def test_a_stream_that_cannot_be_divided(here: Path) -> None:
    with pytest.raises(OuroborosError, match=r"source 'long\.txt': the 1 documents .* raise data\.valid_fraction"):
        prepare(DataSpec(sources=("long.txt",), stream=True), "out")
    assert not Path("out").exists()


def test_large_vocabularies_use_four_bytes(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.vocab_size = 65_537
    monkeypatch.setattr(shards, "resolve_tokenizer", lambda *args, **options: tokenizer)
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


def test_characters_are_those_of_the_training_part(here: Path, caplog: pytest.LogCaptureFixture) -> None:
    Path("long.txt").write_text("plain text\n" * 1000 + "$\u20ac$\n")
    spec = DataSpec(sources=("long.txt",), tokenizer="chars")
    prepared = prepare(spec, "out")
    assert "long.txt: long.txt[10461:11006]: 3 of 543 characters are unknown to this tokenizer ('$' x 2" in caplog.text
    assert prepared.manifest["tokenizer"]["kind"] == "chars"
    assert prepared.tokenizer.vocab_size == len(set("plain text\n")) + 2
    assert (prepared.tokens("test", 0) == prepared.tokenizer.unknown_id).sum() == 3
    assert prepared.documents("test")[0].endswith("$\u20ac$\n".encode())
    assert prepare(spec, "out").fingerprint == prepared.fingerprint


@pytest.mark.parametrize("name", found("sources"))
def test_a_text_that_is_made_has_three_parts(here: Path, name: str) -> None:
    prepared = prepare(DataSpec(sources=(f"{name}:",), tokenizer="chars"), "out")
    (source,) = prepared.manifest["sources"]
    assert source["kind"] == name
    parts = [prepared.documents(split) for split in ("train", "valid", "test")]
    (whole,) = (document.data for document in read_documents(parse_source(f"{name}:"), SPEC))
    assert b"".join(itertools.chain(*parts)) == whole
    assert [len(part[0]) / len(whole) for part in parts] == pytest.approx([0.9, 0.05, 0.05], abs=1e-4)
    assert prepared.tokenizer.vocab_size == len(set(whole)) + 2


def test_reuse_notices_a_changed_tokenizer_directory(here: Path) -> None:
    byte_tokenizer().save("tok")
    spec = DataSpec(sources=("long.txt",), tokenizer="tok")
    prepare(spec, "out")
    prepare(spec, "out")
    shards.resolve_tokenizer("bpe:300", [Path("long.txt").read_bytes()]).save("tok")
    with pytest.raises(OuroborosError, match=r"data\.tokenizer 'tok': has changed"):
        prepare(spec, "out")


def test_a_run_that_goes_on_finds_its_tokenizer_or_its_copy(
    here: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    byte_tokenizer().save("tok")
    spec = DataSpec(sources=("long.txt",), tokenizer="tok")
    out = prepare(spec, "out").directory.resolve()
    Path("other").mkdir()
    monkeypatch.chdir("other")
    prepare(spec, out, resumed=True)
    with pytest.raises(OuroborosError, match=r"source 'long\.txt': no such file"):
        prepare(spec, out)
    assert caplog.text == ""
    Path("../tok").rename("../gone")
    prepare(spec, out, resumed=True)
    assert "tokenizer 'tok': is not at" in caplog.text and "the run goes on with its own copy" in caplog.text
    shards.resolve_tokenizer("bpe:300", [Path("../long.txt").read_bytes()]).save("tok")
    with pytest.raises(OuroborosError, match=r"data\.tokenizer 'tok': has changed"):
        prepare(spec, out, resumed=True)


def test_compressed_sources_have_the_text_they_hold(here: Path) -> None:
    text = Path("long.txt").read_bytes()
    Path("packed.gz").write_bytes(gzip.compress(text, 1))
    spec = DataSpec(sources=("packed.gz",))
    prepared = prepare(spec, "out")
    assert prepared.documents("train") == prepare(DataSpec(sources=("long.txt",)), "plain").documents("train")
    Path("packed.gz").write_bytes(gzip.compress(text, 9))
    prepare(spec, "out")  # the same text
    Path("packed.gz").write_bytes(gzip.compress(text[1:]))
    with pytest.raises(OuroborosError, match=r"source 'packed\.gz': has changed"):
        prepare(spec, "out")


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (("long.txt", "long.txt=2"), "named twice"),
        (("tiny.txt",), r"source 'tiny\.txt': its training part has 46 bytes; at least 64 are needed; use a longer"),
        (
            ("single.txt",),
            r"source 'single\.txt': too little text: the valid part of 1 bytes would be empty; use a longer",
        ),
        (("none.txt",), r"source 'none\.txt': no such file"),
        (("long.txt", "whole"), "both held out and in training"),
        (("mix:rhrm:many",), r"part 'tinygsm' is missing: no tinygsm\.jsonl"),
        (("hf:me/set",), r"source 'hf:me/set': needs data\.stream or data\.max_bytes"),
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


def test_binary_is_fine_for_bytes_and_named_for_text(here: Path) -> None:
    Path("many/99.py").write_bytes(b"ok\xff\xfe" + bytes(range(256)) * 8)
    prepare(DataSpec(sources=("many",)), "out")
    for tokenizer in ("bpe:300", "chars"):
        with pytest.raises(OuroborosError, match=r"source 'many': 99\.py: invalid UTF-8 at byte 2; the byte tokenizer"):
            prepare(DataSpec(sources=("many",), tokenizer=tokenizer), "other")
    assert not Path("other").exists()


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", ["_write_tokens", "sha256_of"])
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
    alive = Path(f".out.tmp-{socket.gethostname()}-{os.getppid()}-x")
    for path in (dead, alive):
        path.mkdir()
        (path / "0-train.bin").touch()
    prepare(SPEC, "out")
    assert (dead.exists(), alive.exists()) == (False, True)


def test_two_processes_at_once(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The slower one finds the directory in place when it renames, and uses it."""
    write = shards._write_all

    def slow(*arguments: Any) -> None:
        write(*arguments)
        monkeypatch.setattr(shards, "_write_all", write)
        prepare(SPEC, "out")

    monkeypatch.setattr(shards, "_write_all", slow)
    assert prepare(SPEC, "out").count("train", "bytes") > 0
    assert [name for name in os.listdir() if "tmp" in name] == []


def test_occupied_directories(here: Path) -> None:
    Path("full").mkdir()
    Path("full/x").touch()
    Path("empty").mkdir()
    for name in ("full", "long.txt"):
        with pytest.raises(OuroborosError, match="exists and holds no prepared data"):
            prepare(SPEC, name)
    assert prepare(SPEC, "empty").count("train", "bytes") > 0
    with pytest.raises(OuroborosError, match="cannot be written"):
        prepare(SPEC, "long.txt/out")


def test_output_inside_a_source(here: Path) -> None:
    with pytest.raises(OuroborosError, match="'many/run/data': lies inside the source 'many'"):
        prepare(DataSpec(sources=("many",)), "many/run/data")
    assert not Path("many/run").exists()
    Path("links").mkdir()
    Path("links/to").symlink_to("../many")
    with pytest.raises(OuroborosError, match="'many/run/data': lies inside the source 'links'"):
        prepare(DataSpec(sources=("links",)), "many/run/data")


def test_torch_is_not_imported(here: Path) -> None:
    code = (
        "import sys; from ouroboros.config import DataSpec; from ouroboros.data.loader import WindowLoader;"
        "from ouroboros.data.shards import prepare;"
        "p = prepare(DataSpec(sources=('long.txt',)), 'out');"
        "WindowLoader(p, batch_size=2, sequence_length=8, seed=0).next_batch();"
        "sys.exit(' '.join({'torch', 'transformers', 'datasets', 'pyarrow'} & set(sys.modules)) or 0)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")


def test_loss_on_answers_adds_a_mask_and_changes_nothing_else(here: Path) -> None:
    rows = [{"q": f"What is {i}?", "a": f"It is {i}."} for i in range(99)]
    Path("qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = ("qa.jsonl@Q: {q}\\nA: {a}", "long.txt")
    plain = prepare(DataSpec(sources=sources), "plain")
    masked = prepare(DataSpec(sources=sources, loss="answers"), "masked")
    before, after = tree(Path("plain")), tree(Path("masked"))
    assert after.keys() - before.keys() == {"0-train.loss", "1-train.loss"}
    assert [name for name in before if before[name] != after[name]] == ["manifest.json"]
    ids, learned = plain.tokens("train", 0), masked.learned(0)
    assert learned is not None and plain.learned(0) is None and len(learned) == len(ids)
    answers = "".join(f" {row['a']}\n" for row in rows)
    shown = np.where(ids == 256, ord("\n"), ids)[learned].astype(np.uint8).tobytes().decode()
    assert shown and all(line in answers for line in shown.splitlines(keepends=True)[:-1])
    assert len(shown.splitlines()) == masked.manifest["sources"][0]["splits"]["train"]["documents"]
    text = masked.learned(1)
    assert text is not None and text[1:].all()
    with pytest.raises(OuroborosError, match=r"was prepared with data\.loss = 'answers', not 'all'"):
        prepare(DataSpec(sources=sources), "masked")


def test_few_conversations_are_cut_with_their_answers(here: Path) -> None:
    turns = [{"role": role, "content": f"{role} {i} " + "x" * 40} for i in range(30) for role in ("user", "assistant")]
    Path("c.jsonl").write_text(json.dumps({"messages": turns}))
    prepared = prepare(DataSpec(sources=("c.jsonl@messages",), loss="answers"), "out")
    learned = prepared.learned(0)
    assert learned is not None
    said = np.asarray(prepared.tokens("train", 0))[learned].astype(np.uint8).tobytes().decode()
    assert said.startswith(f" assistant 0 {'x' * 40}\nUser: assistant 1 xxx") and "Assistant:" not in said


def test_loss_on_answers_needs_some(here: Path) -> None:
    for stream in (False, True):
        with pytest.raises(OuroborosError, match="data.loss 'answers' changes nothing: no source has questions"):
            prepare(DataSpec(sources=("many",), loss="answers", stream=stream), "out")
    assert not Path("out").exists()


def test_bad_records_are_left_out_counted_and_named(here: Path, caplog: pytest.LogCaptureFixture) -> None:
    records("r.jsonl", [f"record number {i}" for i in range(200)])
    with Path("r.jsonl").open("a") as file:
        file.write('{"text": "cut off he\n' * 15)
    with pytest.raises(OuroborosError, match=r"r\.jsonl:201: not JSON.*data\.skip_bad_records leaves such records out"):
        prepare(DataSpec(sources=("r.jsonl",)), "out")
    prepared = prepare(DataSpec(sources=("r.jsonl",), skip_bad_records=True), "out")
    assert prepared.manifest["sources"][0]["dropped"] == {"bad record": 15}
    assert caplog.text.count("left out (data.skip_bad_records)") == 10
    assert "r.jsonl:201: not JSON" in caplog.text and "215 read, 200 kept, 15 bad record" in caplog.text
    caplog.clear()
    prepared.check_sources()
    assert not caplog.records
    assert not prepare(DataSpec(sources=("r.jsonl",)), "out").spec.skip_bad_records


def test_a_tokenizer_that_loses_text_is_refused(here: Path) -> None:
    backend = Tokenizer.from_str(train_bpe([b"line 0 of some text\n" * 20], 300).backend.to_str())
    backend.normalizer = normalizers.Replace("file", "fil")
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>").save_pretrained("upper")
    with pytest.raises(OuroborosError, match=r"data\.tokenizer 'upper': loses text: .* of long\.txt: long\.txt\["):
        prepare(DataSpec(sources=("long.txt",), tokenizer="upper"), "out")
    assert not Path("out").exists()

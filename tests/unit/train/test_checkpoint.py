"""Checkpoints: complete or absent, altered bytes found, the last good one kept."""

import errno
import json
import logging
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import safetensors.torch
import torch

import ouroboros
from ouroboros.errors import OuroborosError
from ouroboros.train import checkpoint
from ouroboros.train.checkpoint import MARKER, load, load_newest, retain, save, verify

DEAD_PID = 2**22 + 1  # above Linux's largest process id


def write(root: Path, step: int, value: float | None = None) -> Path:
    tensor = torch.full((2,), float(step if value is None else value))
    return save(root, step, files={"model.safetensors": {"w": tensor}}, documents={"state.json": {"step": step}})


def value(root: Path) -> float:
    return load_newest(root).tensors("model.safetensors")["w"][0].item()


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def flip(file: Path, position: int = 0, mask: int = 1) -> None:
    raw = bytearray(file.read_bytes())
    raw[position] ^= mask
    file.write_bytes(raw)


def test_round_trip_with_extra_files(tmp_path):
    root = tmp_path / "run" / "checkpoints"
    tensors = {
        "a": torch.randn(3, 4).T,  # not contiguous
        "step": torch.tensor(7.0),
        "b": torch.arange(5, dtype=torch.int64),
        "h": torch.randn(3, dtype=torch.bfloat16),
        "none": torch.zeros(0, 2),
        "p": torch.nn.Parameter(torch.ones(2)),
    }

    def extra(folder: Path) -> None:
        (folder / "tokenizer").mkdir()
        (folder / "tokenizer" / "vocab.txt").write_text("x")

    documents = {"state.json": {"loss": 0.1 + 0.2, "list": [1, None, True, "é"]}, "config.json": {}}
    path = save(root, 123, files={"model.safetensors": tensors}, documents=documents, extra=extra)
    assert path == root / "step-00000123" and verify(path) == []
    found = load_newest(root)
    assert (found.path, found.step, found.documents) == (path, 123, documents)
    read = found.tensors("model.safetensors")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype
        assert read[name].data_ptr() % 64 == 0, "where the file has it, products would add up in another order"
    assert (path / "tokenizer" / "vocab.txt").read_text() == "x"
    with pytest.raises(OuroborosError, match=r"has no file ema\.safetensors"):
        found.tensors("ema.safetensors")


def test_same_content_same_bytes_and_readable_by_others(tmp_path):
    previous = os.umask(0o022)
    try:
        one, two = (
            save(
                tmp_path / name,
                1,
                files={"m.safetensors": dict(items)},
                documents={"s.json": dict(items2)},
            )
            for name, items, items2 in [
                ("x", [("a", torch.ones(2)), ("b", torch.zeros(3))], [("p", 1), ("q", 2)]),
                ("y", [("b", torch.zeros(3)), ("a", torch.ones(2))], [("q", 2), ("p", 1)]),
            ]
        )
    finally:
        os.umask(previous)
    assert names(one) == names(two) == [MARKER, "m.safetensors", "s.json"]
    for file in one.iterdir():
        assert file.read_bytes() == (two / file.name).read_bytes()
        assert file.stat().st_mode & 0o777 == 0o644


def test_every_flipped_byte_and_every_truncation_is_found(tmp_path):
    path = write(tmp_path, 5)
    for file in sorted(path.iterdir()):
        raw = file.read_bytes()
        for position in range(len(raw)):
            mask = (0x01, 0x20, 0x80)[position % 3]
            flip(file, position, mask)
            assert verify(path), f"{file.name}: byte {position} ^ {mask:#x} was not noticed"
            file.write_bytes(raw)
        for length in range(len(raw)):
            file.write_bytes(raw[:length])
            assert verify(path), f"{file.name}: cut at {length} was not noticed"
        file.write_bytes(raw + b" ")
        assert verify(path)
        file.unlink()
        assert verify(path)
        file.write_bytes(raw)
        assert verify(path) == []


def test_damaged_newest_falls_back_with_a_warning_that_names_the_file(tmp_path, caplog):
    write(tmp_path, 1)
    newest = write(tmp_path, 2)
    flip(newest / "model.safetensors", -1)
    with caplog.at_level(logging.WARNING):
        assert load_newest(tmp_path).step == 1
    assert str(newest / "model.safetensors") in caplog.text and "altered" in caplog.text


def test_without_a_good_checkpoint_each_fault_is_listed(tmp_path):
    with pytest.raises(OuroborosError, match="no checkpoint there"):
        load_newest(tmp_path / "missing")
    one, two = write(tmp_path, 1), write(tmp_path, 2)
    (one / "state.json").unlink()
    (two / MARKER).unlink()
    with pytest.raises(OuroborosError) as caught:
        load_newest(tmp_path)
    assert str(one / "state.json") in str(caught.value) and str(two / MARKER) in str(caught.value)


def rewrite_marker(path: Path, **changes: object) -> None:
    body = json.loads((path / MARKER).read_text())
    del body["sha256"]
    (path / MARKER).write_bytes(checkpoint._marker_bytes({**body, **changes}))


def test_a_later_format_is_refused_not_skipped(tmp_path):
    write(tmp_path, 1)
    rewrite_marker(write(tmp_path, 2), format_version=2)
    with pytest.raises(OuroborosError, match="checkpoint format 2, this version of ouroboros reads 1"):
        load_newest(tmp_path)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname"])
def test_a_marker_cannot_point_outside(tmp_path, name):
    path = write(tmp_path, 1)
    rewrite_marker(path, files={name: {"size": 1, "sha256": ""}})
    with pytest.raises(OuroborosError, match="leaves the directory"):
        load(path)


def test_a_renamed_checkpoint_is_refused(tmp_path):
    write(tmp_path, 1).rename(tmp_path / "step-00000009")
    with pytest.raises(OuroborosError, match="does not match the step inside, 1"):
        load_newest(tmp_path)


def test_saving_the_same_step_again_replaces_it(tmp_path):
    write(tmp_path, 1, 10.0)
    flip(write(tmp_path, 2, 20.0) / "state.json")
    write(tmp_path, 2, 30.0)
    assert value(tmp_path) == 30.0 and names(tmp_path) == ["step-00000001", "step-00000002"]


def test_a_replacement_that_was_interrupted_keeps_the_old_one(tmp_path):
    path = write(tmp_path, 2, 20.0)
    hidden = tmp_path / f".step-00000002.old-{DEAD_PID}"
    path.rename(hidden)
    assert retain(tmp_path, 1) == [] and value(tmp_path) == 20.0
    write(tmp_path, 2, 30.0)
    assert value(tmp_path) == 30.0
    retain(tmp_path, 1)
    assert names(tmp_path) == ["step-00000002"]


def test_steps_beyond_eight_digits_sort_by_number(tmp_path):
    write(tmp_path, 99_999_999, 1.0)
    write(tmp_path, 100_000_000, 2.0)
    assert value(tmp_path) == 2.0


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_disk_as_text(*args, **kwargs):
    raise Exception("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("fault", [full_disk, full_disk_as_text])
@pytest.mark.parametrize("place", ["tensors", "documents", "extra", "fsync", "rename", "mkdir"])
def test_a_full_disk_leaves_the_earlier_checkpoints_alone(tmp_path, monkeypatch, place, fault):
    write(tmp_path, 1)
    extra = None
    with monkeypatch.context() as patch:
        if place == "tensors":
            patch.setattr(safetensors.torch, "save_file", fault)
        elif place == "extra":
            extra = fault
        else:
            owner, name = {
                "documents": (Path, "write_bytes"),
                "fsync": (os, "fsync"),
                "rename": (Path, "rename"),
                "mkdir": (Path, "mkdir"),
            }[place]
            patch.setattr(owner, name, full_disk)
        with pytest.raises(OuroborosError, match=r"step-00000002: No space left on device; earlier .* untouched"):
            save(tmp_path, 2, files={"m.safetensors": {"w": torch.ones(1)}}, documents={"s.json": 1}, extra=extra)
    assert names(tmp_path) == ["step-00000001"] and value(tmp_path) == 1.0


def test_a_failed_replacement_keeps_the_replaced(tmp_path, monkeypatch):
    write(tmp_path, 1, 10.0)
    rename = Path.rename

    def fail_for_temporaries(self, target):
        if ".tmp-" in self.name:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail_for_temporaries)
        with pytest.raises(OuroborosError, match="Read-only file system"):
            write(tmp_path, 1, 20.0)
    assert names(tmp_path) == ["step-00000001"] and value(tmp_path) == 10.0


def test_a_root_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OuroborosError, match=r"file/checkpoints/step-00000001: Not a directory"):
        write(tmp_path / "file" / "checkpoints", 1)


def test_a_bug_in_extra_is_not_disguised_and_leaves_nothing(tmp_path):
    def extra(folder: Path) -> None:
        raise KeyError("bug")

    with pytest.raises(KeyError):
        save(tmp_path, 1, files={}, documents={}, extra=extra)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("files", "documents", "message"),
    [
        ({}, {"s.json": {"loss": float("nan")}}, r"s\.json is not JSON"),
        ({}, {"s.json": {"x": object()}}, r"s\.json is not JSON"),
    ],
)
def test_what_cannot_be_saved_is_named(tmp_path, files, documents, message):
    with pytest.raises(OuroborosError, match=message):
        save(tmp_path, 1, files=files, documents=documents)
    assert names(tmp_path) == []


def test_tensors_that_share_memory_are_refused(tmp_path):
    shared = torch.ones(2)
    with pytest.raises(OuroborosError, match=r"model\.safetensors: Some tensors share memory"):
        save(tmp_path, 1, files={"model.safetensors": {"a": shared, "b": shared}}, documents={})
    assert names(tmp_path) == []


def test_retention_keeps_the_last_and_the_best(tmp_path):
    for step in (1, 2, 3, 4):
        write(tmp_path, step)
    removed = retain(tmp_path, 2, None, 1)
    assert removed == [tmp_path / "step-00000002"]
    assert names(tmp_path) == ["step-00000001", "step-00000003", "step-00000004"]
    retain(tmp_path, 1, 99)
    assert names(tmp_path) == ["step-00000004"]
    assert retain(tmp_path, 0) == [] and names(tmp_path) == ["step-00000004"]


def test_retention_never_removes_the_last_good_one(tmp_path, caplog):
    write(tmp_path, 1)
    for step in (2, 3):  # damage that file sizes do not show
        flip(write(tmp_path, step) / "model.safetensors", -1)
    assert retain(tmp_path, 2) == [] and "every checkpoint to keep is damaged" in caplog.text
    assert value(tmp_path) == 1.0


def test_incomplete_checkpoints_do_not_count(tmp_path):
    write(tmp_path, 1)
    (write(tmp_path, 2) / MARKER).unlink()
    write(tmp_path, 3)
    assert retain(tmp_path, 2) == []
    assert names(tmp_path) == ["step-00000001", "step-00000002", "step-00000003"]


def test_leftovers_of_dead_processes_are_removed(tmp_path):
    write(tmp_path, 1)
    alive = f".step-00000002.tmp-{os.getppid()}"
    for name in (f".step-00000002.tmp-{DEAD_PID}", f".step-00000002.tmp-{os.getpid()}", alive, "notes"):
        (tmp_path / name).mkdir()
    retain(tmp_path, 1)
    assert names(tmp_path) == [alive, "notes", "step-00000001"]
    assert retain(tmp_path / "missing", 1) == []


def test_a_removal_that_fails_is_reported_and_harmless(tmp_path, monkeypatch, caplog):
    write(tmp_path, 1)
    write(tmp_path, 2)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", full_disk)
        retain(tmp_path, 1)
    assert "cannot remove old checkpoint" in caplog.text and value(tmp_path) == 2.0


KILLER = """
    import json, os, random, signal, sys, time
    from pathlib import Path
    import torch
    from ouroboros.train.checkpoint import load_newest, retain, save

    root, rounds = Path(sys.argv[1]), 0

    def write(step):
        tensors = {name: torch.full((40_000,), float(step)) for name in "ab"}
        save(root, step, files={"model.safetensors": tensors}, documents={"state.json": {"step": step}})

    write(1)
    begun = time.perf_counter()
    write(1)
    span = time.perf_counter() - begun  # disks differ, and a kill is to fall within a save
    random.seed(0)
    torn = 0
    newest = load_newest(root)
    while rounds < 20 or (rounds < 300 and (torn < 5 or newest.step < 5)):
        rounds += 1
        newest = load_newest(root)
        child = os.fork()
        if child == 0:
            step = newest.step
            while True:
                write(step)  # the first one replaces a checkpoint
                step += 1
                retain(root, 2)
        time.sleep(random.uniform(0.1, 4) * span)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        torn += any(path.name.startswith(".") for path in root.iterdir())
        found = load_newest(root)
        assert found.step >= newest.step, (found.step, newest.step)
        span *= 1.1 if found.step == newest.step else 0.95  # a busy machine saves more slowly than at first
        assert found.documents["state.json"] == {"step": found.step}
        for tensor in found.tensors("model.safetensors").values():
            assert torch.equal(tensor, torch.full((40_000,), float(found.step)))
    print(json.dumps({"torn": torn, "step": found.step}))
"""


def test_a_kill_at_any_instant_leaves_a_loadable_newest(tmp_path):
    source = Path(ouroboros.__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLER), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert "DAMAGED" not in done.stderr
    result = json.loads(done.stdout)
    assert result["torn"] >= 5 and result["step"] >= 5, result  # the kills fell within saves, and saves succeeded

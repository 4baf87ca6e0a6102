"""Checkpoint files: read without running code, or refused with what is wrong."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ouroboros.convert.checkpoint import Checkpoint, published_name, read
from ouroboros.errors import OuroborosError

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}


@pytest.mark.parametrize("name", ["best_model.pth", "old.pt", "pytorch_model.bin", "weights.safetensors"])
def test_files_are_read(name, tmp_path):
    path = tmp_path / name
    if path.suffix == ".safetensors":
        save_file(TENSORS, path)
    else:
        torch.save(TENSORS, path, _use_new_zipfile_serialization=path.suffix != ".pt")
    found = read(path)
    assert found.path == path and found.tensors().keys() == TENSORS.keys()
    assert all(torch.equal(found.tensors()[name], tensor) for name, tensor in TENSORS.items())


def test_a_directory_stands_for_its_weights(tmp_path):
    torch.save({"old": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    assert read(tmp_path).path == tmp_path / "pytorch_model.bin"
    save_file(TENSORS, tmp_path / "model.safetensors")
    assert read(tmp_path).content.keys() == TENSORS.keys()


def test_plain_containers_pass_but_are_no_tensors():
    """A system may keep its settings in the same file."""
    checkpoint = Checkpoint(path=Path("x.pt"), content={"state": {"w": torch.zeros(1)}, "step": 3})
    with pytest.raises(OuroborosError, match="entry 'state' is a dict, not a tensor"):
        checkpoint.tensors()


def test_the_prefix_of_compiled_models_goes(tmp_path):
    names = {"_orig_mod.a.b": "a.b", "a._orig_mod.b": "a.b", "a.b": "a.b"}
    assert {name: published_name(name) for name in names} == names
    torch.save({"_orig_mod.a": torch.zeros(1)}, tmp_path / "x.pt")
    assert read(tmp_path / "x.pt").tensors().keys() == {"a"}


class Harmful:
    """Would make a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["best_model.pth", "pytorch_model.bin"])
def test_a_pickle_that_would_run_code_is_refused_and_not_run(name, tmp_path):
    torch.save({**TENSORS, "harm": Harmful(tmp_path / "ran")}, tmp_path / name)
    with pytest.raises(OuroborosError, match="it holds more than tensors, and reading it could run code") as caught:
        read(tmp_path / name)
    assert not (tmp_path / "ran").exists() and "\n" not in str(caught.value)


def test_other_files_say_what_is_supported(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    for name in ("empty.pth", "bad.safetensors"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "text.pt").write_text("hello, I am no checkpoint")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    torch.save({}, tmp_path / "nothing.pth")
    torch.save({3: torch.zeros(1)}, tmp_path / "numbers.pth")
    for name in ("none", "parts"):
        (tmp_path / name).mkdir()
    (tmp_path / "parts" / "model.safetensors.index.json").write_text("{}")
    for name, words in (
        ("nowhere.pth", "no such file of weights; give a published checkpoint"),
        ("notes.txt", r"no such file of weights; give .*\.safetensors.* or a directory with model.safetensors"),
        ("empty.pth", "cannot be read: ."),
        ("text.pt", "cannot be read: ."),
        ("bad.safetensors", "cannot be read: ."),
        ("list.pth", "holds no dictionary of tensors"),
        ("nothing.pth", "holds no dictionary of tensors"),
        ("numbers.pth", "holds no dictionary of tensors"),
        ("none", "none: its weights are not in one file; give "),
        ("parts", r"not in one file \(model.safetensors.index.json\): save them as one"),
    ):
        with pytest.raises(OuroborosError, match=words) as caught:
            read(tmp_path / name)
        assert "\n" not in str(caught.value)

"""What the standalone export writes, and what it refuses before it writes anything."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ouroboros.api import build, open_model
from ouroboros.config import ModelSpec, Recipe
from ouroboros.config.parts.loop import ContractiveStepSpec
from ouroboros.convert import standalone_run
from ouroboros.convert.standalone import to_standalone
from ouroboros.data.tokenize import TextTokenizer, byte_tokenizer, character_tokenizer
from ouroboros.errors import OuroborosError
from ouroboros.pack.artifact import expected_tensors
from ouroboros.pack.write import write_artifact
from ouroboros.recipes import recipe

SPEC = recipe("loop", "tiny").model.replace(hidden_size=16, max_position_embeddings=64)


def packed(path: Path, spec: ModelSpec = SPEC, tokenizer: TextTokenizer | None = None, end: int = 256) -> Path:
    torch.manual_seed(0)
    weights = build(Recipe(name="x", model=spec)).state_dict()
    tensors = {name: weights[name].half() for name in expected_tensors(spec)}
    write_artifact(path, spec, tensors, tokenizer or byte_tokenizer(), eos_token_id=end)
    return path


def test_both_files_are_copies(tmp_path: Path) -> None:
    source, out = packed(tmp_path / "a.pack"), tmp_path / "out"
    made = to_standalone(source, open_model(source).model, out, byte_tokenizer())
    assert sorted(path.name for path in out.iterdir()) == ["model.pack", "run.py"]
    assert (out / "model.pack").read_bytes() == source.read_bytes()
    assert (out / "run.py").read_bytes() == Path(standalone_run.__file__).read_bytes()
    sizes = [path.stat().st_size for path in sorted(out.iterdir())]
    assert [made.facts[name] for name in ("artifact_bytes", "script_bytes", "bytes")] == [*sizes, sum(sizes)]
    assert 0 <= made.proof.difference <= 1e-5 and made.proof.tokens == 64
    assert f"{sum(sizes):,} bytes in all; logits on 64 random tokens differ by" in made.describe()


def test_refusals(tmp_path: Path) -> None:
    source, out = packed(tmp_path / "a.pack"), tmp_path / "out"
    model = open_model(source).model
    with pytest.raises(
        OuroborosError, match="is a directory, and --to standalone takes a packed file: `ouroboros pack"
    ):
        to_standalone(tmp_path, model, out, byte_tokenizer())
    with pytest.raises(OuroborosError, match="--no-tokenizer has no meaning"):
        to_standalone(source, model, out, None)
    part = packed(tmp_path / "b.pack", SPEC.replace(loop=(ContractiveStepSpec(),)))
    with pytest.raises(OuroborosError, match=r"b.pack: model.loop is 'contractive', where the .* knows inject, emb"):
        to_standalone(part, open_model(part).model, out, byte_tokenizer())
    tokenizer = character_tokenizer([b"abc"])
    characters = packed(tmp_path / "c.pack", SPEC.replace(vocab_size=tokenizer.vocab_size), tokenizer, end=4)
    with pytest.raises(OuroborosError, match="c.pack: the standalone program knows tokenizers of bytes"):
        to_standalone(characters, open_model(characters).model, out, tokenizer)
    other_end = packed(tmp_path / "d.pack", end=10)
    with pytest.raises(OuroborosError, match="d.pack: the tokenizer reads 'Caf.*' as other ids"):
        to_standalone(other_end, model, out, byte_tokenizer())
    assert not out.exists()


def test_what_an_earlier_version_did_not_write_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = packed(tmp_path / "a.pack")
    header, weights, files = standalone_run.read_packed(source)
    del header["spec"]["block"]["mixer"]["window"]
    monkeypatch.setattr(standalone_run, "read_packed", lambda path: (header, weights, files))
    with pytest.raises(OuroborosError, match=r"a.pack: lacks 'window', which the .* reads; pack the model again"):
        to_standalone(source, open_model(source).model, tmp_path / "out", byte_tokenizer())
    assert not (tmp_path / "out").exists()


def test_logits_that_differ_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = packed(tmp_path / "a.pack")
    monkeypatch.setattr(standalone_run.Model, "_norm", lambda self, name, x: x)
    with pytest.raises(OuroborosError, match=r"the standalone program: logits on 64 .*, and at most 1e-05 is allowed"):
        to_standalone(source, open_model(source).model, tmp_path / "out", byte_tokenizer())
    assert not (tmp_path / "out").exists()

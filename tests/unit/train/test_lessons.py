"""Learning from another model beside the text."""

from __future__ import annotations

import copy
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from ouroboros.errors import OuroborosError
from ouroboros.model.configuration import OuroborosConfig
from ouroboros.model.modeling import OuroborosForCausalLM
from ouroboros.train.run import resume, start


@pytest.fixture
def teacher(tmp_path: Path, make: Any) -> Path:
    """A wider model of four blocks in a directory."""
    torch.manual_seed(7)
    spec = make(**{"model.layout": "4"}).model
    OuroborosForCausalLM(OuroborosConfig.from_spec(spec, eos_token_id=256)).save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


@pytest.fixture
def taught(make: Any, teacher: Path) -> Any:
    def build(**changes: Any) -> Any:
        return make(**{"train.teach.model": str(teacher), "train.accumulation": 2, **changes})

    return build


STATES = {"train.teach.states": 0.5, "train.teach.blocks": [2, 3]}


@pytest.mark.parametrize("keep", [False, True])
def test_the_objective_is_that_of_the_formula(taught: Any, trainer_of: Any, tmp_path: Path, keep: bool) -> None:
    more = {"train.teach.keep": str(tmp_path / "kept")} if keep else {}
    trainer = trainer_of(taught(**STATES, **more, **{"train.teach.weight": 0.75, "train.teach.temperature": 2.0}))
    windows = torch.from_numpy(copy.deepcopy(trainer.loader).next_batch())
    inputs, targets = windows[:, :-1], windows[:, 1:].clone()
    targets[:, :5] = -100
    teacher = trainer.lessons.model
    for _ in range(1 + keep):  # what is kept is read the second time
        trainer.model.zero_grad()
        objective, plain = trainer.losses(inputs, targets, 3)
        objective.backward()
    with torch.no_grad():
        student = trainer.model(input_ids=inputs, loops=3, output_hidden_states=True)
        wanted = teacher(input_ids=inputs, output_hidden_states=True)
        found, told = student.logits[:, 5:], wanted.logits[:, 5:]
        ce = F.cross_entropy(found.flatten(0, 1), targets[:, 5:].flatten())
        p, q = (told / 2).softmax(-1), (found / 2).softmax(-1)
        kl = (p * (p.log() - q.log())).sum(-1).mean()
        here, there = student.hidden_states[4], wanted.hidden_states[3]  # one block, three loops; and three blocks
        state = ((here - there) ** 2).sum(-1) / (there**2).sum(-1)
    assert plain.item() == pytest.approx(ce.item(), rel=1e-5)
    expected = 0.25 * ce + 0.75 * 4 * kl + 0.5 * state.mean()
    assert objective.item() == pytest.approx(expected.item(), rel=3e-3 if keep else 1e-4)
    assert all(p.grad is None for p in teacher.parameters())
    assert trainer.model.model.decoder.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0


def test_a_share_of_the_positions_is_drawn_for_each_step(taught: Any, trainer_of: Any) -> None:
    lessons = trainer_of(taught(**{"train.teach.share": 0.25})).lessons
    drawn = [lessons.positions(32, step) for step in range(40)]
    assert all(len(at) == 8 and at.unique().equal(at) for at in drawn)
    assert lessons.positions(32, 3).equal(drawn[3]) and not drawn[3].equal(drawn[4])
    assert torch.cat(drawn).unique().equal(torch.arange(32))


def test_what_is_learned_and_kept_resumes_to_the_same_bits(taught: Any, tmp_path: Path) -> None:
    recipe = taught(**STATES, **{"train.teach.share": 0.5, "train.teach.keep": str(tmp_path / "kept")})
    start(recipe, tmp_path / "whole")
    files = list((tmp_path / "kept").glob("*/*.safetensors"))
    assert 4 * 6 <= len(files) <= 4 * 6 + 1  # and one of the rehearsal that measures threads
    stamps = {path: path.stat().st_mtime_ns for path in files}
    part = taught(**STATES, **{"train.teach.share": 0.5, "train.teach.keep": str(tmp_path / "kept"), "train.steps": 3})
    start(part, tmp_path / "parts")
    # The schedule knows the whole length, so the first part differs from the whole; the second time it does not.
    resume(tmp_path / "parts", recipe=recipe, allow_changes=True)
    assert {path: path.stat().st_mtime_ns for path in files} == stamps  # read, never written again


def test_the_divergence_falls(taught: Any, trainer_of: Any) -> None:
    trainer = trainer_of(taught(**STATES, **{"train.teach.weight": 1.0, "train.steps": 40, "optim.lr": 0.02}))
    windows = torch.from_numpy(copy.deepcopy(trainer.loader).next_batch())
    arguments = {"input_ids": windows[:, :-1], "use_cache": False}

    def now() -> Any:
        with torch.no_grad():
            return trainer.lessons.losses(trainer.model, arguments, windows[:, 1:], 0, 0.0)

    before = now()
    while not trainer.done:
        trainer.step()
    after = now()
    assert after.divergence < 0.5 * before.divergence and after.state < before.state


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train.teach.model": "nowhere"}, "train.teach.model: nowhere is no model directory"),
        ({**STATES, "train.teach.blocks": [7, 3]}, "this model has 3 blocks and no block 7"),
        ({**STATES, "train.teach.blocks": [1, 4]}, "the teacher has 4 blocks and no block 4"),
        ({"data.tokenizer": "chars"}, "vocabulary of 257 and this model one of"),
    ],
)
def test_what_does_not_fit_is_refused(taught: Any, trainer_of: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(OuroborosError, match=message):
        trainer_of(taught(**changes))


def test_a_share_and_masked_positions_exclude_each_other(taught: Any, trainer_of: Any, tmp_path: Path) -> None:
    lines = "".join(f'{{"q": "{n} + 1", "a": "{n + 1}"}}\n' for n in range(200))
    (tmp_path / "sums.jsonl").write_text(lines)
    masked = {"data.sources": [f"{tmp_path / 'sums.jsonl'}@Q: {{q}} A: {{a}}"], "data.loss": "answers"}
    with pytest.raises(OuroborosError, match="leave one of them out"):
        trainer_of(taught(**masked, **{"train.teach.share": 0.5}))
    assert trainer_of(taught(**masked)).step().loss > 0


def test_room_on_the_disk_is_estimated_before_the_start(
    taught: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 20_000))
    recipe = taught(**{"train.teach.keep": str(tmp_path / "kept")})
    with pytest.raises(OuroborosError, match="states of 24 windows take 0.0 GB"):
        start(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()

"""Healing: where arms begin, what training moves, and what a directory remembers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ouroboros.config import DataSpec, Recipe
from ouroboros.convert import heal as module
from ouroboros.convert.arms import TRAINED, Steering
from ouroboros.convert.heal import ARMS, DONOR, PLAN, Healing, Interrupted, adopt, training_windows
from ouroboros.convert.judge import trained_numbers
from ouroboros.errors import OuroborosError
from ouroboros.files import write_whole
from ouroboros.model.reading import load_model
from ouroboros.train.log import Progress
from ouroboros.train.rundir import RunDirectory

Make = Callable[..., Healing]
IDS = torch.arange(40)[None] * 6
SMALL = Steering(rank=3, style=5)


def logits(model: Any, loops: int | None = None) -> Tensor:
    with torch.no_grad():
        return (model if loops is None else model.with_loops(loops))(IDS, use_cache=False).logits


@pytest.mark.parametrize("layout", ["2 loop:(1)x2 2", "2 loop:(1)x3 2"])
@pytest.mark.parametrize("arm", [*TRAINED, "norms"])
def test_later_loops_change_nothing_at_first(arm: str, layout: str, healing: Make) -> None:
    work = healing(layout=layout, steering=SMALL)
    model = work.cut(arm)
    assert torch.equal(logits(model, 1), logits(work.cut("cut")))  # neutral parts, one loop
    torch.testing.assert_close(logits(model), logits(model, 1), atol=1e-4, rtol=1e-4)
    for loops in model.model.decoder.loops:
        torch.nn.init.ones_(loops["gain"].weight)  # pyrefly: ignore  # what the test can see
    assert not torch.allclose(logits(model), logits(model, 1), atol=1e-2)


def test_one_loop_needs_no_gain(healing: Make) -> None:
    work = healing(layout="2 loop:(1)x1 2")
    assert not [name for name in work.cut("healed").state_dict() if ".gain." in name]


def test_the_cut_donor_is_its_layers_alone(healing: Make) -> None:
    work = healing()
    donor, cut = work.donor.state_dict(), work.cut("cut").state_dict()
    for block, layer in enumerate((0, 1, 3, 4, 5)):
        for name, value in cut.items():
            if name.startswith(f"model.decoder.layers.{block}."):
                assert torch.equal(value, donor[name.replace(f"layers.{block}.", f"layers.{layer}.")])
    assert work.coda == 3 and work.layer == 4


def test_training_begins_from_the_bridge(healing: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is called ``bridge`` in the verdict is where the arm ``healed`` begins."""
    work = healing()
    found: dict[str, Tensor] = {}

    def begun(recipe: Any, out: Path, *, source: Any, progress: Any) -> Any:
        found.update(source.model.state_dict())
        return SimpleNamespace(finished=False, reason="SIGTERM")

    monkeypatch.setattr(module, "start", begun)
    with pytest.raises(Interrupted, match="stopped by SIGTERM in arm 'healed'; the same command goes on") as stopped:
        work.train("healed", Progress(quiet=True))
    assert stopped.value.reason == "SIGTERM"
    model, fit = work.bridged("healed")
    assert found.keys() == model.state_dict().keys()
    assert all(torch.equal(value, found[name]) for name, value in model.state_dict().items())
    assert fit.after < fit.before and fit.tokens >= work.plan.bridge_tokens
    assert not torch.equal(logits(model), logits(work.cut("healed")))


@pytest.mark.parametrize("arm", [*TRAINED, "norms"])
def test_training_moves_what_is_counted_and_nothing_else(arm: str, healing: Make) -> None:
    work = healing(steering=SMALL)
    run = RunDirectory(work.train(arm, Progress(quiet=True)))
    start, end = work.bridged(arm)[0].state_dict(), load_model(run.path).state_dict()
    moved = {name: end[name] - start[name] for name in start if not torch.equal(start[name], end[name])}
    assert start.keys() == end.keys()
    counted: dict[str, int] = {}
    for name, change in moved.items():
        owner, number = "layers", change.numel()
        if ".loops." in name:
            owner = name.split(".loops.0.")[1].split(".")[0]
        elif arm == "low-rank":
            owner, number = "low-rank additions", SMALL.low_rank * sum(change.shape)
            assert torch.linalg.matrix_rank(change.double(), rtol=1e-3) == SMALL.low_rank, name
        counted[owner] = counted.get(owner, 0) + number
    assert counted == trained_numbers(load_model(run.path), run)
    of_donor = {name for name in moved if ".loops." not in name}
    matrices = {name for name in end if name.endswith("_proj.weight") and ".layers." in name}
    norms = {name for name in end if "norm" in name and ".loops." not in name}
    assert of_donor == {"low-rank": matrices, "norms": norms}.get(arm, set())
    before = run.weights_file.stat().st_mtime_ns
    assert work.train(arm, Progress(quiet=True)) == run.path  # what is done is passed over
    assert run.weights_file.stat().st_mtime_ns == before


def test_the_teacher_is_the_whole_donor_at_the_blocks_behind_the_loop(healing: Make, tmp_path: Path) -> None:
    work = healing()
    teach = work.recipe("healed", work.cut("healed")).train.teach
    out = tmp_path / "out"
    assert (teach.model, teach.keep, teach.blocks) == (str(out / DONOR), str(out / "states"), (3, 4))
    work = healing(out=tmp_path / "other", train={"states": 0.0, "blocks": None, "keep": str(tmp_path / "kept")})
    teach = work.recipe("healed", work.cut("healed")).train.teach
    assert teach.blocks is None and teach.keep == str(tmp_path / "kept") and teach.model is not None
    work = healing(out=tmp_path / "third", train={"states": 0.0, "blocks": None, "weight": 0.0})
    assert work.recipe("healed", work.cut("healed")).train.teach.model is None


@pytest.mark.parametrize(("layout", "kept"), [("loop:(1)x2 2", (0, 4, 5)), ("2 loop:(1)x2", (0, 1, 3))])
def test_a_loop_at_an_end_has_no_state_to_compare(layout: str, kept: Any, healing: Make, tmp_path: Path) -> None:
    with pytest.raises(OuroborosError, match="needs blocks before it and behind it"):
        healing(layout=layout, kept=tuple((layer,) for layer in kept))
    assert not (tmp_path / "out" / PLAN).exists()


def test_another_plan_is_refused_by_name(healing: Make, tmp_path: Path) -> None:
    healing()
    healing()
    with pytest.raises(OuroborosError, match=r"other settings \(arms .*; bridge_tokens 200, not 300\): choose another"):
        healing(arms=("norms",), bridge_tokens=300)
    with pytest.raises(OuroborosError, match=r"\(train.teach.weight 0.5, not 0.25\)"):
        healing(train={"weight": 0.25})
    with pytest.raises(OuroborosError, match=r"\(steering.rank 32, not 8\)"):
        healing(steering=Steering(rank=8))
    (tmp_path / "out" / PLAN).write_text("[1")
    with pytest.raises(OuroborosError, match=r"heal\.json: cannot be read"):
        healing()


def test_a_plan_is_completed(tmp_path: Path) -> None:
    adopt({"source": "a"}, tmp_path)
    adopt({"source": "a", "train": {"steps": 3}}, tmp_path)
    adopt({"source": "a"}, tmp_path)
    assert json.loads((tmp_path / PLAN).read_text()) == {"source": "a", "train": {"steps": 3}}
    with pytest.raises(OuroborosError, match=r"\(source a, not b\)"):
        adopt({"source": "b"}, tmp_path)


def test_the_best_arm_becomes_the_model(healing: Make, tmp_path: Path) -> None:
    work, out = healing(), tmp_path / "out"
    work.train("norms", Progress(quiet=True))
    write_whole(out / DONOR / "chat_template.jinja", b"{{ messages }}")
    assert list((out / "states").rglob("*.safetensors"))
    work.adopt_best("norms")
    assert not (out / "states").exists()
    for name in ("model.safetensors", "config.json"):
        assert (out / name).read_bytes() == (out / ARMS / "norms" / name).read_bytes()
    for name in ("donor.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (out / DONOR / name).read_bytes()


def test_windows_hold_the_ids_that_are_read_where_only_answers_are_learned(tmp_path: Path) -> None:
    (tmp_path / "sums.jsonl").write_text("".join(f'{{"q": "{n} + 1", "a": "{n + 1}"}}\n' for n in range(200)))
    source = f"{tmp_path / 'sums.jsonl'}@Q: {{q}} A: {{a}}"

    def windows(loss: Any) -> Any:
        data = DataSpec(sources=(source,), sequence_length=16, loss=loss)
        return next(training_windows(Recipe(name="heal", data=data), tmp_path / loss, batch_size=4, seed=0))

    masked = windows("answers")
    assert masked.shape == (4, 17) and masked.min() >= 0 and masked.equal(windows("all"))

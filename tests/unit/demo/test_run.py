"""The demo's own decisions; the whole of it runs in tests/cli/test_demo.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ouroboros.accounting import cost
from ouroboros.config.demo import DemoOptions
from ouroboros.demo import plan, run_demo
from ouroboros.demo import run as demo
from ouroboros.demo.plan import Plan
from ouroboros.demo.run import demo_recipe
from ouroboros.errors import OuroborosError
from ouroboros.train.log import Progress, read_metrics
from ouroboros.train.rundir import RunDirectory
from ouroboros.train.session import RunResult
from ouroboros.train.stop import Counters

SMALL = {"size": "tiny", "tokenizer": "bytes"}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty files of a few hundred bytes."""
    folder = tmp_path_factory.mktemp("texts")
    for index in range(60):
        lines = (f"{index} and {n} are {index + n}, which is {(index * n) % 13} more or less\n" for n in range(20))
        (folder / f"{index}.txt").write_text("".join(lines))
    return folder


def quiet() -> Progress:
    return Progress(quiet=True)


def test_the_recipe_is_that_of_the_plan_and_makes_no_checkpoints():
    plan = Plan(size="tiny", tokenizer="bytes", batch=4, rate=1000.0)
    recipe = demo_recipe(DemoOptions(minutes=10, data="x.txt", seed=3), plan)
    assert recipe.name == "loop" and recipe.data.sources == ("x.txt",) and recipe.data.tokenizer == "bytes"
    assert recipe.model.hidden_size == 64 and recipe.train.batch_size == 4
    assert (recipe.train.seed, recipe.train.checkpoint_every) == (3, 0) and recipe.train.telemetry_every > 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (DemoOptions(out=Path("demo")), "ouroboros demo --out demo"),
        (
            DemoOptions(minutes=2, data="a b.txt", out=Path("x"), **SMALL),
            "ouroboros demo --minutes 2 --data 'a b.txt' --size tiny --tokenizer bytes --out x",
        ),
        (DemoOptions(seed=4, out=Path("demo")), "ouroboros demo --seed 4 --out demo"),
    ],
)
def test_the_command_reproduces_the_run(options, words):
    assert demo._command(options) == words


def test_bad_options_are_refused_before_anything_is_made(tmp_path, text):
    with pytest.raises(OuroborosError, match="--minutes must be > 0, got -1"):
        run_demo(DemoOptions(minutes=-1, out=tmp_path / "out"), print, quiet)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(OuroborosError, match="mine is not empty; choose another --out"):
        run_demo(DemoOptions(out=tmp_path / "mine", data=str(text), **SMALL), print, quiet)
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_the_default_directory_gets_a_number_instead_of_a_refusal(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = DemoOptions().out
    assert demo._free(out) == out
    for taken in (out, out.with_name("demo-2")):
        taken.mkdir(parents=True)
        assert demo._free(out) == out
    for taken in (out, out.with_name("demo-2")):
        (taken / "notes.txt").write_text("keep")
    assert demo._free(out) == out.with_name("demo-3")


@pytest.mark.timeout(120)
def test_all_arms_learn_the_same_text_in_the_same_order(text, tmp_path, monkeypatch):
    pytest.importorskip("jinja2")
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(plan, "BOTH", 0.0)
    said: list[str] = []
    options = DemoOptions(minutes=0.03, out=tmp_path / "out", data=str(text), size="tiny", tokenizer="bpe:300", seed=2)
    numbers = run_demo(options, said.append, quiet)
    assert json.loads((tmp_path / "out" / "demo.json").read_text()) == json.loads(json.dumps(numbers))
    recipes = {name: RunDirectory(tmp_path / "out" / name).read_recipe() for name in ("loop", "twin", "deep")}
    parameters = [cost(recipe.model).parameters for recipe in recipes.values()]
    assert max(parameters) / min(parameters) < 1.01
    for name in ("twin", "deep"):
        train = recipes[name].train
        assert train.steps == numbers["arms"]["loop"]["steps"] and train.minutes is None
        assert train.compile == "off" and train.seed == recipes["loop"].train.seed == 2  # as the looped model was
    states = [
        json.loads(next((tmp_path / "out" / name / "checkpoints").glob("step-*/state.json")).read_text())
        for name in recipes
    ]
    assert states[0]["loader"] == states[1]["loader"] == states[2]["loader"]  # the same place in the same data
    assert {arm["data_sha256"] for arm in numbers["arms"].values()} == {numbers["arms"]["loop"]["data_sha256"]}
    scores = {name: arm["bits_per_byte"] for name, arm in numbers["arms"].items()}
    assert list(scores) == ["loop", *sorted({"loop-twin", "loop-deep"}, key=scores.__getitem__)]
    assert numbers["better_twin"] == list(scores)[1]
    assert numbers["difference"]["delta"] == pytest.approx(
        scores["loop"] - min(scores["loop-twin"], scores["loop-deep"])
    )
    counts = [score["loops"] for score in numbers["loops"]]
    assert counts == [1, 2, 3, 4]
    assert {"verdict", "low", "high"} <= numbers["difference"].keys()
    assert any(r["kind"] == "telemetry" for r in read_metrics(tmp_path / "out" / "loop" / "metrics.jsonl"))
    text_said = "\n".join(said)
    assert "bits/byte" in text_said and "One seed" in text_said and "loop writes" in text_said
    assert all(f"as much per token as {name} and trained" in text_said for name in ("loop-twin", "loop-deep"))
    assert str(tmp_path / "out" / "report.html") in text_said and (tmp_path / "out" / "report.html").exists()


def test_an_interrupted_arm_names_the_way_to_finish_it(text, tmp_path, monkeypatch):
    def interrupted(recipe, out, *, progress):
        return RunResult(out, Counters(step=3), False, "SIGINT", 2.0)

    monkeypatch.setattr(demo, "start", interrupted)
    with pytest.raises(OuroborosError, match=r"stopped by SIGINT; `ouroboros resume .*loop` finishes this model"):
        run_demo(DemoOptions(out=tmp_path / "out", data=str(text), **SMALL), print, quiet)


@pytest.mark.timeout(120)
def test_chats_are_told_by_their_content_as_in_training(tmp_path):
    pytest.importorskip("jinja2")
    pytest.importorskip("matplotlib")
    turns = [{"role": "user", "content": "What is {} plus 1?"}, {"role": "assistant", "content": "It is {}."}]
    records = [{"messages": [{**t, "content": t["content"].format(n)} for t in turns]} for n in range(400)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    options = DemoOptions(minutes=0.01, out=tmp_path / "out", data=str(tmp_path / "chats.jsonl"), **SMALL)
    run_demo(options, print, quiet)
    assert RunDirectory(tmp_path / "out" / "loop").read_recipe().data.sources[0].endswith("chats.jsonl@messages")

"""``convert --heal``: one command from a pretrained model to a verdict on held-out text, on a tiny random donor."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
import signal
import time
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from ouroboros.cli import main
from ouroboros.convert import judge
from ouroboros.data.tokenize import byte_tokenizer
from ouroboros.verbs import heal as verb
from ouroboros.verbs.heal import HealOptions, table

SHORT = [
    *("--layout", "2 loop:(1)x2 2", "--steps", "4", "--held-out-bytes", "9000", "--bridge-tokens", "200", "--quiet"),
    *("--data.sequence-length", "32", "--train.batch-size", "2"),
    *("--train.precision", "fp32", "--train.compile", "off"),
]
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A donor of six layers, a text to train on, and another one."""
    place = tmp_path_factory.mktemp("heal")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=257, num_hidden_layers=6, eos_token_id=256, initializer_range=0.2, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(place / "donor")
    byte_tokenizer().save(place / "donor")
    path = place / "donor" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": TEMPLATE}))
    chooser = random.Random(0)
    words = ["".join(chooser.choice("abcdefgh") for _ in range(chooser.randint(2, 6))) for _ in range(40)]
    for name, lines in (("text.txt", 600), ("other.txt", 300), ("third.txt", 300)):
        (place / name).write_text(
            "".join(" ".join(chooser.choice(words) for _ in range(8)) + "\n" for _ in range(lines))
        )
    return place


def command(place: Path, out: object, *more: object) -> list[object]:
    held_out = [] if "--held-out" in more else ["--held-out", place / "other.txt"]
    small = [] if "--arms" in more else ["--steering.rank", "4", "--steering.style", "8"]
    start = ["convert", place / "donor", "--out", out, "--heal", "--data", place / "text.txt"]
    return [*start, *held_out, *SHORT, *small, *more]


@pytest.fixture(scope="module", autouse=True)
def short_races() -> Iterator[None]:
    """Speeds are measured in a few tokens: on a model this small, writing would take longer than healing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judge, "SPEED_TOKENS", 3)
        patch.setattr(judge, "SPEED_TURNS", 1)
        yield


@pytest.fixture(scope="module")
def healed(place: Path, given_back: Any) -> Path:
    """The directory of a healing that has ended; tests must not change it."""
    with given_back():
        assert main([str(word) for word in command(place, place / "healed")]) == 0
    return place / "healed"


def test_the_same_command_again_does_nothing_new_and_ends_well(cli, healed, place, files):
    before = files(healed)
    kept = {path: path.stat().st_mtime_ns for name in ("arms", "scores") for path in (healed / name).rglob("*")}
    result = cli(*command(place, healed))
    assert result.status == 0, result.err
    after = files(healed)
    assert before.keys() == after.keys()
    assert [name for name in before if before[name] != after[name]] == []
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    lines = result.out.splitlines()
    arms = ["donor", "cut", "bridge", "healed", "low-rank", "static", "controller"]
    shown = [*arms, "controller, shuffled", "controller, constant"]
    assert [line[:22].strip() for line in lines[1:10]] == shown
    facts = json.loads((healed / "verdict.json").read_text())
    assert lines[10] == facts["verdict"] and f"{facts['best']} is the model" in lines[11] and len(lines) == 12


def test_json_is_one_object_with_the_verdict_and_the_arms(cli, healed, place):
    facts = cli(*command(place, healed), "--json").json
    assert facts["finished"] and facts["layout"] == "2 loop:(1)x2 2" and facts["out"] == str(healed)
    arms = {arm["name"]: arm for arm in facts["arms"]}
    assert list(arms) == [
        *("donor", "cut", "bridge", "healed", "low-rank", "static", "controller"),
        *("controller, shuffled", "controller, constant"),
    ]
    assert facts["best"] in ("healed", "low-rank", "static", "controller")
    valid = {name: arm["valid_bits_per_byte"] for name, arm in arms.items() if arm["valid_bits_per_byte"] is not None}
    assert min(valid, key=lambda name: valid[name]) == facts["best"] and len(valid) == 4
    assert arms["donor"]["texts"]["other"]["closed"]["share"] in (1.0, None)
    assert arms["bridge"]["trained"] == {"bridge": 2 * 16 * 16 + 16}
    assert arms["donor"]["trained_parameters"] == arms["cut"]["trained_parameters"] == 0
    assert arms["cut"]["parameters"] < arms["bridge"]["parameters"]
    verdict = json.loads((healed / "verdict.json").read_text())
    assert {**verdict, "finished": True, "report": str(healed / "report.html")} == facts


def test_what_stands_in_the_directory_is_the_best_arm(cli, healed, place):
    best = json.loads((healed / "verdict.json").read_text())["best"]
    assert (healed / "model.safetensors").read_bytes() == (healed / "arms" / best / "model.safetensors").read_bytes()
    assert "<h1>" in (healed / "report.html").read_text() and not (healed / "states").exists()
    assert cli("eval", healed, "--data", place / "other.txt", "--max-bytes", "500", "--json").json
    assert cli("generate", healed, "--prompt", "ab", "--max-new-tokens", "3", "--json").json["prompt"] == "ab"
    model = AutoModelForCausalLM.from_pretrained(healed)
    assert model.config.model_spec.loop_parts and model.generation_config.eos_token_id == 256
    template = AutoTokenizer.from_pretrained(healed).apply_chat_template
    assert template([{"role": "user", "content": "x"}], tokenize=False) == "user: x\nassistant:"


def test_it_can_be_talked_to(command, healed):
    result = command("chat", healed, "--max-new-tokens", "3", input="hello\n/quit\n")
    assert result.status == 0 and "Traceback" not in result.err


def test_the_donor_goes_back_to_its_class_and_what_arms_add_is_refused(cli, healed, place, tmp_path):
    assert "bridge" in cli("export", healed, "--to", "donor", tmp_path / "back").error()
    assert cli("export", healed / "donor", "--to", "donor", tmp_path / "back").status == 0
    back, donor = (load_file(path / "model.safetensors") for path in (tmp_path / "back", place / "donor"))
    assert back.keys() == donor.keys() and all(torch.equal(back[name], donor[name]) for name in donor)


def test_another_held_out_text_is_scored_without_any_training(cli, place, tmp_path, monkeypatch):
    def scores(held_out: Path) -> list[float]:
        facts = cli(*command(place, tmp_path / "out", "--arms", "static", "--held-out", held_out), "--json").json
        assert [list(arm["texts"]) for arm in facts["arms"]] == [[held_out.stem]] * 4
        return [arm["texts"][held_out.stem]["bits_per_byte"] for arm in facts["arms"]]

    first = scores(place / "other.txt")
    monkeypatch.setattr("ouroboros.convert.heal.start", None)
    second = scores(place / "third.txt")
    assert all(a != b for a, b in zip(first, second, strict=True))
    shutil.copyfile(place / "other.txt", tmp_path / "third.txt")  # a text is known by its content, not its name
    assert scores(tmp_path / "third.txt") == first


def test_two_texts_in_and_out_of_the_domain(cli, place, tmp_path):
    texts = ["--held-out", place / "other.txt", place / "third.txt"]
    facts = cli(*command(place, tmp_path / "out", *texts, "--arms", "norms", "--train.eval-every", "0"), "--json").json
    assert [list(arm["texts"]) for arm in facts["arms"]] == [["other", "third"]] * 4
    assert facts["best"] == "norms" and facts["arms"][-1]["trained"].keys() == {"bridge", "gain", "layers"}


def test_a_bridge_alone_is_fitted_and_nothing_trained(cli, place, tmp_path):
    out = tmp_path / "out"
    facts = cli(*command(place, out, "--arms", "bridge"), "--json").json
    assert [arm["name"] for arm in facts["arms"]] == ["donor", "cut", "bridge"] and facts["best"] == "bridge"
    fitted = load_file(out / "bridge.safetensors")["proj.weight"]
    assert load_file(out / "model.safetensors")["model.decoder.loops.0.bridge.proj.weight"].equal(fitted)
    assert not (out / "states").exists() and fitted.abs().sum() > 0


LONGER = ["--steps", "40", "--arms", "healed", "low-rank", "--train.log-every", "1"]


@pytest.fixture(scope="module")
def uninterrupted(place: Path, given_back: Any) -> Path:
    with given_back():
        assert main([str(word) for word in command(place, place / "whole", *LONGER)]) == 0
    return place / "whole"


@pytest.mark.parametrize(("number", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_healing_that_is_stopped_goes_on_to_the_same_bits(cli, spawn, place, uninterrupted, tmp_path, number, status):
    out = tmp_path / "stopped"
    with spawn(*command(place, out, *LONGER)) as process:
        metrics, deadline = out / "arms" / "low-rank" / "metrics.jsonl", time.monotonic() + 90
        while not (metrics.is_file() and metrics.stat().st_size) and process.poll() is None:
            assert time.monotonic() < deadline, "it does not begin"
            time.sleep(0.005)
        process.send_signal(getattr(signal, number))
        printed, errors = process.communicate(timeout=60)
    assert process.returncode == status, errors
    assert printed.splitlines()[-1] == (
        f"{out}: stopped by {number} in arm 'low-rank'; the same command goes on from there"
    )
    assert "Traceback" not in errors and not (out / "arms" / "low-rank" / "model.safetensors").exists()
    done = (out / "arms" / "healed" / "model.safetensors").stat().st_mtime_ns
    assert cli(*command(place, out, *LONGER)).status == 0
    assert (out / "arms" / "healed" / "model.safetensors").stat().st_mtime_ns == done
    for name in ("arms/healed", "arms/low-rank", "."):
        whole, resumed = ((path / name / "model.safetensors").read_bytes() for path in (uninterrupted, out))
        assert whole == resumed, name
    bits = [
        [arm["texts"]["other"]["bits_per_byte"] for arm in json.loads((path / "verdict.json").read_text())["arms"]]
        for path in (uninterrupted, out)
    ]
    assert bits[0] == bits[1]


def test_an_interrupt_between_arms_is_no_traceback_either(cli, place, tmp_path, monkeypatch):
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("ouroboros.convert.judge.score", interrupted)
        result = cli(*command(place, tmp_path / "out"))
        assert result.status == 130 and "the same command goes on" in result.out and "Traceback" not in result.err
        found = cli(*command(place, tmp_path / "out"), "--json")
        assert found.status == 130 and found.json == {
            "out": str(tmp_path / "out"),
            "finished": False,
            "stopped_by": "SIGINT",
        }
    assert cli(*command(place, tmp_path / "out", "--arms", "healed")).error().startswith(f"{tmp_path / 'out'} holds")


OTHERS: dict[str, list[str]] = {
    "--arms": ["healed"],
    "--seed": ["3"],
    "--steps": ["3"],
    "--minutes": ["3"],
    "--data": ["a.txt"],
    "--held-out-bytes": ["3"],
    "--bridge-tokens": ["3"],
    "--quiet": [],
    "--steering.bases": ["joint"],
    "--steering.pooling": ["all"],
    "--optim.lr": ["3"],
    "--train.teach.share": ["1"],
    "--data.sequence-length": ["64"],
    "--data.filters.symbol-run": ["3"],
}


def test_what_needs_heal_is_refused_without_it_by_its_name(cli, place, tmp_path):
    own = {field.name.replace("_", "-") for field in dataclasses.fields(HealOptions)} - {"heal", "held-out", "steering"}
    assert {f"--{name}".replace("sources", "data") for name in own} <= OTHERS.keys()
    for field in dataclasses.fields(verb.Steering):
        OTHERS.setdefault(f"--steering.{field.name.replace('_', '-')}", ["7"])
    for option, values in OTHERS.items():
        error = cli("convert", place / "donor", "--out", tmp_path / "out", option, *values).error()
        assert error == f"{option} changes nothing without --heal: add that, or leave the option out"
        error = cli("convert", place / "donor", "--out", tmp_path / "out", "--to", "osam", option, *values).error()
        assert option in error
    assert "--heal is about reading" in cli("convert", place / "donor", "--out", "x", "--to", "osam", "--heal").error()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--no-tokenizer"], "leave --no-tokenizer out"),
        (["--loops", "3"], "--loops is about published checkpoints: leave it out with --heal"),
        (["--layout", "2 (2)x1 2"], "keeps all 6 layers, so there is nothing to heal"),
        (["--layout", "5"], "has no loop"),
        (["--layout", "(1)x2"], "needs blocks before it and behind it"),
        (["--layout", "2 (1)x2 1 (1)x2"], "more than a prelude, one loop and a coda"),
        (["--keep", "0-1,1,4-5"], "layer 1 of looped block 2 is inside prelude or coda"),
        (["--keep", "0-1,4,4-5"], "layer 4 of looped block 2 is inside prelude or coda"),
        (["--keep", "0-4", "--init", "averaged"], "--keep and --init exclude each other"),
        (["--steps", "3", "--minutes", "1"], "give one of --steps and --minutes"),
        (["--arms"], "--arms names no arm"),
        (["--arms", "healed", "healed"], "--arms names one arm twice"),
        (
            ["--arms", "healed", "--steering.rank", "4"],
            "--steering.rank is for the arms controller and static: name one with --arms",
        ),
        (["--held-out-bytes", "0"], "--held-out-bytes must be >= 1"),
        (["--bridge-tokens", "0"], "--bridge-tokens must be >= 1"),
        (["--train.teach.model", "x"], "--train.teach.model is set by --heal itself"),
        (["--train.low-rank.rank", "2"], "--train.low-rank.rank is set by --heal itself"),
        (["--optim.left-out", "x"], "--optim.left-out is set by --heal itself"),
        (["--data.tokenizer", "chars"], "--data.tokenizer is set by --heal itself"),
        (["--held-out", "nowhere.txt"], "'nowhere.txt': no such file"),
        (["--tokenizer", "nowhere"], "nowhere"),
    ],
)
def test_what_does_not_fit_is_one_line(cli, place, tmp_path, more, words):
    assert words in cli(*command(place, tmp_path / "out", *more)).error()
    assert not list(tmp_path.glob("out/arms/*"))


def test_an_option_without_effect_is_refused(cli, place, tmp_path):
    error = cli(*command(place, tmp_path / "out", "--optim.muon-momentum", "0.1")).error(2)
    assert "--optim.muon-momentum changes nothing here; it needs --optim.matrix-optimizer muon" in error


def test_a_mistake_in_the_layout_does_not_spoil_the_directory(cli, place, tmp_path):
    assert "needs blocks before it" in cli(*command(place, tmp_path / "out", "--layout", "(1)x2")).error()
    assert cli(*command(place, tmp_path / "out", "--arms", "norms")).status == 0


def test_text_that_is_trained_on_is_not_held_out(cli, place, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    Path("texts").mkdir()
    Path("texts/link.txt").symlink_to("../text.txt")
    for name in ("text.txt", "./text.txt", place / "text.txt", "tex*.txt", "texts"):
        error = cli(*command(place, tmp_path / "out", "--held-out", name)).error()
        assert ".txt is trained on: hold another text out" in error
    start = ["convert", "donor", "--out", tmp_path / "out", "--heal", *SHORT]
    assert "name the text to train on with --data" in cli(*start).error()
    error = cli(*start, "--data", "python:").error()
    assert "python: is trained on as a whole: add --data.test-fraction 0.05" in error
    (tmp_path / "empty.txt").write_text("")
    assert "empty" in cli(*command(place, tmp_path / "out", "--held-out", tmp_path / "empty.txt")).error()
    assert not (tmp_path / "out").exists()


def test_a_directory_that_holds_something_else_is_left_alone(cli, place, healed, tmp_path, files):
    (tmp_path / "mine").mkdir()
    shutil.copytree(place / "donor", tmp_path / "mine" / "donor")
    before = files(tmp_path)
    assert "exists and holds no healing: choose another --out" in cli(*command(place, tmp_path / "mine")).error()
    assert "exists and holds no healing" in cli(*command(place, tmp_path / "mine" / "donor" / "config.json")).error()
    assert files(tmp_path) == before
    error = cli(*command(place, healed, "--steps", "9", "--optim.lr", "0.5")).error()
    assert "with other settings (optim.lr 0.001, not 0.5; train.steps 4, not 9): choose another --out" in error
    shutil.copytree(place / "donor", tmp_path / "copy")
    other = ["convert", tmp_path / "copy", *command(place, healed)[2:]]
    assert f"source {place / 'donor'}, not {tmp_path / 'copy'}" in cli(*other).error()


def test_donors_that_are_none_or_damaged(cli, place, trained, tmp_path):
    def refused(source: Path) -> str:
        error = cli("convert", source, *command(place, tmp_path / "out")[2:]).error()
        assert not (tmp_path / "out" / "donor").exists()
        return error

    assert "is no pretrained model of another library: leave --heal out" in refused(trained)
    bare, broken, cut = (tmp_path / name for name in ("bare", "broken", "cut"))
    for path in (bare, broken, cut):
        shutil.copytree(place / "donor", path)
    for path in bare.glob("tokenizer*"):
        path.unlink()
    assert "tokenizer" in refused(bare)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:900])
    assert str(broken) in refused(broken)
    (cut / "config.json").write_text("{")
    assert str(cut) in refused(cut)


def test_too_little_disk_for_the_teacher_is_found_before_training(cli, place, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 10**6, 9))
        error = cli(*command(place, tmp_path / "out", "--arms", "norms")).error()
    assert "train.teach.keep: the teacher's states of 8 windows take" in error and "name another folder" in error
    assert not (tmp_path / "out" / "arms" / "norms" / "recipe.json").exists()
    assert cli(*command(place, tmp_path / "out", "--arms", "norms")).status == 0  # there is room again


def test_without_a_teacher_only_the_text_is_learned(cli, place, tmp_path):
    alone = ["--train.teach.weight", "0", "--train.teach.states", "0", "--train.teach.blocks", "None"]
    out = tmp_path / "out"
    assert cli(*command(place, out, "--arms", "norms", *alone)).status == 0
    recipe = json.loads((out / "arms" / "norms" / "recipe.json").read_text())
    assert recipe["train"]["teach"]["model"] is None and not (out / "states").exists()


def test_the_help_is_brief_unless_it_is_about_healing(cli):
    brief, whole = cli("convert", "--help").out, cli("convert", "--heal", "--help").out
    assert "--optim.lr" not in brief and "--optim.lr" in whole and "--steering.rank" in brief
    assert "`ouroboros convert --heal --help` lists them" in " ".join(brief.split())


def test_the_table_is_blank_where_nothing_is_known():
    from ouroboros.convert.verdict import ArmResult

    gaps = [{"share": None, "low": None}, {"share": 0.5, "low": None}, {"share": 0.5, "low": 0.25, "high": 0.75}]
    arms = [
        {
            "name": name,
            "trained_parameters": 0,
            "speed_against_donor": None,
            "texts": {"t": {"bits_per_byte": 2.0, "closed": gap}},
        }
        for name, gap in zip("abc", gaps, strict=True)
    ]
    scores: Any = {"t": None}
    lines = table([ArmResult(name="a", description="", scores=scores)], {"arms": arms})
    assert [line.split() for line in lines[1:]] == [
        ["a", "2.0000"],
        ["b", "2.0000", "50", "%"],
        ["c", "2.0000", "50", "%", "(25", "to", "75)"],
    ]

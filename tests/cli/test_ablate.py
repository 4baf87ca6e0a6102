"""``ouroboros ablate STUDY``: from a file, with bad files, interrupted and repeated."""

import json
import os
import signal
import time

import pytest

STUDY = """
from ouroboros.ablate.changes import changed
from ouroboros.ablate.study import Arm, Stage, Study
from ouroboros.recipes import recipe

base = changed(recipe("loop", "tiny"), {{
    "model.hidden_size": 16, "model.block.mixer.num_heads": 2, "model.block.ffn.intermediate_size": 24,
    "data.sources": [{text!r}], "data.sequence_length": 32, "train.batch_size": 2, "train.precision": "fp32",
    "train.eval_every": 0, "train.compile": "off", "optim.muon_precision": "fp32",
}})
control = Arm(name="control", recipe=base)
arms = (Arm.changing(control, "lr", {{"optim.lr": 0.02}}),
        Arm.changing(control, "memory", {{"train.activation_checkpointing": True}}))
STUDY = Study(name="small", question="Does it pay?", control=control, arms=arms, seeds=(1, 2),
              stages=(Stage(name="only", steps=2),))
"""


@pytest.fixture
def study(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{n} and {n % 7} are {n + n % 7}\n" for n in range(400)))
    path = tmp_path / "study.py"
    path.write_text(STUDY.format(text=str(text)))
    return path


def test_a_study_is_run_printed_and_not_run_again(cli, study, tmp_path):
    found = cli("ablate", study, "--out", tmp_path / "out")
    assert found.status == 0, found.err
    assert "left out: memory: this arm equals the control 'control'" in found.out
    assert found.out.rstrip().splitlines()[-1].startswith("Against control, in bits per byte: ")
    again = cli("ablate", study, "--out", tmp_path / "out", "--json")
    assert again.status == 0 and "4 of 4 cells" not in again.out
    (stage,) = again.json["stages"]
    assert {line["name"] for line in stage["arms"]} == {"control", "lr"} and list(again.json["dead"]) == ["memory"]
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == again.json
    study.write_text(study.read_text().replace('"optim.lr": 0.02', '"optim.lr": 0.03'))
    assert "arm lr: optim.lr was 0.02 and is 0.03" in cli("ablate", study, "--out", tmp_path / "out", "--quiet").error()
    for page in (tmp_path / "page.html", tmp_path / "page.md"):
        told = cli("report", tmp_path / "out", "--out", page)
        assert told.status == 0 and told.out == f"{page}: written\n{again.json['answer']}\n"
        text = page.read_text(encoding="utf-8")
        assert "Does it pay?" in text and "this arm equals the control" in text and "training FLOPs" in text
    (tmp_path / "out" / "study.json").write_text("{")
    error = cli("ablate", study, "--out", tmp_path / "out").error()
    assert "study.json: is damaged" in error and "choose another --out" in error
    damaged = cli("report", tmp_path / "out", "--out", tmp_path / "other.html")
    assert "study.json: expected a JSON object" in damaged.error() and not (tmp_path / "other.html").exists()


def test_a_study_of_two_processes_that_is_interrupted_saves_what_both_did(study, spawn, tmp_path):
    study.write_text(study.read_text().replace("steps=2)", "steps=100000)"))
    out = tmp_path / "out"
    with spawn("ablate", study, "--out", out, "--workers", 2, start_new_session=True) as process:
        waiting = time.monotonic() + 90
        while len(trained(out)) < 2 and time.monotonic() < waiting:
            time.sleep(0.1)
        assert len(trained(out)) == 2
        os.killpg(process.pid, signal.SIGINT)  # a terminal sends Ctrl-C to all of its processes
        printed, said = process.communicate(timeout=60)
    assert (process.returncode, printed) == (130, "") and "Traceback" not in said
    assert said.endswith("stopped by SIGINT; the same command goes on from here\n")
    for run in trained(out):
        assert any((run / "checkpoints").iterdir())


def trained(out):
    """The runs of a study that have taken a step."""
    return [path.parent for path in out.glob("only/*/seed-*/metrics.jsonl") if '"train"' in path.read_text()]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (('"memory"', '"lr"'), "two arms are called 'lr'; rename one"),
        (('"optim.lr": 0.02', '"optim.lr": base.optim.lr'), "arm 'lr': "),
        (('"optim.lr": 0.02', '"optim.lrr": 0.02'), "arm 'lr': unknown field 'optim.lrr'; did you mean 'optim.lr'?"),
        (("seeds=(1, 2)", "seeds=()"), "no seeds"),
        (("seeds=(1, 2)", "seeds=('a',)"), "seeds are whole numbers from 0 on, not ['a']"),
        (("steps=2", "steps=2, split='vaild'"), "stage 'only': split is valid or test, not 'vaild'"),
        (("base = ", "raise SystemExit(0); base = "), "study.py:6: SystemExit: 0"),
        (("steps=2", "steps=2, tokens=3"), "give one of steps, tokens and minutes"),
        (("STUDY = ", "study = "), "defines no STUDY"),
        (('recipe("loop"', 'recipe("lop"'), "unknown recipe 'lop'; did you mean 'loop'?"),
        (("base = ", "base = = "), "study.py:6: SyntaxError"),
        (("base = changed", "base = 1 / 0 or changed"), "study.py:6: ZeroDivisionError: division by zero"),
    ],
)
def test_a_bad_study_is_one_line(cli, study, tmp_path, change, words):
    study.write_text(study.read_text().replace(*change))
    assert words in cli("ablate", study, "--out", tmp_path / "out").error()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("loop",), "'loop' is neither a Python file (.py) nor the name of a study; did you mean 'loops'?"),
        (("none.py",), "none.py: no such file; a study is a Python file that defines STUDY"),
        (("loops", "--workers", "0"), "--workers must be >= 1, got 0"),
        (("loops", "--data", "nowhere.txt"), "nowhere.txt"),
    ],
)
def test_bad_options_are_one_line(cli, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert words in cli("ablate", *arguments, "--out", tmp_path / "out", "--quiet").error()

"""``eval --tasks``."""

import json
import logging
import sys

import pytest

QUESTIONS = [
    {"query": f"Question: What is {n} plus 1?", "choices": [str(n + 1), str(n), "a cat"], "gold": 0} for n in range(6)
]
PAIRS = [{"sentence_good": f"{n} dogs bark.", "sentence_bad": f"{n} dogs barks.", "UID": "plural"} for n in range(3)]


@pytest.fixture
def data(tmp_path):
    """Records of two tasks."""
    for name, records in (("arc_easy", QUESTIONS), ("blimp", PAIRS)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return tmp_path


@pytest.fixture
def loud(monkeypatch):
    """lm-eval's logger gets its level back."""
    monkeypatch.setattr(logging.getLogger("lm_eval"), "level", logging.WARNING)


def test_tasks_at_several_loop_counts(cli, trained, data, loud, caplog):
    pytest.importorskip("lm_eval")
    options = [trained, "--tasks", "arc_easy,blimp", "--task-data", data]
    facts = cli("eval", *options, "--loops", "1,2", "--json").json
    assert (facts["model"], facts["limit"]) == (str(trained), None) and facts["lm_eval"].startswith("0.4")
    found = facts["tasks"]
    names = [(score["task"], score["loops"], score["metric"], score["documents"]) for score in found]
    each = [("arc_easy", "acc", 6), ("arc_easy", "acc_norm", 6), ("blimp", "acc", 3)]
    assert names == [(task, loops, metric, count) for loops in (1, 2) for task, metric, count in each]
    assert all(0 <= score["value"] <= 1 and 0 <= score["stderr"] < 0.5 for score in found)
    assert [score["chance"] for score in found[:3]] == [pytest.approx(1 / 3), pytest.approx(1 / 3), 0.5]
    assert {score["window"] for score in found} == {32}  # as in training
    assert "arc_easy: 18 requests were longer than the window of 32 tokens and lost their beginning" in caplog.text
    caplog.clear()
    few = cli("eval", *options, "--limit", "2", "--window", "64", "--precision", "bf16", "--json").json
    assert caplog.text == "" and few["limit"] == 2
    assert {(score["documents"], score["loops"], score["window"], score["cut"]) for score in few["tasks"]} == {
        (2, 2, 64, 0)
    }


def test_the_table(cli, trained, data, loud):
    pytest.importorskip("lm_eval")
    result = cli("eval", trained, "--tasks", "blimp", "--task-data", data, "--limit", "1")
    lines = result.out.splitlines()
    assert result.status == 0 and lines[0] == "window 32" and lines[1].split()[:3] == ["task", "loops", "documents"]
    assert lines[2].split()[:4] == ["blimp", "2", "1", "acc"] and lines[2].endswith("0.5000") and len(lines) == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--tasks arc_esay --task-data {data}", "unknown task 'arc_esay'; did you mean 'arc_easy'?"),
        ("--tasks piqa --task-data {data}", "holds no piqa.jsonl (.gz and .zst are read too); put it there"),
        ("--tasks piqa --task-data {data}/no", "no: no such directory; give the one that holds piqa.jsonl"),
        ("--tasks arc_easy", "name the directory that holds arc_easy.jsonl with --task-data DIR"),
        ("--tasks arc_easy,, --task-data {data}", "give names separated by commas, for example arc_easy,hellaswag"),
        ("--tasks blimp,blimp --task-data {data}", "a task is named twice"),
        ("--tasks blimp --task-data {data} --limit 0", "--limit must be >= 1, got 0"),
        ("--tasks blimp --task-data {data} --loops 0", "loop counts must be >= 1"),
        ("--tasks blimp --task-data {data} --data x.txt", "--data is about a text and has no meaning with --tasks"),
        ("--tasks blimp --task-data {data} --stride 8", "--stride is about a text and has no meaning with --tasks"),
        ("--tasks blimp --task-data {data} --baselines", "--baselines is about a text"),
        ("--task-data {data}", "--task-data changes nothing without --tasks"),
        ("--limit 3", "--limit changes nothing without --tasks"),
    ],
)
def test_wrong_options_are_one_line(cli, trained, data, options, words):
    assert words in cli("eval", trained, *options.format(data=data).split()).error()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ('{"query": 1}', "arc_easy.jsonl:7: field 'choices' must be a list of at least two texts"),
        ("{", "arc_easy.jsonl:7"),
    ],
)
def test_a_wrong_record_is_one_line(cli, trained, data, loud, change, words):
    pytest.importorskip("lm_eval")
    with (data / "arc_easy.jsonl").open("a") as file:
        file.write(change + "\n")
    assert words in cli("eval", trained, "--tasks", "arc_easy", "--task-data", data).error()


def test_a_window_beyond_the_context_is_refused(cli, trained, data, loud):
    pytest.importorskip("lm_eval")
    options = ["--tasks", "blimp", "--task-data", data, "--window", "129"]
    assert "longer than the model's context (max_position_embeddings 128)" in cli("eval", trained, *options).error()


def test_without_lm_eval_one_line_says_what_to_install(cli, trained, data, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    message = cli("eval", trained, "--tasks", "blimp", "--task-data", data).error()
    assert message == "tasks need lm-eval: pip install 'ouroboros-lm[eval]'"

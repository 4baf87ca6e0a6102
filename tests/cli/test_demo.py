"""``demo`` through the real command."""

import json
import signal
import subprocess
import time

import pytest

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

SMALL = ["--minutes", "0.05", "--size", "tiny", "--tokenizer", "bytes"]


@pytest.mark.timeout(200)
def test_the_demo_trains_scores_and_says_who_won(command, text, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    content = text.read_text(encoding="utf-8")
    for index in range(60):  # held-out documents enough for an interval
        (folder / f"{index}.txt").write_text(f"{index}\n{content[100 * index : 100 * index + 1500]}", encoding="utf-8")
    text = folder
    out = tmp_path / "demo"
    result = command("demo", *SMALL, "--data", text, "--out", out)
    assert result.status == 0, result.err
    numbers = json.loads((out / "demo.json").read_text())
    assert set(numbers["arms"]) == {"loop", "loop-twin"}
    arms = list(numbers["arms"].values())
    for twin in arms[1:]:
        assert arms[0]["steps"] == twin["steps"] > 0 and arms[0]["data_sha256"] == twin["data_sha256"]
        assert abs(arms[0]["parameters"] / twin["parameters"] - 1) < 0.01
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "<svg" in page and 'src="http' not in page and "loop-twin" in page and "loop-deep" not in page
    command_line = f"ouroboros demo --minutes 0.05 --data {text} --size tiny --tokenizer bytes --out {out}"
    assert numbers["command"] == command_line
    # Three seconds of training are beaten by an n-gram: nobody has won, in the JSON, the text and the page alike.
    assert numbers["verdict"] == "too little training" and numbers["verdict_sentence"] in result.out
    assert "Too little training to tell: no model is better than an n-gram" in page
    assert "windows a step fit the time" in result.out
    assert "loop writes" in result.out and "xz" in result.out and str(out / "report.html") in result.out
    assert {baseline["name"] for baseline in numbers["baselines"]} and len(numbers["loops"]) >= 3
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        again = command("demo", *SMALL, "--data", text, "--out", out)
    assert "is not empty; choose another --out" in again.error()


def test_bad_input(cli, tmp_path, text, files):
    out = tmp_path / "demo"
    assert "--minutes must be > 0" in cli("demo", "--minutes", "0", "--out", out).error()
    assert "unknown size" in cli("demo", "--size", "huge", "--out", out).error()
    assert "no such file" in cli("demo", *SMALL, "--data", tmp_path / "none.txt", "--out", out).error()
    assert files(tmp_path) == {}
    cli("demo", *SMALL, "--data", text, "--out", text).error()


@pytest.mark.timeout(200)
def test_an_interrupted_demo_keeps_its_model(spawn, text, tmp_path):
    out = tmp_path / "demo"
    with spawn(
        "demo", "--minutes", "5", "--size", "tiny", "--tokenizer", "bytes", "--data", text, "--out", out
    ) as process:
        end = time.monotonic() + 90
        while not (out / "loop" / "metrics.jsonl").exists():
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.05)
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        try:
            _, err = process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    assert process.returncode == 130 and "Traceback" not in err
    assert f"`ouroboros resume {out / 'loop'}` finishes this model" in err.replace("\n", " ")
    assert any((out / "loop" / "checkpoints").glob("step-*/COMPLETE.json"))

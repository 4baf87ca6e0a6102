"""``eval``."""

import hashlib
import math
import shutil

import pytest

from ouroboros.data.prepared import open_prepared
from ouroboros.verbs.evaluate import default_window, parse_loops

CONTRACT = {
    *("bits_per_byte", "nats_per_token", "bytes", "tokens", "stderr", "loops", "window", "stride", "data_sha256"),
    "model",
}


def test_the_runs_own_test_split_is_scored(cli, trained):
    facts = cli("eval", trained, "--json").json
    assert facts.keys() >= CONTRACT
    held_out = b"".join(open_prepared(trained / "data").documents("test"))
    assert facts["bytes"] == facts["tokens"] == len(held_out)  # the byte tokenizer
    assert facts["data_sha256"] == hashlib.sha256(held_out).hexdigest()
    assert facts["bits_per_byte"] == pytest.approx(facts["nats_per_token"] / math.log(2))
    assert (facts["loops"], facts["window"], facts["stride"], facts["model"]) == (2, 32, 32, str(trained))
    assert 2 < facts["bits_per_byte"] < 8.5


def test_windows_longer_than_in_training_come_with_a_word(cli, trained, caplog):
    cli("eval", trained, "--window", "32", "--json")
    assert caplog.text == ""
    longer = cli("eval", trained, "--window", "64", "--json")
    assert longer.json["window"] == 64
    assert "windows of 64 tokens are longer than the 32 that the model was trained on" in caplog.text


def test_any_text_is_scored_whole(cli, trained, text, tmp_path):
    facts = cli("eval", trained, "--data", text, "--json").json
    assert facts["bytes"] == text.stat().st_size
    assert facts["data_sha256"] == hashlib.sha256(text.read_bytes()).hexdigest()
    odd = tmp_path / "odd.bin"
    odd.write_bytes(bytes(range(256)))
    both = cli("eval", trained, "--data", text, "--data", odd, "--json").json
    assert both["bytes"] == facts["bytes"] + 256 and both["documents"] == 2
    part = cli("eval", trained, "--data", text, "--max-bytes", "100", "--json").json
    assert part["bytes"] == 100


def test_windows_strides_splits_and_loops(cli, trained, text):
    plain = cli("eval", trained, "--json", "--window", "16").json
    sliding = cli("eval", trained, "--json", "--window", "16", "--stride", "4").json
    assert (plain["window"], plain["stride"], sliding["stride"]) == (16, 16, 4)
    assert plain["bytes"] == sliding["bytes"] and plain["bits_per_byte"] != sliding["bits_per_byte"]
    rolling = cli("eval", trained, "--json", "--window", "16", "--stride", "4", "--rolling").json
    assert (rolling["reading"], sliding["reading"]) == ("rolling", "windows") and rolling["bytes"] == sliding["bytes"]
    assert 0 < abs(rolling["bits_per_byte"] - sliding["bits_per_byte"]) < 0.5
    several = cli("eval", trained, "--json", "--loops", "1,2,4").json
    assert [score["loops"] for score in several["scores"]] == [1, 2, 4] and several["loops"] == 1
    assert len({score["bits_per_byte"] for score in several["scores"]}) == 3
    assert several["scores"][1]["bits_per_byte"] == cli("eval", trained, "--json").json["bits_per_byte"]
    sizes = {split: cli("eval", trained, "--json", "--split", split).json["bytes"] for split in ("valid", "all")}
    assert sizes["all"] == text.stat().st_size and sizes["valid"] < 0.1 * sizes["all"]
    bf16 = cli("eval", trained, "--json", "--precision", "bf16").json
    assert bf16["bits_per_byte"] == pytest.approx(several["scores"][1]["bits_per_byte"], rel=0.01)


def test_adaptation_is_said_and_judged(cli, trained, text, caplog):
    arguments = ["--data", text, "--max-bytes", "300", "--window", "16", "--stride", "8"]
    plain = cli("eval", trained, *arguments, "--json").json
    assert "legal" not in plain
    for name, legal in (("ttt", True), ("slot", True), ("slot-published", False)):
        caplog.clear()
        facts = cli("eval", trained, *arguments, "--adapt", name, "--adapt-lr", "0.1", "--json").json
        assert facts["reading"].startswith(f"adapted by {name} (") and facts["reading"].endswith("steps at 0.1)")
        assert facts["legal"] is legal and len(facts["criteria"]) == 4 and facts["bytes"] == 300
        assert facts["bits_per_byte"] != plain["bits_per_byte"]
        assert ("is not fair by criterion 1 past only" in caplog.text) is not legal
    shown = cli("eval", trained, *arguments, "--adapt", "ttt", "--adapt-steps", "2").out
    assert "window 16, stride 8, adapted by ttt (2 steps at 0.0003)" in shown
    assert cli("eval", trained, *arguments, "--json").json["bits_per_byte"] == plain["bits_per_byte"]


def test_the_table(cli, trained):
    result = cli("eval", trained, "--loops", "1,2", "--baselines")
    assert result.status == 0 and result.err == ""
    lines = result.out.splitlines()
    assert "window 32, stride 32" in lines[0]
    assert [line.split()[0] for line in lines if line.startswith("loops")] == ["loops", "loops"]
    cheap = cli("eval", trained, "--baselines", "--json").json["baselines"]
    assert any("xz" in baseline["name"] for baseline in cheap) and len(cheap) >= 3
    assert all(any(line.startswith(baseline["name"]) for line in lines) for baseline in cheap)


def test_baselines_are_given_the_same_bytes(cli, trained):
    whole, cut = (cli("eval", trained, "--baselines", "--json", *more).json for more in ((), ("--max-bytes", "100")))
    assert {baseline["bytes"] for baseline in whole["baselines"]} == {whole["bytes"]}
    assert {baseline["bytes"] for baseline in cut["baselines"]} == {cut["bytes"]} and cut["bytes"] <= 100


def test_models_other_than_runs(cli, trained, text, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    for path in trained.iterdir():
        if path.is_file() and path.suffix in (".json", ".safetensors") and path.name != "recipe.json":
            shutil.copy(path, model)
    facts = cli("eval", model, "--data", text, "--json").json
    assert facts["window"] == 128  # the model's longest context; nothing tells the training length
    assert "has no held-out data of its own; name the text with --data" in cli("eval", model).error()
    assert default_window(trained, 1000) == 32 and default_window(trained, 20) == 20
    newest = sorted((trained / "checkpoints").iterdir())[-1]
    assert (
        cli("eval", newest, "--data", text, "--window", "128", "--json").json["bits_per_byte"] == facts["bits_per_byte"]
    )


def test_loop_lists():
    assert parse_loops(None) == [None] and parse_loops("4") == [4] and parse_loops("1,2, 8") == [1, 2, 8]


def test_each_source_by_itself(cli, text, tiny, tmp_path):
    """The parts add up to the whole, and the n-gram of a source knows that source's text alone."""
    other = tmp_path / "other.txt"
    other.write_text("".join(f"{n:b} is {n} in binary\n" for n in range(3000)))
    run = tmp_path / "run"
    assert cli("train", "loop", "--data", text, other, "--out", run, "--steps", "2", *tiny).status == 0
    whole = cli("eval", run, "--json").json
    parts = cli("eval", run, "--by-source", "--baselines", "--json").json["sources"]
    assert list(parts) == [str(text), str(other)]
    assert sum(part["bytes"] for part in parts.values()) == whole["bytes"]
    for path, part in parts.items():
        alone = cli("train", "loop", "--data", path, "--out", tmp_path / part["data_sha256"][:8], "--steps", "1", *tiny)
        assert alone.status == 0
        same = cli("eval", tmp_path / part["data_sha256"][:8], "--by-source", "--baselines", "--json").json["sources"]
        assert same[path]["baselines"] == part["baselines"]
    table = cli("eval", run, "--by-source").out
    assert table.splitlines()[0] == str(text) and str(other) in table
    assert "leave out --data" in cli("eval", run, "--by-source", "--data", text).error()
    assert "give --split train, valid or test" in cli("eval", run, "--by-source", "--split", "all").error()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--loops", "1,x"], "give loop counts separated by commas"),
        (["--loops", "0"], "loop counts must be >= 1"),
        (["--loops", ""], "give loop counts separated by commas"),
        (["--window", "0"], "window must be >= 1, got 0"),
        (["--window", "4000"], "window"),
        (["--stride", "0"], "stride must be between 1 and the window (32), got 0"),
        (["--stride", "33"], "stride must be between 1 and the window (32), got 33"),
        (["--max-bytes", "-1"], "max_bytes must be"),
        (["--data", "nowhere.txt"], "no such file"),
        (["--rolling"], "--rolling changes nothing without --stride"),
        (["--stride", "8", "--rolling", "--adapt", "ttt"], "leave one out"),
        (["--adapt", "tt"], "unknown adaptation 'tt'; did you mean 'ttt'?"),
        (["--adapt", "slot"], "give a stride below that"),
        (["--adapt-lr", "0.1"], "--adapt-lr changes nothing without --adapt"),
        (["--adapt", "ttt", "--adapt-steps", "0"], "steps must be >= 1, got 0"),
    ],
)
def test_bad_options(options, words, cli, trained, files):
    before = files(trained)
    assert words in cli("eval", trained, *options).error()
    assert files(trained) == before


def test_what_is_no_model(cli, trained, text, tmp_path):
    assert "no such model directory" in cli("eval", tmp_path / "nowhere").error()
    assert "is a file; give a run directory" in cli("eval", text).error()
    assert "neither a finished model" in cli("eval", tmp_path).error()
    assert "pickled weights are never read" in cli("eval", tmp_path / "model.pt").error()
    broken = tmp_path / "broken"
    shutil.copytree(trained, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "cannot load the model" in cli("eval", broken).error()
    weights.write_bytes(b"")
    assert "cannot load the model" in cli("eval", broken).error()


def test_a_plain_model_has_no_loop_count(cli, text, tiny, tmp_path):
    options = ["--size", "tiny", "--data", text, "--steps", "1", "--quiet", *tiny]
    assert cli("train", "gpt", *options, "--out", tmp_path / "run").status == 0
    assert "has no loop" in cli("eval", tmp_path / "run", "--loops", "2").error()
    assert cli("eval", tmp_path / "run", "--json").json["loops"] in (None, 1)

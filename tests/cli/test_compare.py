"""``compare`` as a user runs it: verdicts, going on where it was, and what it refuses."""

import json

import pytest

from ouroboros.ablate import cells
from ouroboros.errors import Diverged
from ouroboros.pack.calibrate import quantize_model
from ouroboros.pack.plan import uniform
from ouroboros.pack.write import pack

SHORT = ["--size", "tiny", "--steps", "2", "--seeds", "2", "--quiet", "--model.ffn.intermediate-size", "48"]


@pytest.fixture(scope="module")
def small(tiny):
    """Options of a model of a few thousand weights, whose twins come within 1 %."""
    at = tiny.index("--model.ffn.intermediate-size")
    return [*tiny[:at], *tiny[at + 2 :], *SHORT]


@pytest.fixture(scope="module")
def asked(text, small):
    return ["--data", text, *small]


@pytest.fixture
def alive(monkeypatch):
    """No proof of life, which the first test has, and which takes longer than the runs."""
    monkeypatch.setattr("ouroboros.ablate.runner.dead_arms", lambda *_: {})


FIELDS = {"name", "layout", "parameters", "bytes", "bits_per_byte", "difference", "low", "high"}


def test_two_twins_a_verdict_and_the_same_command_again(cli, asked, tmp_path):
    command = ["compare", "loop", *asked, "--out", tmp_path / "out"]
    found = cli(*command, "--json").json
    assert found["match"] == "parameters" and found["verdict"] in ("win", "loss", "cannot tell")
    assert [twin["name"] for twin in found["twins"]] == ["plain", "deep"] and found["seeds"] == [0, 1]
    assert all(set(twin) >= FIELDS and abs(twin["deviation"]) <= 0.01 for twin in found["twins"])
    assert found["low"] < found["difference"] < found["high"] and "packed" not in found
    assert found["difference"] == min(found["twins"], key=lambda twin: twin["bits_per_byte"])["difference"]
    assert json.loads((tmp_path / "out" / "compare.json").read_text()) == found
    results = sorted((tmp_path / "out" / "runs").glob("*/seed-*/result.json"))
    assert len(results) == 6
    (results[3].parent / "model.safetensors").unlink()  # what has a result is not run again
    assert cli(*command, "--json").json == found
    shown = cli(*command)
    assert shown.status == 0 and "the better twin" in shown.out and f"{found['difference']:+.4f}" in shown.out
    more = cli(*command, "--seeds", "3", "--json").json  # two runs of before, and one more
    assert more["seeds"] == [0, 1, 2] and more["twins"][0]["by_seed"][:2] == found["twins"][0]["by_seed"]


@pytest.mark.usefixtures("alive")
def test_a_twin_that_diverges_is_named_and_the_other_one_judged(cli, asked, tmp_path, monkeypatch):
    def trained(cell):
        if (cell.arm, cell.seed) == ("deep", 1):
            raise Diverged("2 steps in a row had a non-finite loss")
        return train(cell)

    train = cells.train
    monkeypatch.setattr(cells, "train", trained)
    shown = cli("compare", "loop", *asked, "--out", tmp_path / "out")
    assert shown.status == 0 and shown.out.endswith("\nleft out: deep: it diverged with seed 1\n")
    assert "than plain" in shown.out and "deep" not in shown.out.removesuffix(
        "left out: deep: it diverged with seed 1\n"
    )
    page = tmp_path / "page.md"
    assert cli("report", tmp_path / "out", "--out", page).status == 0
    assert "diverged" in page.read_text() and "2 steps in a row had a non-finite loss" in page.read_text()


@pytest.mark.usefixtures("alive")
def test_every_match_before_and_after_packing(cli, asked, tmp_path, monkeypatch):
    """With codes that are quickly made in place of those that a budget asks for."""

    def six_bits(opened, data, out, packing):
        made = quantize_model(opened.model, uniform(6), [], mode="rounding")
        content = pack(opened.spec, made.tensors, opened.tokenizer, eos_token_id=256)
        out.write_bytes(content)
        return len(content), True, 0

    monkeypatch.setattr("ouroboros.ablate.cells.pack_run", six_bits)
    command = ["compare", "loop", *asked, "--seeds", "1", "--match", "all", "--out", tmp_path / "out", "--json"]
    found = cli(*command).json["matches"]
    assert [each["match"] for each in found] == ["parameters", "bytes", "flops", "time"]
    names = [[twin["name"].removesuffix("-timed") for twin in each["twins"]] for each in found]
    assert names == [["plain", "deep"], ["plain", "deep"], ["long"], ["plain", "deep"]]
    assert all(abs(twin["deviation"]) <= 0.01 for each in (found[0], found[2]) for twin in each["twins"])
    for each in found:
        assert {*each} - {"unpacked", "packed", "left_out"} == {*each["packed"]} and each["left_out"] == {}
    by_bytes = found[1]
    assert by_bytes["difference"] == by_bytes["packed"]["difference"] != by_bytes["unpacked"]["difference"]
    assert by_bytes["unpacked"] == {name: found[0][name] for name in by_bytes["unpacked"]} | {
        "match": "bytes",
        "sentence": found[0]["sentence"].replace("stored parameters", "packed bytes"),
        "twins": [{**twin, "deviation": new["deviation"]} for twin, new in zip(found[0]["twins"], by_bytes["twins"])],
    }
    rates = json.loads((tmp_path / "out" / "rates.json").read_text())
    assert len(rates) == 3 and min(rates.values()) > 0
    assert {twin["steps"] for each in found[:3] for twin in each["twins"]} == {2}


@pytest.mark.usefixtures("alive")
def test_files_of_equal_bytes(cli, asked, tmp_path):
    length = ["--data.sequence-length", "128", "--seeds", "1"]
    found = cli("compare", "loop", *asked, *length, "--match", "bytes", "--out", tmp_path / "out", "--json").json
    sizes = [side["bytes"] for side in (found["recipe"], *found["twins"])]
    budget = found["recipe"]["parameters"] * 6 // 8 + 4096
    assert 0.99 * budget < min(sizes) and max(sizes) <= budget
    assert all(abs(twin["deviation"]) <= 0.01 for twin in found["twins"])
    small = ["--budget", "3kB", "--match", "bytes"]
    assert "packing was" in cli("compare", "loop", *asked, *length, *small, "--out", tmp_path / "out").error()


def test_a_plain_recipe_against_itself_cannot_be_told_from_it(cli, text, tmp_path):
    """With all of its options, because those that change RECIPE leave the other one as it is."""
    given = ["--data", text, "--size", "tiny", "--steps", "2", "--seeds", "2", "--json", "--train.precision", "fp32"]
    found = cli("compare", "gpt", "--against", "gpt", *given, "--out", tmp_path / "out").json
    assert found["verdict"] == "cannot tell" and found["low"] <= found["difference"] <= found["high"]
    assert found["twins"][0]["name"] == "gpt-again" and "score exactly the same" in found["sentence"]


@pytest.mark.usefixtures("alive")
def test_one_seed_cannot_tell(cli, asked, tmp_path):
    found = cli("compare", "loop", *asked, "--seeds", "1", "--out", tmp_path / "out", "--json").json
    assert found["verdict"] == "cannot tell" and found["low"] is None is found["high"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["lop"], "unknown recipe 'lop'; did you mean 'loop'?"),
        (["loop", "--against", "gtp"], "unknown recipe 'gtp'; did you mean 'gpt'?"),
        (["gpt"], "gpt has no loop, so it has no plain twin; name the recipe to compare it with: --against RECIPE"),
        (["loop", "--tokens", "100"], "give one of steps, tokens and minutes, not steps and tokens"),
        (["loop", "--seeds", "0"], "--seeds must be >= 1, got 0"),
        (["loop", "--workers", "0"], "--workers must be >= 1, got 0"),
        (["loop", "--budget", "many"], "budget 'many' is no size"),
        (["loop", "--data", "nowhere.txt"], "no such file"),
    ],
)
def test_bad_input(cli, asked, arguments, words, tmp_path):
    assert words in cli("compare", *arguments[:1], *asked, *arguments[1:], "--out", tmp_path / "out").error()


def test_a_recipe_without_such_a_twin_is_refused(cli, text, tmp_path):
    given = ["--data", text, "--size", "tiny", "--steps", "2", "--model.ffn", "none", "--match", "flops"]
    error = cli("compare", "loop", *given, "--out", tmp_path / "out").error()
    assert "no plain twin of layout '1 (1)x2 1': its blocks have no feed-forward network" in error


def test_no_budget_and_no_text(cli, text, tmp_path):
    out = ["--out", tmp_path / "out"]
    assert "exactly one of --steps, --tokens" in cli("compare", "loop", "--data", text, *out).error()
    assert "name the text with --data" in cli("compare", "loop", "--steps", "3", *out).error()
    assert "did you mean --match?" in cli("compare", "loop", "--mach", "flops", *out).error(2)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("alive")
def test_results_of_other_data_code_or_settings_are_refused_by_name(cli, text, small, tmp_path):
    source, out = tmp_path / "text.txt", tmp_path / "out"
    source.write_bytes(text.read_bytes())
    command = ["compare", "loop", "--data", source, *small, "--seeds", "1", "--out", out]
    assert cli(*command).status == 0
    assert "train.steps was 2 and is 3" in cli(*command, "--steps", "3").error()
    assert (
        "model.block.ffn.intermediate_size was 48 and is 52"
        in cli(*command, "--model.ffn.intermediate-size", "52").error()
    )
    manifest = out / "study.json"
    kept = manifest.read_text()
    code = json.loads(kept)["code"]
    manifest.write_text(kept.replace(code, "0.0.1+abc"))
    assert f"the code was 0.0.1+abc and is {code}" in cli(*command).error()
    manifest.write_text(kept)
    source.write_bytes(text.read_bytes()[:-100])
    assert "text.txt" in cli(*command).error()
    assert "choose another --out" in cli(*command[:-1], tmp_path).error()

"""``train`` and ``resume`` as a user runs them: bad input, bad disks, signals."""

import io
import json
import os
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ouroboros.data.tokenize import train_bpe
from ouroboros.model.reading import load_model
from ouroboros.recipes import recipe as make_recipe


@pytest.fixture
def train(cli, tiny, text, tmp_path):
    """``train loop`` with small sizes into ``out``; a dictionary of options replaces the usual ones."""

    def run(*more: object, recipe: str = "loop", data: object = text, out: object = None):
        target = tmp_path / "work" / "run" if out is None else out
        (tmp_path / "work").mkdir(exist_ok=True)
        steps = [] if {"--steps", "--tokens", "--minutes"} & set(map(str, more)) else ["--steps", "2"]
        return cli("train", recipe, "--size", "tiny", "--data", data, "--out", target, *steps, "--quiet", *tiny, *more)

    return run


def test_train_reports_in_one_line_or_one_object(train, tmp_path):
    result = train()
    assert result.status == 0 and result.out.count("\n") == 1 and "finished, 2 steps, 256 tokens" in result.out
    assert result.err == ""
    facts = train("--json", out=tmp_path / "other").json
    assert facts["finished"] is True and facts["stopped_by"] is None and facts["run"] == str(tmp_path / "other")
    assert (facts["step"], facts["tokens"], facts["skipped"]) == (2, 256, 0) and facts["loss"] > 1
    assert facts["best_bits_per_byte"] > 1


def test_a_run_begins_from_another_model_with_its_tokenizer(train, cli, tiny, text, tmp_path):
    first = tmp_path / "first"
    assert train("--data.tokenizer", "chars", out=first, recipe="gpt").status == 0
    looped = ["--model.layout", "1 (1)x2 1", "--model.loop.embedding", "--model.loop.inject", "add"]
    begun = cli("train", "gpt", "--size", "tiny", "--data", text, "--out", tmp_path / "a", "--steps", "1", *tiny)
    assert "begins from" not in begun.err
    warm = [
        *("train", "gpt", "--size", "tiny", "--data", text, "--out", tmp_path / "b", "--steps", "1"),
        *tiny,
        *looped,
    ]
    result = cli(*warm, "--from", first)
    assert result.status == 0 and f"begins from {first}: " in result.err and "2 begin anew" in result.err
    recipes = [json.loads((tmp_path / name / "recipe.json").read_text()) for name in ("first", "b")]
    assert recipes[0]["model"]["vocab_size"] == recipes[1]["model"]["vocab_size"] != 257
    said = train("--from", first, "--data.tokenizer", "bpe:300", recipe="gpt").error()
    assert said == "train: --from brings the tokenizer of its model; leave --data.tokenizer out"
    assert "they need --from MODEL" in train("--from-partly").error()
    assert "no such model directory" in train("--from", tmp_path / "nothing").error()
    assert "--from-blocks 0-1,new,2" in train("--from", first, "--model.layout", "4", recipe="gpt").error()


def test_progress_goes_to_standard_error(cli, tiny, text, tmp_path):
    result = cli(
        "train", "gpt", "--size", "tiny", "--data", text, "--out", tmp_path / "r", "--steps", "2", *tiny, "--json"
    )
    assert result.json["step"] == 2
    assert "gpt 3: " in result.err and "100.0%" in result.err and "bits/byte" in result.err


def test_every_part_of_a_recipe_can_be_set(train, tmp_path):
    options = "--optim.lr 0.01 --train.loops.sampling uniform --model.loop.inject add --model.dropout 0.1 --seed 7"
    assert train(*options.split(), "--model.layout", "1 (1)x3 1").status == 0
    recipe = json.loads((tmp_path / "work" / "run" / "recipe.json").read_text())
    assert (recipe["optim"]["lr"], recipe["train"]["seed"], recipe["model"]["block"]["dropout"]) == (0.01, 7, 0.1)
    assert recipe["train"]["loops"]["sampling"] == "uniform"
    assert recipe["model"]["loop"] == [{"kind": "inject", "mode": "add"}]
    assert recipe["model"]["layout"] == "1 (1)x3 1" and recipe["model"]["hidden_size"] == 16


def test_the_recipe_may_come_after_options(cli, tiny, text, tmp_path):
    """It once trained ``loop`` then, whatever was named."""
    out = tmp_path / "run"
    result = cli("train", "--size", "tiny", "gpt", "--data", text, "--out", out, "--steps", "1", "--quiet", *tiny)
    assert result.status == 0
    recipe = json.loads((out / "recipe.json").read_text())
    assert (recipe["name"], recipe["model"]["layout"], recipe["train"]["batch_size"]) == ("gpt", "3", 4)


def test_the_mixers_own_options_are_plain_options(cli, tiny, text, tmp_path):
    options = ["--size", "tiny", "--data", text, "--steps", "1", "--quiet", *tiny]
    for name, mixer, key in (("loop", "--model.mixer.num-kv-heads", "num_kv_heads"), ("rhrm", KV_RANK, "kv_rank")):
        out = tmp_path / name
        assert cli("train", name, *options, "--out", out, "--data.tokenizer", "bytes", mixer, "1").status == 0
        assert json.loads((out / "recipe.json").read_text())["model"]["block"]["mixer"][key] == 1
    assert "model.block.mixer.dropout: 0.0 -> 0.1" in cli("resume", out, "--model.mixer.dropout", "0.1").error()


DELTA = ["--model.residual", "delta"]
KV_RANK = "--model.mixer.kv-rank"
LITE = make_recipe("rhrm", "lite").model.layout


@pytest.mark.parametrize("first", [True, False])
def test_the_hardware_chooses_among_presets(first, cli, tiny, text, tmp_path):
    """This machine has no CUDA device, so the last preset serves; one line says so unless a size is named."""
    options = ["--data", text, "--steps", "1", "--data.tokenizer", "bytes", *tiny, "--json"]
    words = ["rhrm", *options] if first else [*options, "rhrm"]
    result = cli("train", *words, "--out", tmp_path / "a")
    assert result.json["step"] == 1 and result.json["stopped_by"] is None
    line = result.err.splitlines()[0]
    assert line.startswith("rhrm: size lite (no CUDA device; 1 CPU thread, ")
    assert line.endswith(" GB of memory); choose another with --size")
    assert json.loads((tmp_path / "a" / "recipe.json").read_text())["model"]["layout"] == LITE
    for name, *more in (["rhrm", "--size", "tiny"], ["rhrm", "--quiet"], ["loop"]):
        out = tmp_path / "-".join([name, *more])
        assert "choose another with --size" not in cli("train", name, *options, *more, "--out", out).err
    loop = json.loads((tmp_path / "loop" / "recipe.json").read_text())
    assert loop["model"]["layout"] == make_recipe("loop", "small").model.layout


def test_help_asks_the_hardware_only_where_it_decides(cli, monkeypatch):
    def asked(*_: object) -> None:
        raise AssertionError("asked")

    monkeypatch.setattr("ouroboros.train.hardware.choose_size", asked)
    for words in (["loop"], ["gpt"], [], ["rhrm", "--size", "lite"]):
        assert cli("train", *words, "--help").status == 0
    with pytest.raises(AssertionError, match="asked"):
        cli("train", "rhrm", "--help")


def test_a_run_stopped_early_says_why_everywhere(cli, tiny, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for index in range(60):
        (folder / f"{index}.txt").write_text(f"{index} and some words about {index * index}\n" * 20)
    run, budget = tmp_path / "run", ["--steps", "9", "--train.eval-every", "2"]
    more = ["--train.eval-bytes", "4000", "--data.valid-fraction", "0.4", "--train.target-loss", "50"]
    result = cli("train", "loop", "--size", "tiny", "--data", folder, "--out", run, *budget, *tiny, *more, "--json")
    facts = result.json
    assert facts["finished"] and facts["step"] == facts["exported_step"] == 2
    assert facts["stopped_by"] == "target_loss" and "is at or below the target 50" in facts["stopped_because"]
    assert "stops at 50 nats per token (" in result.err and f"stopped early: {facts['stopped_because']}" in result.err
    message = cli("resume", run).error()
    assert "the run is complete (2 steps), stopped early: validation" in message
    again = cli("resume", run, "--train.target-loss", "None", "--allow-changes", "--quiet")
    assert again.status == 0 and "finished, 9 steps" in again.out and "stopped early" not in again.out
    short = tmp_path / "short"
    said = cli("train", "loop", "--size", "tiny", "--data", folder, "--out", short, *budget, *tiny, *more, "--quiet")
    assert said.status == 0 and "stopped early: validation" in said.out and said.err == ""


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        ({"recipe": "lop"}, 1, "unknown recipe 'lop'; did you mean 'loop'?"),
        (["--size", "tyny"], 1, "unknown size 'tyny'; did you mean 'tiny'?"),
        (["--optim.lrr", "1"], 2, "--optim.lrr, 1; did you mean --optim.lr?"),
        (["--steps", "many"], 2, "--steps"),
        (["--steps", "0"], 1, "train.steps must be > 0, got 0"),
        (["--minutes", "-1"], 1, "train.minutes must be > 0, got -1.0"),
        (["--steps", "2", "--tokens", "5"], 1, "give one of steps, tokens and minutes, not steps and tokens"),
        (["--optim.lr", "-1"], 2, "optim.lr must be > 0, got -1.0"),
        (["--optim.schedule", "linear"], 2, "'wsd', 'cosine', 'constant'"),
        (["--train.batch-size", "0"], 2, "train.batch_size must be >= 1, got 0"),
        (["--model.dropout", "1.5"], 2, "dropout must be in [0, 1), got 1.5"),
        ([*DELTA, "--model.residual.beta-init", "2.5"], 2, "residual.beta_init must be in [0, 2], got 2.5"),
        ([*DELTA, "--model.zero-init-outputs"], 2, "direction has a gradient of 1 / residual.eps"),
        (
            [*DELTA, "--model.residual.values", "4", "--model.residual.kernel", "3"],
            2,
            "residual.kernel (3) must be at least residual.values",
        ),
        (["--model.hidden-size", "17"], 2, "hidden_size (17) must be a multiple of mixer.num_heads (2)"),
        (["--seed", str(2**63)], 1, "train.seed must be within 63 bits"),
        (["--model.layout", "(2)x0"], 2, "layout '(2)x0', column 5: the number of loops must be at least 1"),
        (["--model.layout", "((1)x2"], 2, "layout '((1)x2', column 1: unexpected '((1)x2'"),
        (["--model.layout", ""], 2, "layout '', column 1: is empty"),
        (["--model.layout", "(2"], 2, "column 1: unexpected '(2'"),
        (["--train.loops.backprop", "1"], 1, "train.loops.backprop=1 leaves the blocks before the loop"),
        (["--data.sequence-length", "99999"], 1, "one window needs 100000; set data.sequence_length to at most"),
        (["--data.tokenizer", "byts"], 1, "data.tokenizer 'byts': not a directory; did you mean 'bytes'?"),
        (["--data.tokenizer", "bpe:12"], 1, "write 'bpe:N' with N from 257"),
    ],
)
def test_bad_options_end_in_one_line_and_leave_nothing(options, status, words, train, files, tmp_path):
    keywords, more = (options, []) if isinstance(options, dict) else ({}, options)
    message = train(*more, **keywords).error(status)
    assert words in message, message
    assert files(tmp_path / "work") == {}


def test_a_budget_and_data_are_needed(cli, text, tmp_path):
    out = ["--out", tmp_path / "run"]
    assert "exactly one of --steps, --tokens and --minutes" in cli("train", "loop", "--data", text, *out).error()
    assert "name the text with --data" in cli("train", "loop", "--steps", "1", *out).error()
    assert "--out" in cli("train", "loop", "--steps", "1", "--data", text).error(2)
    assert not (tmp_path / "run").exists()


TOKENIZERS = ["bytes", "chars", "bpe:300"]
CONTENT = {
    "empty": b"",
    "newline": b"\n",
    "tiny": b"just a few words\n",
    "binary": bytes(range(256)) * 40,
    "invalid": b"good text for a while\n" * 200 + b"caf\xff\n" + b"and more of it\n" * 100,
    "no newline": b"ab cd " * 1500,
}
OUTCOME = {
    ("empty", "bytes"): "is empty",
    ("empty", "chars"): "is empty",
    ("empty", "bpe:300"): "is empty",
    ("newline", "bytes"): "too little text",
    ("newline", "chars"): "too little text: the valid part of 1 bytes would be empty; use a longer text",
    ("newline", "bpe:300"): "too little text",
    ("tiny", "bytes"): "at least 64 are needed",
    ("tiny", "chars"): "at least 64 are needed; use a longer text",
    ("tiny", "bpe:300"): "at least 64 are needed",
    ("binary", "bytes"): None,
    ("binary", "chars"): "invalid UTF-8 at byte 128; the byte tokenizer accepts binary data",
    ("binary", "bpe:300"): "invalid UTF-8 at byte 128; the byte tokenizer accepts binary data",
    ("invalid", "bytes"): None,
    ("invalid", "chars"): "invalid UTF-8 at byte 4403; the byte tokenizer accepts binary data",
    ("invalid", "bpe:300"): "invalid UTF-8 at byte 4403; the byte tokenizer accepts binary data",
    ("no newline", "bytes"): None,
    ("no newline", "chars"): None,
    ("no newline", "bpe:300"): None,
}


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("content", CONTENT)
def test_odd_files(content, tokenizer, train, files, tmp_path):
    path = tmp_path / f"{content.replace(' ', '-')}.txt"
    path.write_bytes(CONTENT[content])
    result = train("--data.tokenizer", tokenizer, data=path)
    expected = OUTCOME[content, tokenizer]
    if expected is None:
        assert result.status == 0, result
        return
    message = result.error()
    assert expected in message and path.name in message, message
    assert files(tmp_path / "work") == {}


def test_characters_of_a_built_in_text(train, cli, tmp_path, caplog):
    result = train("--data.tokenizer", "chars", "--data.max-bytes", 20_000, data="needle:")
    assert result.status == 0 and "unknown" not in caplog.text, result
    run = tmp_path / "work" / "run"
    result = cli("generate", run, "--prompt", "Tall grass", "--max-new-tokens", "4")
    assert result.status == 0 and result.out.startswith("Tall grass"), result
    assert caplog.text.count("prompt: 1 of 10 characters are unknown to this tokenizer ('T' x 1)") == 1
    scores = cli("eval", run, "--data", "needle:", "--max-bytes", "2000", "--json").json
    assert (scores["bytes"], scores["tokens"], scores["unknown_tokens"]) == (100, 100, 0)  # the test part


def test_data_that_is_not_there(train, files, text, tmp_path):
    assert "did you mean" in train(data=text.parent / "texd.txt").error()
    assert "no such file" in train(data=tmp_path / "nothing.txt").error()
    assert "no file matches this glob" in train(data=tmp_path / "*.md").error()
    (tmp_path / "hollow").mkdir()
    assert "no text, code or record files" in train(data=tmp_path / "hollow").error()
    assert "the weight must be > 0 and finite, as in 'notes.txt=0.3', got 'much'" in train(data=f"{text}=much").error()
    assert files(tmp_path / "work") == {}


def test_several_sources_in_either_spelling(train, text, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("another text with other words\n" * 200)
    assert train("--data", f"{other}=0.5").status == 0
    recipe = json.loads((tmp_path / "work" / "run" / "recipe.json").read_text())
    assert recipe["data"]["sources"] == [str(text), f"{other}=0.5"]
    assert "named twice" in train("--data", text, out=tmp_path / "twice").error()


def test_an_existing_run_is_refused(train, cli, trained, files, text):
    before = files(trained)
    assert f"holds a run of recipe 'loop'; continue it with `ouroboros resume {trained}`" in train(out=trained).error()
    assert "holds a run of recipe 'loop'" in train(recipe="gpt", out=trained).error()
    assert "is not an empty directory" in train(out=text.parent).error()
    assert "the run is complete (8 steps)" in cli("resume", trained).error()
    assert "the run is complete" in cli("resume", "--quiet", trained).error()  # an option may come first
    assert "train.steps: 8 -> 9" in cli("resume", trained, "--train.steps", "9").error()
    assert "did you mean --train.steps?" in cli("resume", trained, "--train.stepz", "9").error(2)
    assert files(trained) == before


def test_resume_goes_on_under_a_larger_budget(cli, trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    result = cli("resume", run, "--train.steps", "9", "--allow-changes", "--quiet", "--json")
    assert result.json["step"] == 9 and result.json["finished"]
    assert load_model(run).schedule.notation == "1 (1)x2 1"


def test_what_is_no_run(cli, tmp_path, text):
    assert "does not exist; start a run with" in cli("resume", tmp_path / "nowhere").error()
    assert "is not a run directory (no recipe.json)" in cli("resume", tmp_path).error()
    (tmp_path / "recipe.json").write_text('{"name": "x", "mudel": {}}')
    assert "unknown key 'mudel'; did you mean 'model'?" in cli("resume", tmp_path).error()
    (tmp_path / "recipe.json").write_text("{")
    assert "not JSON" in cli("resume", tmp_path).error()
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.json"]


def test_places_that_cannot_be_written(train, text):
    """Root may write anywhere, so these are places where nobody can."""
    assert "cannot make the run directory" in train(out=text / "run").error()
    assert "cannot make the run directory" in train(out="/proc/run").error()


def test_a_full_disk_ends_in_one_line_and_the_run_can_go_on(command, cli, tiny, text, tmp_path):
    """A limit on the size of files fails writes as a full disk does, without one."""
    run = tmp_path / "run"
    size = ["--model.hidden-size", "64", "--model.ffn.intermediate-size", "128"]
    options = ["--size", "tiny", "--data", text, "--out", run, "--steps", "4", "--train.checkpoint-every", "2"]

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    failed = command("train", "loop", *options, "--quiet", *tiny, *size, preexec_fn=limit)
    assert "cannot save checkpoint" in failed.error() and "File too large" in failed.err
    names = {path.name for path in run.rglob("*")}
    assert not [name for name in names if "tmp" in name] and not any((run / "checkpoints").iterdir())
    assert cli("resume", run, "--quiet", "--json").json["step"] == 4


def wait_for(condition, process, seconds: float = 90.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "the run did not get so far"
        time.sleep(0.02)


@pytest.mark.timeout(240)
def test_signals_stop_a_run_with_a_checkpoint(spawn, cli, tiny, text, tmp_path):
    run = tmp_path / "run"
    options = ["--size", "tiny", "--data", text, "--out", run, "--steps", "100000", "--json", *tiny]
    metrics = run / "metrics.jsonl"

    def steps() -> int:
        return len(metrics.read_bytes().splitlines()) if metrics.exists() else 0

    with spawn("train", "loop", *options, fresh=True) as process:
        wait_for(lambda: steps() >= 2, process)
        other = cli("resume", run, "--quiet")  # while it runs
        assert f"is in use by process {process.pid}" in other.error()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    first = json.loads(out)
    assert process.returncode == 130 and first["stopped_by"] == "SIGINT" and not first["finished"]
    assert "SIGINT: saving a checkpoint and stopping" in err and "Traceback" not in err
    assert (run / "checkpoints" / f"step-{first['step']:08d}" / "COMPLETE.json").exists()

    before = steps()
    with spawn("resume", run, "--json", "--quiet") as process:
        wait_for(lambda: steps() > before + 1, process)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    second = json.loads(out)
    assert process.returncode == 143 and second["stopped_by"] == "SIGTERM" and second["step"] > first["step"]
    assert err == ""
    total = second["step"] + 2
    assert cli("resume", run, "--train.steps", total, "--allow-changes", "--quiet", "--json").json["step"] == total


def test_an_interruption_before_training_leaves_nothing(cli, tiny, text, tmp_path, monkeypatch):
    def interrupted(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(30)  # another thread may be the one that is told first

    monkeypatch.setattr("ouroboros.train.run.resolve", interrupted)
    out: Path = tmp_path / "run"
    result = cli("train", "loop", "--size", "tiny", "--data", text, "--out", out, "--steps", "1", "--quiet", *tiny)
    assert (result.status, result.err) == (130, "interrupted\n") and not out.exists()


def rows_of(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_stream_that_breaks_late_is_saved_and_goes_on_behind_the_bad_record(command, cli, tiny, tmp_path):
    path = rows_of(tmp_path / "r.jsonl", [{"text": f"Record {n} says {n * n}, and no more."} for n in range(300)])
    whole = path.read_text().splitlines()
    path.write_text("\n".join([*whole[:250], '{"text": "cut off he', *whole[250:]]))
    run = tmp_path / "run"
    options = ["--data", path, "--size", "tiny", "--steps", "90", "--data.stream", "--data.max-bytes", "3000", *tiny]
    begun = time.monotonic()
    result = command("train", "gpt", *options, "--out", run, "--quiet", "--train.eval-every", "100")
    assert result.status == 1 and time.monotonic() - begun < 60
    last = result.err.splitlines()[-1]
    assert f"error: {path}:251: not JSON" in last and "is saved: `ouroboros resume" in last
    assert "Traceback" not in result.err and list((run / "checkpoints").iterdir())
    assert "r.jsonl:251: not JSON" in cli("resume", run, "--quiet").error()
    done = cli("resume", run, "--quiet", "--data.skip-bad-records", "--allow-changes")
    assert done.status == 0, done.err


def test_conversations_are_found_learned_and_answered(cli, tiny, tmp_path, monkeypatch, caplog):
    rows = [
        {"messages": [{"role": "user", "content": f"What is {n}?"}, {"role": "assistant", "content": f"It is {n}."}]}
        for n in range(300)
    ]
    path, run = rows_of(tmp_path / "m.jsonl", rows), tmp_path / "run"
    options = ["--data", path, "--size", "tiny", "--steps", "2", "--quiet", "--data.loss", "answers", *tiny]
    result = cli("train", "gpt", *options, "--out", run)
    assert result.status == 0, result.err
    assert f"has conversations and no 'text', read as {path}@messages" in caplog.text
    assert json.loads((run / "recipe.json").read_text())["data"]["sources"] == [f"{path}@messages"]
    monkeypatch.setattr("sys.stdin", io.StringIO("What is 7?\n/show\n/quit\n"))
    said = cli("chat", run, "--max-new-tokens", "4")
    assert said.status == 0 and "template=messages" in said.out
    assert cli("eval", run, "--data", path, "--max-bytes", "500").status == 0
    assert cli(
        "train", "gpt", *options, "--data", path, "--out", tmp_path / "other", "--train.label-smoothing", "0.1"
    ).error()


def test_a_tokenizers_own_chat_template_is_learned_scored_and_used(cli, tiny, text, tmp_path, monkeypatch):
    hf = train_bpe([text.read_bytes()], 300).hf
    hf.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    hf.chat_template = "{% for m in messages %}<|turn|>{{ m.role }}: {{ m.content }}{% endfor %}<|turn|>assistant:"
    hf.save_pretrained(tmp_path / "tok")
    answer = {"role": "assistant", "content": "It is this."}
    rows = [{"messages": [{"role": "user", "content": f"{n}?"}, answer]} for n in range(90)]
    path, run = rows_of(tmp_path / "m.jsonl", rows), tmp_path / "run"
    options = ["--data", path, "--data.tokenizer", tmp_path / "tok", "--size", "tiny", "--steps", "2", "--quiet", *tiny]
    assert cli("train", "gpt", *options, "--out", run).status == 0
    shown = "<|turn|>user: 7?<|turn|>assistant: It is this.<|turn|>assistant:"
    assert shown[16:].encode() in (run / "data" / "0-train.raw").read_bytes()
    assert cli("eval", run, "--data", path, "--json").json["bytes"] == 10 * len(shown) + 80 * (len(shown) + 1)
    monkeypatch.setattr("sys.stdin", io.StringIO("8?\n<|turn|>\n/quit\n"))
    said = cli("chat", run, "--max-new-tokens", "4")
    assert said.status == 0 and "error: chat: a turn of 'user' spells the special token '<|turn|>'" in said.out


def test_optional_columns_and_what_is_dropped(cli, tiny, tmp_path, caplog):
    rows = [{"ask": f"Question {n}", "more": "" if n % 2 else None, "say": f"Answer {n}"} for n in range(200)]
    path = rows_of(tmp_path / "r.jsonl", [*rows, dict.fromkeys(rows[0], " ")])
    options = ["--size", "tiny", "--steps", "1", "--quiet", *tiny]
    result = cli("train", "gpt", "--data", f"{path}@{{ask}}\\n{{more}}\\n{{say}}", "--out", tmp_path / "run", *options)
    assert result.status == 0, result.err
    assert caplog.messages == [f"source '{path}': 201 read, 200 kept, 1 no text"]
    page = tmp_path / "page.html"
    assert cli("report", tmp_path / "run", "--out", page).status == 0
    assert "no text" in page.read_text(encoding="utf-8")


def test_a_tokenizer_that_loses_text_is_refused_before_training(cli, tiny, text, tmp_path):
    vocabulary = ["[UNK]", "[SEP]", *(chr(code) for code in range(97, 123)), *(f"##{chr(c)}" for c in range(97, 123))]
    backend = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(vocabulary)}, unk_token="[UNK]"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="[SEP]").save_pretrained(tmp_path / "pieces")
    options = ["--data", text, "--data.tokenizer", tmp_path / "pieces", "--size", "tiny", "--steps", "1", *tiny]
    error = cli("train", "gpt", *options, "--out", tmp_path / "run", "--quiet").error()
    assert "loses text: it gives back" in error and "use 'bytes', 'bpe:4096'" in error
    assert not (tmp_path / "run").exists()

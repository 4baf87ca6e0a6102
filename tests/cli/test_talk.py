"""``generate`` and ``chat``."""

import io
import json
import os
import pty
import re
import resource
import select
import shutil
import signal
import time

import pytest

from ouroboros.data.tokenize import train_bpe
from ouroboros.model.configuration import OuroborosConfig
from ouroboros.recipes import recipe
from ouroboros.serve.sampling import Sampling
from ouroboros.systems.osam.sampling import ProgramSampling
from ouroboros.systems.rhrm.sampling import ChatSampling
from ouroboros.verbs.talk import GenerateOptions, _parse

RATE = re.compile(r"\[\d+ tokens, [\d,]+ tokens/s\]\n")


def test_generate_streams_prompt_and_continuation(cli, trained):
    result = cli("generate", trained, "--prompt", "abc", "--max-new-tokens", "12")
    assert result.status == 0 and result.out.startswith("abc") and result.out.endswith("\n")
    assert RATE.fullmatch(result.err) and "[12 tokens, " in result.err
    assert cli("generate", trained, "--prompt", "abc", "--max-new-tokens", "1").err == "[1 token]\n"
    assert cli("generate", trained, "--prompt", "abc", "--max-new-tokens", "12").out == result.out  # seeded
    assert cli("generate", trained, "--prompt", "abc", "--max-new-tokens", "12", "--seed", "1").out != result.out


def test_generate_as_json(cli, trained):
    options = ["--max-new-tokens", "8", "--temperature", "0", "--json"]
    facts = cli("generate", trained, "--prompt", "caf\u00e9", "--count", "2", "--loops", "3", *options).json
    assert facts["prompt"] == "caf\u00e9" and facts["loops"] == 3 and facts["seed"] == 0
    assert len(facts["continuations"]) == 2 and facts["continuations"][0] == facts["continuations"][1]
    assert facts["model"] == str(trained)
    assert facts["tokens"] == [8, 8] and all(0 < seconds < 60 for seconds in facts["seconds"])
    text = cli("generate", trained, "--prompt", "caf\u00e9", "--loops", "3", *options[:-1]).out
    assert text == f"caf\u00e9{facts['continuations'][0]}\n"


def test_an_empty_prompt_starts_a_document_and_a_dash_reads_standard_input(cli, trained, monkeypatch):
    assert cli("generate", trained, "--prompt", "", "--max-new-tokens", "4", "--json").json["prompt"] == ""
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"from a pipe \xff")))
    result = cli("generate", trained, "--prompt", "-", "--max-new-tokens", "4")
    assert result.status == 0 and result.out.startswith("from a pipe \ufffd") and RATE.fullmatch(result.err)


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        ([], 1, "give --prompt TEXT"),
        (["--prompt", "x" * 200], 1, "the prompt has 201 tokens but the model's context holds 128; shorten the prompt"),
        (["--prompt", "x" * 10_000], 1, "the prompt has 10001 tokens but the model's context holds 128"),
        (["--prompt", "x", "--window", "129"], 1, "the window is 129 tokens but the model's context holds 128"),
        (["--prompt", "x", "--window", "0"], 2, "window must be >= 1 or none, got 0"),
        (["--prompt", "x", "--window", "8", "--fast"], 1, "--fast does not serve --window (8): leave one of them out"),
        (["--prompt", "x", "--style", "published"], 1, "the model is of no system that has a published style"),
        (["--prompt", "x", "--style", "publishe"], 2, "publishe"),
        (["--prompt", "x", "--template", "metamth"], 1, "format 'metamth': unknown; did you mean 'metamath'?"),
        (["--prompt", "x", "--template", "cosmopedia"], 1, "template 'cosmopedia' has no second column"),
        (["--prompt", "x", "--temperature", "-1"], 2, "temperature must be >= 0, got -1.0"),
        (["--prompt", "x", "--top-p", "0"], 2, "top_p must be in (0, 1], got 0.0"),
        (["--prompt", "x", "--top-k", "-2"], 2, "top_k must be >= 0"),
        (["--prompt", "x", "--max-new-tokens", "0"], 2, "max_new_tokens must be >= 1"),
        (["--prompt", "x", "--tempratur", "1"], 2, "did you mean --temperature?"),
        (["--prompt", "x", "--loops", "0"], 1, "loops must be >= 1"),
        (["--prompt", "x", "--count", "0"], 1, "--count must be >= 1"),
    ],
)
def test_bad_input(options, status, words, cli, trained):
    assert words in cli("generate", trained, *options).error(status)


def test_what_is_no_model(cli, text):
    for verb, options in (("generate", ["--prompt", "x"]), ("chat", [])):
        assert "no such model directory" in cli(verb, "nowhere", *options).error()
        assert "is a file" in cli(verb, text, *options).error()


def test_stop_strings_end_the_text(cli, trained):
    options = ["--prompt", "ab", "--max-new-tokens", "60", "--json"]
    whole = cli("generate", trained, *options).json["continuations"][0]
    stop = next(character for character in whole[5:] if character.isascii() and character.isprintable())
    cut = cli("generate", trained, *options, "--stop", stop).json
    assert cut["continuations"][0] == whole[: whole.index(stop)]


def test_a_window_takes_a_prompt_of_any_length(cli, trained):
    options = ["--max-new-tokens", "5", "--temperature", "0", "--window", "16", "--json"]
    long = cli("generate", trained, "--prompt", "x" * 10_000, *options).json
    short = cli("generate", trained, "--prompt", "x" * 16, *options).json
    assert long["continuations"] == short["continuations"]


@pytest.fixture
def published(trained, tmp_path):
    """A directory that looks like a model of a system; it has the weights of none."""

    def of(name):
        path = tmp_path / name
        shutil.copytree(trained, path, ignore=shutil.ignore_patterns("checkpoints", "data", "config.json"))
        OuroborosConfig.from_spec(recipe(name, "tiny").model).save_pretrained(path)
        return path

    return of


def test_the_published_style_is_that_of_the_models_system(published, monkeypatch):
    rhrm, osam = published("rhrm-published"), published("osam")

    def parsed(*options):
        return _parse(GenerateOptions, "generate", list(map(str, options))).sampling

    assert parsed(rhrm, "--prompt", "x") == Sampling()
    assert parsed(rhrm, "--prompt", "x", "--style", "published") == ChatSampling()
    assert parsed(osam, "--style=published", "--max-new-tokens", "7") == ProgramSampling(max_new_tokens=7)
    mixed = ["--top-k", "3", "--style=published", "--no-ban-triples", "--window", "None", "--stop", "END"]
    expected = ChatSampling(top_k=3, ban_triples=False, window=None, stop=("END",))
    # The controls are found wherever the model stands, and whatever other words name a directory.
    for words in ([rhrm, *mixed], [*mixed, rhrm], ["--prompt", "x", *mixed[:-2], rhrm, *mixed[-2:]]):
        assert parsed(*words) == expected
    monkeypatch.chdir(rhrm.parent)
    assert parsed("--prompt", ".", "osam", "--style", "published", "--no-repeat-last") == ProgramSampling(
        repeat_last=False
    )


def test_a_style_shows_its_own_controls(published, cli):
    rhrm = published("rhrm")
    shown = cli("generate", rhrm, "--style", "published", "--help").out
    assert "--ban-triples" in shown and "--penalty" in shown
    assert "--ban-triples" not in cli("generate", rhrm, "--help").out
    options = [rhrm, "--prompt", "x", "--style", "published"]
    assert "--fast does not serve --window (128)" in cli("generate", *options, "--fast").error()
    assert "'distinct', 'occurrences'" in cli("generate", *options, "--penalty", "twice").error(2)
    assert "did you mean --ban-triples?" in cli("generate", *options, "--ban-tripels").error(2)


@pytest.mark.parametrize("content", ["", "{}", '{"spec": {"mixer": 1}}'])
def test_a_style_for_a_model_that_cannot_be_read_is_an_error_of_the_model(content, cli, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_text(content)
    message = cli("generate", tmp_path, "--prompt", "x", "--style", "published").error()
    assert f"{tmp_path / 'config.json'}" in message and ("cannot read" in message or "expected" in message)
    assert "no such model" in cli("generate", tmp_path / "no", "--prompt", "x", "--style", "published").error()


def test_a_template_makes_the_prompt(cli, trained):
    options = ["--max-new-tokens", "4", "--template", "qa"]
    facts = cli("generate", trained, "--prompt", "How?", *options, "--json").json
    assert facts["prompt"] == "Q: How?\nA:" and facts["template"] == "qa"
    written = ["--max-new-tokens", "4", "--template", "Ask: {a}\\nTell: {b}"]
    assert cli("generate", trained, "--prompt", "How?", *written).out.startswith("Ask: How?\nTell:")


def test_what_does_not_belong_together(cli, trained, tmp_path):
    for name in ("config.json", "model.safetensors", "generation_config.json"):
        shutil.copy(trained / name, tmp_path)
    for verb, options in (("generate", ["--prompt", "x"]), ("chat", [])):
        assert "holds no tokenizer (tokenizer.json)" in cli(verb, tmp_path, *options).error()
    train_bpe([b"some words and some more words " * 20], 270).save(tmp_path)
    for verb, options in (("generate", ["--prompt", "x"]), ("chat", [])):
        words = "the model has a vocabulary of 257 and the tokenizer one of 270"
        assert words in cli(verb, tmp_path, *options).error()


def test_chat_takes_the_template_of_the_training_text(cli, trained, tmp_path, monkeypatch, caplog):
    shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints", "data"))
    saved = json.loads((trained / "recipe.json").read_text())

    def templates(sources: list[str], *options: str) -> list[str | None]:
        saved["data"]["sources"] = sources
        (tmp_path / "run" / "recipe.json").write_text(json.dumps(saved))
        monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
        path = tmp_path / "talk.jsonl"
        assert cli("chat", tmp_path / "run", "--max-new-tokens", "2", "--transcript", path, *options).status == 0
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        path.unlink()
        return [line["template"] for line in lines]

    mixed = ["a.jsonl@qa=0.4", "b.jsonl@mbpp=0.6"]
    assert templates(mixed) == ["mbpp"] and templates(mixed, "--template", "none") == [None]
    assert templates(mixed, "--template", "metamath") == ["metamath"]
    assert templates(["python:"]) == [None] and caplog.text == ""
    assert (
        templates(["a.jsonl=heavy"]) == [None] and "no template from the recipe: source 'a.jsonl=heavy'" in caplog.text
    )


def test_a_transcript_grows_over_sessions_and_other_files_are_refused(cli, trained, tmp_path, monkeypatch):
    path = tmp_path / "talk.jsonl"

    def chat(said: str):
        monkeypatch.setattr("sys.stdin", io.StringIO(said))
        return cli("chat", trained, "--max-new-tokens", "3", "--transcript", path)

    assert [chat(said).status for said in ("one\n/loops 3\ntwo\n", "three\n")] == [0, 0]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["user"], line["loops"]) for line in lines] == [("one", 2), ("two", 3), ("three", 2)]
    assert all(line["time"].endswith("+00:00") and line["sampling"]["max_new_tokens"] == 3 for line in lines)
    path.write_text("my notes\n")
    assert "line 1 is no turn of a conversation" in chat("one\n").error()
    assert path.read_text() == "my notes\n"


def test_chat_without_history_continues_each_line_alone(cli, trained, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("abc\nabc\n"))
    options = ["--no-history", "--temperature", "0", "--max-new-tokens", "9"]
    said = cli("chat", trained, *options).out
    alone = cli("generate", trained, "--prompt", "abc", *options[1:]).out.removeprefix("abc")
    assert said == alone * 2 + "\n"


def test_a_full_disk_is_an_error_line_and_the_conversation_goes_on(command, trained, tmp_path):
    path = tmp_path / "talk.jsonl"
    said = f"one\ntwo\n/save {tmp_path / 'saved.json'}\n"

    def no_room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))  # for one turn and a part of the next

    options = ["--max-new-tokens", "3", "--transcript", str(path)]
    result = command("chat", trained, *options, input=said, preexec_fn=no_room)
    assert result.out.count("error: transcript") == 1 and "File too large; 1 turn(s) are not in it yet" in result.out
    assert [json.loads(line)["user"] for line in path.read_text().splitlines()] == ["one"]
    assert [turn["user"] for turn in json.loads((tmp_path / "saved.json").read_text())["turns"]] == ["one", "two"]
    assert result.status == 1 and result.err.startswith("error: transcript") and result.err.count("\n") == 1


def test_chat_over_a_pipe(command, trained, tmp_path):
    lines = ["hello", "/loops 3", "/set temperature 0", "/tempratur", "/", "again", f"/save {tmp_path / 'talk.json'}"]
    said = "\n".join([*lines, "caf\udcff", "/quit", "never read"])
    result = command(
        "chat", trained, "--max-new-tokens", "6", input=said, errors="surrogateescape", encoding="utf-8", text=None
    )
    assert result.status == 0 and result.err == "" and ">" not in result.out[:1] and "tokens/s" not in result.out
    assert "[3 loops (trained with 2)]" in result.out
    assert "error: unknown command /tempratur" in result.out and "error: unknown command /;" in result.out
    saved = json.loads((tmp_path / "talk.json").read_text())
    assert [turn["user"] for turn in saved["turns"]] == ["hello", "again"]
    assert saved["loops"] == 3 and saved["sampling"]["temperature"] == 0


def test_chat_at_a_terminal(spawn, trained, request):
    """With a prompt, Ctrl-C at it, and Ctrl-D to leave."""
    master, slave = pty.openpty()
    request.addfinalizer(lambda: os.close(master))
    process = spawn("chat", trained, "--max-new-tokens", "4", stdin=slave, stdout=slave, stderr=slave)
    request.addfinalizer(lambda: process.poll() is None and (process.kill(), process.wait()))
    os.close(slave)
    seen = b""

    def until(words: bytes, seconds: float = 90.0, poke: bytes = b"") -> None:
        nonlocal seen
        begun = time.monotonic()
        poked = begun
        while words not in seen:
            assert time.monotonic() < begun + seconds, seen
            if poke and time.monotonic() > poked + 3:
                poked = time.monotonic()
                os.write(master, poke)
            if select.select([master], [], [], 0.1)[0]:
                seen += os.read(master, 4096)
        seen = seen[seen.index(words) + len(words) :]

    until(b"template none; /help lists commands")
    until(b"> ")
    os.write(master, b"hello\n")
    until(b"hello")
    until(b" tokens/s]")
    until(b"> ")
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    # A signal between the prompt and the reading of the terminal is seen at the next key only: Ctrl-U changes nothing.
    until(b"[Ctrl-D or /quit leaves]", poke=b"\x15")
    until(b"> ")
    os.write(master, b"/loops x\n")
    until(b"error: /loops takes a number")
    until(b"> ")
    os.write(master, b"\x04")
    assert process.wait(timeout=30) == 0

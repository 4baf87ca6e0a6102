"""``generate`` and ``chat``."""

import io
import json
import os
import pty
import select
import signal
import time

import pytest


def test_generate_streams_prompt_and_continuation(cli, trained):
    result = cli("generate", trained, "--prompt", "abc", "--max-new-tokens", "12")
    assert result.status == 0 and result.err == "" and result.out.startswith("abc") and result.out.endswith("\n")
    assert cli("generate", trained, "--prompt", "abc", "--max-new-tokens", "12").out == result.out  # seeded
    assert cli("generate", trained, "--prompt", "abc", "--max-new-tokens", "12", "--seed", "1").out != result.out


def test_generate_as_json(cli, trained):
    options = ["--max-new-tokens", "8", "--temperature", "0", "--json"]
    facts = cli("generate", trained, "--prompt", "caf\u00e9", "--count", "2", "--loops", "3", *options).json
    assert facts["prompt"] == "caf\u00e9" and facts["loops"] == 3 and facts["seed"] == 0
    assert len(facts["continuations"]) == 2 and facts["continuations"][0] == facts["continuations"][1]
    assert facts["model"] == str(trained)
    text = cli("generate", trained, "--prompt", "caf\u00e9", "--loops", "3", *options[:-1]).out
    assert text == f"caf\u00e9{facts['continuations'][0]}\n"


def test_an_empty_prompt_starts_a_document_and_a_dash_reads_standard_input(cli, trained, monkeypatch):
    assert cli("generate", trained, "--prompt", "", "--max-new-tokens", "4", "--json").json["prompt"] == ""
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"from a pipe \xff")))
    result = cli("generate", trained, "--prompt", "-", "--max-new-tokens", "4")
    assert result.status == 0 and result.out.startswith("from a pipe \ufffd") and result.err == ""


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        ([], 1, "give --prompt TEXT"),
        (["--prompt", "x" * 200], 1, "the prompt has 201 tokens but the model's context holds 128; shorten the prompt"),
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


def test_chat_over_a_pipe(command, trained, tmp_path):
    lines = ["hello", "/loops 3", "/set temperature 0", "/tempratur", "/", "again", f"/save {tmp_path / 'talk.json'}"]
    said = "\n".join([*lines, "caf\udcff", "/quit", "never read"])
    result = command(
        "chat", trained, "--max-new-tokens", "6", input=said, errors="surrogateescape", encoding="utf-8", text=None
    )
    assert result.status == 0 and result.err == "" and ">" not in result.out[:1]
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

    def until(words: bytes, seconds: float = 30.0) -> None:
        nonlocal seen
        end = time.monotonic() + seconds
        while words not in seen:
            assert time.monotonic() < end, seen
            if select.select([master], [], [], 0.1)[0]:
                seen += os.read(master, 4096)
        seen = seen[seen.index(words) + len(words) :]

    until(b"/help lists commands")
    until(b"> ")
    os.write(master, b"hello\n")
    until(b"hello")
    until(b"> ")
    time.sleep(0.5)  # a signal between the prompt and the reading of the terminal is seen at the next key only
    process.send_signal(signal.SIGINT)
    until(b"[Ctrl-D or /quit leaves]")
    until(b"> ")
    os.write(master, b"/loops x\n")
    until(b"error: /loops takes a number")
    until(b"> ")
    os.write(master, b"\x04")
    assert process.wait(timeout=30) == 0

"""``tokenizer``."""

import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from ouroboros.data.token_shards import read_shard
from ouroboros.data.tokenize import load_tokenizer


def test_a_tokenizer_is_trained_on_the_training_part_and_used(cli, text, tiny, tmp_path):
    out = tmp_path / "bpe"
    result = cli("tokenizer", "--data", text, "--out", out, "--vocab-size", "300", "--json")
    facts = result.json
    size = text.stat().st_size
    assert facts["vocab_size"] == 300 and facts["out"] == str(out)
    assert 0.85 * size < facts["bytes"] < 0.95 * size and facts["tokens"] < facts["bytes"]
    made = load_tokenizer(out)
    assert made.decode(made.encode(text.read_bytes())) == text.read_bytes() and made.vocab_size == 300
    options = ["--data", text, "--data.tokenizer", out, "--size", "tiny", "--steps", "1", "--quiet", *tiny]
    assert cli("train", "gpt", *options, "--out", tmp_path / "run").status == 0
    assert load_tokenizer(tmp_path / "run").fingerprint == made.fingerprint


def test_it_says_what_it_made(cli, text, tmp_path):
    result = cli("tokenizer", "--data", text, "--out", tmp_path / "bpe", "--vocab-size", "260")
    assert result.status == 0 and "260 entries" in result.out and "bytes per token" in result.out


def test_texts_become_shards_that_are_trained_on_and_scored(cli, text, tiny, tmp_path):
    tokenizer, shards = tmp_path / "bpe", tmp_path / "shards"
    made = ["tokenizer", "--data", text, "--out", tokenizer, "--vocab-size", "300", "--shards", shards]
    facts = cli(*made, "--shard-tokens", "2000", "--json").json
    names = sorted(path.name for path in shards.iterdir())
    assert sorted(facts["shards"]) == names and {name.split("_")[0] for name in names} == {"train", "valid", "test"}
    assert names.count("train_000001.bin") == 1
    decode = load_tokenizer(tokenizer).decode
    ids = [
        np.concatenate([read_shard(shards / n) for n in names if n.startswith(s)]) for s in ("train", "valid", "test")
    ]
    assert b"".join(map(decode, ids)) == text.read_bytes()
    again = cli("tokenizer", "--data", text, "--tokenizer", tokenizer, "--shards", tmp_path / "again", "--json").json
    assert again["shards"] == ["train_000000.bin", "valid_000000.bin", "test_000000.bin"]

    run, train = tmp_path / "run", f"shards:{shards}/train_*.bin"
    options = ["--data.tokenizer", tokenizer, "--size", "tiny", "--steps", "1", "--quiet", *tiny]
    assert cli("train", "gpt", "--data", train, *options, "--out", run).status == 0
    valid = f"shards:{shards / 'valid_000000.bin'}"
    size = len(decode(read_shard(shards / "valid_000000.bin")))
    facts = cli("eval", run, "--data", valid, "--json").json
    stream = cli("eval", run, "--data", valid, "--scoring", "challenge", "--stride", "8", "--json").json
    assert facts["bytes"] == stream["bytes"] == size and stream["scoring"] == "challenge"
    assert stream["tokens"] == stream["distinct_tokens"] == facts["tokens"]
    published = cli("eval", run, "--data", valid, "--scoring", "challenge-published", "--stride", "8", "--json").json
    assert published["tokens"] > published["distinct_tokens"]
    assert "bits/byte" in cli("eval", run, "--data", valid, "--scoring", "challenge").out
    for extra, words in (
        (["--data", text], "give it as --data shards:PATH"),
        (["--data", valid, "--max-bytes", "5"], "--max-bytes has no meaning with --scoring"),
        (["--data", f"shards:{text}"], "so it is no token shard"),
    ):
        assert words in cli("eval", run, "--scoring", "challenge", *extra).error()
    assert "unknown scoring 'chall'; did you mean" in cli("eval", run, "--scoring", "chall").error()
    options[1] = "bpe:300"
    assert "name its directory" in cli("train", "gpt", "--data", train, *options, "--out", tmp_path / "no").error()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "give --out DIR to train a tokenizer"),
        (["--out", "a", "--tokenizer", "b"], "give --out DIR to train a tokenizer"),
        (["--tokenizer", "b"], "changes nothing without --shards"),
        (["--out", "a", "--shards", "."], ". exists; choose another --shards"),
    ],
)
def test_options_that_do_not_fit(options, words, cli, text):
    assert words in cli("tokenizer", "--data", text, *options).error()


@pytest.mark.parametrize(
    ("content", "options", "words"),
    [
        (None, [], "no such file"),
        (b"", [], "is empty"),
        (b"some \xff text\n" * 50, [], "text.txt: invalid UTF-8 at byte 5"),
        (b"some text\n" * 50, ["--vocab-size", "100"], "needs at least 257 entries"),
    ],
)
def test_bad_input_leaves_nothing(content, options, words, cli, tmp_path):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    assert words in cli("tokenizer", "--data", path, "--out", tmp_path / "bpe", *options).error()
    assert not (tmp_path / "bpe").exists()


def test_an_existing_place_is_refused(cli, text, files, tmp_path):
    (tmp_path / "bpe").mkdir()
    assert "exists; choose another --out" in cli("tokenizer", "--data", text, "--out", tmp_path / "bpe").error()
    below_a_file = cli("tokenizer", "--data", text, "--out", text / "bpe", "--vocab-size", "260")
    assert below_a_file.error() == f"{text / 'bpe'}: Not a directory"
    assert files(tmp_path) == {"bpe": b""}


def test_one_endless_word_takes_seconds_and_ctrl_c_is_heard(spawn, cli, tmp_path):
    path = tmp_path / "letters.txt"
    path.write_text("".join(random.Random(1).choices("ACGT", k=600_000)))
    begun = time.monotonic()
    result = cli("tokenizer", "--data", path, "--out", tmp_path / "bpe", "--vocab-size", "300")
    assert result.status == 0 and time.monotonic() - begun < 30  # 119 s before, 3 s on an idle processor now
    path.write_text("".join(random.Random(1).choices("ACGT", k=6_000_000)))
    with spawn("tokenizer", "--data", path, "--out", tmp_path / "other", "--vocab-size", "9000", fresh=True) as process:
        waiting = time.monotonic() + 60
        while threads(process.pid) < 2 and time.monotonic() < waiting:  # the second one trains the vocabulary
            time.sleep(0.02)
        time.sleep(0.5)
        asked = time.monotonic()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        assert time.monotonic() - asked < 10  # some hundredths of a second on an idle processor
    assert (process.returncode, out, err) == (130, "", "interrupted\n")
    assert sorted(tmp_path.iterdir()) == [tmp_path / "bpe", path]


def threads(pid):
    return len(list(Path(f"/proc/{pid}/task").iterdir()))

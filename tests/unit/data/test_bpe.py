from __future__ import annotations

import json
import os
import random
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tokenizers import Regex, pre_tokenizers
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from ouroboros.data import bpe
from ouroboros.data.tokenize import load_tokenizer, resolve_tokenizer, train_bpe

CODE = (
    b'def f(x):\n    """Doc."""\n    if x > 10:\n        return {"a": x, "b": [1, 2, 345678]}\n\n\nclass A:\r\n\tpass\n'
)
PROSE = "It's 1838 \u2013 na\u00efve caf\u00e9s, \u65e5\u672c\u8a9e \U0001f600!\n\n  The end.  ".encode()


@pytest.mark.parametrize("pattern", [bpe.OWN, bpe.QWEN])
def test_pattern_covers_the_cut_rule(pattern: str) -> None:
    """The cut between a letter and a line feed is safe only while no alternative spans it, also for saved ones."""
    assert bpe.SAFE_CUT.pattern == rb"[A-Za-z]\n"
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    text = (PROSE + CODE).decode() + "it's\n 't's\nX\u0301\n\n9\n'LL\nq\n'd"
    units = [unit for unit, _ in split.pre_tokenize_str(text)]
    pieces = re.split(r"(?<=[A-Za-z])(?=\n)", text)
    assert len(pieces) > 5 and "".join(units) == text
    assert [unit for piece in pieces for unit, _ in split.pre_tokenize_str(piece)] == units


@pytest.mark.parametrize("name", ["bpe", "bpe-qwen"])
def test_saved_vocabularies_keep_their_units(name: str, tmp_path: Path) -> None:
    made = resolve_tokenizer(f"{name}:400", [PROSE + CODE * 9])
    made.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.fingerprint == made.fingerprint
    assert again.encode(CODE * 3000).tolist() == again.encode(CODE).tolist() * 3000  # encoded in pieces
    entries = [again.decode([token]) for token in range(again.vocab_size)]
    assert (b"):\n    " in entries) == (name == "bpe")


def test_the_units_have_a_name_elsewhere() -> None:
    assert GGUF_PRE_TOKENIZER_SPLITS["qwen35"] == bpe.QWEN


def test_long_units_are_trained_in_pieces_and_encoded_whole() -> None:
    letters = "".join(random.Random(1).choices("ACGT", k=60_000)).encode()
    for text in (letters, b"=" * 60_000, b" " * 60_000 + b"x", "\u00e9".encode() * 30_000):
        start = time.process_time()
        made = train_bpe([text], 300)
        ids = made.encode(text)
        # The square of the length took 1.4 s for the letters, and 119 s for ten times as many.
        assert time.process_time() - start < 1.0
        assert made.decode(ids) == text and len(ids) < len(text) / 2


def test_units_of_ordinary_length_train_the_same_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    text = PROSE + CODE * 9 + b"=" * 1000 + b"\n" * 900 + b" " * 1000 + b"x" * 1023 + b" y"
    bounded = train_bpe([text], 400)
    monkeypatch.setattr(bpe, "_bounded", lambda pattern: pattern)
    assert train_bpe([text], 400).fingerprint == bounded.fingerprint
    assert json.loads(bounded.backend.to_str())["pre_tokenizer"]["pretokenizers"][0]["pattern"] == {"Regex": bpe.OWN}


def test_an_error_while_the_text_is_read_is_raised() -> None:
    def texts() -> Iterator[str]:
        yield "some text"
        raise LookupError("none")

    with pytest.raises(LookupError, match="none"):
        bpe.train(texts(), 300, shows_progress=False)


def test_an_interruption_is_heard_while_the_work_goes_on() -> None:
    reading, ended = threading.Event(), threading.Event()

    def texts() -> Iterator[str]:
        os.kill(os.getpid(), signal.SIGINT)
        assert reading.wait(20)
        yield "some text"
        ended.set()

    with pytest.raises(KeyboardInterrupt):
        bpe.train(texts(), 300, shows_progress=False)
    reading.set()
    assert ended.wait(5)

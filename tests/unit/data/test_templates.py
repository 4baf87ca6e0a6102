from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken

from ouroboros.config import DataSpec
from ouroboros.data.formats import formats
from ouroboros.data.shards import prepare
from ouroboros.data.stream import open_loader
from ouroboros.data.templates import TemplateChat, chat_format, source_format
from ouroboros.data.tokenize import byte_tokenizer, load_tokenizer, train_bpe
from ouroboros.errors import OuroborosError

MARKS = ["<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TURNS = [("user", "One?"), ("assistant", "1."), ("user", "Two?"), ("assistant", "2.")]
TEXT = "".join(f"<|im_start|>{role}\n{says}<|im_end|>\n" for role, says in TURNS)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory with a tokenizer that has a chat template, and conversations."""
    monkeypatch.chdir(tmp_path)
    hf = train_bpe([TEXT.encode() * 9], 300).hf
    hf.add_tokens([AddedToken(mark, special=True, normalized=False) for mark in MARKS], special_tokens=True)
    hf.add_special_tokens({"additional_special_tokens": MARKS})
    hf.chat_template = TEMPLATE
    hf.save_pretrained("tok")
    rows = [record(*((role, says.replace("?", f" {n}?")) for role, says in TURNS)) for n in range(300)]
    Path("m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def record(*turns: tuple[str, str]) -> dict:
    return {"messages": [{"role": role, "content": says} for role, says in turns]}


def form(**options: object) -> TemplateChat:
    found = source_format(formats()["messages"], DataSpec(tokenizer="tok", **options))
    assert isinstance(found, TemplateChat)
    return found


def test_conversations_are_written_by_the_tokenizers_template() -> None:
    found = form(loss="answers").render(record(*TURNS), "here")
    assert found is not None and found.answers is not None and found.text == TEXT
    assert [TEXT[start:end] for start, end in found.answers] == ["1.<|im_end|>\n", "2.<|im_end|>\n"]
    assert form().render(record(*TURNS), "here") == (TEXT, ())
    assert form().conversation([("One?", "1.")], "Two?") == TEXT.removesuffix("2.<|im_end|>\n")
    assert form().stop == ("<|im_end|>",)
    assert form().render(record(("user", " ")), "here") is None


def test_other_formats_and_tokenizers_stay_as_they_are() -> None:
    train_bpe([b"text " * 99], 260).hf.save_pretrained("plain")
    for tokenizer in ("bytes", "chars", "bpe:300", "plain", "gone"):
        assert source_format(formats()["messages"], DataSpec(tokenizer=tokenizer)) is formats()["messages"]
    assert source_format(formats()["qa"], DataSpec(tokenizer="tok")) is formats()["qa"]
    assert chat_format(formats()["messages"], load_tokenizer("tok")) is formats()["messages"]
    assert chat_format(None, byte_tokenizer()) is None


def test_marks_are_one_id_each_and_nobody_can_say_them() -> None:
    prepared = prepare(DataSpec(sources=("m.jsonl@messages",), tokenizer="tok", loss="answers"), "out")
    tokenizer = prepared.tokenizer
    start, end = (tokenizer.backend.token_to_id(mark) for mark in MARKS)
    assert tokenizer.reads_specials and not load_tokenizer("tok").reads_specials
    ids, learned = np.asarray(prepared.tokens("train", 0)), prepared.learned(0)
    count = prepared.count("train", "documents")
    assert learned is not None and (ids == start).sum() == (ids == end).sum() == 4 * count
    assert not learned[ids == start].any() and learned[ids == end].sum() == 2 * count
    assert tokenizer.decode(tokenizer.encode(TEXT.encode())) == TEXT.encode()
    assert tokenizer.token_bytes()[end] == len(MARKS[1])
    again = chat_format(formats()["messages"], tokenizer)
    assert isinstance(again, TemplateChat) and again.prompt("One?") == TEXT[: TEXT.index("1.")]
    with pytest.raises(OuroborosError, match=r"^chat: a turn of 'user' spells the special token '<\|im_end\|>'"):
        again.prompt("One?<|im_end|>")
    with pytest.raises(OuroborosError, match=r"^a:3: a turn of 'assistant' spells the special token '<\|im_start\|>'"):
        form().render(record(("assistant", "<|im_start|>")), "a:3")


def test_streams_and_a_second_preparation() -> None:
    spec = DataSpec(sources=("m.jsonl@messages",), tokenizer="tok", stream=True, max_bytes=9000)
    prepared = prepare(spec, "out")
    batch = open_loader(prepared, batch_size=2, sequence_length=40, seed=0).next_batch()
    assert (batch == prepared.tokenizer.backend.token_to_id(MARKS[0])).sum() >= 4
    assert prepare(spec, "out").fingerprint == prepared.fingerprint


@pytest.mark.parametrize("stream", [False, True])
def test_a_run_that_goes_on_writes_conversations_as_before(monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    spec = DataSpec(sources=("m.jsonl@messages",), tokenizer="tok", stream=stream, max_bytes=9000 if stream else None)
    prepared = prepare(spec, "out")
    batch = open_loader(prepared, batch_size=2, sequence_length=40, seed=0).next_batch()
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    for gone in (False, True):
        if gone:
            Path("../tok").rename("../gone")
        again = prepare(spec, Path("../out"), resumed=True)
        same = open_loader(again, batch_size=2, sequence_length=40, seed=0).next_batch()
        np.testing.assert_array_equal(same, batch)
    monkeypatch.chdir("..")
    Path("gone").rename("tok")
    hf = load_tokenizer("tok").hf
    hf.chat_template = TEMPLATE.replace("im_end|>\n", "im_end|>")
    hf.save_pretrained("tok")
    with pytest.raises(OuroborosError, match=r"data\.tokenizer 'tok': has changed"):
        prepare(spec, "out")


def test_templates_that_fail_or_rewrite_are_said() -> None:
    loaded = load_tokenizer("tok").hf
    loaded.chat_template = "{{ raise_exception('only one turn') }}"
    with pytest.raises(OuroborosError, match=r"^a:3: the tokenizer's chat template fails: only one turn$"):
        TemplateChat("messages", loaded).render(record(*TURNS), "a:3")
    loaded.chat_template = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    assert TemplateChat("messages", loaded).render(record(*TURNS), "a:3") == ("4One?1.Two?2.", ())
    with pytest.raises(OuroborosError, match=r"^a:3: .* writes earlier turns in another way .* 'answers'"):
        TemplateChat("messages", loaded, tells_answers=True).render(record(*TURNS), "a:3")

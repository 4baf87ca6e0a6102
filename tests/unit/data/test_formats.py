from __future__ import annotations

import json
from pathlib import Path

import pytest

from ouroboros.data.formats import CHATS, ChatFormat, TextFormat, chat_column, find_format, formats
from ouroboros.errors import OuroborosError
from ouroboros.registry import found

DATA = Path(__file__).parents[4] / "shared" / "data"
RECORDS = {
    "tinygsm": {"question": "What is 3+4?", "code": "def f():\n    return 7\n"},
    "tiny-codes": {"prompt": "Write a loop", "response": "```python\nfor i in x: ...\n```", "idx": 5},
    "cosmopedia": {"prompt": "p", "text": "A chapter on tides.", "format": "textbook"},
    "metamath": {"query": "Solve x+1=2", "response": "x=1", "type": "MATH", "original_question": "x+1=2?"},
    "gsm8k": {"question": "Q here", "answer": "A here"},
    "qa": {"question": "Q here", "answer": "A here"},
    "mbpp": {"text": "Write a function.", "code": "def f():\r\n  pass", "task_id": 1},
    "chat": {"prompt": "Hello", "response": "Hi"},
    "instruct": {"prompt": "Sort 2, 1.", "response": "1, 2"},
    "messages": {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]},
    "conversations": {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}]},
}


def field_format(column: str) -> TextFormat:
    """What ``data.text_field`` names, as a format."""
    return TextFormat("data.text_field", f"{{{column}}}")


def test_every_format_has_a_record_here() -> None:
    assert RECORDS.keys() == formats().keys() - found("formats").keys()


@pytest.mark.parametrize("name", sorted(set(RECORDS) - {*CHATS}))
def test_text_holds_the_columns_as_they_are(name: str) -> None:
    form, record = find_format(name), RECORDS[name]
    found = form.render(record, "here")
    assert found is not None
    text = found.text
    assert all(record[column] in text for column in form.columns)
    assert "{" not in text.replace(record[form.columns[0]], "")
    if len(form.columns) == 2:
        prompt = form.prompt(str(record[form.columns[0]]))
        assert prompt is not None
        assert text.startswith(prompt)
        assert text.removeprefix(prompt).lstrip(" ") == record[form.columns[1]]
        assert found.answers == ((len(prompt), len(text)),)
        assert all(text.startswith(stop.lstrip("\n")) for stop in form.stop)
        assert form.stop
    else:
        assert found.answers is None


def test_metamath_is_the_published_form() -> None:
    form = find_format("metamath")
    assert form.render(RECORDS["metamath"], "here") == ("Q: Solve x+1=2\nA: x=1", ((17, 21),))
    assert form.prompt("2+2?") == "Q: 2+2?\nA:"
    assert form.stop == ("\nQ:",)
    assert form.columns == ("query", "response")
    assert form.group_of(RECORDS["metamath"], "here") == "x+1=2?"
    assert form.group_of({**RECORDS["metamath"], "original_question": None}, "here") is None


def test_prompt() -> None:
    assert find_format("tinygsm").prompt("1+1?") == "Problem: 1+1?\n\n"
    assert find_format("cosmopedia").prompt("x") is None
    assert TextFormat("t", "{a} / {b} / {c}").prompt("{b}") == "{b} /  /"


@pytest.mark.parametrize("value", [None, "", " \n\t"])
def test_an_empty_column_is_a_legal_value(value: str | None) -> None:
    form = find_format(r"{instruction}\n{input}\n{output}")
    record = {"instruction": "Sort.", "input": value, "output": "Done."}
    assert form.render(record, "here") == (
        f"Sort.\n{value or ''}\nDone.",
        ((7 + len(value or ""), 12 + len(value or "")),),
    )
    assert form.render(dict.fromkeys(record, value), "here") is None
    assert field_format("body").render({"body": value}, "here") is None


def test_a_missing_column_is_named_with_the_nearest() -> None:
    with pytest.raises(OuroborosError, match=r"^a:3: no column 'answer' \(format 'gsm8k'\); did you mean 'answers'\?$"):
        find_format("gsm8k").render({"question": "q", "answers": "a"}, "a:3")
    with pytest.raises(OuroborosError, match=r"no column 'original_question' \(format 'metamath'\)"):
        find_format("metamath").group_of({"query": "q", "response": "r"}, "a:3")


def test_a_value_that_is_no_text() -> None:
    with pytest.raises(OuroborosError, match=r"^a:3: column 'answer' holds int, not text \(format 'qa'\)$"):
        find_format("qa").render({"question": "q", "answer": 5}, "a:3")
    with pytest.raises(OuroborosError, match=r"holds list, not text \(format 'data\.text_field'\)"):
        field_format("body").render({"body": []}, "a:3")
    with pytest.raises(OuroborosError, match=r"; conversations are read by SRC@messages$"):
        field_format("messages").render({"messages": []}, "a:3")


def test_templates() -> None:
    form = find_format(r"{title}: {body}\n{{}} {title}")
    assert form.columns == ("title", "body")
    assert form.render({"title": "T", "body": "{x}"}, "here") == ("T: {x}\n{} T", ((2, 11),))
    assert form.stop == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gsm8", "format 'gsm8': unknown; did you mean 'gsm8k'"),
        ("", "; known: chat, conversations, cosmopedia"),
        ("{a} {", "Single '{'.*a brace itself is written twice"),
        ("{a}}", "Single '}'"),
        ("{{a}}", "names no column"),
        ("{}", "names no column"),
    ],
)
def test_bad_formats(text: str, message: str) -> None:
    with pytest.raises(OuroborosError, match=message):
        find_format(text)


def test_columns_within_columns() -> None:
    form = find_format("{meta.title}: {data.text}")
    record = {"meta": {"title": "T"}, "data": {"text": "x", "n": 1}, "data.text": "its own"}
    assert form.render(record, "here") == ("T: its own", ((2, 10),))
    del record["data.text"]
    assert form.render(record, "here") == ("T: x", ((2, 4),))
    assert form.render({**record, "data": None}, "here") == ("T: ", ((2, 3),))
    assert field_format("data.text").render(record, "here") == ("x", None)


@pytest.mark.parametrize(
    ("column", "record", "message"),
    [
        ("text", {"data": {"text": "x"}}, r"no column 'text' \(format 'data.text_field'\); did you mean 'data.text'"),
        ("data.body", {"data": {"text": "x"}}, r"no column 'data.body' .*; did you mean 'data.text'"),
        ("data.text", {"data": "x"}, r"no column 'data.text'"),
        ("data.n", {"data": {"n": 1}}, "column 'data.n' holds int, not text"),
        ("text", {"messages": []}, "it holds conversations: write SRC@messages"),
    ],
)
def test_missing_columns_within_columns(column: str, record: dict, message: str) -> None:
    with pytest.raises(OuroborosError, match=f"^a:3: .*{message}"):
        field_format(column).render(record, "a:3")


def said(*turns: tuple[str, str], names: tuple[str, str] = ("role", "content")) -> list[dict]:
    return [dict(zip(names, turn, strict=True)) for turn in turns]


def test_conversations_of_both_kinds_read_alike() -> None:
    expected = ("User: Hello\nAssistant: Hi", ((22, 25),))
    for name in CHATS:
        assert find_format(name).render(RECORDS[name], "here") == expected
    mixed = {"messages": RECORDS["conversations"]["conversations"]}
    assert find_format("messages").render(mixed, "here") == expected


def test_an_answer_reaches_to_where_the_next_turn_has_begun() -> None:
    turns = said(("system", "Be brief."), ("user", "1?"), ("assistant", "one"), ("User", "2?"), ("assistant", "two"))
    found = find_format("messages").render({"messages": turns}, "here")
    assert found is not None and found.answers is not None
    assert found.text == "System: Be brief.\nUser: 1?\nAssistant: one\nUser: 2?\nAssistant: two"
    assert [found.text[start:end] for start, end in found.answers] == [" one\nUser:", " two"]
    form = find_format("messages")
    assert isinstance(form, ChatFormat)
    assert found.text.endswith(form.conversation([("1?", " one")], "2?") + " two")
    assert form.conversation([("1?", "one")], "2?") == form.conversation([("1?", " one")], "2?")
    assert form.prompt("1?") == "User: 1?\nAssistant:" and form.stop == ("\nUser:",)


def test_odd_conversations() -> None:
    form = find_format("messages")
    for empty in (None, [], said(("user", ""), ("assistant", " "))):
        assert form.render({"messages": empty}, "here") is None
    unanswered = form.render({"messages": said(("user", "Hello?"))}, "here")
    assert unanswered == ("User: Hello?", ())
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    nulls = [
        {"role": "user", "content": parts},
        {"role": "tool", "content": "7"},
        {"role": "assistant", "content": None},
    ]
    assert form.render({"messages": nulls}, "here") == ("User: ab\nTool: 7\nAssistant: ", ((27, 28),))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("hello", "column 'messages' holds str, not a list of turns"),
        ({"role": "user"}, "column 'messages' holds dict, not a list of turns"),
        (["hello"], "turn 1 of 'messages': needs 'role' and 'content', or 'from' and 'value'"),
        ([{"role": "user", "text": "x"}], "turn 1 of 'messages': needs 'role' and 'content'"),
        ([{"role": None, "content": "x"}], "turn 1 of 'messages': its 'role' is no name of a speaker"),
        ([{"role": "user", "content": 5}], "turn 1 of 'messages': its 'content' holds something else than text"),
        ([{"role": "user", "content": [{"type": "image"}]}], "its 'content' holds something else than text"),
    ],
)
def test_bad_conversations_name_the_turn(value: object, message: str) -> None:
    with pytest.raises(OuroborosError, match=f"^a:3: .*{message}"):
        find_format("messages").render({"messages": value}, "a:3")
    with pytest.raises(OuroborosError, match=r"^a:3: no column 'messages' \(format 'messages'\)"):
        find_format("messages").render({"turns": value}, "a:3")


def test_conversations_are_told_by_their_content() -> None:
    for name in CHATS:
        assert chat_column(RECORDS[name], "text") == name
        assert chat_column({**RECORDS[name], "text": "x"}, "text") is None
        assert chat_column({**RECORDS[name], "data": {"text": "x"}}, "data.text") is None
    assert chat_column({"messages": ["a", "b"]}, "text") is None
    assert chat_column({"messages": []}, "text") is None


@pytest.mark.skipif(not DATA.is_dir(), reason="no shared data")
@pytest.mark.parametrize(
    ("file", "name"),
    [("math/gsm8k_test.jsonl", "gsm8k"), ("code/mbpp.jsonl", "mbpp"), ("chat/dolly_hhrlhf_small.jsonl", "chat")],
)
def test_real_records(file: str, name: str) -> None:
    form, texts = find_format(name), []
    for number, line in enumerate((DATA / file).read_text().splitlines(), 1):
        texts.append(form.render(json.loads(line), f"{file}:{number}"))
    assert len([found for found in texts if found]) > 0.99 * len(texts) > 100

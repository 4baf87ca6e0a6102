from __future__ import annotations

import json
from pathlib import Path

import pytest

from ouroboros.data.formats import FORMATS, FieldFormat, TextFormat, find_format
from ouroboros.errors import OuroborosError

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
    "rhrm-published": {"prompt": "p", "response": "r"},
}


def test_every_format_has_a_record_here() -> None:
    assert RECORDS.keys() == FORMATS.keys()


@pytest.mark.parametrize("name", sorted(set(RECORDS) - {"rhrm-published"}))
def test_text_holds_the_columns_as_they_are(name: str) -> None:
    form, record = find_format(name), RECORDS[name]
    text = form.render(record, "here")
    assert text is not None
    assert all(record[column] in text for column in form.columns)
    assert "{" not in text.replace(record[form.columns[0]], "")
    if len(form.columns) == 2:
        prompt = form.prompt(str(record[form.columns[0]]))
        assert prompt is not None
        assert text.startswith(prompt)
        assert text.removeprefix(prompt).lstrip(" ") == record[form.columns[1]]
        assert all(text.startswith(stop.lstrip("\n")) for stop in form.stop)
        assert form.stop


def test_metamath_is_the_published_form() -> None:
    form = find_format("metamath")
    assert form.render(RECORDS["metamath"], "here") == "Q: Solve x+1=2\nA: x=1"
    assert form.prompt("2+2?") == "Q: 2+2?\nA:"
    assert form.stop == ("\nQ:",)
    assert form.columns == ("query", "response")
    assert form.group_of(RECORDS["metamath"], "here") == "x+1=2?"
    assert form.group_of({**RECORDS["metamath"], "original_question": None}, "here") is None


def test_published_format_is_the_repr_of_the_row() -> None:
    form = find_format("rhrm-published")
    assert form.render({"prompt": "p", "n": None}, "here") == "{'prompt': 'p', 'n': None}"
    assert (form.columns, form.prompt("x")) == ((), None)


def test_prompt() -> None:
    assert find_format("tinygsm").prompt("1+1?") == "Problem: 1+1?\n\n"
    assert find_format("cosmopedia").prompt("x") is None
    assert TextFormat("t", "{a} / {b} / {c}").prompt("{b}") == "{b} /  /"


@pytest.mark.parametrize("value", [None, "", " \n\t"])
def test_a_record_without_text(value: str | None) -> None:
    assert find_format("gsm8k").render({"question": "q", "answer": value}, "here") is None


def test_a_missing_column_is_named_with_the_nearest() -> None:
    with pytest.raises(OuroborosError, match=r"^a:3: no column 'answer' \(format 'gsm8k'\); did you mean 'answers'\?$"):
        find_format("gsm8k").render({"question": "q", "answers": "a"}, "a:3")
    with pytest.raises(OuroborosError, match=r"no column 'original_question' \(format 'metamath'\)"):
        find_format("metamath").group_of({"query": "q", "response": "r"}, "a:3")


def test_a_value_that_is_no_text() -> None:
    with pytest.raises(OuroborosError, match=r"^a:3: column 'answer' holds int, not text \(format 'qa'\)$"):
        find_format("qa").render({"question": "q", "answer": 5}, "a:3")
    with pytest.raises(OuroborosError, match=r"holds list, not text \(data\.text_field\)"):
        FieldFormat("body").render({"body": []}, "a:3")


def test_templates() -> None:
    form = find_format(r"{title}: {body}\n{{}} {title}")
    assert form.columns == ("title", "body")
    assert form.render({"title": "T", "body": "{x}"}, "here") == "T: {x}\n{} T"
    assert form.stop == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gsm8", "format 'gsm8': unknown; did you mean 'gsm8k'"),
        ("", "; known: chat, cosmopedia"),
        ("{a} {", "'{' has no partner"),
        ("{a}}", "'}' has no partner"),
        ("{{a}}", "names no column"),
        ("{}", "has no partner"),
    ],
)
def test_bad_formats(text: str, message: str) -> None:
    with pytest.raises(OuroborosError, match=message):
        find_format(text)


@pytest.mark.skipif(not DATA.is_dir(), reason="no shared data")
@pytest.mark.parametrize(
    ("file", "name"),
    [("math/gsm8k_test.jsonl", "gsm8k"), ("code/mbpp.jsonl", "mbpp"), ("chat/dolly_hhrlhf_small.jsonl", "chat")],
)
def test_real_records(file: str, name: str) -> None:
    form, texts = find_format(name), []
    for number, line in enumerate((DATA / file).read_text().splitlines(), 1):
        texts.append(form.render(json.loads(line), f"{file}:{number}"))
    assert len([text for text in texts if text]) > 0.99 * len(texts) > 100

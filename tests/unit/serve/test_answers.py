"""Answers in OpenAI's form, whole and in pieces, are read by its own client's types."""

import json

from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from ouroboros.serve.answers import Answer, error, server_sent
from ouroboros.serve.engine import Event, Told

IDENTITY = {"id": "x", "model": "run", "loops": 2, "seed": 0}
TOLD = Told(97, b"a", -0.5, ((97, -0.5), (98, float("-inf"))))


def answer(**options):
    given = {"is_chat": True, "prompt_tokens": 3, "count": 2, "decode": bytes, "tells": False}
    return Answer(IDENTITY, **{**given, **options})


def test_a_chat_in_pieces_and_whole():
    found = answer()
    pieces = found.beginnings()
    for event in (
        Event(0, "a", 1),
        Event(1, "", 1),
        Event(1, "b\u00e9", 1, finish="stop"),
        Event(0, "", 1, finish="length"),
    ):
        piece = found.take(event)
        pieces += [piece] if piece else []
    chunks = [ChatCompletionChunk.model_validate(piece) for piece in pieces]
    assert [(c.choices[0].index, c.choices[0].delta.content, c.choices[0].finish_reason) for c in chunks] == [
        (0, "", None),
        (1, "", None),
        (0, "a", None),
        (1, "b\u00e9", "stop"),
        (0, None, "length"),
    ]
    whole = ChatCompletion.model_validate(found.whole())
    assert found.is_complete and [c.message.content for c in whole.choices] == ["a", "b\u00e9"]
    assert whole.usage.completion_tokens == 4 and whole.usage.total_tokens == 7 and whole.model_extra["loops"] == 2
    assert ChatCompletionChunk.model_validate(found.last()).usage.prompt_tokens == 3


def test_a_completion_with_probabilities():
    found = answer(is_chat=False, count=1, tells=True)
    assert found.beginnings() == []
    piece = found.take(Event(0, "a", 1, (TOLD,)))
    assert Completion.model_validate({**piece, "choices": [{**piece["choices"][0], "finish_reason": "stop"}]})
    later = found.take(Event(0, "a", 1, (TOLD,), "stop"))
    assert later["choices"][0]["logprobs"]["text_offset"] == [1]
    whole = Completion.model_validate(found.whole()).choices[0]
    assert whole.text == "aa" and whole.logprobs.tokens == ["a", "a"] and whole.logprobs.text_offset == [0, 1]
    assert whole.logprobs.token_logprobs == [-0.5, -0.5] and whole.logprobs.top_logprobs[0] == {"a": -0.5, "b": -9999.0}


def test_a_chat_with_probabilities():
    found = answer(count=1, tells=True)
    found.take(Event(0, "a", 1, (TOLD,), "stop"))
    token = ChatCompletion.model_validate(found.whole()).choices[0].logprobs.content[0]
    assert token.token == "a" and token.bytes == [97] and token.logprob == -0.5
    assert [best.logprob for best in token.top_logprobs] == [-0.5, -9999.0]


def test_events_and_errors():
    line = server_sent({"a": "\u00e9\n"})
    assert (
        line.endswith("\n\n") and line.count("\n") == 2 and json.loads(line.removeprefix("data: ")) == {"a": "\u00e9\n"}
    )
    assert error("no", "code") == {
        "error": {"message": "no", "type": "invalid_request_error", "param": None, "code": "code"}
    }

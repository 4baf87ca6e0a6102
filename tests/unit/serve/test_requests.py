"""Requests are read strictly, and refused in words."""

import json

import pytest

from ouroboros.data.formats import find_format
from ouroboros.errors import OuroborosError
from ouroboros.serve.requests import ChatRequest, CompletionRequest, chat_prompt, chat_stops, read
from ouroboros.serve.sampling import Sampling


def completion(**fields):
    return read(CompletionRequest, json.dumps({"prompt": "a", **fields}).encode())


def chat(**fields):
    return read(ChatRequest, json.dumps({"messages": [{"role": "user", "content": "hi"}], **fields}).encode())


def test_controls_and_their_defaults():
    assert completion().sampling(Sampling(), 1000) == Sampling()
    asked = completion(max_tokens=7, temperature=0, top_p=0.5, top_k=3, repetition_penalty=1.1, stop="x", loops=2, n=3)
    given = {"max_new_tokens": 7, "temperature": 0.0, "top_p": 0.5, "top_k": 3, "repetition_penalty": 1.1}
    assert asked.sampling(Sampling(), 1000) == Sampling(**given, stop=("x",))
    assert asked.sampling(Sampling(), 5).max_new_tokens == 5
    assert chat(max_completion_tokens=9, stop=["a", "b"]).sampling(Sampling(), 99).max_new_tokens == 9
    assert completion(seed=3).chosen_seed() == 3 and 0 <= completion().chosen_seed() < 2**31
    assert completion(logprobs=2).best == 2 and completion().best is None
    assert chat(logprobs=True, top_logprobs=4).best == 4 and chat(logprobs=True).best == 0 and chat().best is None


def test_what_changes_nothing_is_taken():
    assert (
        chat(user="me", presence_penalty=0, frequency_penalty=0.0, tools=[], response_format={"type": "text"}).n is None
    )
    assert completion(best_of=1, echo=False, logit_bias=None, suffix=None).n is None


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"max_tokens": "x"}, "request: max_tokens: Input should be a valid integer"),
        ({"max_tokens": 0}, "max_tokens must be >= 1, got 0"),
        ({"max_token": 1}, "unknown key 'max_token'; did you mean 'max_tokens'?"),
        ({"temperature": -1}, "temperature must be >= 0, got -1"),
        ({"temperature": 1e999}, "temperature must be a finite number, got inf"),
        ({"top_p": 0}, "top_p must be in (0, 1], got 0"),
        ({"top_k": -1}, "top_k must be >= 0, got -1"),
        ({"loops": 0}, "loops must be >= 1, got 0"),
        ({"n": -2}, "n must be >= 1, got -2"),
        ({"seed": -1}, "seed must be in 0.."),
        ({"seed": 2**70}, "seed"),
        ({"stop": ["a"] * 17}, "stop must have at most 16 strings, got 17"),
        ({"stop": ""}, "stop must not have an empty string"),
        ({"logprobs": 6}, "logprobs must be in 0..5, got 6"),
        ({"echo": True}, "echo is not served here; leave it out"),
        ({"best_of": 2}, "best_of is not served here"),
        ({"presence_penalty": 0.5}, "presence_penalty is not served here"),
        ({"stream_options": {"include_usage": True}}, "stream_options needs stream"),
        ({"stream": True, "stream_options": {"usage": True}}, "stream_options: unknown key usage"),
    ],
)
def test_refusals(fields, words):
    text = json.dumps({"prompt": "a", **fields}).replace("Infinity", "1e999")
    with pytest.raises(OuroborosError) as caught:
        read(CompletionRequest, text.encode()).sampling(Sampling(), 100)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "the body is not JSON"),
        (b"[1]", "the body must be a JSON object"),
        (b'{"prompt": NaN}', "the body is not JSON: NaN is no number in JSON"),
        (b'{"prompt": "\xff"}', "the body is not valid UTF-8 text"),
        (rb'{"prompt": "\ud800"}', "the body is not valid UTF-8 text"),
        (b"[" * 200_000, "the body is nested too deeply"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "the body is not JSON"),
    ],
)
def test_bodies_that_are_no_requests(body, words):
    with pytest.raises(OuroborosError, match=words):
        read(CompletionRequest, body)


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])],
)
def test_forms_of_prompts(prompt, prompts):
    assert completion(prompt=prompt).prompts() == prompts


@pytest.mark.parametrize("prompt", [7, [], [[]], {}, None, [1.5], [True], ["a", 1]])
def test_prompts_that_are_none(prompt):
    with pytest.raises(OuroborosError, match="prompt must be a text"):
        completion(prompt=prompt).prompts()


def said(*messages):
    return [{"role": role, "content": content} for role, content in messages]


TALK = said(("system", "Be kind."), ("user", "one"), ("assistant", "two"), ("user", "three"), ("user", "four"))


@pytest.mark.parametrize(
    ("template", "earlier", "prompt"),
    [
        (None, [], b"Be kind.\none\ntwo\n\nthree\nfour\n"),
        ("qa", [b"Q: Be kind.\none\nA:two"], b"Q: three\nfour\nA:"),
        ("messages", [], b"User: Be kind.\none\nAssistant: two\nUser: three\nfour\nAssistant:"),
    ],
)
def test_conversations(template, earlier, prompt):
    form = template and find_format(template)
    assert chat_prompt(TALK, form) == (earlier, prompt)
    assert chat_stops(form) == (form.stop if form else ("\n\n",))


def test_content_may_be_in_parts():
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert chat_prompt(parts, None) == ([], b"ab\n")


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "messages must not be empty"),
        (said(("assistant", "x")), "the last of messages must be a user's, got one of 'assistant'"),
        (said(("tool", "x"), ("user", "y")), "messages of tool are not served"),
        (["x"], "turn 1 of 'messages': needs 'role' and 'content'"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "holds something else than text"),
    ],
)
def test_messages_that_are_none(messages, words):
    with pytest.raises(OuroborosError, match=words):
        chat_prompt(messages, None)


def test_chat_needs_messages_and_one_length():
    with pytest.raises(OuroborosError, match="messages: Field required"):
        read(ChatRequest, b"{}")
    with pytest.raises(OuroborosError, match="max_tokens and max_completion_tokens differ"):
        chat(max_tokens=1, max_completion_tokens=2)
    with pytest.raises(OuroborosError, match="top_logprobs needs logprobs"):
        chat(top_logprobs=1)

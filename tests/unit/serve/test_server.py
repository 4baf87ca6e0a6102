"""The server as its clients see it: OpenAI's own client, plain HTTP, and raw sockets that misbehave."""

import asyncio
import json
import os
import socket
import threading
import time
from pathlib import Path

import httpx2
import openai
import pytest
import torch

from ouroboros.api import build
from ouroboros.config import AttentionSpec, FeedForwardSpec, ModelSpec, Recipe
from ouroboros.data.tokenize import byte_tokenizer
from ouroboros.errors import OuroborosError
from ouroboros.model.modeling import OuroborosForCausalLM
from ouroboros.serve.engine import Engine, Event
from ouroboros.serve.facts import loop_costs, segments
from ouroboros.serve.sampling import Sampling
from ouroboros.serve.server import PACE, Limits, Service, _Inbox, listen, server_of
from ouroboros.serve.stream import Continuation

BODY, PATIENCE = 20_000, 1.0
POST = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def looped():
    torch.manual_seed(0)
    spec = ModelSpec(layout="1 (1)x2", hidden_size=16, max_position_embeddings=128).replace(
        mixer=AttentionSpec(num_heads=2), ffn=FeedForwardSpec(intermediate_size=16)
    )
    return build(Recipe(name="small", model=spec)).eval()


@pytest.fixture(scope="module")
def url(looped):
    """The address of a server in this process."""
    spec = looped.model.spec
    engine = Engine(looped, byte_tokenizer(), rows=4, queue=8, context=128)
    facts = {"trained_loops": [2, 2], "costs": loop_costs(spec, 8, 64), "segments": segments(spec.schedule)}
    limits = Limits(body=BODY, seconds=60, patience=PATIENCE, loops=8)
    service = Service(engine, name="run", tokenizer=byte_tokenizer(), template=None, facts=facts, limits=limits)
    with listen("127.0.0.1", 0) as bound:
        server = server_of(service)
        engine.start()
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"
        server.should_exit = True
        thread.join(30)
        engine.close()


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as found:
        yield found


@pytest.fixture(scope="module")
def http(url):
    with httpx2.Client(base_url=url, timeout=60) as found:
        yield found


@pytest.fixture
def slow(monkeypatch):
    """Each call of the model takes 20 ms at least."""
    forward = OuroborosForCausalLM.forward
    monkeypatch.setattr(OuroborosForCausalLM, "forward", lambda *a, **k: time.sleep(0.02) or forward(*a, **k))


def alone(model, prompt, **controls):
    torch.manual_seed(3)
    return "".join(Continuation(model, byte_tokenizer(), prompt, Sampling(**controls)))


def idle(http):
    """Wait until nothing is being written."""
    end = time.monotonic() + 60
    while http.get("/health").json()["running"]:
        assert time.monotonic() < end
        time.sleep(0.02)


def test_completions(client, looped):
    asked = {"model": "run", "prompt": "The river", "max_tokens": 12, "seed": 3}
    found = client.completions.create(**asked)
    assert found.choices[0].text == alone(looped, b"The river", max_new_tokens=12)
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (10, 12)
    assert found.choices[0].finish_reason == "length" and found.model_extra["loops"] == 2
    deeper = client.completions.create(**asked, extra_body={"loops": 5})
    assert deeper.choices[0].text == alone(looped.with_loops(5), b"The river", max_new_tokens=12)
    streamed = list(client.completions.create(**asked, stream=True))
    assert "".join(chunk.choices[0].text for chunk in streamed) == found.choices[0].text and len(streamed) > 3


def test_several_prompts_and_answers(client, looped):
    found = client.completions.create(model="run", prompt=["ab", "c"], n=2, seed=3, max_tokens=5, logprobs=2)
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    assert found.choices[2].text == alone(looped, b"c", max_new_tokens=5)
    assert all(len(choice.logprobs.tokens) == 5 for choice in found.choices)
    ids = client.completions.create(model="run", prompt=[256, 99], seed=3, max_tokens=5)
    assert ids.choices[0].text == found.choices[2].text


def test_chat(client, looped):
    talk = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
    ]
    asked = {"model": "run", "messages": talk, "max_tokens": 10, "seed": 3}
    found = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    text = alone(looped, b"one\ntwo\n\nthree\n", max_new_tokens=10, stop=("\n\n",))
    assert found.choices[0].message.content == text and found.choices[0].message.role == "assistant"
    assert len(found.choices[0].logprobs.content) == 10
    options = {"include_usage": True}
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options=options))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == text
    assert chunks[-1].usage.completion_tokens == 10


def test_two_clients_at_once(client, looped, slow):
    """Eight requests of two loop counts, more than are written at once."""
    texts = {}

    def ask(number):
        loops = 2 + number % 2
        body = {"loops": loops}
        asked = {"model": "run", "prompt": "x" * number, "max_tokens": 8, "temperature": 0, "extra_body": body}
        texts[number] = client.completions.create(**asked).choices[0].text

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for number in range(8):
        view = looped.with_loops(2 + number % 2)
        assert texts[number] == alone(view, b"x" * number, max_new_tokens=8, temperature=0.0)


def test_models_and_the_rest(client, http):
    (model,) = client.models.list().data
    assert model.id == "run" and model.model_extra["max_loops"] == 8 and client.models.retrieve("run").id == "run"
    with pytest.raises(openai.NotFoundError, match="no model 'other' here"):
        client.models.retrieve("other")
    assert http.get("/health").json() == {"status": "ok", "running": 0, "waiting": 0}
    page = http.get("/")
    assert "<html" in page.text and page.headers["content-type"].startswith("text/html")
    assert http.get("/about").json()["costs"][0]["loops"] == 1
    for answer, status in ((http.get("/nothing"), 404), (http.get("/v1/completions"), 405)):
        assert answer.status_code == status and answer.json()["error"]["message"]


REFUSED = [
    ({"prompt": 7, "max_tokens": "x"}, 400, "max_tokens"),
    ({"prompt": "x" * 128}, 400, "the prompt has 129 tokens but the model's context holds 128; shorten it"),
    ({"prompt": "x", "loops": 9}, 400, "loops must be in 1..8, got 9"),
    ({"prompt": "x", "loops": 10**30}, 400, "loops"),
    ({"prompt": "x", "n": 5}, 400, "n must be at most 4, got 5"),
    ({"prompt": ["x"] * 13}, 400, "at most 12 answers in one request"),
    ({"prompt": [1, 999]}, 400, "prompt: no token [999]; ids are 0..256"),
    ({"prompt": "x", "model": "other"}, 404, "no model 'other' here; this server has 'run'"),
    (b'{"prompt": "x", "temperature": NaN}', 400, "NaN is no number in JSON"),
    (b'{"prompt": "\xff\xfe"}', 400, "the body is not valid UTF-8 text"),
    (b"[" * 15_000, 400, "the body is nested too deeply"),
    (b'{"prompt": "' + b"x" * BODY + b'"}', 413, "the body has more than 20,000 bytes"),
]


@pytest.mark.parametrize(("body", "status", "words"), REFUSED)
def test_refusals_have_openais_form(body, status, words, http):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = http.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == status
    found = answer.json()["error"]
    assert words in found["message"] and "\n" not in found["message"] and "Traceback" not in answer.text
    assert found["type"] == "invalid_request_error"


def test_ten_thousand_messages(http):
    messages = [{"role": "user", "content": ""}] * 10_000
    answer = http.post("/v1/chat/completions", json={"messages": messages})
    assert answer.status_code == 413
    short = http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": ""}] * 500})
    assert short.status_code == 400 and short.json()["error"]["code"] == "context_length_exceeded"


def test_a_body_must_say_that_it_is_json(http):
    """A page of another site could send a form, but not this."""
    assert http.post("/v1/completions", data={"prompt": "x"}).status_code == 415


def test_a_large_body_is_not_kept(url, http):
    """The answer comes at once, and the client may send the rest before it reads that."""
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=30) as client:
        client.sendall(f"{POST}Content-Length: 1000000000\r\nExpect: 100-continue\r\n\r\n".encode())
        assert client.recv(100).startswith(b"HTTP/1.1 413")
    stream = (b"x" * 65536 for _ in range(64))
    answer = http.post("/v1/completions", content=stream, headers={"content-type": "application/json"})
    assert answer.status_code == 413


@pytest.mark.parametrize("says_length", [True, False])
def test_a_body_of_a_gigabyte_takes_no_memory(says_length, url, http):
    """The answer is there after the first piece, and a client that sends everything first still finds it."""
    size, piece = 1_000_000_000, bytes(1 << 20)
    head = f"Content-Length: {size}" if says_length else "Transfer-Encoding: chunked"
    framed = piece if says_length else b"%x\r\n%b\r\n" % (len(piece), piece)
    before, most = resident(), 0
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=60) as client:
        client.sendall(f"{POST}{head}\r\n\r\n".encode() + framed)
        assert client.recv(12, socket.MSG_PEEK) == b"HTTP/1.1 413"
        for _ in range(size // len(piece) if says_length else 50):
            client.sendall(framed)
            most = max(most, resident() - before)
        assert b"the body has more than 20,000 bytes" in client.recv(1000)
    assert most < 64 << 20 and http.get("/health").status_code == 200


def resident():
    """Bytes of memory that this process, which is the server's too, occupies."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("part", ["head", "body"])
def test_a_client_that_sends_byte_by_byte_is_not_waited_for(part, url, http):
    head = f"{POST}Content-Length: 999\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=0.05) as client:
        client.sendall(head if part == "body" else b"P")
        answer, end = None, time.monotonic() + 60
        while answer is None and time.monotonic() < end:
            try:
                client.sendall(b"x")
                answer = client.recv(100)
            except TimeoutError:
                continue
            except ConnectionError:
                answer = b""
    assert answer is not None and answer.startswith(b"HTTP/1.1 408" if part == "body" else b"")
    assert (answer == b"") == (part == "head") and http.get("/health").status_code == 200


def test_a_client_that_hangs_up_stops_the_work(url, http, slow):
    for stream in (True, False):
        body = json.dumps({"prompt": "x", "max_tokens": 100, "temperature": 0, "stream": stream}).encode()
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=30) as client:
            head = f"{POST}Content-Length: {len(body)}\r\n\r\n"
            client.sendall(head.encode() + body)
            while not http.get("/health").json()["running"]:
                time.sleep(0.01)
            started = time.monotonic()
        idle(http)
        assert time.monotonic() - started < 1.5  # the whole answer takes two seconds at least


def test_more_requests_than_may_wait(client, http, slow):
    asked = {"model": "run", "prompt": ["x"] * 12, "max_tokens": 15, "temperature": 0}
    thread = threading.Thread(target=lambda: client.completions.create(**asked))
    thread.start()
    while not http.get("/health").json()["running"]:
        time.sleep(0.01)
    with pytest.raises(openai.RateLimitError, match="no more may; try again later") as caught:
        client.completions.create(**asked)
    assert caught.value.response.headers["retry-after"] == "1"
    thread.join(60)


def test_a_model_that_fails_is_told_without_a_traceback(client, http, monkeypatch):
    monkeypatch.setattr(OuroborosForCausalLM, "forward", lambda *a, **k: 1 / 0)
    with pytest.raises(openai.InternalServerError, match="the model failed; the server's log says more"):
        client.completions.create(model="run", prompt="x")
    with pytest.raises(openai.APIError, match="the model failed"):
        list(client.completions.create(model="run", prompt="x", stream=True))
    monkeypatch.undo()
    assert client.completions.create(model="run", prompt="x", max_tokens=2).usage.completion_tokens == 2


def test_addresses_that_cannot_be_used(url):
    with pytest.raises(OuroborosError, match=r"cannot listen at 127.0.0.1:\d+: Address already in use; choose another"):
        listen("127.0.0.1", int(url.rpartition(":")[2]))
    with pytest.raises(OuroborosError, match=r"--port must be in 0\.\.65535, got 70000"):
        listen("127.0.0.1", 70000)


@pytest.mark.parametrize("streams", [True, False])
def test_events_come_together_and_the_first_and_the_last_at_once(streams):
    """Whoever reads a stream is woken for the first event, then in turns of PACE, and at once for the end."""

    async def read():
        inbox, found, start = _Inbox(streams=streams, count=2), [], time.monotonic()

        def write():
            for number in range(50):
                inbox.put(Event(0, text=str(number)))
                time.sleep(PACE / 10)
            inbox.put(Event(0, finish="stop"))
            inbox.put(Event(1, finish="length"))

        writer = threading.Thread(target=write)
        writer.start()
        async for events in inbox.take():
            found.append((time.monotonic() - start, events))
            if events and events[-1].finish == "length":
                break
        end = time.monotonic() - start
        writer.join()
        return found, end

    found, end = asyncio.run(read())
    events = [event for _, some in found for event in some]
    assert [event.text for event in events[:50]] == [str(number) for number in range(50)] and len(events) == 52
    if streams:
        assert 3 <= len(found) <= end / PACE + 2 and found[0][1][0].text == "0" and len(found[0][1]) < 50
    else:
        assert len(found) == 1
    assert end < found[-1][0] + PACE


def test_an_error_ends_what_waits():
    async def read():
        inbox = _Inbox(streams=False, count=3)
        inbox.put(Event(0, error=OuroborosError("no")))
        async for events in inbox.take():
            return [str(event.error) for event in events]

    assert asyncio.run(asyncio.wait_for(read(), 20)) == ["no"]

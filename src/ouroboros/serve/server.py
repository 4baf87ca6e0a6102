"""The server: OpenAI's interface, and a page to talk to the model, over HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import secrets
import socket
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from ouroboros.data.formats import TextFormat
from ouroboros.data.tokenize import TextTokenizer
from ouroboros.errors import OuroborosError, check
from ouroboros.serve.answers import Answer, error, server_sent
from ouroboros.serve.connection import Connection
from ouroboros.serve.engine import Ask, BusyError, Engine, Event
from ouroboros.serve.requests import ChatRequest, CompletionRequest, chat_prompt, chat_stops, read
from ouroboros.serve.sampling import Sampling
from ouroboros.serve.stream import text_ids

logger = logging.getLogger(__name__)

OWN = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"
"""What the page may load: nothing but itself, and what it asks this server for."""
CONNECTIONS = 1000
"""Clients that may be connected at once."""
PACE = 0.02
"""Seconds between two pieces of a stream, at least: each takes time from the thread that computes, and nobody reads
faster."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one request may take."""

    body: int
    """Bytes of its body."""
    seconds: float
    """From its arrival to the end of its answer."""
    patience: float
    """Seconds that a client may need to send a request, or to take what was written for it."""
    loops: int
    """The largest loop count."""


class _RefusedError(Exception):
    """A request that is answered by an error."""

    def __init__(self, status: int, message: str, code: str | None = None, kind: str = "invalid_request_error") -> None:
        super().__init__(message)
        self.response = JSONResponse(error(message, code, kind), status, {"retry-after": "1"} if status > 428 else None)


class _Inbox:
    """Brings the engine's events from its thread to the one of the connections.

    Args:
        streams: whether events are wanted as they come, or all together at the end.
        count: how many answers have to end.
    """

    def __init__(self, *, streams: bool, count: int) -> None:
        self._events: deque[Event] = deque()
        self._loop = asyncio.get_running_loop()
        self._ready = asyncio.Event()
        self._streams = self._looks = streams
        self._open = count

    def put(self, event: Event) -> None:
        """Called by the engine."""
        self._events.append(event)
        self._open -= event.finish is not None
        if self._looks or event.error is not None or not self._open:
            self._looks = False
            with contextlib.suppress(RuntimeError):  # the server has stopped
                self._loop.call_soon_threadsafe(self._ready.set)

    async def take(self) -> AsyncIterator[list[Event]]:
        """The events as they come, without an end; those that come within :data:`PACE` seconds come together."""
        while True:
            await self._ready.wait()
            self._ready.clear()
            self._looks = False
            yield [self._events.popleft() for _ in range(len(self._events))]
            if self._streams:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._ready.wait(), PACE)  # only an end comes before that
                self._looks = True
                if self._events:
                    self._ready.set()


class Service:
    """Answers HTTP requests.

    Args:
        engine: does the work.
        name: of the model.
        tokenizer: the model's.
        template: of conversations; None for plain ones.
        facts: what the page shows of the model.
        limits: of each request.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        name: str,
        tokenizer: TextTokenizer,
        template: TextFormat | None,
        facts: dict[str, Any],
        limits: Limits,
    ) -> None:
        self.engine, self.name, self.tokenizer, self.template = engine, name, tokenizer, template
        self.facts, self.limits, self.created = facts, limits, int(time.time())
        self.usual = Sampling()
        self.page = (files("ouroboros.serve") / "page.html").read_text(encoding="utf-8")
        self.loops = engine.model.schedule.loops

    def app(self) -> Starlette:
        """The routes."""
        completions = functools.partial(self.answer, CompletionRequest)
        chat = functools.partial(self.answer, ChatRequest)
        routes = [
            Route("/", self.home),
            Route("/health", self.health),
            Route("/about", self.about),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.one_model),
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/v1/chat/completions", chat, methods=["POST"]),
        ]
        handlers: dict[Any, Any] = {_RefusedError: _refuse, HTTPException: _refuse_route, Exception: _apologise}
        return Starlette(routes=routes, exception_handlers=handlers)

    async def home(self, request: HttpRequest) -> Response:
        """The page."""
        return HTMLResponse(self.page, headers={"content-security-policy": OWN})

    async def health(self, request: HttpRequest) -> Response:
        """That the server works, and how busy it is."""
        works = self.engine.works
        return JSONResponse({"status": "ok" if works else "failed", **self.engine.load}, 200 if works else 503)

    async def about(self, request: HttpRequest) -> Response:
        """What the page shows of the model."""
        return JSONResponse({"model": self.name, **self.facts})

    async def models(self, request: HttpRequest) -> Response:
        """The list of models, which has one."""
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def one_model(self, request: HttpRequest) -> Response:
        """The model of this name."""
        self._check_name(request.path_params["name"])
        return JSONResponse(self._model())

    def _model(self) -> dict[str, Any]:
        loops = {"loops": self.loops, "trained_loops": self.facts["trained_loops"], "max_loops": self.limits.loops}
        facts = {"context": self.engine.context, **loops}
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "ouroboros", **facts}

    def _check_name(self, name: str | None) -> None:
        if name not in (None, self.name):
            raise _RefusedError(404, f"no model {name!r} here; this server has {self.name!r}", "model_not_found")

    async def answer(self, kind: type[CompletionRequest | ChatRequest], http: HttpRequest) -> Response:
        """Answer a request of either kind."""
        started = time.monotonic()
        body = await self._body(http)
        is_chat = kind is ChatRequest
        try:
            asked = read(kind, body)
            self._check_name(asked.model)
            # Templates and tokenizers of long texts would keep other connections waiting.
            asks = await asyncio.to_thread(self._asks, asked, started + self.limits.seconds)
        except OuroborosError as refused:
            code = "context_length_exceeded" if "the model's context holds" in str(refused) else None
            raise _RefusedError(400, str(refused), code) from None
        identity = {"id": f"{'chatcmpl' if is_chat else 'cmpl'}-{secrets.token_hex(12)}"}
        answer = Answer(
            {**identity, "model": self.name, "loops": asks[0].loops, "seed": asks[0].seed},
            is_chat=is_chat,
            prompt_tokens=sum(len(ask.ids) for ask in asks),
            count=sum(ask.count for ask in asks),
            decode=self.tokenizer.decode,
            tells=asks[0].best is not None,
        )
        inbox = _Inbox(streams=bool(asked.stream), count=len(answer.texts))
        for ask in asks:
            ask.tell = inbox.put
        try:
            self.engine.submit(asks)
        except BusyError as busy:
            raise _RefusedError(429, str(busy), "rate_limit_exceeded", "rate_limit_error") from None
        if asked.stream:
            stream = _stream(asks, answer, inbox, includes_usage=asked.includes_usage)
            return StreamingResponse(stream, media_type="text/event-stream", headers={"cache-control": "no-cache"})
        return await _whole(http, asks, answer, inbox)

    async def _body(self, http: HttpRequest) -> bytes:
        """The body of a request, if it is of a kind and a size that is read here."""
        kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise _RefusedError(415, "the body must be JSON: send content-type: application/json")
        # The connection reads and forgets the rest of a refused body, which a client may send before it reads a word.
        too_large = _RefusedError(413, f"the body has more than {self.limits.body:,} bytes")
        body, announced = bytearray(), http.headers.get("content-length", "")
        if announced.isdigit() and int(announced) > self.limits.body:
            raise too_large
        try:
            async with asyncio.timeout(self.limits.patience):
                async for piece in http.stream():
                    body += piece
                    if len(body) > self.limits.body:
                        raise too_large
        except TimeoutError:
            raise _RefusedError(408, f"the body did not come within {self.limits.patience:g} seconds") from None
        return bytes(body)

    def _asks(self, asked: CompletionRequest | ChatRequest, deadline: float) -> list[Ask]:
        """What the engine is asked for."""
        loops = self.loops if asked.loops is None else asked.loops
        only = f"loops must be in 1..{self.limits.loops}" if self.limits.loops > 1 else "the model has no loop: loops"
        changes = loops != self.loops
        check(not changes or self.engine.model.model.spec.schedule.is_looped, "the model has no loop; leave loops out")
        check(loops <= self.limits.loops, f"{only}, got {loops}")
        count, seed = asked.n or 1, asked.chosen_seed()
        check(count <= self.engine.rows, f"n must be at most {self.engine.rows}, got {count}")
        sampling = asked.sampling(self.usual, self.engine.context)
        if isinstance(asked, ChatRequest):
            prompts = [self._chat_ids(asked)]
            sampling = replace(sampling, stop=(*sampling.stop, *chat_stops(self.template)))
        else:
            prompts = [self._ids(prompt) for prompt in asked.prompts()]
        most = self.engine.rows + self.engine.queue
        check(len(prompts) * count <= most, f"prompt: at most {most} answers in one request")
        for ids in prompts:
            check(
                len(ids) < self.engine.context,
                f"the prompt has {len(ids)} tokens but the model's context holds {self.engine.context}; shorten it",
            )
        shared = {"sampling": sampling, "loops": loops, "seed": seed, "count": count, "best": asked.best}
        return [
            Ask(ids=ids, tell=_unheard, deadline=deadline, first=number * count, **shared)
            for number, ids in enumerate(prompts)
        ]

    def _ids(self, prompt: str | list[int]) -> list[int]:
        """The tokens of a prompt; ids are taken as they are."""
        if isinstance(prompt, str):
            return text_ids(self.tokenizer, prompt.encode())
        unknown = [token for token in prompt if not 0 <= token < self.tokenizer.vocab_size]
        check(not unknown, f"prompt: no token {unknown[:1]}; ids are 0..{self.tokenizer.vocab_size - 1}")
        return prompt

    def _chat_ids(self, asked: ChatRequest) -> list[int]:
        earlier, prompt = chat_prompt(asked.messages, self.template)
        return text_ids(self.tokenizer, prompt, earlier)


async def _stream(asks: list[Ask], answer: Answer, inbox: _Inbox, *, includes_usage: bool) -> AsyncIterator[str]:
    """The pieces of a streamed answer; whoever stops reading cancels the work."""
    try:
        for beginning in answer.beginnings():
            yield server_sent(beginning)
        async for events in inbox.take():
            sent = ""
            for event in events:
                if event.error is not None:
                    yield sent + server_sent(_failure(event.error)[1])
                    return
                if piece := answer.take(event):
                    sent += server_sent(piece)
            if sent:
                yield sent
            if answer.is_complete:
                break
        if includes_usage:
            yield server_sent(answer.last())
        yield "data: [DONE]\n\n"
    finally:
        for ask in asks:
            ask.cancelled = True


async def _whole(http: HttpRequest, asks: list[Ask], answer: Answer, inbox: _Inbox) -> Response:
    """The whole answer; a client that hangs up cancels the work."""

    async def wait() -> Response:
        async for events in inbox.take():
            for event in events:
                if event.error is not None:
                    status, found = _failure(event.error)
                    return JSONResponse(found, status)
                answer.take(event)
            if answer.is_complete:
                break
        return JSONResponse(answer.whole())

    async def hang_up() -> Response:
        while (await http.receive())["type"] != "http.disconnect":
            pass
        return Response(status_code=499)

    tasks = [asyncio.ensure_future(wait()), asyncio.ensure_future(hang_up())]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return done.pop().result()
    finally:
        for ask in asks:
            ask.cancelled = True
        for task in tasks:
            task.cancel()


def _failure(found: Exception) -> tuple[int, dict[str, Any]]:
    """Status and error object of work that failed."""
    if isinstance(found, BusyError):
        return 503, error(str(found), "timeout", "server_error")
    if isinstance(found, OuroborosError):
        return 400, error(str(found))
    return 500, error("the model failed; the server's log says more", kind="server_error")


def _unheard(event: Event) -> None:
    """Stands for who will listen."""


async def _refuse(request: HttpRequest, refused: Exception) -> Response:
    assert isinstance(refused, _RefusedError)
    return refused.response


async def _refuse_route(request: HttpRequest, refused: Exception) -> Response:
    assert isinstance(refused, HTTPException)
    if refused.status_code == 404:
        return JSONResponse(error(f"no such address: {request.method} {request.url.path}", "unknown_url"), 404)
    return JSONResponse(
        error(f"{refused.detail}: {request.method} {request.url.path}"), refused.status_code, refused.headers
    )


async def _apologise(request: HttpRequest, found: Exception) -> Response:
    return JSONResponse(error("the server failed; its log says more", kind="server_error"), 500)


def listen(host: str, port: int) -> socket.socket:
    """A socket at this address that is not yet open to clients, so that a port in use is told before the model is read.

    Raises:
        OuroborosError: the address cannot be used.
    """
    check(0 <= port < 65536, f"--port must be in 0..65535, got {port}")
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, proto)
        try:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind(address)
        except OSError:
            found.close()
            raise
    except OSError as failed:
        reason = failed.strerror or failed
        raise OuroborosError(f"cannot listen at {host}:{port}: {reason}; choose another --host or --port") from None
    return found


def server_of(service: Service) -> uvicorn.Server:
    """What takes the connections."""
    limits = service.limits
    config = uvicorn.Config(
        service.app(),
        http=type("PatientConnection", (Connection,), {"patience": limits.patience}),
        loop="asyncio",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=2,
    )
    return uvicorn.Server(config)


def run(service: Service, bound: socket.socket) -> None:
    """Serve until the process is told to stop."""
    service.engine.start()
    try:
        server_of(service).run(sockets=[bound])
    finally:
        service.engine.close()

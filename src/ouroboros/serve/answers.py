"""Answers in the form of OpenAI's interface, whole or in pieces."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from typing import Any

from ouroboros.serve.engine import Event, Told

LEAST_NATS = -9999.0
"""Stands for the logarithm of 0, which JSON lacks."""


def error(message: str, code: str | None = None, kind: str = "invalid_request_error") -> dict[str, Any]:
    """An error object."""
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def server_sent(value: Any) -> str:
    """One event of a stream."""
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"


class Answer:
    """The answers to one request, put together from the engine's events.

    Args:
        identity: fields of every object: model, loops, seed.
        is_chat: an answer of the chat, in place of a completion.
        prompt_tokens: how many tokens the prompts have.
        count: how many answers there are.
        decode: the bytes of a token.
        tells: whether the request wants to know the probabilities of tokens.
    """

    def __init__(
        self,
        identity: dict[str, Any],
        *,
        is_chat: bool,
        prompt_tokens: int,
        count: int,
        decode: Callable[[Sequence[int]], bytes],
        tells: bool,
    ) -> None:
        self.is_chat, self.prompt_tokens, self.decode, self.tells = is_chat, prompt_tokens, decode, tells
        self.texts = [""] * count
        self.tokens = [0] * count
        self.told: list[list[Told]] = [[] for _ in range(count)]
        self.finish: list[str | None] = [None] * count
        kind = "chat.completion" if is_chat else "text_completion"
        self.identity = {"id": "", "object": kind, "created": int(time.time()), **identity}

    @property
    def is_complete(self) -> bool:
        """Whether every answer has ended."""
        return all(self.finish)

    def take(self, event: Event) -> dict[str, Any] | None:
        """Take an event; returns the piece of a stream that tells it, None where there is nothing to tell."""
        offset = len(self.texts[event.index])
        self.texts[event.index] += event.text
        self.tokens[event.index] += event.tokens
        self.told[event.index] += event.told
        self.finish[event.index] = event.finish
        if not (event.text or event.told or event.finish):
            return None
        return self._piece(event.index, event.text, event.told, event.finish, offset)

    def beginnings(self) -> list[dict[str, Any]]:
        """What a stream begins with."""
        roles = {"role": "assistant", "content": ""}
        return [self._chunk(index, {"delta": roles}, None) for index in range(len(self.texts))] if self.is_chat else []

    def whole(self) -> dict[str, Any]:
        """The answer that is not streamed."""
        choices = []
        for index, text in enumerate(self.texts):
            said = {"role": "assistant", "content": text, "refusal": None}
            content = {"message": said} if self.is_chat else {"text": text}
            logprobs = self._logprobs(self.told[index], 0)
            choices.append({"index": index, **content, "logprobs": logprobs, "finish_reason": self.finish[index]})
        return {**self.identity, "choices": choices, "usage": self.usage()}

    def usage(self) -> dict[str, int]:
        """The numbers of tokens."""
        written = sum(self.tokens)
        total = self.prompt_tokens + written
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": written, "total_tokens": total}

    def last(self) -> dict[str, Any]:
        """The piece of a stream that tells the numbers of tokens."""
        return {**self.identity, **self._kind(), "choices": [], "usage": self.usage()}

    def _kind(self) -> dict[str, str]:
        return {"object": "chat.completion.chunk"} if self.is_chat else {}

    def _chunk(self, index: int, content: dict[str, Any], finish: str | None) -> dict[str, Any]:
        choice = {"index": index, "logprobs": None, **content, "finish_reason": finish}
        return {**self.identity, **self._kind(), "choices": [choice]}

    def _piece(self, index: int, text: str, told: tuple[Told, ...], finish: str | None, offset: int) -> dict[str, Any]:
        content: dict[str, Any] = {"delta": {"content": text} if text else {}} if self.is_chat else {"text": text}
        if told:
            content["logprobs"] = self._logprobs(told, offset)
        return self._chunk(index, content, finish)

    def _logprobs(self, told: Sequence[Told], offset: int) -> dict[str, Any] | None:
        if not self.tells:
            return None
        if self.is_chat:
            content = []
            for one in told:
                best = [self._token(self.decode([token]), nats) for token, nats in one.best]
                content.append({**self._token(one.text, one.nats), "top_logprobs": best})
            return {"content": content, "refusal": None}
        texts = [one.text.decode("utf-8", "replace") for one in told]
        offsets = []
        for text in texts:
            offsets.append(offset)
            offset += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [max(one.nats, LEAST_NATS) for one in told],
            "top_logprobs": [
                {self.decode([token]).decode("utf-8", "replace"): max(nats, LEAST_NATS) for token, nats in one.best}
                for one in told
            ],
            "text_offset": offsets,
        }

    def _token(self, piece: bytes, nats: float) -> dict[str, Any]:
        text = piece.decode("utf-8", "replace")
        return {"token": text, "logprob": max(nats, LEAST_NATS), "bytes": list(piece)}

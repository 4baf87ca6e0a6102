"""Requests in the form of OpenAI's interface, read strictly: what this server cannot do is refused by name."""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

from ouroboros.config import from_dict
from ouroboros.data.formats import ASSISTANT, USER, ChatFormat, TextFormat, Turn
from ouroboros.data.templates import TemplateChat
from ouroboros.errors import OuroborosError, check
from ouroboros.serve.chat import BLANK_LINE, documents
from ouroboros.serve.sampling import Sampling

IGNORED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls")
"""Fields that change no answer."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
"""Fields that are not served, with the values that ask for nothing; null is another one."""
MOST_SEED = 2**63 - 1
MOST_BEST = {"completions": 5, "chat": 20}
SYSTEM = ("system", "developer")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What both kinds of request have in common; None stands for the default."""

    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    loops: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_tokens", "n", "loops"):
            value = getattr(self, name)
            check(value is None or value >= 1, f"{name} must be >= 1, got {value}")
        for name in ("temperature", "top_p", "repetition_penalty"):
            value = getattr(self, name)
            check(value is None or math.isfinite(value), f"{name} must be a finite number, got {value}")
        check(self.seed is None or 0 <= self.seed <= MOST_SEED, f"seed must be in 0..{MOST_SEED}, got {self.seed}")
        check(len(self.stops) <= 16, f"stop must have at most 16 strings, got {len(self.stops)}")
        check("" not in self.stops, "stop must not have an empty string")
        options = self.stream_options or {}
        check(not options or bool(self.stream), "stream_options needs stream")
        unknown = sorted(options.keys() - {"include_usage", "include_obfuscation"})
        check(not unknown, f"stream_options: unknown key {', '.join(unknown)}")

    @property
    def stops(self) -> tuple[str, ...]:
        """The strings that end an answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return bool((self.stream_options or {}).get("include_usage"))

    def sampling(self, usual: Sampling, most: int) -> Sampling:
        """The controls, at most ``most`` tokens long; ``usual`` stands for what the request leaves out."""
        named = ("temperature", "top_p", "top_k", "repetition_penalty")
        values = {name: getattr(self, name) for name in named if getattr(self, name) is not None}
        tokens = self.max_tokens or usual.max_new_tokens
        return Sampling(**values, max_new_tokens=min(tokens, most), stop=self.stops)

    def chosen_seed(self) -> int:
        """The seed, or a random one."""
        return secrets.randbelow(2**31) if self.seed is None else self.seed


@dataclass(frozen=True, kw_only=True)
class CompletionRequest(Request):
    """``POST /v1/completions``."""

    prompt: Any = None
    logprobs: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_best("logprobs", self.logprobs, MOST_BEST["completions"])

    @property
    def best(self) -> int | None:
        """How many most probable tokens are told for each that is written."""
        return self.logprobs

    def prompts(self) -> list[str | list[int]]:
        """The prompts, each a text or a list of token ids."""
        value = self.prompt
        if isinstance(value, str) or _are_ids(value):
            return [value]
        fits = isinstance(value, list) and value and all(isinstance(item, str) or _are_ids(item) for item in value)
        check(bool(fits), "prompt must be a text, a list of texts, a list of token ids or a list of such lists")
        return value


@dataclass(frozen=True, kw_only=True)
class ChatRequest(Request):
    """``POST /v1/chat/completions``."""

    messages: list[Any]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        most = self.max_completion_tokens
        check(most is None or most >= 1, f"max_completion_tokens must be >= 1, got {most}")
        check(most is None or self.max_tokens in (None, most), "max_tokens and max_completion_tokens differ; give one")
        check(self.top_logprobs is None or bool(self.logprobs), "top_logprobs needs logprobs")
        _check_best("top_logprobs", self.top_logprobs, MOST_BEST["chat"])
        if most is not None:
            object.__setattr__(self, "max_tokens", most)

    @property
    def best(self) -> int | None:
        """How many most probable tokens are told for each that is written."""
        return (self.top_logprobs or 0) if self.logprobs else None


_R = TypeVar("_R", bound=Request)


def read(kind: type[_R], body: bytes) -> _R:
    """The request in ``body``.

    Raises:
        OuroborosError: no JSON object, an unknown field, a wrong type, a value out of range, something not served.
    """
    try:
        values = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
        json.dumps(values, ensure_ascii=False).encode()  # an escape can spell half a character
    except UnicodeError:
        raise OuroborosError("the body is not valid UTF-8 text") from None
    except RecursionError:
        raise OuroborosError("the body is nested too deeply") from None
    except OuroborosError:
        raise
    except ValueError as error:
        raise OuroborosError(f"the body is not JSON: {error}") from None
    check(isinstance(values, dict), "the body must be a JSON object")
    for name in IGNORED:
        values.pop(name, None)
    for name, neutral in NEUTRAL.items():
        value = values.pop(name, None)
        check(value is None or value in neutral, f"{name} is not served here; leave it out")
    return from_dict(kind, values, where="request")


def _refuse_constant(name: str) -> NoReturn:
    raise OuroborosError(f"the body is not JSON: {name} is no number in JSON")


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


def _check_best(name: str, value: int | None, most: int) -> None:
    check(value is None or 0 <= value <= most, f"{name} must be in 0..{most}, got {value}")


def chat_prompt(messages: Sequence[Any], template: TextFormat | None) -> tuple[list[bytes], bytes]:
    """A conversation as the model reads it: whole documents, and the one to go on with.

    A template of the tokenizer gets every message. Others know questions and answers alone: there, what the system says
    stands in front of the next question, and messages in a row by one speaker are one.

    Raises:
        OuroborosError: messages that are none, or whose last is not a user's.
    """
    turns = ChatFormat("messages").turns({"messages": list(messages)}, "request")
    check(bool(turns), "messages must not be empty")
    check(turns[-1].role == USER, f"the last of messages must be a user's, got one of {turns[-1].role!r}")
    unknown = sorted({turn.role for turn in turns} - {*SYSTEM, USER, ASSISTANT})
    check(not unknown, f"messages of {', '.join(unknown)} are not served; give system, user and assistant")
    if isinstance(template, TemplateChat):
        return [], template.asked([Turn("system" if t.role in SYSTEM else t.role, t.text) for t in turns]).encode()
    pairs: list[tuple[str, str]] = []
    asked: list[str] = []
    answered = ""
    for turn in turns:
        if turn.role == ASSISTANT:
            answered = f"{answered}\n{turn.text}" if answered else turn.text
            continue
        if answered:
            pairs.append(("\n".join(asked), answered))
            asked, answered = [], ""
        asked.append(turn.text)
    return documents(template, pairs, "\n".join(asked))


def chat_stops(template: TextFormat | None) -> tuple[str, ...]:
    """Where the answers of a conversation end, beside what the request says."""
    return (BLANK_LINE,) if template is None else template.stop

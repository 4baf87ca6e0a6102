"""The engine of a server: one thread that reads prompts and decodes several answers together.

A turn reads a piece of the next waiting prompt, then gives every running sequence one more token. So a request joins
and leaves between two tokens, and a long prompt delays others by one piece only. Sequences of one loop count share a
batch; each has its own random numbers and controls. Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache
from transformers.generation import LogitsProcessorList
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ouroboros.errors import OuroborosError
from ouroboros.serve.batch import Batch
from ouroboros.serve.sampling import Sampling
from ouroboros.serve.stream import StreamedText

if TYPE_CHECKING:
    from ouroboros.data.tokenize import TextTokenizer
    from ouroboros.model.modeling import OuroborosForCausalLM

logger = logging.getLogger(__name__)

PIECE = 512
"""Tokens of prompts that are read in one turn."""


class BusyError(OuroborosError):
    """More requests wait than the server lets wait, or one has waited too long."""


class Told(NamedTuple):
    """A token that was written, with what the model thought of it."""

    token: int
    text: bytes
    nats: float
    """Logarithm of its probability, before temperature and the other controls."""
    best: tuple[tuple[int, float], ...]
    """The most probable tokens and the logarithms of their probabilities."""


class Event(NamedTuple):
    """What a request is told of one of its answers."""

    index: int
    text: str = ""
    """What can be shown now, behind what was shown before."""
    tokens: int = 0
    """How many more were written."""
    told: tuple[Told, ...] = ()
    """These, where a request wants to know them."""
    finish: str | None = None
    """``stop`` or ``length`` when the answer has ended."""
    error: Exception | None = None
    """Why the whole request has failed."""


@dataclass(kw_only=True, eq=False)
class Ask:
    """A prompt and how to go on from it."""

    ids: list[int]
    """The tokens of the prompt; one at least, and fewer than the context holds."""
    tell: Callable[[Event], None]
    """Called by the engine's thread."""
    sampling: Sampling
    loops: int
    seed: int = 0
    count: int = 1
    """How many answers, each with a seed of its own."""
    first: int = 0
    """The index of the first of them."""
    best: int | None = None
    """How many most probable tokens to tell for each that is written; None tells nothing of tokens."""
    deadline: float = float("inf")
    """On the clock ``time.monotonic``."""
    cancelled: bool = False
    """Set by whoever no longer wants the answer; the engine looks between two tokens."""


@dataclass(eq=False)
class _Row:
    """An answer that is being written."""

    ask: Ask
    index: int
    streamed: StreamedText
    processors: LogitsProcessorList
    generator: torch.Generator
    room: int
    """Tokens that may still be written."""
    ids: list[int] = field(default_factory=list)
    """The prompt's tokens and those written."""


@dataclass(eq=False)
class _Reading:
    """A prompt of which a part has been read."""

    ask: Ask
    store: DynamicCache
    at: int = 0


class Engine:
    """Answers requests until it is closed.

    Args:
        model: the model, at its usual loop count.
        tokenizer: turns tokens into bytes.
        rows: how many answers are written at once at most.
        queue: how many more may wait for their turn.
        context: how many tokens a prompt and its answer have together at most.
    """

    def __init__(
        self, model: OuroborosForCausalLM, tokenizer: TextTokenizer, *, rows: int, queue: int, context: int
    ) -> None:
        self.model, self.tokenizer, self.rows, self.queue, self.context = model, tokenizer, rows, queue, context
        self._batches: dict[int, tuple[Batch, list[_Row]]] = {}
        self._waiting: deque[Ask] = deque()
        self._reading: _Reading | None = None
        self._condition = threading.Condition()
        self._closed = False
        self._view = functools.lru_cache(maxsize=16)(self._at_loops)
        self._thread = threading.Thread(target=self._run, name="ouroboros-engine", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def submit(self, asks: Sequence[Ask]) -> None:
        """Let requests wait for their turn.

        Raises:
            BusyError: too many wait already.
        """
        with self._condition:
            wanted = self._running + sum(ask.count for ask in (*self._waiting, *asks))
            if wanted > self.rows + self.queue:
                raise BusyError(f"{len(self._waiting)} requests are waiting, and no more may; try again later")
            self._waiting += asks
            self._condition.notify()

    def close(self) -> None:
        """Stop; what is being written is left as it is."""
        with self._condition:
            self._closed = True
            self._condition.notify()
        self._thread.join()

    @property
    def works(self) -> bool:
        """Whether its thread is there."""
        return self._thread.is_alive()

    @property
    def load(self) -> dict[str, int]:
        """How many answers are being written, and how many requests wait."""
        waiting = len(self._waiting) + (self._reading is not None)
        return {"running": self._running, "waiting": waiting}

    @property
    def _running(self) -> int:
        return sum(len(rows) for _, rows in list(self._batches.values()))

    def _at_loops(self, loops: int) -> OuroborosForCausalLM:
        return self.model if loops == self.model.schedule.loops else self.model.with_loops(loops)

    def _run(self) -> None:
        with torch.no_grad():
            while self._has_work():
                self._read()
                for loops in list(self._batches):
                    self._step(loops)

    def _has_work(self) -> bool:
        with self._condition:
            while not (self._closed or self._waiting or self._reading or self._batches):
                self._condition.wait()
            return not self._closed

    def _next(self) -> Ask | None:
        """The next request, if there is room for its answers."""
        with self._condition:
            while self._waiting:
                ask = self._waiting[0]
                is_late = time.monotonic() > ask.deadline
                if not (ask.cancelled or is_late):
                    if self._running + ask.count > self.rows:
                        return None
                    return self._waiting.popleft()
                self._waiting.popleft()
                if is_late:
                    ask.tell(Event(ask.first, error=BusyError("the server was busy for too long; try again later")))
        return None

    def _read(self) -> None:
        """Read prompts, at most :data:`PIECE` tokens of them."""
        left = PIECE
        while left > 0:
            ask = self._next() if self._reading is None else self._reading.ask
            if ask is None:
                return
            try:
                if ask.cancelled or time.monotonic() > ask.deadline:
                    raise BusyError("the time of the request ended while its prompt was read")
                view = self._view(ask.loops)
                reading = self._reading = self._reading or _Reading(ask, DynamicCache(config=view.config))
                piece = ask.ids[reading.at : reading.at + left]
                ids = torch.tensor([piece], device=self.model.device)
                options: Any = {"past_key_values": reading.store, "use_cache": True, "logits_to_keep": 1}
                logits_1V = view(ids, **options).logits[:, -1]
                reading.at, left = reading.at + len(piece), left - len(piece)
                if reading.at == len(ask.ids):
                    self._reading = None
                    self._begin(reading, logits_1V)
            except Exception as error:
                self._reading = None
                self._fail([ask], error)

    def _begin(self, reading: _Reading, logits_1V: Tensor) -> None:
        """The first token of each answer to a prompt that has been read; then they join the others."""
        ask = reading.ask
        rows = []
        for number in range(ask.count):
            row = _Row(
                ask,
                ask.first + number,
                StreamedText(ask.sampling.stop),
                processors(ask.sampling),
                torch.Generator(self.model.device).manual_seed(ask.seed + number),
                min(ask.sampling.max_new_tokens, self.context - len(ask.ids)),
                list(ask.ids),
            )
            if not self._write(row, logits_1V):
                rows.append(row)
        if rows:
            batch, running = self._batches.setdefault(ask.loops, (Batch(self._view(ask.loops)), []))
            batch.add(reading.store, len(rows))
            running += rows

    def _step(self, loops: int) -> None:
        """One more token for every sequence of a batch."""
        batch, rows = self._batches[loops]
        try:
            self._leave(loops, [n for n, row in enumerate(rows) if not self._is_over(row)])
            if not rows:
                return
            token_B1 = torch.tensor([row.ids[-1:] for row in rows], device=self.model.device)
            logits_BV = batch.step(token_B1)
            failed: list[Ask] = []
            going_on = []
            for number, row in enumerate(rows):
                try:
                    if row.ask not in failed and not self._write(row, logits_BV[number : number + 1]):
                        going_on.append(number)
                except Exception as error:  # of one alone, logits that are not finite say
                    failed.append(row.ask)
                    row.ask.cancelled = True  # its other answers leave with the next turn
                    self._fail([row.ask], error)
            self._leave(loops, going_on)
        except Exception as error:
            del self._batches[loops]
            self._fail(list(dict.fromkeys(row.ask for row in rows)), error)

    def _is_over(self, row: _Row) -> bool:
        """Whether nobody waits for an answer any more, or its time has ended."""
        if not row.ask.cancelled and time.monotonic() > row.ask.deadline:
            row.ask.tell(Event(row.index, row.streamed.rest(), finish="length"))
            return True
        return row.ask.cancelled

    def _leave(self, loops: int, stay: list[int]) -> None:
        batch, rows = self._batches[loops]
        batch.keep(stay)
        rows[:] = [rows[number] for number in stay]
        if not rows:
            del self._batches[loops]

    def _write(self, row: _Row, logits_1V: Tensor) -> bool:
        """Choose one more token of an answer; whether it was the last one."""
        ask, scores = row.ask, logits_1V.to(torch.float32, copy=True)
        nats_V = scores[0].log_softmax(dim=-1) if ask.best is not None else None
        if row.processors:
            needs_ids = ask.sampling.repetition_penalty != 1.0
            ids = torch.tensor([row.ids if needs_ids else row.ids[-1:]], device=scores.device)
            scores = row.processors(ids, scores)  # pyrefly: ignore
        if ask.sampling.temperature > 0:
            token = int(torch.multinomial(scores.softmax(dim=-1), 1, generator=row.generator))
        else:
            token = int(scores.argmax(dim=-1))
        row.ids.append(token)
        row.room -= 1
        told, piece = (), self.tokenizer.decode([token])
        if nats_V is not None:
            best = nats_V.topk(min(ask.best or 0, len(nats_V)))
            pairs = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
            told = (Told(token, piece, float(nats_V[token]), pairs),)
        text, finish = row.streamed.add(piece), None
        if token == self.tokenizer.eos_id or row.streamed.ended:
            finish = "stop"
        elif row.room <= 0:
            finish = "length"
        if finish:
            text += row.streamed.rest()
        ask.tell(Event(row.index, text, 1, told, finish))
        return finish is not None

    def _fail(self, asks: list[Ask], error: Exception) -> None:
        if not isinstance(error, OuroborosError):
            logger.exception("a request failed")
        for ask in asks:
            ask.tell(Event(ask.first, error=error))


def processors(sampling: Sampling) -> LogitsProcessorList:
    """What changes the scores before a token is chosen, in the order of ``generate``."""
    found = LogitsProcessorList()
    if sampling.repetition_penalty != 1.0:
        found.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.temperature > 0:
        if sampling.temperature != 1.0:
            found.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k:
            found.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            found.append(TopPLogitsWarper(sampling.top_p))
    return found

"""Streaming: continuations as text that arrives while the model writes.

Text is kept as bytes, because a token may end inside a character, and what could begin a stop string is held back until
that is known. transformers' ``TextIteratorStreamer`` gives decoded words, and its ``stop_strings`` ends the writing
once the string has been shown, also at one that began in the prompt.
"""

from __future__ import annotations

import codecs
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from queue import Queue
from threading import Thread
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.generation import StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from ouroboros.data.tokenize import TextTokenizer
from ouroboros.errors import OuroborosError, check
from ouroboros.serve.decoder import LoopDecoder, WindowDecoder
from ouroboros.serve.sampling import Sampling

if TYPE_CHECKING:
    from ouroboros.model.modeling import OuroborosForCausalLM


class Continuation:
    """One continuation of a prompt, as an iterator of text that arrives while the model writes.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        prompt: the text so far; an empty prompt starts a new document.
        sampling: how tokens are chosen.
        decoder: writes the tokens; None leaves it to ``model.generate``, or to a window if ``sampling`` asks for one.
        earlier: whole documents before the prompt, each ended as training ends documents.

    Raises:
        OuroborosError: the prompt leaves no room for a new token in the model's context; a window is longer than
            the context, or comes together with a decoder.
    """

    def __init__(
        self,
        model: OuroborosForCausalLM,
        tokenizer: TextTokenizer,
        prompt: bytes,
        sampling: Sampling,
        decoder: LoopDecoder | None = None,
        earlier: Sequence[bytes] = (),
    ) -> None:
        self.model, self.tokenizer, self.sampling = model, tokenizer, sampling
        ids, context = sampling.read(text_ids(tokenizer, prompt, earlier)), model.config.max_position_embeddings
        self.decoder, self.room = decoder, context - len(ids)
        if sampling.window is None:
            check(
                self.room >= 1,
                f"the prompt has {len(ids)} tokens but the model's context holds {context};"
                " shorten the prompt, or let the model see its end with a window",
            )
        else:
            check(decoder is None, "a window needs the whole of it at every step, which fast decoding does not serve")
            fits = sampling.window <= context
            check(fits, f"the window is {sampling.window} tokens but the model's context holds {context}")
            self.decoder, self.room = WindowDecoder(sampling.window), sampling.max_new_tokens
        self.input_ids = torch.tensor([ids], device=model.device)
        self._cancelled = False
        self.text = b""
        """The continuation so far, whole once iteration has ended."""
        self.tokens = 0
        """Tokens written, an end-of-text token included; known once iteration has ended."""
        self.seconds = 0.0
        """From the first of these tokens to the last one: without the reading of the prompt."""

    @property
    def rate(self) -> str:
        """What was written, and how fast: ``64 tokens, 533 tokens/s``; one token has no speed."""
        count = f"{self.tokens} token{'' if self.tokens == 1 else 's'}"
        return f"{count}, {(self.tokens - 1) / self.seconds:,.0f} tokens/s" if self.seconds > 0 else count

    def cancel(self) -> None:
        """Ask the writing thread to end after the present token."""
        self._cancelled = True

    def __iter__(self) -> Iterator[str]:
        queue: Queue[bytes | Exception | None] = Queue()
        thread = Thread(target=self._write, args=(queue,), daemon=True)
        thread.start()
        # Bytes of one character may come in several tokens.
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        try:
            while (piece := queue.get()) is not None:
                if isinstance(piece, Exception):
                    raise OuroborosError(f"generation failed: {piece}") from piece
                if shown := decoder.decode(piece):
                    yield shown
            if rest := decoder.decode(b"", final=True):
                yield rest
        finally:
            self.cancel()
            thread.join()

    def _write(self, queue: Queue[bytes | Exception | None]) -> None:
        streamer = _ByteStreamer(self.tokenizer, self.input_ids.shape[1], self.sampling.stop, queue.put)
        generate: Any = self.model.generate
        if self.decoder is not None:
            generate = functools.partial(self.decoder.generate, self.model)

        def ended(ids_BT: Tensor, scores: Any, **_: Any) -> Tensor:
            return ids_BT.new_full(ids_BT.shape[:1], self._cancelled or streamer.stopped, dtype=torch.bool)

        options = {**self.sampling.options(), "max_new_tokens": min(self.sampling.max_new_tokens, self.room)}
        try:
            generate(
                self.input_ids,
                attention_mask=torch.ones_like(self.input_ids),
                pad_token_id=self.tokenizer.eos_id,
                eos_token_id=self.tokenizer.eos_id,
                streamer=streamer,
                stopping_criteria=StoppingCriteriaList([ended]),
                **options,
            )
        except Exception as error:
            queue.put(error)
        self.text, self.tokens, self.seconds = streamer.text, streamer.tokens, streamer.last - streamer.first
        queue.put(None)


def text_ids(tokenizer: TextTokenizer, prompt: bytes, earlier: Sequence[bytes] = ()) -> list[int]:
    """The ids of whole documents and of one that is begun, an end-of-text token before each, as in training."""
    ids = []
    for document in (*earlier, prompt):
        ids += [tokenizer.eos_id, *tokenizer.encode(document, name="prompt").tolist()]
    return ids


class _ByteStreamer(BaseStreamer):
    """Passes on the bytes of new tokens."""

    def __init__(
        self, tokenizer: TextTokenizer, prompt_tokens: int, stop: Sequence[str], send: Callable[[bytes], Any]
    ) -> None:
        self.tokenizer, self.skip, self.send = tokenizer, prompt_tokens, send
        self.stop_strings = [text.encode() for text in stop]
        self.text, self.sent, self.stopped = b"", 0, False
        self.tokens, self.first, self.last = 0, 0.0, 0.0

    def put(self, value: Tensor) -> None:
        """Take the prompt (first call) or new tokens."""
        ids = value.reshape(-1).tolist()[self.skip :]
        self.skip = max(self.skip - value.numel(), 0)
        if not ids or self.stopped:
            return
        self.last = time.perf_counter()
        self.first = self.first if self.tokens else self.last
        self.tokens += len(ids)
        before = len(self.text)
        self.text += self.tokenizer.decode(ids)
        # One that began earlier and was whole would have been found earlier.
        found = [at for s in self.stop_strings if (at := self.text.find(s, max(before - len(s) + 1, 0))) >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True
        # The longest ending of the text that begins a stop string is held back.
        sizes = range(0 if found else max(map(len, self.stop_strings), default=1) - 1, 0, -1)
        held = next((n for n in sizes if any(s.startswith(self.text[-n:]) for s in self.stop_strings)), 0)
        self._flush(len(self.text) - held)

    def end(self) -> None:
        """Send what was held back."""
        self._flush(len(self.text))

    def _flush(self, until: int) -> None:
        if until > self.sent:
            self.send(self.text[self.sent : until])
            self.sent = until

"""Streaming: continuations as text that arrives while the model writes.

Text is kept as bytes, because a token may end inside a character, and what could begin a stop string is held back until
that is known. (Of transformers, ``TextIteratorStreamer`` gives decoded words, and ``stop_strings`` ends the writing
once the string has been shown, also at one that began in the prompt.)
"""

from __future__ import annotations

import codecs
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from ouroboros.data.tokenize import TextTokenizer
from ouroboros.errors import OuroborosError, check
from ouroboros.serve.decoder import CachedDecoder, LoopDecoder, WindowDecoder
from ouroboros.serve.sampling import Sampling

if TYPE_CHECKING:
    from ouroboros.model.modeling import OuroborosForCausalLM


class StreamedText:
    """What a model writes, made into text as it arrives, up to the first of some stop strings.

    Args:
        stop: strings that end the text and are left out of it.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self.bytes = b""
        """All that was written, without what follows a stop string."""
        self.ended = False
        """Whether a stop string was written."""
        self._stops = [text.encode() for text in stop]
        self._longest = max(map(len, self._stops), default=1)
        self._characters = codecs.getincrementaldecoder("utf-8")(errors="replace")  # each may take several tokens
        self._sent = 0

    def add(self, piece: bytes) -> str:
        """Take the bytes of one more token; returns what can be shown now, which may be nothing."""
        before = len(self.bytes)
        self.bytes += piece
        # One that began earlier and was whole would have been found earlier.
        found = [at for s in self._stops if (at := self.bytes.find(s, max(before - len(s) + 1, 0))) >= 0]
        if found:
            self.bytes, self.ended = self.bytes[: min(found)], True
            return ""
        # The longest ending of the text that begins a stop string is held back.
        sizes = range(self._longest - 1, 0, -1)
        held = next((n for n in sizes if any(s.startswith(self.bytes[-n:]) for s in self._stops)), 0)
        until = max(len(self.bytes) - held, self._sent)
        shown = self._characters.decode(self.bytes[self._sent : until])
        self._sent = until
        return shown

    def rest(self) -> str:
        """What was held back, when nothing more will come."""
        return self._characters.decode(self.bytes[self._sent :], final=True)


class Continuation:
    """One continuation of a prompt, as an iterator of text that arrives while the model writes.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        prompt: the text so far; an empty prompt starts a new document.
        sampling: how tokens are chosen.
        decoder: writes the tokens; None takes a growing cache, or a window if ``sampling`` asks for one.
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
        self.decoder, self.room = decoder or CachedDecoder(), context - len(ids)
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
        self._streamed = StreamedText(sampling.stop)
        self.tokens = 0
        """Tokens written so far, an end-of-text token included."""
        self.seconds = 0.0
        """From the first of these tokens to the last one: without the reading of the prompt."""

    @property
    def rate(self) -> str:
        """What was written, and how fast: ``64 tokens, 533 tokens/s``; one token has no speed."""
        count = f"{self.tokens} token{'' if self.tokens == 1 else 's'}"
        return f"{count}, {(self.tokens - 1) / self.seconds:,.0f} tokens/s" if self.seconds > 0 else count

    @property
    def text(self) -> bytes:
        """The continuation so far, without what follows a stop string."""
        return self._streamed.bytes

    def __iter__(self) -> Iterator[str]:
        streamed, first = self._streamed, 0.0
        options = {**self.sampling.options(), "max_new_tokens": min(self.sampling.max_new_tokens, self.room)}
        end = self.tokenizer.eos_id
        options |= {"attention_mask": torch.ones_like(self.input_ids), "pad_token_id": end, "eos_token_id": end}
        try:
            for token in self.decoder.tokens(self.model, self.input_ids, **options):
                now = time.perf_counter()
                first = first if self.tokens else now
                self.seconds = now - first
                self.tokens += 1
                if shown := streamed.add(self.tokenizer.decode([int(token)])):
                    yield shown
                if streamed.ended:
                    break
        except Exception as error:
            raise OuroborosError(f"generation failed: {error}") from error
        if rest := streamed.rest():
            yield rest


def text_ids(tokenizer: TextTokenizer, prompt: bytes, earlier: Sequence[bytes] = ()) -> list[int]:
    """The ids of whole documents and of one that is begun, an end-of-text token before each, as in training."""
    ids = []
    for document in (*earlier, prompt):
        ids += [tokenizer.eos_id, *tokenizer.encode(document, name="prompt").tolist()]
    return ids

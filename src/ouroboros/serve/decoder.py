"""Decoding loops in place of the one of ``generate``, which still prepares options, processors and criteria.

Shapes: B = 1 sequence, T tokens, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import GenerationConfig
    from transformers.generation import LogitsProcessorList, StoppingCriteriaList
    from transformers.generation.streamers import BaseStreamer

    from ouroboros.model.modeling import OuroborosForCausalLM

Advance = Callable[[Tensor, Tensor | None], Tensor]
"""From all tokens so far (1, T) and the newest of them (1, 1), None at first, to the logits (1, V) of the next."""


class LoopDecoder(ABC):
    """Writes one sequence, greedy or sampled; how the next logits come about is the subclass's."""

    def generate(
        self, model: OuroborosForCausalLM, input_ids: Tensor, *, streamer: BaseStreamer | None = None, **options: Any
    ) -> Tensor:
        """Prompt and new tokens, (1, T); ``options`` are those of ``model.generate``.

        Raises:
            OuroborosError: something asked for that this loop does not serve.
        """
        # generate() shows the prompt to the streamer but does not hand it on to a loop that is not its own.
        return model.generate(  # pyrefly: ignore
            input_ids, custom_generate=self._write, streamer=streamer, token_streamer=streamer, **options
        )

    @abstractmethod
    def begin(
        self, model: OuroborosForCausalLM, input_ids: Tensor, config: GenerationConfig, prepared: dict[str, Any]
    ) -> Advance:
        """Refuse what is not served; return what gives the logits of one token after another."""

    def _write(
        self,
        model: OuroborosForCausalLM,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        token_streamer: BaseStreamer | None = None,
        **prepared: Any,
    ) -> Tensor:
        """The loop, as ``generate`` calls it; order and random numbers are those of its own."""
        advance = self.begin(model, input_ids, generation_config, prepared)
        text, token_B1 = _Text(input_ids), None
        done = False
        while not done:
            # A copy in float32: processors may change it in place; they see the whole text.
            logits = advance(input_ids, token_B1).to(torch.float32, copy=True)
            token_B1 = _choose(logits_processor(input_ids, logits), generation_config.do_sample)  # pyrefly: ignore
            input_ids = text.extended(token_B1)
            done = bool(stopping_criteria(input_ids, None).all())  # pyrefly: ignore
            if token_streamer is not None:
                token_streamer.put(token_B1[0].cpu())
        if token_streamer is not None:
            token_streamer.end()
        return input_ids


class _Text:
    """All tokens so far, in a buffer that doubles: the cost of a token does not grow with the text."""

    def __init__(self, ids_BT: Tensor) -> None:
        self.buffer, self.length = ids_BT, ids_BT.shape[1]

    def extended(self, token_B1: Tensor) -> Tensor:
        """(B, T + 1), a view of the buffer."""
        if self.length == self.buffer.shape[1]:
            self.buffer = torch.cat((self.buffer, torch.empty_like(self.buffer)), dim=1)
        self.buffer[:, self.length] = token_B1[:, 0]
        self.length += 1
        return self.buffer[:, : self.length]


def _choose(scores_1V: Tensor, sample: bool) -> Tensor:
    """The next token, (1, 1)."""
    if sample:
        return torch.multinomial(scores_1V.softmax(dim=-1), num_samples=1)
    return scores_1V.argmax(dim=-1, keepdim=True)

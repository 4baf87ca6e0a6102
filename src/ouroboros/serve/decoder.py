"""Decoding loops in place of the one of ``generate``, which still prepares options, processors and criteria.

Shapes: B = 1 sequence, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
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
        text, end, token_B1 = _Text(input_ids), _End(stopping_criteria), None
        done = False
        while not done:
            # Processors see the whole text, and may change the scores in place.
            scores = advance(input_ids, token_B1).to(torch.float32, copy=bool(logits_processor))
            if logits_processor:
                scores = logits_processor(input_ids, scores)  # pyrefly: ignore
            token_B1 = _choose(scores, generation_config.do_sample)
            input_ids = text.extended(token_B1)
            done = end.reached(input_ids, token_B1)
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
        self.buffer.narrow(1, self.length, 1).copy_(token_B1)
        self.length += 1
        return self.buffer[:, : self.length]


class _End:
    """When to stop. Length and end tokens cost a comparison of numbers; criteria of other kinds are asked."""

    def __init__(self, criteria: StoppingCriteriaList) -> None:
        from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria, StoppingCriteriaList

        self.length, self.tokens, self.others = math.inf, set[int](), StoppingCriteriaList()
        for criterion in criteria:
            # A length beyond what the model was made for is worth a warning, which the criterion itself gives.
            known = getattr(criterion, "max_position_embeddings", None) or math.inf
            if type(criterion) is MaxLengthCriteria and criterion.max_length <= known:
                self.length = min(self.length, criterion.max_length)
            elif type(criterion) is EosTokenCriteria:
                self.tokens.update(criterion.eos_token_id.flatten().tolist())
            else:
                self.others.append(criterion)

    def reached(self, ids_1T: Tensor, token_11: Tensor) -> bool:
        """Whether ``token_11``, the last of ``ids_1T``, was the last one to write."""
        if ids_1T.shape[1] >= self.length or (self.tokens and int(token_11) in self.tokens):
            return True
        return bool(self.others and self.others(ids_1T, None).all())  # pyrefly: ignore


def _choose(scores_1V: Tensor, sample: bool) -> Tensor:
    """The next token, (1, 1)."""
    if sample:
        return torch.multinomial(scores_1V.softmax(dim=-1), num_samples=1)
    return scores_1V.argmax(dim=-1, keepdim=True)

"""Decoding through a window: the model sees the last tokens of the text only, counted from position 0 at every step.

Every position changes with every token past the window, so nothing can be cached: each step runs the whole window.

Shapes: B = 1 sequence, T tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from ouroboros.errors import check
from ouroboros.serve.decoder import Advance, LoopDecoder

if TYPE_CHECKING:
    from transformers import GenerationConfig

    from ouroboros.model.modeling import OuroborosForCausalLM


class WindowDecoder(LoopDecoder):
    """A decoding loop in place of the one of ``generate``: one sequence of any length.

    Args:
        window: tokens that the model sees.
    """

    def __init__(self, window: int) -> None:
        self.window = window

    def check_fits(self, model: OuroborosForCausalLM) -> None:
        """Refuse a window longer than the model's context."""
        limit = model.config.max_position_embeddings
        check(self.window <= limit, f"the window is {self.window} tokens but the model's context holds {limit}")

    def begin(
        self, model: OuroborosForCausalLM, input_ids: Tensor, config: GenerationConfig, prepared: dict[str, Any]
    ) -> Advance:
        """Run the window anew for every token.

        Raises:
            OuroborosError: several sequences, or a window longer than the model's context.
        """
        self.check_fits(model)
        check(len(input_ids) == 1, f"a window serves one sequence at a time, got {len(input_ids)}")
        return lambda ids, token: model(ids[:, -self.window :], use_cache=False, logits_to_keep=1).logits[:, -1]

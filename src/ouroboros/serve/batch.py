"""Sequences of different lengths that are decoded together, and may join and leave between two tokens.

The shorter ones are padded on the left. Shapes: B sequences, S positions of the longest one, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from ouroboros.model.cache import add_rows, keep_last

if TYPE_CHECKING:
    from ouroboros.model.modeling import OuroborosForCausalLM


class Batch:
    """The caches of some sequences as one.

    Args:
        model: at the loop count of all of them.
    """

    def __init__(self, model: OuroborosForCausalLM) -> None:
        self.model = model
        self.lengths: list[int] = []
        """How many tokens each sequence has in the cache."""
        self._store: DynamicCache | None = None

    def add(self, store: DynamicCache, count: int) -> None:
        """Let ``count`` sequences join that all begin with the text in ``store``, a cache of one sequence, which is
        taken over."""
        length = store.get_seq_length()
        if count > 1:
            store.batch_repeat_interleave(count)
        if self._store is None:
            self._store = store
        else:
            add_rows(self._store, store)
        self.lengths += [length] * count

    def keep(self, rows: Sequence[int]) -> None:
        """Let all sequences but ``rows`` leave, with the padding that no longer serves."""
        if len(rows) == len(self.lengths):
            return
        before = max(self.lengths)
        self.lengths = [self.lengths[row] for row in rows]
        if not rows:
            self._store = None
            return
        assert self._store is not None
        self._store.batch_select_indices(torch.tensor(rows, device=self.model.device))
        if max(self.lengths) < before:
            keep_last(self._store, max(self.lengths))

    def step(self, token_B1: Tensor) -> Tensor:
        """The logits (B, V) behind one more token of each sequence."""
        longest = max(self.lengths) + 1
        self.lengths = [length + 1 for length in self.lengths]
        mask_BS = None
        if min(self.lengths) < longest:
            lengths_B = torch.tensor(self.lengths, device=token_B1.device)
            mask_BS = (torch.arange(longest, device=token_B1.device) >= longest - lengths_B[:, None]).long()
        options = {"past_key_values": self._store, "use_cache": True, "logits_to_keep": 1}
        return self.model(token_B1, attention_mask=mask_BS, **options).logits[:, -1]

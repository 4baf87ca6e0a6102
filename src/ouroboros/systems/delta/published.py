"""The published Python interface of the delta residual: ``logits, loss = model(input_ids, targets=...)``.

Shapes: B batch, T positions, V vocabulary.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ouroboros.errors import check
from ouroboros.model import configuration
from ouroboros.model.modeling import OuroborosForCausalLM
from ouroboros.systems.delta.config import OuroborosConfig

TARGETS_IGNORED, LABELS_IGNORED = -1, -100
"""What marks a position without a target: as published, and as in transformers."""


class OuroborosModel(nn.Module):
    """The published model over this library's parts; ``model`` is the transformers model with these very weights.

    Args:
        config: the published fields.
    """

    def __init__(self, config: OuroborosConfig) -> None:
        super().__init__()
        self.config = config
        self.model = OuroborosForCausalLM(configuration.OuroborosConfig.from_spec(config.spec))

    def forward(
        self,
        input_ids: Tensor,
        targets: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        output_all_seq: bool = False,
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Logits in float32 and the mean cross-entropy.

        Args:
            input_ids: token ids (B, T).
            targets: (B, T), already shifted: ``targets[:, t]`` is what follows ``input_ids[:, t]``; -1 is ignored.
            labels: (B, T), shifted inside: pass the input ids; -100 is ignored. Give this or ``targets``.
            output_all_seq: without either, logits of every position instead of the last one's.
            attention_mask: (B, T), 0 on padding.

        Returns:
            ``(logits, loss)``: (B, T, V) and a number with targets or labels; else (B, 1, V) and None.

        Raises:
            OuroborosError: other shapes, both targets and labels, more than ``block_size`` tokens.
        """
        shape, limit = tuple(input_ids.shape), self.config.block_size
        check(len(shape) == 2 and shape[1] <= limit, f"input_ids must be (batch, up to {limit} tokens), got {shape}")
        check(targets is None or labels is None, "give targets (already shifted) or labels (shifted inside), not both")
        given = targets if labels is None else labels
        check(given is None or given.shape == shape, f"targets and labels must have the shape of input_ids {shape}")
        if targets is not None:
            _warn_of_copying(input_ids, targets)
        ignored = TARGETS_IGNORED if labels is None else LABELS_IGNORED
        if labels is not None:
            targets = F.pad(labels[:, 1:], (0, 1), value=ignored)
        keep = 0 if output_all_seq or targets is not None else 1
        outputs = self.model(input_ids, attention_mask=attention_mask, use_cache=False, logits_to_keep=keep)
        logits = outputs.logits.float()
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten().long(), ignore_index=ignored)

    def get_num_params(self) -> int:
        """Parameters; the embedding, which is the output matrix too, counts once."""
        return sum(parameter.numel() for parameter in self.parameters())


def _warn_of_copying(input_ids: Tensor, targets: Tensor) -> None:
    """Warn if the targets are the inputs themselves, which teaches a model to copy: the loss falls, for nothing."""
    counted = targets != TARGETS_IGNORED
    if input_ids.shape[1] > 1 and bool(counted.any()) and torch.equal(targets[counted], input_ids[counted].to(targets)):
        warnings.warn(
            "targets equal input_ids, so the model learns to copy its input: pass labels=input_ids, which shifts"
            " inside, or targets shifted by one (targets[:, t] = input_ids[:, t + 1], -1 at the end)",
            UserWarning,
            stacklevel=5,
        )

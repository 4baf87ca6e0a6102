"""Validation during training: bits per byte on a fixed sample of the held-out documents."""

from __future__ import annotations

import hashlib

from ouroboros.data.prepared import PreparedData
from ouroboros.eval.score import Score, score
from ouroboros.train.loop import Trainer


def validation_sample(data: PreparedData, limit: int, split: str = "valid") -> list[bytes]:
    """Documents of ``split`` in the order of their sha256, at most ``limit`` bytes in all, the last one cut.

    The order spreads a small sample over a collection that is sorted by name.
    """
    documents = sorted(data.documents(split), key=lambda document: hashlib.sha256(document).digest())
    chosen, left = [], limit
    for document in documents:
        if left <= 0:
            break
        chosen.append(document[:left])
        left -= len(document)
    return [document for document in chosen if document]


def validate(trainer: Trainer, documents: list[bytes], name: str = "") -> Score:
    """Score the model as it would be exported, in the training precision."""
    window = min(trainer.recipe.data.sequence_length, trainer.recipe.model.max_position_embeddings)
    with trainer.evaluation_weights() as model:
        return score(
            model,
            trainer.data.tokenizer,
            documents,
            window=window,
            amp=None if str(trainer.dtype) == "torch.float32" else trainer.dtype,
            model_name=name,
        )

"""What a model reads while it is calibrated: text, what it generates itself, or random ids. Each gives rows (T,)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ouroboros.data.prepared import PreparedData
from ouroboros.data.tokenize import TextTokenizer
from ouroboros.errors import check
from ouroboros.eval.windows import evaluating


def text_ids(documents: Iterable[bytes], tokenizer: TextTokenizer, *, rows: int, length: int) -> list[Tensor]:
    """Rows of running text, as in training: the end-of-text token stands before every document.

    Args:
        documents: texts; no more of them are read than are needed.
        tokenizer: of the model.
        rows: how many.
        length: ids of each; if the text ends before, the last row is shorter or rows are missing.

    Raises:
        OuroborosError: there is no text.
    """
    parts: list[Tensor] = []
    for document in documents:
        ids = torch.from_numpy(tokenizer.encode(document).astype("int64"))
        parts += [torch.tensor([tokenizer.eos_id]), ids]
        if sum(map(len, parts)) >= rows * length:
            break
    check(any(len(part) for part in parts[1::2]), "calibration: the text is empty")
    return list(torch.cat(parts)[: rows * length].split(length))


def training_ids(data: PreparedData, rows: int, length: int) -> list[Tensor]:
    """Rows of the training text of a run, evenly spaced; each source gives as many as it has text for.

    Args:
        data: the run's.
        rows: how many.
        length: ids of each, at most.

    Raises:
        OuroborosError: the run has no training text.
    """
    found = []
    counts = [len(data.tokens("train", source)) for source in range(len(data.sources))]
    for source, count in enumerate(counts):
        wanted = max(1, round(rows * count / max(sum(counts), 1)))
        ids = data.tokens("train", source)
        for start in np.linspace(0, max(count - length, 0), min(wanted, max(count // length, 1))).astype(int):
            found.append(torch.from_numpy(ids[start : start + length].astype("int64")))
    found = [row for row in found if len(row)]
    check(bool(found), "pack: the run has no training text; name one with --calibration FILE")
    return found


def generated_ids(model: Any, *, rows: int, length: int, first: int, seed: int = 0) -> list[Tensor]:
    """Rows that the model writes itself, each token drawn from what it predicts; no text is needed.

    Args:
        model: ours.
        rows: how many.
        length: ids of each, the first one included.
        first: the id that every row begins with, usually that of the end of a text.
        seed: of the draws.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.full((rows, 1), first)
    with evaluating(model):
        cache = None
        for _ in range(length - 1):
            step = model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True)
            cache = step.past_key_values
            share = torch.softmax(step.logits[:, -1].double(), dim=-1)
            ids = torch.cat((ids, torch.multinomial(share, 1, generator=generator)), dim=1)
    return list(ids)


def random_ids(vocab_size: int, *, rows: int, length: int, seed: int = 0) -> list[Tensor]:
    """Rows of ids that are all as likely; for comparison, as no text looks like that."""
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randint(vocab_size, (rows, length), generator=generator))

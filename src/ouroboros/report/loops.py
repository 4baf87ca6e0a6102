"""The section on what loops do: what their parts hand to the blocks, gates and gains, how far each loop moves the
state, and where tokens halt (Controller, section 8)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ouroboros.api import open_model
from ouroboros.config import ModelSpec
from ouroboros.config.part import module_of
from ouroboros.errors import OuroborosError, check
from ouroboros.eval.depth import Depth, depths
from ouroboros.eval.loops import LoopRecord, loop_records, spread
from ouroboros.nn.part import LoopModule
from ouroboros.report.content import Section, Table
from ouroboros.report.data import held_out_sample
from ouroboros.report.loop_charts import charts
from ouroboros.report.text import MISSING, bits, displayable, percent, plural

if TYPE_CHECKING:
    from ouroboros.data.tokenize import TextTokenizer
    from ouroboros.model.modeling import OuroborosForCausalLM
    from ouroboros.report.run import Run

MAX_TEXTS, MAX_TOKENS = 4, 24
SENTENCES = (
    "The capital of France is Paris.",
    "Water freezes at zero degrees, and boils at one hundred degrees.",
    "If a train travels 60 miles in 45 minutes, its average speed is 80 miles per hour.",
    "Suppose that the square root of two were a fraction a/b in lowest terms; then a and b would both be even.",
)
"""Texts of rising difficulty, for models without held-out text."""


@dataclass(frozen=True, kw_only=True)
class Look:
    """What one looped segment does on a few texts."""

    segment: int
    texts: Sequence[Sequence[LoopRecord]]
    """The records of every text, in the order of the loops."""
    tokens: Sequence[Sequence[str]]
    """The tokens of every text."""
    depths: Sequence[Depth] = field(default=())
    """Of every text, where tokens halt."""

    @property
    def handed(self) -> list[str]:
        """The names of what parts hand to the blocks."""
        return list(self.texts[0][0].handed)


def has_something_to_say(spec: ModelSpec) -> bool:
    """Whether a loop part of the model hands something to blocks, multiplies channels or tells of positions."""
    quiet = (LoopModule.scales, LoopModule.tell)
    parts = [part for parts in spec.loop_parts for part in parts]
    return any(part.hands or (module_of(part).scales, module_of(part).tell) != quiet for part in parts)


def loops_section(run: Run) -> Section | None:
    """The section of a run's finished model, else of its newest checkpoint; None without parts that tell anything.

    Raises:
        OuroborosError: no model, or damaged files.
    """
    if not has_something_to_say(run.recipe.model):
        return None
    opened = open_model(run.directory)
    which = "finished model" if opened.directory == run.directory else opened.directory.name
    texts, where = SENTENCES, "on built-in sentences"
    if run.data is not None:
        with suppress(OuroborosError):  # there is no held-out text
            split, sample = held_out_sample(run.data, MAX_TEXTS, MAX_TOKENS)
            texts, where = list(sample), f"on {'validation' if split == 'valid' else split} text"
    return section_of(opened.model, opened.tokenizer, texts, f"the run's {which} {where}")


def section_of(
    model: OuroborosForCausalLM,
    tokenizer: TextTokenizer,
    texts: Sequence[str | bytes | np.ndarray],
    where: str,
    name: str = "",
) -> Section | None:
    """The section of a model; None if its loop parts tell nothing.

    Args:
        model: in evaluation mode.
        tokenizer: of the model.
        texts: of which the first few tokens are read; as text, or as token ids.
        where: what is looked at, in words.
        name: of the model, where a page has several.

    Raises:
        OuroborosError: texts without a token, or with one that the model does not know.
    """
    if not has_something_to_say(model.config.model_spec):
        return None
    most = min(MAX_TOKENS, model.config.max_position_embeddings)
    chosen = [ids[:most] for text in texts[:MAX_TEXTS] if len(ids := _ids(text, tokenizer))]
    known = bool(chosen) and all(int(ids.max()) < model.config.vocab_size for ids in chosen)
    check(known, "there is no text, or it has tokens that the model does not know")
    looks = looks_of(model, tokenizer, chosen)
    many = len(looks) > 1
    return Section(
        ident=f"inside-loops-{name}" if name else "inside-loops",
        title=f"What the loops of {name} do" if name else "What the loops do",
        headline=" ".join(headline(look, many) for look in looks),
        lead=f"This is {where}: {plural(len(looks[0].texts), 'text')} of at most {MAX_TOKENS} tokens, read at once.",
        charts=[chart for look in looks for chart in charts(look, many)],
        tables=[table for look in looks for table in _tables(look, many)],
    )


def looks_of(model: OuroborosForCausalLM, tokenizer: TextTokenizer, texts: Sequence[Tensor]) -> list[Look]:
    """What every looped segment does on texts of token ids."""
    records = [loop_records(model, ids) for ids in texts]
    halts = any("halted" in one.told for one in records[0])
    found = [depths(model, ids) for ids in texts] if halts else []
    return [
        Look(
            segment=segment,
            texts=[[one for one in text if one.segment == segment] for text in records],
            tokens=[[_shown(tokenizer.decode([int(token)])) for token in ids] for ids in texts],
            depths=[one for text in found for one in text if one.segment == segment],
        )
        for segment in sorted({one.segment for one in records[0]})
    ]


def _ids(text: str | bytes | np.ndarray, tokenizer: TextTokenizer) -> Tensor:
    if isinstance(text, str):
        text = text.encode()
    ids = np.asarray(tokenizer.encode(text[:1000]) if isinstance(text, bytes) else text)
    return torch.from_numpy(ids.astype(np.int64))


def _shown(token: bytes) -> str:
    """A token as a label: a space is an open box."""
    return displayable(token).replace(" ", "\u2423").replace("\n", "\u21b5").replace("\t", "\u21e5") or "\u2205"


def headline(look: Look, many: bool) -> str:
    """What the parts of a segment do with the loop, the token and the text, and how far the first and last loop go."""
    part = f"Part {look.segment + 1}: " if many else ""
    first, last = (float(torch.cat([text[at].update for text in look.texts]).mean()) for at in (0, -1))
    moved = f"the first of {plural(len(look.texts[0]), 'loop')} changes the state by {percent(first)} of its length"
    moved += f", the last by {percent(last)}." if len(look.texts[0]) > 1 else "."
    if not look.handed:
        return part + (moved if part else moved[0].upper() + moved[1:])
    found = spread(look.texts, look.handed)
    if not found.norm:
        return f"{part}{'w' if part else 'W'}hat loop parts hand to the blocks is zero; {moved}"
    shares = [
        f"{percent(distance / found.norm)} between {name}"
        for name, distance in (("loops", found.loops), ("tokens", found.tokens), ("texts", found.texts))
        if distance is not None
    ]
    differs = f"hat loop parts hand to the blocks differs by {', '.join(shares)} (of its length); {moved}"
    return f"{part}{'w' if part else 'W'}{differs}"


def _tables(look: Look, many: bool) -> list[Table]:
    of = f" (part {look.segment + 1})" if many else ""
    tables = []
    if look.handed:
        rows = []
        for name in look.handed:
            found = spread(look.texts, [name])
            rows.append([name, *(MISSING if value is None else bits(value) for value in found)])
        head = (f"Handed to the blocks{of}", "length", "between loops", "between tokens", "between texts")
        note = (
            "L2 distances: of later loops to the first, of tokens to the next one, and of the mean of a text to that of"
            " the next text. A part that does not look at the text has zeros in the last two columns."
        )
        tables.append(Table(head, rows, note))
    if look.depths:
        rows = [
            ["".join(tokens), str(min(one.steps)), f"{one.mean:.2f}", str(max(one.steps))]
            for tokens, one in zip(look.tokens, look.depths, strict=True)
        ]
        head = (f"Loops until a token halts{of}", "least", "mean", "most")
        tables.append(Table(head, rows))
    return tables

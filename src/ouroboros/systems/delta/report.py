"""The report's section on the delta residuals: what they do on a little of the run's held-out text."""

from __future__ import annotations

import numpy as np
import torch

from ouroboros.api import open_model
from ouroboros.config import Recipe
from ouroboros.data.prepared import open_prepared
from ouroboros.errors import check
from ouroboros.report.content import Section
from ouroboros.report.data import held_out_sample
from ouroboros.report.run import Run
from ouroboros.report.text import plural
from ouroboros.schedule import parse
from ouroboros.systems.delta.measure import record
from ouroboros.systems.delta.report_charts import CUTS, Look, charts

MAX_TOKENS, MAX_LENGTH = 2_048, 256
"""Of the sample, and of each of its sequences."""
MAX_RECORDED = 2**27
"""Entries of all recorded directions: larger models are looked at on fewer tokens."""


def section(run: Run) -> Section | None:
    """The section of a run's finished model, else of its newest checkpoint; None without a delta residual.

    Raises:
        OuroborosError: no model, no held-out text, or damaged files.
    """
    if run.recipe.model.block.residual.kind != "delta":
        return None
    opened = open_model(run.directory)
    split, sample = held_out_sample(run.data or open_prepared(run.directory / "data"), *sample_size(run.recipe))
    known = sample.max() < opened.model.config.vocab_size
    check(known, f"{run.directory}: the data has tokens that the model does not know")
    look = Look(schedule=opened.model.schedule, records=record(opened.model, torch.from_numpy(sample)))
    which = "finished model" if opened.directory == run.directory else opened.directory.name
    text = f"the run's {which} on {sample.size:,} tokens of its {'validation' if split == 'valid' else split} text"
    return Section(
        ident="residual",
        title="Inside the delta residuals",
        headline=headline(look),
        lead=lead(look, f"{text} ({plural(len(sample), 'sequence')} of {sample.shape[1]:,})"),
        charts=charts(look),
    )


def sample_size(recipe: Recipe) -> tuple[int, int]:
    """How many sequences of how many tokens to look at: few enough that the page is made in seconds."""
    length = min(recipe.data.sequence_length, recipe.model.max_position_embeddings, MAX_LENGTH)
    entries = 2 * parse(recipe.model.layout).num_visits * recipe.model.hidden_size
    return max(1, min(MAX_TOKENS, MAX_RECORDED // entries) // length), length


def headline(look: Look) -> str:
    """How many residuals keep, erase and reflect by their median gate, and how many have an eigenvalue below 0."""
    medians, erase = look.median_gates, look.spec.erase
    kept, erased, reflected = np.histogram(medians, [-np.inf, *CUTS, np.inf])[0].tolist()
    words = (" (keep)", " (erase)", " (reflect)") if erase else ("", "", "")
    return (
        f"Of {plural(len(medians), 'residual')}, median gates below 0.5{words[0]}: {kept}; from 0.5 to 1.5{words[1]}:"
        f" {erased}; 1.5 or more{words[2]}: {reflected}; above 1"
        f"{', where what lies along the direction changes its sign' if erase else ''}: {sum(m > 1 for m in medians)}."
    )


def lead(look: Look, sample: str) -> str:
    """What was looked at (``sample`` in words)."""
    erase = look.spec.erase
    formula = "X + b k (v \u2212 k\u00b7X)" if erase else "X + b k v"
    return (
        f"Each residual takes the direction k of its sublayer's output, {'erases' if erase else 'leaves'} what the"
        " state holds along it, by a gate b between 0 and 2, and writes a value v there: the state becomes"
        f" {formula}. The pictures are of {sample}; they describe those tokens and no others. Attention stands to the"
        " left of the feed-forward network of the same visit."
    )

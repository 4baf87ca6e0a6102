"""The report's section on the delta residuals: what they do on a little of the run's held-out text.

Shapes: B sequences, T positions, V value channels, N residual uses (two for each visit: mixer and mlp).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ouroboros.accounting import cost
from ouroboros.api import build, open_model
from ouroboros.config import Recipe
from ouroboros.config.parts.delta import DeltaSpec
from ouroboros.data.prepared import open_prepared
from ouroboros.errors import check
from ouroboros.nn.delta import ChannelCompressor
from ouroboros.report.content import Section, Table
from ouroboros.report.data import held_out_sample
from ouroboros.report.drawing import MAX_VISITS, shown_visits
from ouroboros.report.run import Run
from ouroboros.report.text import percent, plural
from ouroboros.schedule import Schedule, parse
from ouroboros.systems.delta.measure import QUANTILES, Ablation, ResidualRecord, ablate, quantiles, record, shares
from ouroboros.systems.delta.report_charts import CUTS, NAMES, charts

MAX_TOKENS, MAX_LENGTH = 2_048, 256
"""Of the sample, and of each of its sequences."""
MAX_RECORDED = 2**27
"""Entries of all recorded directions: larger models are looked at on fewer tokens."""
FORCED_FLOPS, FORCED_LENGTH = 2 * 10**11, 64
"""What the passes with forced gates may cost together, and the tokens of each of their sequences, at least two."""
MAX_FORCED_FLOPS, MAX_FORCED_VISITS = 4 * 10**12, 12_000
"""A model too large even for those goes without (minutes on one core), and so does one so deep that calling its blocks
takes as long, however small they are."""
FINE_CUTS = (0.3, 0.7, 1.3, 1.7)
"""Gates that bound the five regimes of the table."""
MEDIAN = QUANTILES.index(0.5)


@dataclass(frozen=True, kw_only=True)
class Look:
    """What the delta residuals of a model do on a sample of text."""

    schedule: Schedule
    spec: DeltaSpec
    records: Sequence[ResidualRecord]
    """One for each use, in order of execution."""
    gates_before: Sequence[float]
    """Median gate of each use in a new model of the run's seed, which is how training began."""
    lengths_before: Sequence[float]
    """Mean length of its state after each use."""
    forced: Sequence[Ablation]
    """Empty for a model that is too large or too deep."""
    forced_tokens: int
    readings: Mapping[str, tuple[Tensor, Tensor]]
    """How each compressor reads the value channels: its read vector (V,), and the weight of each channel with the
    filter included, mean over features (V,). Empty with one value channel."""

    @cached_property
    def median_gates(self) -> list[float]:
        """Of each use."""
        return [medians[MEDIAN] for medians in self.quantiles("beta")]

    def quantiles(self, field: str) -> list[list[float]]:
        """Of a quantity of the records, for each use."""
        return [quantiles(getattr(one, field)) for one in self.records]

    def means(self, field: str) -> list[float]:
        """Of a quantity of the records, for each use."""
        return [getattr(one, field).mean().item() for one in self.records]

    def share(self, where: Callable[[ResidualRecord], Tensor]) -> float:
        """Of the tokens (or targets) of all uses, those for which something holds."""
        return float(np.mean([where(one).double().mean().item() for one in self.records]))

    def drawn(self, *sublayers: str) -> tuple[list[int], np.ndarray]:
        """The numbers of the uses that charts show, of these sublayers or all, and their places on the axis over depth.

        Both sublayers of a visit stand side by side, the mixer to the left.
        """
        place = {slot: index for index, slot in enumerate(shown_visits(self.schedule))}
        shown = {
            number: place[one.visit.slot] + (-0.25 if one.sublayer == "mixer" else 0.25)
            for number, one in enumerate(self.records)
            if one.visit.slot in place and one.sublayer in (sublayers or NAMES)
        }
        return list(shown), np.array(list(shown.values()))


def section(run: Run) -> Section | None:
    """The section of a run's finished model, else of its newest checkpoint; None without a delta residual.

    Raises:
        OuroborosError: no model, no held-out text, or damaged files.
    """
    if run.recipe.model.block.residual.kind != "delta":
        return None
    opened = open_model(run.directory)
    directory, model = opened.directory, opened.model
    split, sample = held_out_sample(run.data or open_prepared(run.directory / "data"), *sample_size(run.recipe))
    known = sample.max() < model.config.vocab_size
    check(known, f"{run.directory}: the data has tokens that the model does not know")
    look = look_at(model, run.recipe, torch.from_numpy(sample))
    which = "finished model" if directory == run.directory else directory.name
    text = f"the run's {which} on {sample.size:,} tokens of its {'validation' if split == 'valid' else split} text"
    return Section(
        ident="residual",
        title="Inside the delta residuals",
        headline=headline(look),
        lead=lead(look, f"{text} ({plural(len(sample), 'sequence')} of {sample.shape[1]:,})"),
        charts=charts(look),
        tables=[table(look)],
    )


def sample_size(recipe: Recipe) -> tuple[int, int]:
    """How many sequences of how many tokens to look at: few enough that the page is made in seconds."""
    length = min(recipe.data.sequence_length, recipe.model.max_position_embeddings, MAX_LENGTH)
    entries = 2 * parse(recipe.model.layout).num_visits * recipe.model.hidden_size
    return max(1, min(MAX_TOKENS, MAX_RECORDED // entries) // length), length


def look_at(model: Any, recipe: Recipe, ids: Tensor) -> Look:
    """What the delta residuals of ``model``, made by ``recipe``, do on the tokens ``ids`` (B, T)."""
    records, residual = record(model, ids), recipe.model.block.residual
    assert isinstance(residual, DeltaSpec)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.train.seed)
        start = record(build(recipe), ids)
    few = ids[: _affordable(recipe, len(records)), :FORCED_LENGTH]
    return Look(
        schedule=model.model.schedule,
        spec=residual,
        records=records,
        gates_before=[quantiles(one.beta)[MEDIAN] for one in start],
        lengths_before=[one.state_norm_after.mean().item() for one in start],
        forced=ablate(model, few) if few.shape[0] and few.shape[1] >= 2 else [],
        forced_tokens=few.numel(),
        readings=_readings(model.model),
    )


def _affordable(recipe: Recipe, uses: int) -> int:
    """How many short sequences the passes with forced gates are affordable on; 0 for too large a model."""
    passes = 3 * uses + 1
    each = passes * FORCED_LENGTH * cost(recipe.model, context=FORCED_LENGTH // 2).flops_per_token
    if 2 * each > MAX_FORCED_FLOPS or passes * uses // 2 > MAX_FORCED_VISITS:
        return 0
    return max(2, FORCED_FLOPS // each)


def _readings(inner: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Of every compressor: one for each block and one before the head."""
    parts = {f"block {index}": layer.compressor for index, layer in enumerate(inner.decoder.layers)}
    found = {}
    for name, part in (parts | {"read-out": inner.readout}).items():
        if part is not None:
            read, channel = part.read.detach().float(), isinstance(part, ChannelCompressor)
            # A filter over tokens is summed over its taps.
            weights = part.folded().mean(0) if channel else read * part.weight.float().sum(0).mean(-1)
            found[name] = (read, weights.detach())
    return found


def headline(look: Look) -> str:
    """How many residuals keep, erase and reflect, and how many have an eigenvalue below 0, by the median gate."""
    medians = look.median_gates
    kept, erased, reflected = np.histogram(medians, [-np.inf, *CUTS, np.inf])[0].tolist()
    above = sum(gate > 1 for gate in medians)
    count = plural(len(medians), "residual")
    if not look.spec.erase:
        return (
            f"Of {count} none erases, because this control only writes; the median gate is below 0.5 in {kept}, from"
            f" 0.5 to 1.5 in {erased}, and 1.5 or more in {reflected}."
        )
    turned = "it turns round what lies along its" if above == 1 else "they turn round what lies along their"
    return (
        f"Of {count}, {kept} keep{'s' * (kept == 1)} (median gate below 0.5), {erased} erase{'s' * (erased == 1)} and"
        f" {reflected} reflect{'s' * (reflected == 1)} (1.5 or more); {above} {'has' if above == 1 else 'have'} a"
        f" median gate above 1{f', so {turned} direction' if above else ''}."
    )


def lead(look: Look, sample: str) -> str:
    """What was looked at (``sample`` in words), and how to read the axis."""
    erase, visits = look.spec.erase, look.schedule.num_visits
    formula = "X + b k (v \u2212 k\u00b7X)" if erase else "X + b k v"
    text = (
        f"Each residual takes the direction k of its sublayer's output, {'erases' if erase else 'leaves'} what the"
        " state holds along it, by a gate b between 0 and 2, and writes a value v there: the state becomes"
        f" {formula}. The pictures are of {sample}; they describe those"
        " tokens and no others. Attention stands to the left of the feed-forward network of the same block."
    )
    if look.schedule.is_looped:
        text += (
            " The axis is the order of visits: a looped block is visited again with the same weights, and then has"
            f" other gates, because it reads another state ({look.schedule.num_blocks} blocks, {visits} visits)."
        )
    if visits > MAX_VISITS:
        text += f" Of the {visits:,} visits {MAX_VISITS} at even distances are drawn."
    if not look.forced:
        text += " Forcing single gates would take too long for a model of this size, and is left out."
    if not erase:
        text += " This is the control that only writes, so there is no eigenvalue, regime, product or coupling to show."
    return text


def table(look: Look) -> Table:
    """One line for each residual: name, quantiles of the gate, and its shares in the finer regimes."""
    rows = []
    for one, gates in zip(look.records, look.quantiles("beta"), strict=True):
        shown = [f"{gates[at]:.2f}" for at in (0, MEDIAN, -1)]
        rows.append([f"{one.visit.slot} {NAMES[one.sublayer]}", *shown, *map(percent, shares(one.beta, FINE_CUTS))])
    regimes = ("b < 0.3", "0.3 to 0.7", "0.7 to 1.3", "1.3 to 1.7", "1.7 and more")
    head = ("Residual", "gate, 5 %", "median", "95 %", *regimes)
    return Table(head=head, rows=rows, folded="Every residual in numbers")

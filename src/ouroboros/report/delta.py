"""What the delta residuals of a run's model do on a little of its held-out text: the numbers behind the pictures.

Shapes: B sequences, T positions, D width, V value channels, N residual uses (two for each visit).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ouroboros.accounting import cost
from ouroboros.config import Recipe
from ouroboros.data.prepared import PreparedData, open_prepared
from ouroboros.errors import check
from ouroboros.report.text import plural
from ouroboros.schedule import Schedule, parse

if TYPE_CHECKING:
    from torch import Tensor

    from ouroboros.eval.residuals import Ablation, ResidualRecord, ResidualSummary

logger = logging.getLogger(__name__)

MAX_TOKENS = 2_048
MAX_LENGTH = 256
"""Tokens of a sequence."""
MAX_RECORDED = 2**27
"""Entries of all recorded directions: larger models are looked at on fewer tokens."""
ABLATION_FLOPS = 2 * 10**11
"""What the forward passes with forced gates may cost together; they need at least two short sequences."""
ABLATION_LENGTH = 64
MAX_ABLATION_FLOPS = 4 * 10**12
"""A model too large even for those goes without: minutes on one core."""
MAX_ABLATION_VISITS = 12_000
"""So does one so deep that calling its blocks takes as long, however small they are."""
PRODUCT_TOKENS = 32
PRODUCT_WORK = 4 * 10**8
"""Bound of tokens times N^4, the order of N decompositions of N x N matrices each."""
MAX_PRODUCT_USES = 256
BINS = 20
"""Of the histograms of gates and targets."""
FEATURES = 32
"""Of the coupling matrix."""
LOW = 0.5
"""A singular value below this counts as mostly erased."""


@dataclass(frozen=True, kw_only=True)
class Use:
    """One residual use over the tokens of the sample."""

    slot: int
    sublayer: str
    """``mixer`` or ``mlp``."""
    summary: ResidualSummary
    gates: Sequence[float]
    """Shares of the tokens with a gate in each of :data:`BINS` equal parts of [0, 2]."""
    targets: Sequence[float]
    """Shares of the targets in each part of :attr:`DeltaFacts.target_range`; empty without one."""
    channel_norms: Sequence[float]
    """Mean length of each value channel of the state after the update."""
    cosines: tuple[float, float, float] | None
    """Least, mean and largest over pairs of value channels of the mean cosine; None with one channel."""


@dataclass(frozen=True, kw_only=True)
class Product:
    """Singular values of the product of the shortcuts up to each use, mean over tokens."""

    values: Sequence[Sequence[float]]
    """By use, ascending; only those that can differ from 1."""
    below: Sequence[float]
    """By use: how many are below :data:`LOW`."""
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Coupling:
    """``-b k k^T`` of one token at one use, for the features with the largest entries of ``k``."""

    slot: int
    sublayer: str
    beta: float
    sequence: int
    position: int
    features: Sequence[int]
    """By strength."""
    matrix: Sequence[Sequence[float]]
    share: float
    """Share of ``|k|^2`` that these features hold."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How one compressor reads the value channels."""

    name: str
    read: Sequence[float]
    weights: Sequence[float]
    """Weight of each channel with the filter included, mean over features (a token filter's taps summed)."""


@dataclass(frozen=True, kw_only=True)
class DeltaFacts:
    """The delta residuals of a run's model on a sample of held-out text."""

    schedule: Schedule
    model: str
    """Which of the run's models: ``finished model`` or a checkpoint's name."""
    split: str
    sequences: int
    length: int
    width: int
    """D."""
    erase: bool
    eps: float
    target_range: tuple[float, float] | None
    """What the parts of the targets' histogram cover; None for a constant target."""
    uses: Sequence[Use]
    """In order of execution."""
    start_gates: Sequence[float]
    """Median gate of each use before training: a new model of the same seed."""
    start_norms: Sequence[float]
    """Its mean ``|X|`` after each use."""
    product: Product | None
    coherence: Sequence[Sequence[float]]
    """Mean over tokens of ``|k_i . k_j|``, N x N."""
    signed_coherence: Sequence[Sequence[float]]
    """Mean of ``k_i . k_j``."""
    coupling: Coupling | None
    readings: Sequence[Reading]
    """Empty with one value channel."""
    ablations: Sequence[Ablation]
    """Empty for a model that is too large or too deep."""
    ablation_tokens: int

    @property
    def tokens(self) -> int:
        """Tokens looked at."""
        return self.sequences * self.length

    @property
    def headline(self) -> str:
        """How many residuals keep, erase and reflect, and how many have an eigenvalue below 0, by the median gate."""
        from ouroboros.eval.residuals import headline

        found = headline([use.summary for use in self.uses])
        if not self.erase:
            return (
                f"Of {plural(found.residuals, 'residual')} none erases, because this control only writes; the median"
                f" gate is below 0.5 in {found.keep}, from 0.5 to 1.5 in {found.erase}, and 1.5 or more in"
                f" {found.reflect}."
            )
        above = sum(use.summary.median_beta > 1 for use in self.uses)
        turns = "it turns round what lies along its" if above == 1 else "they turn round what lies along their"
        sign = f", so {turns} direction" if above else ""
        return (
            f"Of {plural(found.residuals, 'residual')}, {found.keep} keep{_s(found.keep)} (median gate below 0.5),"
            f" {found.erase} erase{_s(found.erase)} and {found.reflect} reflect{_s(found.reflect)} (1.5 or more);"
            f" {above} {'has' if above == 1 else 'have'} a median gate above 1{sign}."
        )


def _s(count: int) -> str:
    return "s" if count == 1 else ""


def delta_facts(run: Path, recipe: Recipe) -> DeltaFacts | None:
    """The delta residuals of the run in ``run``: its finished model, else its newest checkpoint. None without any.

    Raises:
        OuroborosError: no model, no held-out text, or damaged files.
    """
    if recipe.model.residual != "delta":
        return None
    import torch

    from ouroboros.api import open_model

    opened = open_model(run)
    model: Any = opened.model
    split, sample = held_out_sample(open_prepared(run / "data"), *sample_size(recipe))
    check(sample.max() < model.config.vocab_size, f"{run}: the data has tokens that the model does not know")
    name = "finished model" if opened.directory == run else opened.directory.name
    split = {"valid": "validation"}.get(split, split)
    return look_at(model, recipe, torch.from_numpy(sample), name=name, split=split)


def look_at(model: Any, recipe: Recipe, ids: Tensor, *, name: str, split: str) -> DeltaFacts:
    """What the delta residuals of ``model``, made by ``recipe``, do on ``ids`` (B, T).

    Args:
        model: a causal language model with the delta residual.
        recipe: gives the seed and the cost of a pass.
        ids: tokens.
        name: :attr:`DeltaFacts.model`.
        split: part of the data that ``ids`` come from.
    """
    from ouroboros.eval.residuals import record

    records = record(model, ids)
    limits = _target_range(records)
    start_gates, start_norms = _before_training(recipe, ids)
    forced = ids[: _ablation_sequences(recipe, len(records)), :ABLATION_LENGTH]
    coherence, signed = _coherence(records)
    delta = recipe.model.delta
    return DeltaFacts(
        schedule=model.model.schedule,
        model=name,
        split=split,
        sequences=ids.shape[0],
        length=ids.shape[1],
        width=recipe.model.hidden_size,
        erase=delta.erase,
        eps=delta.eps,
        target_range=limits,
        uses=[_use(one, limits) for one in records],
        start_gates=start_gates,
        start_norms=start_norms,
        product=_product(records) if delta.erase and len(records) <= MAX_PRODUCT_USES else None,
        coherence=coherence,
        signed_coherence=signed,
        coupling=_coupling(records) if delta.erase else None,
        readings=_readings(model.model),
        ablations=_ablations(model, forced),
        ablation_tokens=forced.numel(),
    )


def held_out_sample(data: PreparedData, count: int, length: int) -> tuple[str, np.ndarray]:
    """Sequences that do not overlap from the test part, else the validation part: always the same ones.

    Args:
        data: of the run.
        count: sequences, fewer where there is less text.
        length: tokens of a sequence, fewer where no source has as many.

    Returns:
        The part and int64 (count, length).

    Raises:
        OuroborosError: no held-out text.
    """
    for split in ("test", "valid"):
        streams = [data.tokens(split, index) for index in range(len(data.sources))]
        longest = max(map(len, streams))
        if longest < 2:
            continue
        length = min(length, longest)
        places = [(stream, at * length) for stream in streams for at in range(len(stream) // length)]
        chosen = np.random.default_rng(0).choice(len(places), min(count, len(places)), replace=False)
        windows = [places[at][0][places[at][1] : places[at][1] + length] for at in sorted(chosen.tolist())]
        return split, np.stack(windows).astype(np.int64)
    check(False, f"{data.directory}: no held-out text; set data.test_fraction or data.valid_fraction above 0")
    raise AssertionError


def sample_size(recipe: Recipe) -> tuple[int, int]:
    """How many sequences of how many tokens to look at: few enough that the page is made in seconds."""
    length = min(recipe.data.sequence_length, recipe.model.max_position_embeddings, MAX_LENGTH)
    entries = 2 * parse(recipe.model.layout).num_visits * recipe.model.hidden_size
    return max(1, min(MAX_TOKENS, MAX_RECORDED // entries) // length), length


def _ablation_sequences(recipe: Recipe, uses: int) -> int:
    """How many short sequences the passes with forced gates are affordable on; 0 for too large a model."""
    passes = 3 * uses + 1
    each = passes * ABLATION_LENGTH * cost(recipe.model, context=ABLATION_LENGTH // 2).flops_per_token
    if 2 * each > MAX_ABLATION_FLOPS or passes * uses // 2 > MAX_ABLATION_VISITS:
        return 0
    return max(2, ABLATION_FLOPS // each)


def _ablations(model: Any, ids: Tensor) -> list[Ablation]:
    from ouroboros.eval.residuals import ablate

    return ablate(model, ids) if ids.shape[0] and ids.shape[1] >= 2 else []


def _before_training(recipe: Recipe, ids: Tensor) -> tuple[list[float], list[float]]:
    """Median gates and mean ``|X|`` of a new model of the run's seed, which is how training began."""
    import torch

    from ouroboros.api import build
    from ouroboros.eval.residuals import record

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.train.seed)
        records = record(build(recipe), ids)
    return [one.beta.median().item() for one in records], [one.state_norm_after.mean().item() for one in records]


def _target_range(records: Sequence[ResidualRecord]) -> tuple[float, float] | None:
    scale = records[0].value_scale
    if scale is not None:
        return 0.0, scale
    low = min(one.value.min().item() for one in records)
    high = max(one.value.max().item() for one in records)
    return (low, high) if low < high else None


def _use(record: ResidualRecord, limits: tuple[float, float] | None) -> Use:
    from ouroboros.eval.residuals import summarise

    squares = record.gram.diagonal(dim1=-2, dim2=-1)
    return Use(
        slot=record.slot,
        sublayer=record.sublayer,
        summary=summarise(record),
        gates=_histogram(record.beta, 0.0, 2.0),
        targets=() if limits is None else _histogram(record.value, *limits),
        channel_norms=squares.clamp(min=0).sqrt().flatten(0, -2).mean(0).tolist(),
        cosines=_cosines(record.gram),
    )


def _histogram(values: Tensor, low: float, high: float) -> list[float]:
    import torch

    return (torch.histc(values.float(), BINS, low, high).double() / values.numel()).tolist()


def _cosines(gram: Tensor) -> tuple[float, float, float] | None:
    """Of the value channels, from their inner products (B, T, V, V)."""
    import torch

    V = gram.shape[-1]
    if V == 1:
        return None
    norms = gram.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    cosine = gram / (norms[..., :, None] * norms[..., None, :]).clamp(min=1e-12)
    rows, columns = torch.triu_indices(V, V, offset=1)
    pairs = cosine.flatten(0, -3).mean(0)[rows, columns]
    return pairs.min().item(), pairs.mean().item(), pairs.max().item()


def _product(records: Sequence[ResidualRecord]) -> Product:
    import torch

    from ouroboros.nn.operators import product_singular_values

    N = len(records)
    tokens = records[0].beta.numel()
    count = min(tokens, PRODUCT_TOKENS, max(1, PRODUCT_WORK // N**4))
    chosen = torch.linspace(0, tokens - 1, count).long()
    k = torch.stack([one.direction.flatten(0, 1)[chosen] for one in records], dim=1)
    b = torch.stack([one.beta.flatten()[chosen] for one in records], dim=1)
    values = product_singular_values(k, b).flip(-1)
    mean = values.mean(0).tolist()
    # The product of n shortcuts has at most n singular values other than 1.
    kept = [row[: at + 1] for at, row in enumerate(mean)]
    return Product(values=kept, below=(values < LOW).double().sum(-1).mean(0).tolist(), tokens=count)


def _coherence(records: Sequence[ResidualRecord]) -> tuple[list[list[float]], list[list[float]]]:
    """Mean over tokens of ``|k_i . k_j|`` and of ``k_i . k_j``."""
    import torch

    from ouroboros.nn.operators import coherence

    N = len(records)
    size, signed = torch.zeros(N, N, dtype=torch.float64), torch.zeros(N, N, dtype=torch.float64)
    sequences = records[0].beta.shape[0]
    for at in range(sequences):  # one at a time: all would be N^2 numbers for each token at once
        products = coherence(torch.stack([one.direction[at] for one in records], dim=1))
        size += products.abs().mean(0) / sequences
        signed += products.mean(0) / sequences
    return size.tolist(), signed.tolist()


def _coupling(records: Sequence[ResidualRecord]) -> Coupling:
    """Of the use that erases most, at the token where it erases most."""
    one = max(records, key=lambda record: record.erased.mean().item())
    at = int(one.erased.argmax())
    sequence, position = divmod(at, one.erased.shape[1])
    k, beta = one.direction[sequence, position].double(), one.beta[sequence, position].item()
    features = k.abs().argsort(descending=True, stable=True)[:FEATURES]
    strong = k[features]
    return Coupling(
        slot=one.slot,
        sublayer=one.sublayer,
        beta=beta,
        sequence=sequence,
        position=position,
        features=features.tolist(),
        matrix=(-beta * strong[:, None] * strong[None, :]).tolist(),
        share=(strong.square().sum() / k.square().sum().clamp(min=1e-30)).item(),
    )


def _readings(inner: Any) -> list[Reading]:
    """Of every compressor: one for each block and one before the head."""
    from ouroboros.nn.delta import ChannelCompressor

    parts = [(f"block {index}", layer.compressor) for index, layer in enumerate(inner.decoder.layers)]
    found = []
    for name, part in [*parts, ("read-out", inner.readout)]:
        if part is None:
            continue
        read = part.read.detach().float()
        if isinstance(part, ChannelCompressor):
            weights = part.folded().detach().mean(0)
        else:
            weights = read * part.weight.detach().float().sum(0).mean(-1)
        found.append(Reading(name=name, read=read.tolist(), weights=weights.tolist()))
    return found

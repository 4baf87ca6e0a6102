"""What the linear maps of a model are given while it reads text: second moments, visit by visit.

Whatever code applies a map, the product with its weight is a call of torch, and those are watched; so a part needs to
declare nothing, and a weight that another operation reads is known by that operation's name. Shapes: N positions,
C inputs of a map, B rows of text, T tokens.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, resolve_name

from ouroboros.errors import check
from ouroboros.eval.windows import evaluating
from ouroboros.model.executor import Decoder, observe
from ouroboros.nn.block import Block
from ouroboros.nn.part import Started
from ouroboros.nn.visit import VisitContext

BATCH_TOKENS = 1024
"""Tokens that are read at a time: what is in memory besides the sums does not grow with the text."""

Weighting = str | tuple[float, ...]
"""How visits of a map count: ``mean`` (each position of each), ``last`` (the last visit alone), or a factor for the
mean of each loop, of which later loops take the last."""


def maps_of(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """The matrices (R, C) that a parameter holds, by name: itself, or of more than two dimensions each of those that
    are stacked in it, ``NAME[0]`` and so on, as views."""
    if tensor.ndim < 3:
        return {name: tensor}
    return {f"{name}[{number}]": matrix for number, matrix in enumerate(tensor.detach().flatten(0, -3))}


class Statistics:
    """Second moments of the inputs of maps, by the map's name (:func:`maps_of`) and the visit.

    A visit is the ``loop`` of a block's visit, and of a map outside of blocks how often it was applied before. Sums are
    float64; the products of one batch, a thousand positions or so, are summed in float32 first. Weights that share an
    input share its sums.
    """

    def __init__(self) -> None:
        self.sums: dict[tuple[str, int], Tensor] = {}
        """``sum x x^T``, (C, C) float64."""
        self.counts: dict[tuple[str, int], int] = {}
        """Positions."""
        self.read_by: dict[str, set[str]] = defaultdict(set)
        """Which other operations were given the tensor, by the tensor's name."""

    def visits(self, name: str) -> list[int]:
        """In which visits the map was applied."""
        return sorted(visit for of, visit in self.sums if of == name)

    def moment(self, name: str, weighting: Weighting = "mean") -> Tensor | None:
        """``mean x x^T`` over the visits of a map, (C, C) float64; None if no product with it was seen.

        Raises:
            OuroborosError: an unknown weighting.
        """
        visits = self.visits(name)
        if not visits:
            return None
        if weighting == "last":
            visits = visits[-1:]
        if isinstance(weighting, str):
            check(weighting in ("mean", "last"), f"visits are weighted by mean, last or factors, not {weighting!r}")
            total = sum(self.counts[name, visit] for visit in visits)
            return torch.stack([self.sums[name, visit] for visit in visits]).sum(dim=0) / total
        factors = [weighting[min(visit, len(weighting) - 1)] for visit in visits]
        check(
            min(factors) >= 0 and sum(factors) > 0, f"factors of visits must be 0 or more, and not all 0: {weighting}"
        )
        means = [self.sums[name, visit] * (factor / self.counts[name, visit]) for visit, factor in zip(visits, factors)]
        return torch.stack(means).sum(dim=0) / sum(factors)


def gather(
    model: Any, rows: Sequence[Tensor], names: Collection[str] | None = None, *, batch_tokens: int = BATCH_TOKENS
) -> Statistics:
    """The statistics of a model that reads texts, each from its start.

    Rows of equal length are read together and nothing is padded, so every position counts once. The reading of
    registers, which goes before every text, does not count. The model is in evaluation mode meanwhile, and watched by
    :func:`~ouroboros.model.executor.observe`: positions that have stopped are computed and count.

    Args:
        model: ours.
        rows: ids of texts, (T,) each.
        names: of the parameters whose moments are wanted; None: all.
        batch_tokens: read at a time.

    Raises:
        OuroborosError: there is no text, or it holds ids that the model does not have.
    """
    rows = [row.long() for row in rows if len(row)]
    check(bool(rows), "calibration: there is no text, give at least one row of ids")
    found = Statistics()
    watcher = _Watcher(model, found, names)
    size = model.config.vocab_size
    with evaluating(model), observe(model, watcher.visited), _unfolded(model):
        for batch in _batches(rows, batch_tokens):
            fits = int(batch.min()) >= 0 and int(batch.max()) < size
            check(fits, f"calibration: ids must be from 0 to {size - 1}, the model's vocabulary")
            with watcher:
                model(input_ids=batch, use_cache=False)
            watcher.end_batch()
    return found


@contextlib.contextmanager
def _unfolded(model: Any) -> Iterator[None]:
    """Meanwhile every part forms the input of each of its maps."""
    modules = [module for module in model.modules() if isinstance(module, Started)]
    before = [module.folds for module in modules]
    try:
        for module in modules:
            module.folds = False
        yield
    finally:
        for module, folds in zip(modules, before, strict=True):
            module.folds = folds


def _batches(rows: Sequence[Tensor], tokens: int) -> Iterator[Tensor]:
    """Rows of equal length put together, (B, T), in an order that depends on the rows alone."""
    for length, alike in itertools.groupby(sorted(rows, key=len), key=len):
        equal = list(alike)
        count = max(1, tokens // length)
        for start in range(0, len(equal), count):
            yield torch.stack(equal[start : start + count])


class _Watcher(TorchFunctionMode):
    """Sees every call of torch; products with weights are added up, other uses of them are noted."""

    def __init__(self, model: Any, found: Statistics, names: Collection[str] | None) -> None:
        super().__init__()
        self.found, self.names = found, names
        tensors = {name: tensor for name, tensor in model.named_parameters() if tensor.numel()}
        maps = [(name, *held) for name, tensor in tensors.items() for held in maps_of(name, tensor).items()]
        self.by_place = {matrix.data_ptr(): (name, label, matrix) for name, label, matrix in maps}
        """Recognised by where they lie, because a cast to the same type or a detached view is another object."""
        decoder_name, decoder = next((n, m) for n, m in model.named_modules() if isinstance(m, Decoder))
        self.blocks = {block: f"{decoder_name}.layers.{number}." for number, block in enumerate(decoder.layers)}
        self.inside = f"{decoder_name}.layers."
        self.table: nn.Parameter = model.get_input_embeddings().weight
        self.last: tuple[Tensor, Tensor] | None = None
        """The newest input and its product with itself: queries, keys and values share one."""
        self.begin_batch()

    def begin_batch(self) -> None:
        """Forget what belongs to one batch."""
        self.reading = False
        """Whether the text has begun; what comes before are registers."""
        self.pending: dict[str, tuple[Tensor, int]] = {}
        """Of the present visit."""
        self.applied: dict[str, int] = defaultdict(int)
        """How often maps outside of blocks were applied."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Watch one call."""
        kwargs = kwargs or {}
        given = [*args, *kwargs.values()]
        if func is F.embedding and any(value is self.table for value in given):
            self.reading = True
        product = None
        if func is F.linear:
            x, weight = given[:2]
            product = self._known(weight)
            if product is not None and (weight.shape, weight.stride()) != (product[2].shape, product[2].stride()):
                product = None  # transposed, or a part of it
            if product is not None and self.reading:
                self._add(*product[:2], x)
        for value in given if product is None else ():
            for tensor in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(tensor, Tensor) and (known := self._known(tensor)) is not None:
                    self._note(known[0], func)
        return func(*args, **kwargs)

    def _known(self, tensor: Tensor) -> tuple[str, str, Tensor] | None:
        return self.by_place.get(tensor.data_ptr())

    def _note(self, name: str, func: Any) -> None:
        """Another use than as a map; what only looks at the tensor, or casts it, is none."""
        operation = resolve_name(func) or str(func)
        if not operation.endswith(("__get__", ".to", ".detach", ".size", ".dim", ".numel", ".data_ptr", ".device")):
            self.found.read_by[name].add(operation.removeprefix("torch.").removeprefix("nn.functional."))

    def _add(self, parameter: str, name: str, x: Tensor) -> None:
        """One application to ``x`` (..., C) of the map ``name``, which ``parameter`` holds."""
        if self.names is not None and parameter not in self.names:
            return
        if self.last is None or self.last[0] is not x:
            x_NC = x.detach().flatten(0, -2).float()
            self.last = x, x_NC.T @ x_NC
        count = x.numel() // x.shape[-1]
        if not name.startswith(self.inside):
            self._sum((name, self.applied[name]), self.last[1], count)
            self.applied[name] += 1
        elif name in self.pending:
            before, counted = self.pending[name]
            self.pending[name] = before + self.last[1], counted + count
        else:
            self.pending[name] = self.last[1], count

    def _sum(self, key: tuple[str, int], product_CC: Tensor, count: int) -> None:
        if key in self.found.sums:
            self.found.sums[key] += product_CC
        else:
            self.found.sums[key] = product_CC.double()
        self.found.counts[key] = self.found.counts.get(key, 0) + count

    def visited(self, block: Block, visit: VisitContext, before: Tensor, after: Tensor) -> None:
        """The visit to which the applications since the last one belong."""
        assert visit.visit is not None
        for name in [name for name in self.pending if name.startswith(self.blocks[block])]:
            self._sum((name, visit.visit.loop), *self.pending.pop(name))

    def end_batch(self) -> None:
        """Nothing is left over for the next batch."""
        assert not self.pending, f"applied outside of a visit: {', '.join(self.pending)}"
        self.last = None
        self.begin_batch()

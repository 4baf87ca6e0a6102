"""Documents packed into one row, told by positions that begin anew, and the rows they would be without packing.

Attention can be masked at a document's start; a state, a filter over tokens or a shift cannot. So every document is
given a row of its own and the states are put back where their tokens were: all parts see what they see without packing.
Documents of similar lengths run together, so that at most half of what is computed is padding.
Shapes: B rows, T positions, N documents of a group, L tokens of its longest, S tokens of all its documents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ouroboros.errors import check
from ouroboros.model.loss import StatesOutput
from ouroboros.model.padding import padding_of

COMPILED = (
    "documents packed by position_ids cannot be kept apart by this compiled program: run the model uncompiled, or give"
    " each document a row of its own"
)


def find_starts(
    positions: Tensor,
    tokens: Tensor,
    mask: Tensor | dict[str, Tensor] | None,
    *,
    past: int | Tensor,
    caching: bool,
    carries: bool,
) -> Tensor | None:
    """Where documents packed by ``positions`` (B or 1, T) begin, (B, T); None where every row is one.

    Args:
        positions: as given to the model.
        tokens: ids (B, T) or embeddings (B, T, D).
        mask: as given to the model.
        past: tokens in its cache.
        caching: whether the call fills a cache; while compiling also one that nobody asked for.
        carries: whether a part of the model other than attention brings something from earlier tokens to later ones.

    Raises:
        OuroborosError: they cannot be kept apart in such a call. A compiled program raises a ``RuntimeError`` when it
            meets them, except where the mask that transformers makes of positions suffices.
    """
    B, T = tokens.shape[:2]
    mask = mask["full_attention"] if isinstance(mask, dict) else mask
    prepared = mask is not None and mask.ndim != 2
    if T < 2 or (prepared and not carries):  # a prepared mask itself says which tokens attention sees
        return None
    real = padding_of(mask, T, past)
    if real is None and caching:
        real = torch.ones_like(positions)  # positions may skip some, as with a mask
    starts = document_starts(positions.expand(B, T), None if real is None else real.expand(B, T))
    if torch.compiler.is_compiling():  # what a program does cannot depend on the positions it is given
        if carries or mask is not None or caching:
            torch._assert_async(~starts.any(), COMPILED)
        return None
    if not bool(starts.any()):
        return None
    check(not caching, "documents packed by position_ids cannot share a cache: give each document a row")
    check(
        not prepared,
        "a prepared attention mask does not keep documents packed by position_ids apart in this model, whose parts"
        " carry something from token to token: leave the mask out",
    )
    return starts


def separately(
    run: Callable[..., StatesOutput], tokens: Tensor, positions: Tensor, mask: Any, starts_BT: Tensor
) -> StatesOutput:
    """What ``run``, a model without its head, gives for packed documents: each in a row of its own, then packed."""
    at_BT = positions.expand(starts_BT.shape)
    groups = list(documents(starts_BT, mask))
    found = []
    for group in groups:
        mask_NL, positions_NL = group.unpacked(torch.ones_like(at_BT)), group.unpacked(at_BT)
        found.append(run(group.unpacked(tokens), mask_NL, positions_NL))
    last = packed(groups, [output[0] for output in found], starts_BT)
    states = [output.hidden_states[:-1] for output in found if output.hidden_states is not None]
    shown = (*(packed(groups, s, starts_BT) for s in zip(*states)), last) if states else None
    # What parts add to the loss is a mean over tokens.
    losses = [
        output.auxiliary_loss * len(group.token_S)
        for group, output in zip(groups, found, strict=True)
        if output.auxiliary_loss is not None
    ]
    added = torch.stack(losses).sum() / sum(len(group.token_S) for group in groups) if losses else None
    return StatesOutput(last, None, shown, auxiliary_loss=added)


def document_starts(positions_BT: Tensor, real_BT: Tensor | None) -> Tensor:
    """(B, T), True where a document begins behind another one of its row.

    Args:
        positions_BT: as given to the model. Without a mask a document begins where they do not go up by one, which is
            how transformers reads them; with a mask, which may leave positions out, where they do not go up.
        real_BT: not 0 where the token is no padding; None: no mask was given.
    """
    B, T = positions_BT.shape
    at = torch.arange(T, device=positions_BT.device).expand(B, T)
    real = torch.ones_like(at, dtype=torch.bool) if real_BT is None else real_BT.bool()
    last_real = torch.where(real, at, -1).cummax(-1).values.roll(1, dims=-1)
    last_real[:, 0] = -1
    step = positions_BT - positions_BT.gather(1, last_real.clamp(min=0))
    return (step != 1 if real_BT is None else step < 1) & real & (last_real >= 0)


class Group(NamedTuple):
    """Documents of similar lengths, each a row that is padded on the right."""

    token_S: Tensor
    """Where a token is among the packed ones, of all B T."""
    row_S: Tensor
    """Its document's row."""
    at_S: Tensor
    """How many tokens of its document precede it."""

    def unpacked(self, x: Tensor) -> Tensor:
        """Packed (B, T, ...) to (N, L, ...), 0 where padded."""
        N, L = int(self.row_S.max()) + 1, int(self.at_S.max()) + 1
        rows = x.new_zeros(N, L, *x.shape[2:])
        return rows.index_put((self.row_S, self.at_S), x.flatten(0, 1)[self.token_S])


def documents(begins_BT: Tensor, real_BT: Tensor | None) -> Iterator[Group]:
    """All real tokens in groups of documents, from what :func:`document_starts` says."""
    begins = begins_BT.clone()
    begins[:, 0] = True
    real = torch.ones_like(begins) if real_BT is None else real_BT.bool()
    token = real.flatten().nonzero().squeeze(1)
    _, document, lengths = (begins.flatten().cumsum(0)[token]).unique(return_inverse=True, return_counts=True)
    at = torch.arange(len(token), device=token.device) - (lengths.cumsum(0) - lengths)[document]
    size = lengths.double().log2().ceil()  # rows of a group are at most twice as long as the shortest
    for one in size.unique():
        among = size == one
        chosen = among[document]
        yield Group(token[chosen], (among.cumsum(0) - 1)[document[chosen]], at[chosen])


def packed(groups: Sequence[Group], parts: Sequence[Tensor], like_BT: Tensor) -> Tensor:
    """What was worked out for every group, (N, L, D) each, where its tokens were: (B, T, D), 0 at padding."""
    found = torch.cat([part[group.row_S, group.at_S] for group, part in zip(groups, parts, strict=True)])
    token = torch.cat([group.token_S for group in groups])
    return found.new_zeros(like_BT.numel(), found.shape[-1]).index_copy(0, token, found).unflatten(0, like_BT.shape)

"""Training with quantised weights: which ones, from when, and what they are replaced by at a step."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ouroboros.config import QuantizedTraining
from ouroboros.errors import check
from ouroboros.files import sha256_of
from ouroboros.nn.quantize import noisy, quantized, row_steps, straight_through
from ouroboros.optim import chosen_matrices
from ouroboros.pack.artifact import Artifact
from ouroboros.pack.coded import Coded
from ouroboros.pack.plan import bits_by_name, entries
from ouroboros.pack.quantize import matrix_of, quantize, rounded

LIKE = "train.quantize.like"


class Quantizer:
    """Puts quantised or noisy weights in the place of the chosen ones while a gradient is computed.

    Args:
        model: its parameters are chosen from.
        spec: which, from when and how; none where it is off.
        seed: of the run. Noise depends on it, the step and the parameter alone, so all processes and micro-batches
            have the same, and a resumed run has that of one that was not stopped.

    Raises:
        OuroborosError: a pattern that no two-dimensional parameter has, or no matrix at all; bits for parameters that
            are not chosen; a packed file that cannot be read or is of another model.
    """

    def __init__(self, model: nn.Module, spec: QuantizedTraining, seed: int) -> None:
        self.spec, self.seed = spec, seed
        self.names: list[str] = []
        self.stored: dict[str, Coded] = {}
        """What the packed file holds that the training imitates."""
        self.bits: dict[str, int] = {}
        """Of the other parameters."""
        self.digest: str | None = None
        """The sha256 of that file."""
        if spec.mode == "off":
            pass
        elif spec.like is not None:
            self.stored, self.digest = _coded(Path(spec.like), model), sha256_of(Path(spec.like))
            self.names = [*self.stored]
        else:
            self.names = chosen_matrices(model, spec.where, "train.quantize")
            chosen = [entry for entry in entries(model) if entry.name in self.names]
            other = bits_by_name(chosen, spec.bits_of, "train.quantize.bits_of")
            self.bits = {name: other.get(name, spec.bits) for name in self.names}
        self.parameters = [model.get_parameter(name) for name in self.names]

    def acting(self, step: int, progress: float) -> AbstractContextManager[None]:
        """The context of the passes of ``step``, at ``progress`` in [0, 1] of the run."""
        if not self.names or progress < self.spec.start:
            return contextlib.nullcontext()
        change = self._rounded
        if self.spec.mode == "noise":
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + step) % 2**63)
            change = functools.partial(self._noisy, generator)
        named = zip(self.names, self.parameters, strict=True)
        return straight_through({parameter: functools.partial(change, name) for name, parameter in named})

    def _rounded(self, name: str, w: Tensor) -> Tensor:
        """With the steps of the file, with those that packing would choose, or with a quantile of each row."""
        if name in self.stored:
            like = self.stored[name]
            return dataclasses.replace(like, codes=rounded(matrix_of(w), like.scales, like.bits)).dense()
        if self.spec.clip is None:
            return quantize(w, self.bits[name], name=name).dense()
        return quantized(w, self.bits[name], clip=self.spec.clip, smallest=self.spec.smallest)

    def _noisy(self, generator: torch.Generator, name: str, w: Tensor) -> Tensor:
        w_RC = matrix_of(w)
        steps = self.stored[name].steps() if name in self.stored else row_steps(w_RC, self.bits[name])
        return noisy(w_RC, steps, generator).reshape(w.shape)

    def state(self) -> dict[str, Any]:
        """What a resumed run has to find again, as JSON: the file that is imitated, if there is one."""
        return {} if self.digest is None else {LIKE: [self.spec.like, self.digest]}

    def check_state(self, state: dict[str, Any]) -> None:
        """Refuse to go on from :meth:`state` with a file of the same name and other content.

        Raises:
            OuroborosError: it has changed.
        """
        file, digest = state.get(LIKE, (None, None))
        same = None in (file, self.digest) or file != self.spec.like or digest == self.digest
        check(same, f"resume: {LIKE}: {file} has changed since the checkpoint: put the file back, or name another one")


def _coded(file: Path, model: nn.Module) -> dict[str, Coded]:
    """The tensors with codes of a packed file of this model, by name, on the model's device."""
    where, own = f"{LIKE}: {file}", dict(model.named_parameters())
    found = {name: tensor for name, tensor in Artifact(file, where).tensors().items() if isinstance(tensor, Coded)}
    check(bool(found), f"{where} holds no codes, as all its tensors are stored as they are: leave it out")
    for name, tensor in found.items():
        shape = tuple(own[name].shape) if name in own else None
        check(shape == tensor.shape, f"{where} is of another model: it has {name} of shape {tensor.shape}, not {shape}")
    return {name: dataclasses.replace(t, scales=t.scales.to(own[name].device)) for name, t in found.items()}

"""How a model is trained. A field that another one can make idle says so, see :mod:`ouroboros.config.needs`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ouroboros.config.needs import needs, positive, untried
from ouroboros.errors import check


@dataclass(frozen=True, kw_only=True)
class OptimSpec:
    """Optimiser by parameter role: Muon for matrices, AdamW for the rest (or AdamW for all)."""

    matrix_optimizer: Literal["muon", "adamw"] = "muon"
    """What trains the matrices of blocks; AdamW trains everything else."""
    lr: float = 3e-3
    """Peak rate of matrices; Muon's update is scaled to AdamW's RMS, so one scale serves both."""
    embedding_lr: float | None = None
    """Peak rate of embeddings and the untied head; None means ``lr``."""
    vector_lr: float | None = None
    """Peak rate of norms, gains, biases and per-loop vectors; None means ``lr``."""
    scalar_lr: float | None = None
    """Peak rate of single numbers that steer a part as a whole: phases, frequencies, decays and gates of a memory of
    constant size; None means ``vector_lr``."""
    weight_decay: float = 0.1
    """Decoupled weight decay."""
    decay: Literal["matrices", "all"] = field(default="matrices", metadata=needs("weight_decay", positive))
    """What is decayed: matrices alone, or every parameter, norms and biases included."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's coefficients of the running averages of the gradient and of its square."""
    eps: float = 1e-8
    """AdamW's addend to the root of the second average."""
    muon_momentum: float = field(default=0.95, metadata=needs("matrix_optimizer", "muon"))
    """Coefficient of Muon's running average of the gradient."""
    muon_steps: int = field(default=5, metadata=needs("matrix_optimizer", "muon"))
    """Newton-Schulz iterations of Muon."""
    muon_precision: Literal["auto", "fp32", "bf16"] = field(default="auto", metadata=needs("matrix_optimizer", "muon"))
    """In what Muon orthogonalises; ``auto`` is what is measured to be faster for the model's shapes on this device, and
    a resumed run keeps it."""
    schedule: Literal["wsd", "cosine", "constant", "one_cycle"] = "wsd"
    """How the rate goes on after the warm-up: flat and then falling (``wsd``), falling by a half cosine, constant, or
    the one-cycle schedule of Smith and Topin (2019)."""
    warmup_fraction: float = 0.02
    """Share of the run in which the rate rises."""
    decay_fraction: float = field(default=0.4, metadata=needs("schedule", "wsd"))
    """Share of the run spent in the final linear decay of ``wsd``."""
    final_lr: float = field(default=0.0, metadata=needs("schedule", "wsd", "cosine", "one_cycle"))
    """Rate at the end as a share of the peak."""
    start_lr: float = field(default=0.0, metadata=needs("schedule", "one_cycle"))
    """Rate at the first step of ``one_cycle`` as a share of the peak."""
    momentum_cycle: tuple[float, float] | None = field(default=None, metadata=needs("schedule", "one_cycle"))
    """With ``one_cycle``: AdamW's first coefficient falls from the second number to the first while the rate rises, and
    comes back while it falls; null leaves it at ``betas[0]``."""
    clip_norm: float = 1.0
    """Global gradient norm limit; 0 turns clipping off."""

    def __post_init__(self) -> None:
        for name in ("lr", "embedding_lr", "vector_lr", "scalar_lr"):
            value = getattr(self, name)
            check(value is None or value > 0, f"optim.{name} must be > 0, got {value}")
        for name in ("warmup_fraction", "decay_fraction", "final_lr", "start_lr"):
            value = getattr(self, name)
            check(0 <= value <= 1, f"optim.{name} must be in [0, 1], got {value}")
        check(
            self.warmup_fraction + self.decay_fraction <= 1, "optim.warmup_fraction + optim.decay_fraction must be <= 1"
        )
        check(self.weight_decay >= 0, f"optim.weight_decay must be >= 0, got {self.weight_decay}")
        check(self.clip_norm >= 0, f"optim.clip_norm must be >= 0, got {self.clip_norm}")
        check(all(0 <= b < 1 for b in self.betas), f"optim.betas must be in [0, 1), got {self.betas}")
        cycle = self.momentum_cycle
        check(
            cycle is None or (self.schedule == "one_cycle" and 0 <= cycle[0] <= cycle[1] < 1),
            f"optim.momentum_cycle must be two numbers in [0, 1), the smaller first, with optim.schedule one_cycle;"
            f" got {cycle} with {self.schedule}",
        )
        check(0 <= self.muon_momentum < 1, f"optim.muon_momentum must be in [0, 1), got {self.muon_momentum}")
        check(1 <= self.muon_steps < 100, f"optim.muon_steps must be in 1..99, got {self.muon_steps}")


LOOPED = needs("/model.schedule.is_looped", True, say="a layout with a loop, for example --model.layout '1 (1)x2 1'")


@dataclass(frozen=True, kw_only=True)
class LoopTraining:
    """Loop counts during training."""

    sampling: Literal["fixed", "uniform", "poisson"] = "fixed"
    """``fixed``: the layout's count. ``uniform``: min..max. ``poisson``: 1 + Poisson(mean - 1), clipped."""
    mean: float = field(default=4.0, metadata=needs("sampling", "poisson"))
    """Mean loop count, before clipping."""
    min: int = field(default=1, metadata=needs("sampling", "uniform", "poisson"))
    """Smallest loop count."""
    max: int = field(default=8, metadata=needs("sampling", "uniform", "poisson"))
    """Largest loop count."""
    backprop: int | None = None
    """Truncated backpropagation: only the last this many loops carry gradient; None means all."""
    curriculum: tuple[tuple[float, int], ...] = field(default=(), metadata=needs("sampling", "fixed"))
    """Depth curriculum: pairs (fraction of the run, loops), for example ``((0.0, 1), (0.35, 2))``."""

    def __post_init__(self) -> None:
        check(1 <= self.min <= self.max, f"train.loops: need 1 <= min <= max, got {self.min}, {self.max}")
        check(self.mean >= 1, f"train.loops.mean must be >= 1, got {self.mean}")
        check(self.backprop is None or self.backprop >= 1, f"train.loops.backprop must be >= 1, got {self.backprop}")
        starts = [start for start, _ in self.curriculum]
        check(starts == sorted(starts), "train.loops.curriculum must be sorted by fraction")
        check(
            all(0 <= s <= 1 and n >= 1 for s, n in self.curriculum),
            "train.loops.curriculum needs fractions in [0, 1], loops >= 1",
        )
        check(not starts or starts[0] == 0.0, "train.loops.curriculum must begin at fraction 0.0")
        check(
            not (self.curriculum and self.sampling != "fixed"),
            "train.loops: curriculum and random sampling exclude each other",
        )


BUDGET = untried("says how long a run is")
SAME_NUMBERS = untried("changes memory or time, and numbers by rounding alone")
RECORDS = untried("changes what a run records, or when it ends")
VALIDATION = needs("eval_every", positive) | RECORDS


@dataclass(frozen=True, kw_only=True)
class TrainSpec:
    """One training run. Exactly one of ``steps``, ``tokens`` and ``minutes`` says when it ends."""

    steps: int | None = field(default=None, metadata=BUDGET)
    """Stop after this many optimiser steps."""
    tokens: int | None = field(default=None, metadata=BUDGET)
    """Stop after this many training tokens."""
    minutes: float | None = field(default=None, metadata=BUDGET)
    """Stop after this many minutes."""
    batch_size: int = 16
    """Sequences per optimiser step, over all processes and accumulation steps."""
    accumulation: int = field(default=1, metadata=SAME_NUMBERS)
    """Parts into which each process divides its sequences of a step, to save memory."""
    seed: int = 0
    """Seed of initialisation, order, dropout and loop counts."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the forward and backward pass; ``auto`` takes bfloat16 where it is measured to be much faster."""
    threads: int | None = field(default=None, metadata=SAME_NUMBERS)
    """Threads of each process on a CPU. None measures, when the run begins, whether fewer than all are as fast, and
    takes fewer while other programs slow the run down."""
    compile: Literal["auto", "on", "off"] = field(default="auto", metadata=SAME_NUMBERS)
    """Compile each block with ``torch.compile``; ``auto`` does so where the run is long enough for it to pay."""
    activation_checkpointing: bool = field(default=False, metadata=SAME_NUMBERS)
    """Compute activations again in the backward pass instead of keeping them: less memory, more time."""
    ema_decay: float = 0.0
    """Decay of the averaged weights that are evaluated and exported; 0 is off."""
    label_smoothing: float = 0.0
    """Share of the target's probability that is spread over the vocabulary in the training loss. Validation, and every
    loss that is reported as one, is without it."""
    corruption: float = 0.0
    """Probability that an input token is replaced by one drawn from the vocabulary, itself included; targets stay.
    Special tokens (the end of a text, the unknown character) are neither replaced nor drawn."""
    loops: LoopTraining = field(default_factory=LoopTraining, metadata=LOOPED)
    eval_every: int = field(default=200, metadata=RECORDS)
    """Steps between validations; 0 is off."""
    eval_bytes: int = field(default=65_536, metadata=VALIDATION)
    """Validation bytes scored at each validation."""
    target_loss: float | None = field(default=None, metadata=VALIDATION)
    """Stop when validation is surely at or below this many nats per token: its mean plus two standard errors."""
    patience: int = field(default=0, metadata=VALIDATION)
    """Stop after this many validations in a row without a new best; 0 never does."""
    max_bad_validations: int = field(default=3, metadata=VALIDATION)
    """Stop with an error after this many validations in a row that failed; each one is reported."""
    checkpoint_every: int = field(default=500, metadata=RECORDS)
    """Steps between checkpoints (and one at each new best validation); 0 saves at the end and on interruption only."""
    keep_last: int = field(default=2, metadata=RECORDS)
    """Checkpoints that are kept besides the one of the best validation."""
    log_every: int = field(default=10, metadata=RECORDS)
    """Steps between records of the loss in ``metrics.jsonl``."""
    telemetry_every: int = field(default=0, metadata=RECORDS)
    """Steps between telemetry records of loops and of parts that have some, such as memories; 0 is off."""
    max_bad_steps: int = field(default=10, metadata=RECORDS)
    """Stop after this many steps in a row with a non-finite loss or gradient."""

    def __post_init__(self) -> None:
        given = [n for n in ("steps", "tokens", "minutes") if getattr(self, n) is not None]
        check(len(given) <= 1, f"train: give one of steps, tokens and minutes, not {' and '.join(given)}")
        for name in ("steps", "tokens", "minutes"):
            value = getattr(self, name)
            check(value is None or value > 0, f"train.{name} must be > 0, got {value}")
        positive = ("batch_size", "accumulation", "keep_last", "log_every", "eval_bytes")
        for name in (*positive, "max_bad_steps", "max_bad_validations"):
            check(getattr(self, name) >= 1, f"train.{name} must be >= 1, got {getattr(self, name)}")
        for name in ("eval_every", "checkpoint_every", "telemetry_every", "patience"):
            check(getattr(self, name) >= 0, f"train.{name} must be >= 0, got {getattr(self, name)}")
        check(self.threads is None or self.threads >= 1, f"train.threads must be >= 1, got {self.threads}")
        check(
            self.batch_size % self.accumulation == 0,
            f"train.batch_size ({self.batch_size}) must be a multiple of train.accumulation ({self.accumulation})",
        )
        check(
            self.target_loss is None or self.target_loss > 0, f"train.target_loss must be > 0, got {self.target_loss}"
        )
        check(
            self.eval_every > 0 or (self.target_loss is None and not self.patience),
            "train.target_loss and train.patience need validation: set train.eval_every",
        )
        check(abs(self.seed) < 2**63, f"train.seed must be within 63 bits, got {self.seed}")
        for name in ("label_smoothing", "corruption"):
            check(0 <= getattr(self, name) < 1, f"train.{name} must be in [0, 1), got {getattr(self, name)}")
        check(0 <= self.ema_decay < 1, f"train.ema_decay must be in [0, 1), got {self.ema_decay}")

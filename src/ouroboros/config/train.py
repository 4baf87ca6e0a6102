"""How a model is trained. A field that another one can make idle says so, see :mod:`ouroboros.config.needs`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from ouroboros.config.needs import all_of, given, needs, positive, untried
from ouroboros.config.widths import parse_widths
from ouroboros.errors import check

MUON = needs("matrix_optimizer", "muon")


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
    left_out: tuple[str, ...] = ()
    """Patterns, with ``*`` and ``?``, of the names of parameters that are not trained: they keep their start, have no
    gradient, and cost the less for it. For a pretrained model of which little is trained."""
    muon_momentum: float = field(default=0.95, metadata=MUON)
    """Coefficient of Muon's running average of the gradient."""
    muon_momentum_warmup: int = field(default=0, metadata=MUON)
    """Optimiser steps in which that coefficient rises linearly to ``muon_momentum``; 0 is off."""
    muon_momentum_start: float = field(default=0.85, metadata=all_of(MUON, needs("muon_momentum_warmup", positive)))
    """The coefficient at the first step, if it rises."""
    muon_steps: int = field(default=5, metadata=MUON)
    """Newton-Schulz iterations of Muon."""
    muon_coefficients: Literal["quintic", "polar_express"] = field(default="quintic", metadata=MUON)
    """Polynomials of these iterations: the same in each, which brings singular values near 1 quickly and leaves them
    between 0.7 and 1.2 (Jordan et al. 2024), or the best one for each, which converges (Amsel et al. 2025)."""
    muon_rows: bool = field(default=False, metadata=MUON)
    """Divide each row of the averaged gradient by its length before Muon orthogonalises it (MuonEq-R)."""
    muon_form: Literal["matched", "original"] = field(default="matched", metadata=MUON)
    """Muon's update: of the gradients' average, times ``0.2 sqrt(max(rows, columns))``, so that one rate serves AdamW
    too; or as first published, of their sum, times ``sqrt(max(1, rows / columns))``, with rates about ten times as high
    and the rounding of those programs."""
    muon_precision: Literal["auto", "fp32", "bf16"] = field(default="auto", metadata=MUON)
    """In what Muon orthogonalises; ``auto`` is what is measured to be faster for the model's shapes on this device, and
    a resumed run keeps it."""
    schedule: Literal["wsd", "cosine", "constant", "one_cycle"] = "wsd"
    """How the rate goes on after the warm-up: flat and then falling (``wsd``), falling by a half cosine, constant, or
    the one-cycle schedule of Smith and Topin (2019)."""
    warmup_fraction: float = 0.02
    """Share of the run in which the rate rises."""
    decay_fraction: float = field(default=0.4, metadata=all_of(needs("schedule", "wsd"), needs("decay_steps", None)))
    """Share of the run spent in the final linear decay of ``wsd``."""
    decay_steps: int | None = field(default=None, metadata=needs("schedule", "wsd"))
    """Optimiser steps spent in that decay, in place of ``decay_fraction``. A run of so many minutes counts them at the
    pace so far, so a slow machine begins to decay earlier, or at once. Null means the fraction."""
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
            self.decay_steps is not None or self.warmup_fraction + self.decay_fraction <= 1,
            "optim.warmup_fraction + optim.decay_fraction must be <= 1",
        )
        for name in ("decay_steps", "muon_momentum_warmup"):
            check((getattr(self, name) or 0) >= 0, f"optim.{name} must be >= 0, got {getattr(self, name)}")
        check(self.weight_decay >= 0, f"optim.weight_decay must be >= 0, got {self.weight_decay}")
        check(self.clip_norm >= 0, f"optim.clip_norm must be >= 0, got {self.clip_norm}")
        check(all(0 <= b < 1 for b in self.betas), f"optim.betas must be in [0, 1), got {self.betas}")
        cycle = self.momentum_cycle
        check(
            cycle is None or (self.schedule == "one_cycle" and 0 <= cycle[0] <= cycle[1] < 1),
            f"optim.momentum_cycle must be two numbers in [0, 1), the smaller first, with optim.schedule one_cycle;"
            f" got {cycle} with {self.schedule}",
        )
        for name in ("muon_momentum", "muon_momentum_start"):
            check(0 <= getattr(self, name) < 1, f"optim.{name} must be in [0, 1), got {getattr(self, name)}")
        check(1 <= self.muon_steps < 100, f"optim.muon_steps must be in 1..99, got {self.muon_steps}")


LOOPED = needs("/model.schedule.is_looped", True, say="a layout with a loop, for example --model.layout '1 (1)x2 1'")


@dataclass(frozen=True, kw_only=True)
class LoopTraining:
    """Loop counts during training."""

    sampling: Literal["fixed", "uniform", "poisson"] = "fixed"
    """How the loop count of each step is chosen, the depth dial: a model that was trained with random counts can be run
    with more or fewer loops afterwards. ``fixed``: the layout's count. ``uniform``: min..max. ``poisson``:
    1 + Poisson(mean - 1), clipped."""
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

    def shares(self, own: int) -> dict[int, float]:
        """The share of all steps that trains with each loop count.

        Args:
            own: the loop count of the layout.
        """
        found: dict[int, float] = {}
        if self.curriculum:
            starts = [*(start for start, _ in self.curriculum), 1.0]
            parts = [(count, starts[number + 1] - starts[number]) for number, (_, count) in enumerate(self.curriculum)]
        elif self.sampling == "uniform":
            parts = [(count, 1 / (self.max + 1 - self.min)) for count in range(self.min, self.max + 1)]
        elif self.sampling == "poisson":
            rate, drawn = self.mean - 1, range(self.max)
            chances = [math.exp(-rate) * rate**k / math.factorial(k) for k in drawn]
            parts = [(min(max(1 + k, self.min), self.max), chance) for k, chance in zip(drawn, chances, strict=True)]
            parts.append((self.max, 1 - sum(chances)))
        else:
            parts = [(own, 1.0)]
        for count, share in parts:
            found[count] = found.get(count, 0.0) + share
        return found


QUANTIZED = needs("mode", "round", "noise")
CHOSEN = all_of(QUANTIZED, needs("like", None, say="no train.quantize.like, which decides it"))


@dataclass(frozen=True, kw_only=True)
class QuantizedTraining:
    """Training with quantised weights, so that little is lost when the model is packed."""

    mode: Literal["off", "round", "noise"] = "off"
    """Compute the training loss with weights that are rounded to their codes, or that have noise as large as the error
    of rounding. Gradients pass to the weights themselves, which validation and export have as they are."""
    like: str | None = field(default=None, metadata=QUANTIZED)
    """A packed file of this model: every tensor that has codes there is rounded with its bits and steps, or has noise
    of their size. Null means that the options below say which tensors, and with how many bits."""
    where: tuple[str, ...] = field(default=(), metadata=CHOSEN)
    """Patterns, with ``*`` and ``?``, of the names of the matrices and tables that this is for; none means every matrix
    that is no table."""
    start: float = field(default=0.0, metadata=QUANTIZED)
    """Share of the run after which it begins."""
    bits: int = field(default=6, metadata=CHOSEN)
    """Bits of a code."""
    bits_of: tuple[str, ...] = field(default=(), metadata=CHOSEN)
    """Other bits for some of these tensors, each as ``WHICH=BITS``, as `ouroboros pack --bits-of` takes them:
    ``looped=8`` or ``*.mlp.*=4``. Of several that fit a tensor, the first decides."""
    clip: float | None = field(default=None, metadata=all_of(needs("mode", "round"), CHOSEN))
    """Quantile of a row's magnitudes that the largest code stands for; 1 is the largest magnitude. Null means the steps
    that `ouroboros pack` chooses, those with which rounding a row has the least squared error; to find them costs about
    as much time as a pass over 2,000 tokens."""
    smallest: float = field(default=0.0, metadata=all_of(needs("mode", "round"), CHOSEN, needs("clip", given)))
    """Least difference between neighbouring codes, whatever the weights. Published programs had 1/31, which leaves rows
    of small weights few levels; 0 leaves each row its own."""

    def __post_init__(self) -> None:
        check(0 <= self.start <= 1, f"train.quantize.start must be in [0, 1], got {self.start}")
        check(2 <= self.bits <= 8, f"train.quantize.bits must be in 2..8, got {self.bits}")
        parse_widths(self.bits_of, "train.quantize.bits_of")
        check(self.clip is None or 0 < self.clip <= 1, f"train.quantize.clip must be in (0, 1], got {self.clip}")
        check(self.smallest >= 0, f"train.quantize.smallest must be >= 0, got {self.smallest}")


LOW_RANK = needs("rank", positive)


@dataclass(frozen=True, kw_only=True)
class LowRankTraining:
    """Training of matrices by what is added to them, a product of two narrow ones (LoRA, Hu et al. 2021): ``W + alpha /
    rank * B A``. W keeps its start, B starts at zero, and what is evaluated and exported is the sum."""

    rank: int = 0
    """Rows of A and columns of B; 0 is off, and matrices are trained themselves."""
    alpha: float = field(default=16.0, metadata=LOW_RANK)
    """The product is multiplied by ``alpha / rank``, so that another rank needs no other rate."""
    where: tuple[str, ...] = field(default=(), metadata=LOW_RANK)
    """Patterns, with ``*`` and ``?``, of the names of the matrices and tables that this is for; none means every matrix
    that is no table. Other parameters are trained as usual, unless ``optim.left_out`` names them."""

    def __post_init__(self) -> None:
        check(self.rank >= 0, f"train.low_rank.rank must be >= 0, got {self.rank}")
        check(self.alpha > 0, f"train.low_rank.alpha must be > 0, got {self.alpha}")


DISTILLED = needs("fraction", positive)


@dataclass(frozen=True, kw_only=True)
class DistilledTraining:
    """The last phase of a run, in which the weights learn from a frozen copy of their average and the text at once. The
    learning-rate schedule ends before it, and what is evaluated and exported in it are the weights themselves."""

    fraction: float = 0.0
    """Share of the run that this phase takes at its end; 0 is off. It needs ``ema_decay`` or ``average_every``."""
    temperature: float = field(default=1.5, metadata=DISTILLED)
    """What divides the logits of both before they are compared."""
    alpha: float = field(default=0.6, metadata=DISTILLED)
    """Weight of the loss on the text; the divergence from the average has the rest."""
    lr: float = field(default=0.02, metadata=DISTILLED)
    """Learning rate as a share of the peak."""

    def __post_init__(self) -> None:
        check(0 <= self.fraction < 1, f"train.distill.fraction must be in [0, 1), got {self.fraction}")
        check(self.temperature > 0, f"train.distill.temperature must be > 0, got {self.temperature}")
        check(0 <= self.alpha <= 1, f"train.distill.alpha must be in [0, 1], got {self.alpha}")
        check(self.lr > 0, f"train.distill.lr must be > 0, got {self.lr}")


TAUGHT = needs("model", given) | untried("needs a trained model to learn from")
COMPARED = needs("states", positive) | untried("needs a trained model to learn from")


@dataclass(frozen=True, kw_only=True)
class TaughtTraining:
    """Learning from another model, the teacher, beside the text: from what it predicts, and from the state that it has
    in one place. Validation, and every loss that is reported as one, is of the text alone."""

    model: str | None = field(default=None, metadata=untried("names a trained model to learn from"))
    """Directory of the teacher, a model of the same vocabulary; null is off."""
    weight: float = field(default=0.5, metadata=TAUGHT)
    """Weight of the divergence from what the teacher predicts; the loss on the text has the rest."""
    temperature: float = field(default=1.0, metadata=TAUGHT)
    """What divides the logits of both before they are compared."""
    states: float = field(default=0.0, metadata=TAUGHT)
    """Weight of the squared difference of two states, as a share of the square of the teacher's."""
    blocks: tuple[int, int] | None = field(default=None, metadata=COMPARED)
    """Which states: what enters the block of the first number here, and what enters that of the second in the
    teacher."""
    share: float = field(default=1.0, metadata=TAUGHT)
    """Share of each window's positions whose predictions are learned; they are drawn anew for every step. With a large
    vocabulary predictions are half of the work."""
    keep: str | None = field(default=None, metadata=TAUGHT | untried("changes time alone, and numbers by rounding"))
    """Folder in which the teacher's states of every window are kept, in bfloat16, so that other runs on the same text
    need not compute them again. Null computes them at every step."""

    def __post_init__(self) -> None:
        check(0 <= self.weight <= 1, f"train.teach.weight must be in [0, 1], got {self.weight}")
        check(self.temperature > 0, f"train.teach.temperature must be > 0, got {self.temperature}")
        check(self.states >= 0, f"train.teach.states must be >= 0, got {self.states}")
        check(0 < self.share <= 1, f"train.teach.share must be in (0, 1], got {self.share}")
        check(
            (self.blocks is None) == (self.states == 0),
            "train.teach.states is the weight of a difference between two states, and train.teach.blocks says which:"
            " give both or neither",
        )


RECORDS = untried("changes what a run records, or when it ends")
ROLLS_BACK = needs("action", "rollback") | RECORDS


@dataclass(frozen=True, kw_only=True)
class GuardedTraining:
    """The stability guard. At every step it compares the loss, the gradient, and the state of each loop with those of
    the steps before, and names the loop in which training becomes unstable."""

    action: Literal["off", "warn", "stop", "rollback"] = field(default="warn", metadata=RECORDS)
    """What it does: nothing; say so; stop the run at the third unusual step in a row, with the weights of the last good
    checkpoint; or go on from those weights with a lower rate and the text that follows."""
    lr_factor: float = field(default=0.5, metadata=ROLLS_BACK)
    """What a rollback multiplies the learning rate with, for the rest of the run; 1 leaves it."""
    rollbacks: int = field(default=3, metadata=ROLLS_BACK)
    """Rollbacks of a run; at the next one it is stopped instead."""

    def __post_init__(self) -> None:
        check(0 < self.lr_factor <= 1, f"train.guard.lr_factor must be in (0, 1], got {self.lr_factor}")
        check(self.rollbacks >= 1, f"train.guard.rollbacks must be >= 1, got {self.rollbacks}")


BUDGET = untried("says how long a run is")
SAME_NUMBERS = untried("changes memory or time, and numbers by rounding alone")
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
    """Compute the activations of every visit, thus of every loop, again in the backward pass instead of keeping them:
    less memory, more time."""
    sharding: Literal["none", "full"] = field(default="none", metadata=SAME_NUMBERS)
    """What several processes divide among them besides the text: nothing, so that each has the whole model (DDP), or
    its parameters, their gradients and the state of the optimisers (FSDP), which takes less memory and sends more. One
    process divides nothing."""
    ema_decay: float = 0.0
    """Evaluate and export an exponential average of the weights with this decay; 0 is off."""
    average_every: int = 0
    """Evaluate and export the plain mean of the weights after every so many steps (SWA); 0 is off."""
    average_start: float | None = field(
        default=None, metadata=needs("averages", say="--train.ema-decay or --train.average-every")
    )
    """Share of the run after which weights are averaged, and before which they are evaluated as they are. Null is 0 for
    ``ema_decay`` and 0.8 for ``average_every``."""
    label_smoothing: float = 0.0
    """Share of the target's probability that is spread over the vocabulary in the training loss. Validation, and every
    loss that is reported as one, is without it."""
    corruption: float = 0.0
    """Probability that an input token is replaced by one drawn from the vocabulary, itself included; targets stay.
    Special tokens (the end of a text, the unknown character) are neither replaced nor drawn."""
    loops: LoopTraining = field(default_factory=LoopTraining, metadata=LOOPED)
    quantize: QuantizedTraining = field(default_factory=QuantizedTraining)
    low_rank: LowRankTraining = field(default_factory=LowRankTraining)
    distill: DistilledTraining = field(default_factory=DistilledTraining)
    teach: TaughtTraining = field(default_factory=TaughtTraining)
    guard: GuardedTraining = field(default_factory=GuardedTraining)
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
        for name in ("eval_every", "checkpoint_every", "telemetry_every", "patience", "average_every"):
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
        check(not (self.ema_decay and self.average_every), "train.ema_decay and train.average_every exclude each other")
        teaches = 1.0 - self.distill.fraction
        check(
            teaches == 1.0 or (self.averages and self.averages_from < teaches),
            "train.distill.fraction needs an average to learn from, which begins before: set train.ema_decay, or"
            " train.average_every and train.average_start",
        )
        check(
            self.teach.model is None or not self.distill.fraction,
            "train.teach and train.distill both say whom to learn from: leave one of them out",
        )
        whole = {
            "train.quantize.mode": self.quantize.mode != "off",
            "train.low_rank.rank": self.low_rank.rank > 0,
            "train.distill.fraction": self.distill.fraction > 0,
            "train.teach.model": self.teach.model is not None,
            "train.compile=on": self.compile == "on",
        }
        refused = ", ".join(name for name, on in whole.items() if on)
        check(
            self.sharding == "none" or not refused,
            f"train.sharding={self.sharding} does not work with {refused}, which needs the whole model in every"
            " process: leave that out, or take train.sharding=none",
        )
        check(0 <= self.averages_from <= 1, f"train.average_start must be in [0, 1], got {self.average_start}")

    @property
    def averages(self) -> bool:
        """Whether weights are averaged."""
        return bool(self.ema_decay or self.average_every)

    @property
    def averages_from(self) -> float:
        """The share of the run after which they are."""
        usual = 0.8 if self.average_every else 0.0
        return usual if self.average_start is None else self.average_start

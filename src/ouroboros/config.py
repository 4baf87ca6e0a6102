"""Specifications: frozen dataclasses that describe a model, its data and its training.

A recipe is a Python value of type :class:`Recipe`. Every run, checkpoint and artifact carries its
resolved recipe as JSON (:func:`to_json`, :func:`from_json`); reading is strict: an unknown key, a wrong
type or a value out of range is an :class:`~ouroboros.errors.OuroborosError` that names the field.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import typing
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from ouroboros.errors import OuroborosError, nearest
from ouroboros.schedule import parse

T = TypeVar("T")


def check(condition: bool, message: str) -> None:
    """Raise :class:`OuroborosError` with ``message`` unless ``condition`` holds."""
    if not condition:
        raise OuroborosError(message)


@dataclass(frozen=True, kw_only=True)
class RopeSpec:
    """Rotary position embedding (Su et al. 2021, eq. 15), half-split layout as in Llama."""

    base: float = 10_000.0
    """Wavelength base theta."""
    fraction: float = 1.0
    """Share of each head's channels that is rotated; the rest passes through."""
    scale: float = 1.0
    """Positions are divided by this number before rotation."""

    def __post_init__(self) -> None:
        check(self.base > 1, f"rope.base must be > 1, got {self.base}")
        check(0 <= self.fraction <= 1, f"rope.fraction must be in [0, 1], got {self.fraction}")
        check(self.scale > 0, f"rope.scale must be > 0, got {self.scale}")


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """Grouped-query causal self-attention (Ainslie et al. 2023)."""

    kind: Literal["attention"] = "attention"
    num_heads: int = 4
    num_kv_heads: int | None = None
    """Key/value heads; None means one per query head."""
    head_dim: int | None = None
    """Channels per head; None means hidden_size // num_heads."""
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: Literal["none", "before_rope", "after_rope"] = "none"
    """RMS-normalise queries and keys per head, before or after the rotation."""
    query_gain: float | None = None
    """Initial value of a learned gain per query head; None leaves it out."""
    dropout: float = 0.0
    """Dropout of attention probabilities in training."""
    rope: RopeSpec = field(default_factory=RopeSpec)

    def __post_init__(self) -> None:
        check(self.num_heads >= 1, f"mixer.num_heads must be >= 1, got {self.num_heads}")
        kv = self.kv_heads
        check(kv >= 1, f"mixer.num_kv_heads must be >= 1, got {kv}")
        check(
            self.num_heads % kv == 0,
            f"mixer.num_heads ({self.num_heads}) must be a multiple of mixer.num_kv_heads ({kv})",
        )
        check(0 <= self.dropout < 1, f"mixer.dropout must be in [0, 1), got {self.dropout}")

    @property
    def kv_heads(self) -> int:
        """Key/value heads, resolved."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    def width(self, hidden_size: int) -> int:
        """Channels per head, resolved for a model of ``hidden_size``."""
        return hidden_size // self.num_heads if self.head_dim is None else self.head_dim


@dataclass(frozen=True, kw_only=True)
class FeedForwardSpec:
    """Position-wise feed-forward network."""

    kind: Literal["swiglu", "relu2", "leaky_relu2", "gelu"] = "swiglu"
    intermediate_size: int = 512
    bias: bool = False
    negative_slope: float = 0.5
    """Slope of ``leaky_relu2`` below zero."""

    def __post_init__(self) -> None:
        check(self.intermediate_size >= 1, f"ffn.intermediate_size must be >= 1, got {self.intermediate_size}")


@dataclass(frozen=True, kw_only=True)
class NormSpec:
    """RMS normalisation (Zhang & Sennrich 2019)."""

    placement: Literal["pre", "sandwich"] = "pre"
    """``sandwich`` also normalises each sublayer's output before the residual addition."""
    eps: float = 1e-6

    def __post_init__(self) -> None:
        check(self.eps > 0, f"norm.eps must be > 0, got {self.eps}")


@dataclass(frozen=True, kw_only=True)
class LoopSpec:
    """What enters at loop boundaries. Everything is off by default, and off is the same as absent."""

    norm: bool = False
    """Per-loop RMS norm of the state a loop has produced (Controller, section 2.5)."""
    embedding: bool = False
    """Per-loop learned vector added to the state that enters a loop; zero at the start."""
    inject: Literal["none", "add", "concat"] = "none"
    """Re-inject the state that entered the first loop: ``x + s * x0`` with a learned per-channel ``s`` (zero
    at the start), or a learned map of ``[x; x0]`` (identity on ``x`` at the start)."""
    gate: bool = False
    """Gated recurrence ``x <- g * z + (1 - g) * x`` with ``g = sigmoid(W [z; x] + b)``, W = 0 at the start."""
    gate_bias: float = -2.0
    contractive: float = 1.0
    """Contractive step ``x <- (1 - dt) x + dt z``; 1 is off."""
    share_last_kv: bool = False
    """Cache the keys and values of the last loop only; earlier loops read them for positions cached before
    the call. Smaller cache, approximate decoding (its cost is measured in docs/benchmarks.md)."""
    max_loops: int | None = None
    """Rows of per-loop tables; None means the layout's loops. Later loops use the last row."""

    def __post_init__(self) -> None:
        check(0 < self.contractive <= 1, f"loop.contractive must be in (0, 1], got {self.contractive}")
        check(self.max_loops is None or self.max_loops >= 1, f"loop.max_loops must be >= 1, got {self.max_loops}")


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A language model: a schedule of visits, the parts of a block, and what surrounds them."""

    layout: str = "6"
    """Schedule notation, for example ``"2 (2)x3 2"``; see docs/concepts/schedules.md."""
    vocab_size: int = 257
    hidden_size: int = 256
    max_position_embeddings: int = 4096
    """Longest context the model accepts, in tokens."""
    mixer: AttentionSpec = field(default_factory=AttentionSpec)
    ffn: FeedForwardSpec = field(default_factory=FeedForwardSpec)
    norm: NormSpec = field(default_factory=NormSpec)
    residual: Literal["additive"] = "additive"
    loop: LoopSpec = field(default_factory=LoopSpec)
    registers: int = 0
    """Learned prefix tokens that every position can see; they never see the text."""
    tie_embeddings: bool = True
    embedding_norm: bool = False
    """RMS norm of the token embeddings before the first block."""
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    """Logits become ``c * tanh(logits / c)``."""
    dropout: float = 0.0
    """Dropout of each sublayer's output in training."""
    init_std: float = 0.02
    zero_init_outputs: bool = False
    """Start output projections at zero, so that every block starts as the identity."""

    def __post_init__(self) -> None:
        check(self.vocab_size >= 2, f"vocab_size must be >= 2, got {self.vocab_size}")
        check(self.hidden_size >= 1, f"hidden_size must be >= 1, got {self.hidden_size}")
        check(
            self.max_position_embeddings >= 1,
            f"max_position_embeddings must be >= 1, got {self.max_position_embeddings}",
        )
        check(self.registers >= 0, f"registers must be >= 0, got {self.registers}")
        check(0 <= self.dropout < 1, f"dropout must be in [0, 1), got {self.dropout}")
        check(self.init_std > 0, f"init_std must be > 0, got {self.init_std}")
        check(
            self.logit_softcap is None or self.logit_softcap > 0,
            f"logit_softcap must be > 0 or null, got {self.logit_softcap}",
        )
        if self.mixer.head_dim is None:
            check(
                self.hidden_size % self.mixer.num_heads == 0,
                f"hidden_size ({self.hidden_size}) must be a multiple of mixer.num_heads ({self.mixer.num_heads})"
                " unless mixer.head_dim is given",
            )
        parse(self.layout)  # the notation's own errors, at construction


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """Where text comes from and how it becomes windows of tokens."""

    sources: tuple[str, ...] = ("python:",)
    """``python:``, a file, a directory, a glob or ``hf:NAME``, each with an optional ``=weight``."""
    tokenizer: str = "bytes"
    """``bytes``, ``bpe:N`` (byte-level BPE of N entries trained on the training split) or a directory."""
    sequence_length: int = 512
    text_field: str = "text"
    """Field of jsonl, json and parquet records that holds the text."""
    valid_fraction: float = 0.05
    test_fraction: float = 0.05
    max_bytes: int | None = None
    """Read at most this many bytes of each source; required for ``hf:`` streams."""

    def __post_init__(self) -> None:
        check(len(self.sources) > 0, "data.sources is empty: name at least one source, e.g. --data notes.txt")
        check(self.sequence_length >= 2, f"data.sequence_length must be >= 2, got {self.sequence_length}")
        for name in ("valid_fraction", "test_fraction"):
            value = getattr(self, name)
            check(0 <= value < 0.5, f"data.{name} must be in [0, 0.5), got {value}")
        check(self.max_bytes is None or self.max_bytes > 0, f"data.max_bytes must be > 0, got {self.max_bytes}")


@dataclass(frozen=True, kw_only=True)
class OptimSpec:
    """Optimiser by parameter role: Muon for matrices, AdamW for the rest (or AdamW for all)."""

    matrix_optimizer: Literal["muon", "adamw"] = "muon"
    lr: float = 3e-3
    """Peak rate of matrices; Muon's update is scaled to AdamW's RMS, so one scale serves both."""
    embedding_lr: float | None = None
    """Peak rate of embeddings and the untied head; None means ``lr``."""
    vector_lr: float | None = None
    """Peak rate of norms, gains, biases and per-loop vectors; None means ``lr``."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices; embeddings and vectors are excluded."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    muon_momentum: float = 0.95
    muon_steps: int = 5
    schedule: Literal["wsd", "cosine", "constant"] = "wsd"
    warmup_fraction: float = 0.02
    decay_fraction: float = 0.4
    """Share of the run spent in the final linear decay of ``wsd``."""
    final_lr: float = 0.0
    """Rate at the end as a share of the peak."""
    clip_norm: float = 1.0
    """Global gradient norm limit; 0 turns clipping off."""

    def __post_init__(self) -> None:
        for name in ("lr", "embedding_lr", "vector_lr"):
            value = getattr(self, name)
            check(value is None or value > 0, f"optim.{name} must be > 0, got {value}")
        for name in ("warmup_fraction", "decay_fraction", "final_lr"):
            value = getattr(self, name)
            check(0 <= value <= 1, f"optim.{name} must be in [0, 1], got {value}")
        check(
            self.warmup_fraction + self.decay_fraction <= 1, "optim.warmup_fraction + optim.decay_fraction must be <= 1"
        )
        check(self.weight_decay >= 0, f"optim.weight_decay must be >= 0, got {self.weight_decay}")
        check(self.clip_norm >= 0, f"optim.clip_norm must be >= 0, got {self.clip_norm}")
        check(all(0 <= b < 1 for b in self.betas), f"optim.betas must be in [0, 1), got {self.betas}")
        check(0 <= self.muon_momentum < 1, f"optim.muon_momentum must be in [0, 1), got {self.muon_momentum}")
        check(1 <= self.muon_steps < 100, f"optim.muon_steps must be in 1..99, got {self.muon_steps}")


@dataclass(frozen=True, kw_only=True)
class LoopTraining:
    """Loop counts during training."""

    sampling: Literal["fixed", "uniform", "poisson"] = "fixed"
    """``fixed``: the layout's count. ``uniform``: min..max. ``poisson``: 1 + Poisson(mean - 1), clipped."""
    mean: float = 4.0
    min: int = 1
    max: int = 8
    backprop: int | None = None
    """Truncated backpropagation: only the last this many loops carry gradient; None means all."""
    curriculum: tuple[tuple[float, int], ...] = ()
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


@dataclass(frozen=True, kw_only=True)
class TrainSpec:
    """One training run. Exactly one of ``steps``, ``tokens`` and ``minutes`` says when it ends."""

    steps: int | None = None
    tokens: int | None = None
    minutes: float | None = None
    batch_size: int = 16
    """Sequences per optimiser step, over all processes and accumulation steps."""
    accumulation: int = 1
    seed: int = 0
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    compile: Literal["auto", "on", "off"] = "auto"
    activation_checkpointing: bool = False
    ema_decay: float = 0.0
    """Decay of the averaged weights that are evaluated and exported; 0 is off."""
    loops: LoopTraining = field(default_factory=LoopTraining)
    eval_every: int = 200
    """Steps between validations; 0 is off."""
    eval_bytes: int = 65_536
    """Validation bytes scored at each validation."""
    checkpoint_every: int = 500
    """Steps between checkpoints (and one at each new best validation); 0 saves at the end and on interruption only."""
    keep_last: int = 2
    log_every: int = 10
    telemetry_every: int = 0
    """Steps between per-loop telemetry records; 0 is off."""
    max_bad_steps: int = 10
    """Stop after this many steps in a row with a non-finite loss or gradient."""

    def __post_init__(self) -> None:
        given = [n for n in ("steps", "tokens", "minutes") if getattr(self, n) is not None]
        check(len(given) <= 1, f"train: give one of steps, tokens and minutes, not {' and '.join(given)}")
        for name in ("steps", "tokens", "minutes"):
            value = getattr(self, name)
            check(value is None or value > 0, f"train.{name} must be > 0, got {value}")
        for name in ("batch_size", "accumulation", "keep_last", "log_every", "eval_bytes", "max_bad_steps"):
            check(getattr(self, name) >= 1, f"train.{name} must be >= 1, got {getattr(self, name)}")
        for name in ("eval_every", "checkpoint_every", "telemetry_every"):
            check(getattr(self, name) >= 0, f"train.{name} must be >= 0, got {getattr(self, name)}")
        check(
            self.batch_size % self.accumulation == 0,
            f"train.batch_size ({self.batch_size}) must be a multiple of train.accumulation ({self.accumulation})",
        )
        check(abs(self.seed) < 2**63, f"train.seed must be within 63 bits, got {self.seed}")
        check(0 <= self.ema_decay < 1, f"train.ema_decay must be in [0, 1), got {self.ema_decay}")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A named system: a model and the way it is trained."""

    name: str
    description: str = ""
    model: ModelSpec = field(default_factory=ModelSpec)
    data: DataSpec = field(default_factory=DataSpec)
    optim: OptimSpec = field(default_factory=OptimSpec)
    train: TrainSpec = field(default_factory=TrainSpec)


def to_dict(spec: Any) -> dict[str, Any]:
    """The specification as plain JSON values (tuples become lists)."""
    return json.loads(json.dumps(dataclasses.asdict(spec)))


def to_json(spec: Any) -> str:
    """The specification as indented JSON text."""
    return json.dumps(to_dict(spec), indent=2) + "\n"


def from_dict(cls: type[T], values: dict[str, Any], *, where: str = "") -> T:
    """Read ``values`` as ``cls``, strictly.

    Raises:
        OuroborosError: an unknown key (the nearest valid one is offered), a wrong type, a bad value.
    """
    from pydantic import ValidationError

    _refuse_unknown_keys(cls, values, where or cls.__name__)
    try:
        return _adapter(cls).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise OuroborosError(f"{where or cls.__name__}: {place + ': ' if place else ''}{message}") from None


def from_json(cls: type[T], text: str, *, where: str = "") -> T:
    """Read JSON ``text`` as ``cls``; see :func:`from_dict`."""
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise OuroborosError(f"{where or cls.__name__}: not JSON: {error}") from None
    check(isinstance(values, dict), f"{where or cls.__name__}: expected a JSON object")
    return from_dict(cls, values, where=where)


@functools.cache
def _adapter(cls: Any) -> Any:
    """The validator of ``cls``; making one takes 20 ms, and a model reads its specification dozens of times."""
    from pydantic import TypeAdapter

    return TypeAdapter(cls)


_type_hints = functools.cache(typing.get_type_hints)


def _refuse_unknown_keys(cls: Any, values: Any, where: str) -> None:
    """Walk nested dataclasses and refuse keys they do not have."""
    if not dataclasses.is_dataclass(cls) or not isinstance(values, dict):
        return
    hints = _type_hints(cls)
    for key, value in values.items():
        if key not in hints:
            raise OuroborosError(f"{where}: unknown key {key!r}{nearest(key, hints)}")
        for candidate in (hints[key], *typing.get_args(hints[key])):
            if dataclasses.is_dataclass(candidate):
                _refuse_unknown_keys(candidate, value, f"{where}.{key}")

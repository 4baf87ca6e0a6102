"""``delta``: the delta residual in place of the addition (OUROBOROS, Deep Delta Learning; arXiv 2601.00417).

The published Python interface is here too::

    from ouroboros.recipes.delta import OuroborosConfig, OuroborosModel

    model = OuroborosModel(OuroborosConfig(hidden_size=256, num_hidden_layers=4, head_dim=64, num_attention_heads=4))
    logits, loss = model(input_ids, targets=next_ids)
"""

from __future__ import annotations

import dataclasses
import math
import typing
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ouroboros.config import (
    AttentionSpec,
    BlockSpec,
    DataSpec,
    FeedForwardSpec,
    ModelSpec,
    OptimSpec,
    Recipe,
    RMSNormSpec,
    RopeSpec,
    TrainSpec,
)
from ouroboros.config.parts.attention import Activation
from ouroboros.config.parts.delta import DeltaSpec
from ouroboros.config.parts.head import LinearHeadSpec
from ouroboros.errors import check, nearest
from ouroboros.recipes.gpt import gpt

if TYPE_CHECKING:
    from ouroboros.published import OuroborosModel

__all__ = ["SIZES", "OuroborosConfig", "OuroborosModel", "delta", "delta_published"]

_OTHER_NAMES = {
    "ddl_v_dim1_constant": "ouroboros_v_constant",
    "ddl_v_dim1_constant_value": "ouroboros_v_constant_value",
}
"""Field names of one published revision, and ours; ``ddl_x`` is otherwise ``ouroboros_x``."""
_ACTIVATIONS = typing.get_args(Activation)


@dataclass(frozen=True, kw_only=True, init=False)
class OuroborosConfig:
    """A model in the published field names and defaults; :attr:`spec` is the same as a ``ModelSpec``.

    Switches that Deep Delta Learning calls ``ddl_x`` are called ``ouroboros_x`` here; either name is accepted.

    Raises:
        OuroborosError: an unknown field (the nearest is offered), a wrong type, a value out of range, fields that
            contradict each other.
    """

    vocab_size: int = 50_304
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 6
    head_dim: int = 128
    block_size: int = 1024
    """Longest sequence, tokens."""
    ouroboros_k_eps: float = 1e-6
    """Guard of the direction: ``h / sqrt(|h|^2 + eps^2)``."""
    ouroboros_beta_init: float = 1.0
    ouroboros_beta_single_linear: bool = True
    """False: a gate of two layers, ``ouroboros_beta_hidden_size`` wide."""
    ouroboros_beta_hidden_size: int = 128
    ouroboros_v_sigmoid: bool = True
    """False: the target is linear."""
    ouroboros_v_sigmoid_scale: float = 4.0
    ouroboros_v_constant: bool = False
    """The target is ``ouroboros_v_constant_value``, whatever ``ouroboros_v_sigmoid`` says."""
    ouroboros_v_constant_value: float = 2.0
    ouroboros_value_channels: int = 1
    """Value channels of the state; more than 1 is the expanded state."""
    ouroboros_compressor: Literal["channel", "token"] = "channel"
    """What reads an expanded state (two model files in the published code)."""
    ouroboros_state_shortconv_kernel_size: int = 4
    ouroboros_embedding_conv: bool = False
    """Start an expanded state with a convolution over embeddings (a model file of its own in the published code)."""
    input_embed_shortconv_kernel_size: int = 4
    use_qk_rmsnorm: bool = True
    using_groupnorm: bool = False
    use_output_gate: bool = False
    use_k_shift: bool = False
    use_v_shift: bool = False
    q_activation: Activation | None = None
    k_activation: Activation | None = None
    v_activation: Activation | None = None
    rope_ratio: float = 1.0
    embedding_init_std: float = 0.02
    hidden_init_std_factor: float = 0.5
    """Standard deviation of weights is this number over ``sqrt(hidden_size)``."""
    mup: bool = False
    """Multiply the logits by ``hidden_size_base / hidden_size``."""
    hidden_size_base: int = 1024

    def __init__(self, **fields: Any) -> None:
        values = _known_fields(fields, {field.name for field in dataclasses.fields(self)})
        for field in dataclasses.fields(self):
            value = _typed(field.name, values[field.name], field.default) if field.name in values else field.default
            object.__setattr__(self, field.name, value)
        self._check()

    def _check(self) -> None:
        """Ranges and contradictions, with the reasons."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if type(field.default) is int:
                check(value >= 1, f"{field.name} must be >= 1, got {value}")
        for name in ("ouroboros_k_eps", "ouroboros_v_sigmoid_scale", "embedding_init_std"):
            check(getattr(self, name) > 0, f"{name} must be > 0, got {getattr(self, name)}")
        check(
            self.hidden_init_std_factor > 0,
            f"hidden_init_std_factor must be > 0, got {self.hidden_init_std_factor}: weights of 0 give sublayer outputs"
            " of 0, where the direction's gradient is 1 / ouroboros_k_eps and clipping erases every other gradient",
        )
        check(0 <= self.rope_ratio <= 1, f"rope_ratio must be in [0, 1], got {self.rope_ratio}")
        beta = self.ouroboros_beta_init
        check(0 <= beta <= 2, f"ouroboros_beta_init must be in [0, 2], the range of the gate 2 sigmoid(.), got {beta}")
        values, kernel = self.ouroboros_value_channels, self.ouroboros_state_shortconv_kernel_size
        check(
            values > 1 or not (self.ouroboros_embedding_conv or self.ouroboros_compressor == "token"),
            "ouroboros_embedding_conv and ouroboros_compressor are parts of the expanded state: set"
            " ouroboros_value_channels to more than 1 (published: 4) or leave them out",
        )
        check(
            values == 1 or self.ouroboros_compressor == "token" or kernel >= values,
            f"ouroboros_state_shortconv_kernel_size ({kernel}) must be at least ouroboros_value_channels ({values})"
            " with the channel compressor: a smaller filter leaves value channels unread",
        )
        if self._delta().frozen_gate:
            warnings.warn(
                f"ouroboros_beta_init={beta} starts the gate where its derivative is almost 0, so it does not learn;"
                " for a start near the identity take 0.01 to 0.1",
                UserWarning,
                stacklevel=3,
            )

    @property
    def spec(self) -> ModelSpec:
        """The specification of this model."""
        d = self.hidden_size
        return ModelSpec(
            layout=str(self.num_hidden_layers),
            vocab_size=self.vocab_size,
            hidden_size=d,
            max_position_embeddings=self.block_size,
            block=BlockSpec(
                mixer=AttentionSpec(
                    num_heads=self.num_attention_heads,
                    head_dim=self.head_dim,
                    qk_norm="after_rope" if self.use_qk_rmsnorm else "none",
                    rope=RopeSpec(fraction=self.rope_ratio),
                    k_shift=self.use_k_shift,
                    v_shift=self.use_v_shift,
                    head_norm=self.using_groupnorm,
                    output_gate=self.use_output_gate,
                    q_activation=self.q_activation or "none",
                    k_activation=self.k_activation or "none",
                    v_activation=self.v_activation or "none",
                ),
                ffn=FeedForwardSpec(intermediate_size=8 * d // 3),
                norm=RMSNormSpec(eps=1e-5),
                residual=self._delta(),
            ),
            head=LinearHeadSpec(logit_scale=self.hidden_size_base / d if self.mup else 1.0),
            init_std=self.hidden_init_std_factor / math.sqrt(d),
            embedding_std=self.embedding_init_std,
            output_init="depth_scaled",
        )

    def _delta(self) -> DeltaSpec:
        value = "constant" if self.ouroboros_v_constant else "sigmoid" if self.ouroboros_v_sigmoid else "linear"
        return DeltaSpec(
            values=self.ouroboros_value_channels,
            compressor=self.ouroboros_compressor,
            kernel=self.ouroboros_state_shortconv_kernel_size,
            compressor_init="normal",
            embedding_conv=self.ouroboros_embedding_conv,
            embedding_kernel=self.input_embed_shortconv_kernel_size,
            gate="linear" if self.ouroboros_beta_single_linear else "two_layer",
            gate_hidden=self.ouroboros_beta_hidden_size,
            beta_init=self.ouroboros_beta_init,
            value=value,
            value_scale=self.ouroboros_v_sigmoid_scale,
            value_constant=self.ouroboros_v_constant_value,
            eps=self.ouroboros_k_eps,
        )


def _known_fields(fields: dict[str, Any], known: set[str]) -> dict[str, Any]:
    """``fields`` under our names."""
    found: dict[str, Any] = {}
    for name, value in fields.items():
        if name == "ddl_state_dv_shortconv_causal" and value is False:
            continue  # the default of a published switch that does nothing
        ours = _OTHER_NAMES.get(name, "ouroboros_" + name[4:] if name.startswith("ddl_") else name)
        check(ours in known, f"OuroborosConfig: unknown field {name!r}{nearest(ours, known)}")
        check(ours not in found, f"OuroborosConfig: {name} and another name of {ours} are both given: give one")
        found[ours] = value
    return found


def _typed(name: str, value: Any, default: Any) -> Any:
    """``value`` if it is of the type of ``default``; an int passes for a float."""
    if name.endswith("_activation"):
        fits = value is None or value in _ACTIVATIONS
        check(fits, f"{name} must be null or one of {', '.join(_ACTIVATIONS)}, got {value!r}")
        return value
    if name == "ouroboros_compressor":
        check(value in ("channel", "token"), f"{name} must be 'channel' or 'token', got {value!r}")
        return value
    kinds = {float: (int, float)}.get(type(default), type(default))
    fits = isinstance(value, kinds) and (type(default) is bool or not isinstance(value, bool))
    check(fits, f"{name} must be of type {type(default).__name__}, got {value!r}")
    return float(value) if type(default) is float else value


_SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"vocab_size": 257, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "head_dim": 32},
    "small": {"vocab_size": 257, "hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 2, "head_dim": 64},
    "published": {},
    "medium": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 8},
}
"""``tiny`` and ``small`` are the plain decoder's; the other two are published. What is not said is as published."""
SIZES = tuple(_SHAPES)
_LAPTOP = ("tiny", "small")


def delta(size: str = "small") -> Recipe:
    """The plain decoder with the delta residual, as it should be: queries and keys are normalised before the rotation
    (so that scores depend on distances alone), norms have a smaller eps, and compressors start as an average.

    With ``residual`` set to ``additive`` it is its own control arm.
    """
    published = OuroborosConfig(**_SHAPES[size]).spec
    mixer = dataclasses.replace(published.block.mixer, qk_norm="before_rope")
    block = dataclasses.replace(published.block, mixer=mixer, norm=RMSNormSpec(), residual=DeltaSpec())
    model = dataclasses.replace(published, block=block)
    if size in _LAPTOP:
        plain = gpt(size)
        model = dataclasses.replace(
            model,
            block=dataclasses.replace(block, ffn=plain.model.block.ffn),
            max_position_embeddings=plain.model.max_position_embeddings,
        )
        data, optim, train = plain.data, plain.optim, plain.train
    else:
        data, optim, train = _PUBLISHED_DATA, OptimSpec(), _PUBLISHED_TRAINING
    return Recipe(
        name="delta",
        description="delta residual: each sublayer erases and writes along one direction",
        model=model,
        data=data,
        optim=optim,
        train=train,
    )


def delta_published(size: str = "published") -> Recipe:
    """The model as published, for parity: RMS gains after the rotation, eps 1e-5, random compressors; AdamW, cosine."""
    plain = gpt(size) if size in _LAPTOP else None
    return Recipe(
        name="delta-published",
        description="delta as published: query/key norm after the rotation, AdamW with a cosine",
        model=OuroborosConfig(**_SHAPES[size]).spec,
        data=_PUBLISHED_DATA if plain is None else plain.data,
        optim=OptimSpec(matrix_optimizer="adamw", lr=1e-3, schedule="cosine"),
        train=_PUBLISHED_TRAINING if plain is None else plain.train,
    )


_PUBLISHED_DATA = DataSpec(tokenizer="bpe:4096", sequence_length=1024)
_PUBLISHED_TRAINING = TrainSpec(batch_size=480, accumulation=60)
"""100,000 updates of 480 sequences were published, on four large accelerators."""


def __getattr__(name: str) -> Any:
    """The published model class on first use: recipes are values and need no torch."""
    if name == "OuroborosModel":
        from ouroboros.published import OuroborosModel

        return OuroborosModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

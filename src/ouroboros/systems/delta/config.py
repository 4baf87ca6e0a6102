"""The published settings of a delta-residual model as its specification here."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any, Literal

from ouroboros.config import AttentionSpec, BlockSpec, FeedForwardSpec, ModelSpec, RMSNormSpec, RopeSpec
from ouroboros.config.parts.attention import Activation
from ouroboros.config.parts.delta import DeltaSpec
from ouroboros.config.parts.head import LinearHeadSpec
from ouroboros.errors import check


@dataclass(frozen=True, kw_only=True)
class OuroborosConfig:
    """A model in the published field names and defaults; :attr:`spec` is the same as a ``ModelSpec``.

    Deep Delta Learning calls the switches ``ddl_x`` that are called ``ouroboros_x`` here; its settings are read by
    :func:`~ouroboros.config.codec.from_dict`.

    Raises:
        OuroborosError: a value out of range, fields that contradict each other.
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

    def __post_init__(self) -> None:
        check(
            self.hidden_init_std_factor > 0,
            f"hidden_init_std_factor must be > 0, got {self.hidden_init_std_factor}: weights of 0 give sublayer outputs"
            " of 0, where the direction's gradient is 1 / ouroboros_k_eps and clipping erases every other gradient",
        )
        for text in self.spec.warnings():  # the specification checks everything else as it is made
            warnings.warn(text, UserWarning, stacklevel=3)

    @staticmethod
    def migrate(values: dict[str, Any]) -> dict[str, Any]:
        """Settings under any of their published names, by the names here.

        Raises:
            OuroborosError: one field under two of its names.
        """
        found: dict[str, Any] = {}
        for name, value in values.items():
            ours = name.replace("ddl_v_dim1_", "ddl_v_").replace("ddl_", "ouroboros_")
            check(ours not in found, f"{name} and another name of {ours} are both given: give one")
            found[ours] = value
        return found

    @property
    def spec(self) -> ModelSpec:
        """The specification of this model."""
        d, value = self.hidden_size, "sigmoid" if self.ouroboros_v_sigmoid else "linear"
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
                residual=DeltaSpec(
                    values=self.ouroboros_value_channels,
                    compressor=self.ouroboros_compressor,
                    kernel=self.ouroboros_state_shortconv_kernel_size,
                    compressor_init="normal",
                    embedding_conv=self.ouroboros_embedding_conv,
                    embedding_kernel=self.input_embed_shortconv_kernel_size,
                    gate="linear" if self.ouroboros_beta_single_linear else "two_layer",
                    gate_hidden=self.ouroboros_beta_hidden_size,
                    beta_init=self.ouroboros_beta_init,
                    value="constant" if self.ouroboros_v_constant else value,
                    value_scale=self.ouroboros_v_sigmoid_scale,
                    value_constant=self.ouroboros_v_constant_value,
                    eps=self.ouroboros_k_eps,
                ),
            ),
            head=LinearHeadSpec(logit_scale=self.hidden_size_base / d if self.mup else 1.0),
            init_std=self.hidden_init_std_factor / math.sqrt(d),
            embedding_std=self.embedding_init_std,
            output_init="depth_scaled",
        )

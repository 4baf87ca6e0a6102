"""The published configuration of delta-residual models."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from ouroboros.accounting import cost
from ouroboros.config.codec import from_dict
from ouroboros.config.parts.residual import AdditiveResidualSpec
from ouroboros.errors import OuroborosError
from ouroboros.systems.delta.config import OuroborosConfig

MEDIUM = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 8}
CHANNEL = {"ouroboros_value_channels": 4}
TOKEN = {"ouroboros_value_channels": 4, "ouroboros_compressor": "token"}


@pytest.mark.parametrize(
    ("fields", "small", "medium"),
    [
        ({}, 123_627_312, 353_606_752),
        (TOKEN, 123_842_476, 354_164_052),
        ({**TOKEN, "ouroboros_embedding_conv": True}, 123_854_764, 354_180_436),
        (CHANNEL, 123_722_668, 353_856_852),
        ({**CHANNEL, "ouroboros_embedding_conv": True}, 123_734_956, 353_873_236),
    ],
    ids=str,
)
def test_published_parameter_counts(fields: dict[str, Any], small: int, medium: int) -> None:
    for shape, expected, additive in (({}, small, 123_590_400), (MEDIUM, medium, 353_508_352)):
        spec = OuroborosConfig(**shape, **fields).spec
        assert cost(spec).parameters == expected
        assert cost(spec.replace(residual=AdditiveResidualSpec())).parameters == additive


def read(**settings: Any) -> OuroborosConfig:
    """The configuration of published settings."""
    return from_dict(OuroborosConfig, settings)


def test_fields_become_the_specification() -> None:
    config = read(
        hidden_size=24,
        num_attention_heads=2,
        head_dim=8,
        block_size=64,
        ddl_k_eps=1e-5,
        ddl_beta_init=0.5,
        ddl_beta_single_linear=False,
        ouroboros_beta_hidden_size=6,
        ddl_v_sigmoid=False,
        use_k_shift=True,
        use_output_gate=True,
        using_groupnorm=True,
        use_qk_rmsnorm=False,
        q_activation="silu",
        rope_ratio=0.5,
        mup=True,
        hidden_size_base=48,
    )
    spec, delta, mixer = config.spec, config.spec.block.residual, config.spec.block.mixer
    assert (delta.eps, delta.beta_init, delta.gate, delta.gate_hidden, delta.value) == (
        1e-5,
        0.5,
        "two_layer",
        6,
        "linear",
    )
    assert (mixer.k_shift, mixer.v_shift, mixer.output_gate, mixer.head_norm) == (True, False, True, True)
    assert (mixer.qk_norm, mixer.q_activation, mixer.k_activation) == ("none", "silu", "none")
    assert (mixer.rope.fraction, spec.head.logit_scale, spec.block.ffn.intermediate_size) == (0.5, 2.0, 64)
    assert (spec.max_position_embeddings, spec.output_init, spec.embedding_std) == (64, "depth_scaled", 0.02)
    constant = read(ddl_v_dim1_constant=True, ddl_v_constant_value=1).spec.block.residual
    assert (constant.value, constant.value_constant) == ("constant", 1.0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hiden_size": 8}, r"unknown key 'hiden_size'; did you mean 'hidden_size'\?"),
        ({"ddl_kk_eps": 8}, "unknown key 'ouroboros_kk_eps'; did you mean 'ouroboros_k_eps'"),
        ({"ddl_k_eps": 1e-5, "ouroboros_k_eps": 1e-5}, "both given: give one"),
        ({"hidden_size": "x"}, "hidden_size: Input should be a valid integer"),
        ({"num_hidden_layers": 0}, "layout"),
        ({"q_activation": "gelu"}, "q_activation.*Input should be"),
        ({"ouroboros_compressor": "both"}, "Input should be 'channel' or 'token'"),
        ({"ouroboros_beta_init": 2.5}, r"beta_init must be in \[0, 2\]"),
        ({"hidden_init_std_factor": 0}, "weights of 0 give sublayer outputs of 0"),
        ({"ouroboros_value_channels": 4, "ddl_state_shortconv_kernel_size": 3}, "leaves value channels unread"),
        ({"ouroboros_compressor": "token"}, "values to more than 1"),
        ({"ouroboros_k_eps": 0}, "residual.eps must be > 0"),
        ({"rope_ratio": 2}, r"rope.fraction must be in \[0, 1\]"),
    ],
    ids=str,
)
def test_bad_fields(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(OuroborosError, match=message) as caught:
        read(**fields)
    assert "\n" not in str(caught.value)


def test_a_frozen_gate_is_reported() -> None:
    for start in (0, 2):
        with pytest.warns(UserWarning, match=r"derivative is almost 0.*take 0.01 to 0.1"):
            OuroborosConfig(ouroboros_beta_init=start)
    assert OuroborosConfig(ouroboros_beta_init=0.01).ouroboros_beta_init == 0.01


def test_the_configuration_needs_no_torch() -> None:
    code = (
        "import sys; from ouroboros.systems.delta import OuroborosConfig; OuroborosConfig().spec;"
        " sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

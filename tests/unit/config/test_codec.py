"""Specifications: exact round trips, strict reading."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ouroboros.config import (
    AttentionSpec,
    BlockOverride,
    BlockSpec,
    DataSpec,
    FeedForwardSpec,
    LayerNormSpec,
    LoopTraining,
    ModelSpec,
    NoFeedForwardSpec,
    OptimSpec,
    Recipe,
    RMSNormSpec,
    RopeSpec,
    TrainSpec,
    fields_by_path,
    from_dict,
    from_json,
    to_dict,
    to_json,
)
from ouroboros.config.parts.delta import DeltaSpec
from ouroboros.config.parts.head import LinearHeadSpec
from ouroboros.config.parts.latent import BottleneckAttentionSpec, LatentAttentionSpec
from ouroboros.config.parts.loop import ContractiveStepSpec, InjectionSpec, LoopNormSpec, RecurrenceGateSpec
from ouroboros.config.parts.osam import OsamSpec
from ouroboros.config.parts.residual import AdditiveResidualSpec
from ouroboros.config.parts.stem import EmbeddingNormSpec, LearnedPositionsSpec
from ouroboros.errors import OuroborosError
from ouroboros.recipes import RECIPES

positive = st.floats(1e-6, 1e6)
share = st.floats(0, 0.99)
ropes = st.builds(RopeSpec, base=st.floats(1.5, 1e7), fraction=st.floats(0, 1), scale=positive)
mixers = st.builds(
    AttentionSpec,
    num_heads=st.just(12),
    num_kv_heads=st.sampled_from([None, 1, 2, 3, 4, 6, 12]),
    head_dim=st.integers(1, 256),
    qkv_bias=st.booleans(),
    qk_norm=st.sampled_from(["none", "before_rope", "after_rope"]),
    query_gain=st.none() | st.floats(-5, 5),
    dropout=share,
    rope=ropes,
)
latents = st.builds(LatentAttentionSpec, num_heads=st.just(12), head_dim=st.just(8), query_rank=st.integers(0, 9))
bottlenecks = st.builds(BottleneckAttentionSpec, head_dim=st.just(8), cache=st.sampled_from(["keys_values", "latent"]))
memories = st.builds(OsamSpec, buckets=st.integers(1, 99), decay=st.booleans(), time_scales=st.just((2.0, 9.0)))
placements = st.sampled_from(["pre", "sandwich", "final"])
blocks = st.builds(
    BlockSpec,
    mixer=mixers | latents | bottlenecks | memories,
    ffn=st.builds(FeedForwardSpec, kind=st.sampled_from(["swiglu", "geglu", "relu2", "leaky_relu2", "gelu"]))
    | st.builds(NoFeedForwardSpec),
    norm=st.builds(RMSNormSpec, placement=placements, eps=st.floats(1e-12, 1e-1))
    | st.builds(LayerNormSpec, placement=placements),
    residual=st.builds(AdditiveResidualSpec)
    | st.builds(DeltaSpec, values=st.integers(1, 4), beta_init=st.floats(0, 2)),
    dropout=share,
)
loop_parts = st.lists(
    st.builds(InjectionSpec, mode=st.sampled_from(["add", "concat"]))
    | st.builds(LoopNormSpec, rows=st.none() | st.integers(1, 99))
    | st.builds(RecurrenceGateSpec, bias=st.floats(-9, 9))
    | st.builds(ContractiveStepSpec, step=st.floats(0.01, 1)),
    unique_by=lambda part: part.kind,
).map(tuple)
overrides = st.lists(
    st.builds(BlockOverride, where=st.sampled_from(["0", "0-1"]), set=st.just({"dropout": 0.5})), max_size=2
).map(tuple)
models = st.builds(
    ModelSpec,
    layout=st.sampled_from(["3", "(2)x8", "2 w:(2)x3 2"]),
    vocab_size=st.integers(2, 10**6),
    hidden_size=st.integers(1, 10**4),
    block=blocks,
    overrides=overrides,
    stem=st.sampled_from([(), (EmbeddingNormSpec(),), (EmbeddingNormSpec(), LearnedPositionsSpec())]),
    loop=loop_parts,
    head=st.builds(LinearHeadSpec, logit_softcap=st.none() | positive),
    share_last_kv=st.booleans(),
    tie_embeddings=st.booleans(),
)


@given(models)
def test_model_round_trip(spec: ModelSpec) -> None:
    assert from_json(ModelSpec, to_json(spec)) == spec
    assert from_dict(ModelSpec, to_dict(spec)) == spec


curriculum = st.lists(st.tuples(st.floats(0.01, 1), st.integers(1, 9)), max_size=3).map(
    lambda pairs: ((0.0, 1), *sorted(pairs)) if pairs else ()
)


@given(curriculum, st.tuples(share, share), st.lists(st.text(min_size=1), min_size=1))
def test_recipe_round_trip_keeps_tuples(
    steps: tuple[tuple[float, int], ...], betas: tuple[float, float], sources: list[str]
) -> None:
    recipe = Recipe(
        name="x",
        data=DataSpec(sources=tuple(sources)),
        optim=OptimSpec(betas=betas),
        train=TrainSpec(loops=LoopTraining(curriculum=steps)),
    )
    assert from_json(Recipe, to_json(recipe)) == recipe


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_shipped_recipes_round_trip(name: str) -> None:
    assert from_json(Recipe, to_json(RECIPES[name])) == RECIPES[name]


def test_missing_keys_take_their_defaults() -> None:
    assert from_dict(ModelSpec, {}) == ModelSpec()
    gated = from_dict(ModelSpec, {"loop": [{"kind": "gate"}]})
    assert gated == ModelSpec(loop=(RecurrenceGateSpec(),))
    assert from_dict(ModelSpec, {"block": {"ffn": {"bias": True}}}) == ModelSpec().replace(
        ffn=FeedForwardSpec(bias=True)
    )


@pytest.mark.parametrize("name", ["mixer", "ffn", "norm", "residual"])
def test_a_part_without_a_kind_is_of_the_fields_default_kind(name: str) -> None:
    assert from_dict(ModelSpec, {"block": {name: {}}}) == ModelSpec()


def test_fields_by_path_name_parts_of_a_list_by_their_kind() -> None:
    spec = ModelSpec(layout="(1)x2", loop=(RecurrenceGateSpec(bias=1.0),), stem=(EmbeddingNormSpec(),))
    fields = fields_by_path(spec)
    assert fields["loop.gate.bias"] == 1.0 and fields["stem.norm.kind"] == "norm"
    assert fields["block.mixer.rope.base"] == 10_000.0 and fields["layout"] == "(1)x2"
    assert fields_by_path(ModelSpec())["loop"] == []


def test_specifications_are_values() -> None:
    assert hash(ModelSpec()) == hash(ModelSpec())
    with pytest.raises(dataclasses.FrozenInstanceError):
        ModelSpec().hidden_size = 3  # type: ignore[misc]  # pyrefly: ignore
    with pytest.raises(TypeError):
        RopeSpec(10.0)  # type: ignore[misc]  # pyrefly: ignore


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hiden_size": 3}, r"ModelSpec: unknown key 'hiden_size'; did you mean 'hidden_size'\?"),
        (
            {"block": {"mixer": {"heads": 3}}},
            r"ModelSpec\.block\.mixer: unknown key 'heads'; did you mean 'num_heads'\?",
        ),
        (
            {"block": {"mixer": {"rope": {"theta": 3}}}},
            r"ModelSpec\.block\.mixer\.rope: unknown key 'theta'; known: base, fraction, loop_scales",
        ),
        ({"hidden_size": "big"}, r"hidden_size: .*valid integer"),
        ({"hidden_size": 2.5}, r"hidden_size: .*valid integer"),
        ({"hidden_size": None}, r"hidden_size: .*valid integer"),
        ({"tie_embeddings": "perhaps"}, r"tie_embeddings: .*valid boolean"),
        ({"block": 4}, r"ModelSpec\.block: expected an object, got 4"),
        ({"block": {"mixer": 4}}, r"ModelSpec\.block\.mixer: expected an object with a kind, got 4"),
        ({"block": {"mixer": {"kind": "latent"}}}, r"mixer\.kind: unknown kind 'latent'; did you mean 'attention'\?"),
        (
            {"block": {"mixer": {"kind": "latent_attention", "rank": 2}}},
            r"mixer: unknown key 'rank'; did you mean 'kv_rank'\?",
        ),
        ({"block": {"mixer": {"kind": "latent_attention", "num_heads": "a"}}}, r"mixer\.num_heads: .*valid integer"),
        ({"block": {"ffn": {"kind": "relu"}}}, r"ffn\.kind: .*'relu2'"),
        ({"block": {"mixer": {"qk_norm": "yes"}}}, r"mixer\.qk_norm: .*'before_rope'"),
        ({"block": {"mixer": {"kind": ["attention"]}}}, r"mixer\.kind: unknown kind \['attention'\]"),
        ({"stem": {"kind": "norm"}}, r"ModelSpec\.stem: expected a list, got"),
        ({"loop": [{"kind": "gait"}]}, r"ModelSpec\.loop\.0\.kind: unknown kind 'gait'; did you mean 'gate'\?"),
        ({"overrides": [{"where": "9", "set": {"dropout": 0.1}}]}, r"ModelSpec: layout '6' has blocks 0 to 5, not 9"),
        ({"vocab_size": 1}, r"vocab_size must be >= 2, got 1"),
        ({"layout": "(2)x0"}, r"layout '\(2\)x0', column 5"),
        ({"loop": [{"kind": "contractive", "step": 0}]}, r"loop\.0: loop\.contractive.* must be in \(0, 1\], got 0"),
    ],
    ids=str,
)
def test_strict_reading(values: dict[str, Any], message: str) -> None:
    for read in (lambda: from_dict(ModelSpec, values), lambda: from_json(ModelSpec, json.dumps(values))):
        with pytest.raises(OuroborosError, match=message) as caught:
            read()
        assert "\n" not in str(caught.value)


def test_errors_say_where() -> None:
    with pytest.raises(OuroborosError, match=r"^run/recipe\.json\.model: unknown key 'x'"):
        from_dict(Recipe, {"name": "a", "model": {"x": 1}}, where="run/recipe.json")
    with pytest.raises(OuroborosError, match=r"^run/recipe\.json: name: Field required"):
        from_dict(Recipe, {}, where="run/recipe.json")


@pytest.mark.parametrize(
    ("text", "message"), [("{", "not JSON"), ("[]", "expected a JSON object"), ("", "not JSON"), ("3", "JSON object")]
)
def test_not_an_object(text: str, message: str) -> None:
    with pytest.raises(OuroborosError, match=message):
        from_json(ModelSpec, text)

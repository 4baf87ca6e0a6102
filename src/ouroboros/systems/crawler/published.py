"""The published program's settings under its own names, and the model that they describe (spec of the pull requests
openai/parameter-golf#1308 and #1283; names are in docs/systems/crawler.md)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ouroboros.config import AttentionSpec, BlockOverride, BlockSpec, FeedForwardSpec, ModelSpec, RMSNormSpec, RopeSpec
from ouroboros.config.codec import to_dict
from ouroboros.config.part import FeedForwardPart, LoopPart, StemPart, TopologyPart
from ouroboros.config.parts.choke import ChokeSpec
from ouroboros.config.parts.head import LinearHeadSpec
from ouroboros.config.parts.helix import CrossSpec, HelixSpec
from ouroboros.config.parts.loop import (
    AnchorSpec,
    ContractiveStepSpec,
    FlowSpec,
    LoopEmbeddingSpec,
    LoopGainSpec,
    LoopSmearSpec,
)
from ouroboros.config.parts.residual import NoResidualSpec, ScaledResidualSpec
from ouroboros.config.parts.stem import EmbeddingNormSpec, NgramSpec, SmearSpec
from ouroboros.config.parts.tap import TapSpec
from ouroboros.config.parts.topology import ChainSpec, UNetSpec
from ouroboros.config.parts.values import ValueEmbeddingSpec
from ouroboros.errors import check, nearest
from ouroboros.systems.crawler.parts import UnconnectedValuesSpec

EPS = 1.1920928955078125e-07
"""The smallest float32 that added to 1 gives more, which the published norms add."""
_CHOKES = {"pyramid_res": "pyramid_residual"}
_ACTIVATIONS = {"relu_sq": "relu2", "leaky_relu_sq": "leaky_relu2"}


@dataclass(frozen=True, kw_only=True)
class Published:
    """Settings of the published program, lower case; of the plain model those with ``num_layers``."""

    num_layers: int | None = None
    """Blocks of the plain model, which has no shared ones; the crawler has the next three instead."""
    num_flat_layers: int = 4
    num_crawler_layers: int = 1
    crawler_loops: int = 2
    vocab_size: int = 1024
    model_dim: int = 512
    num_heads: int = 8
    num_kv_heads: int = 4
    mlp_mult: float = 3.0
    crawler_mlp_mult: float = 4.0
    mlp_act: str = "relu_sq"
    mlp_leaky_slope: float = 0.5
    crawler_mlp_leaky_slope: float = 0.5
    crawler_mlp_choke_dim: int = 0
    crawler_mlp_choke_shape: str = "flat"
    crawler_mlp_choke_groups: int = 8
    tie_embeddings: bool = True
    tied_embed_init_std: float = 0.005
    logit_softcap: float = 30.0
    rope_base: float = 10_000.0
    rope_dims: int = 16
    qk_gain_init: float = 1.5
    bigram_vocab_size: int = 2048
    bigram_dim: int = 128
    trigram: bool = False
    xsa_last_n: int = 11
    ln_scale: bool = True
    ve_enabled: bool = True
    ve_dim: int = 128
    ve_layers: str = "9,10"
    inst_dim: int = 32
    anchor_dim: int = 0
    crawler_loop_smear: bool = False
    crawler_loop_rope_scales: tuple[float, ...] = (1, 1, 1)
    crawler_tap_dim: int = 0
    crawler_tap_loop_specific: bool = True
    crawler_tap_layers: str = "all"
    crawler_cannon_type: str = "none"
    flat_weight_share: bool = False
    helix_enabled: bool = False
    helix_dim: int = 32
    helix_stride: int = 1
    helix_cross_attn: bool = False
    helix_fire_embed: bool = False
    helix_inject_cap: float = 0.0
    helix_merge_cap: float = 0.0
    contractive_dt: float = 1.0
    cross_heads: int = 0
    confidence_gated_skips: bool = False
    skip_taken_after_hint: bool = False
    rotary_reference_length: int = 1024
    keep_unconnected: bool = False
    """Also make parameters that no visit reads, as the program did."""

    @classmethod
    def read(cls, settings: Mapping[str, Any]) -> Published:
        """From names to values.

        Raises:
            OuroborosError: an unknown name, or a feature of the program that no result used.
        """
        fields = {field.name for field in dataclasses.fields(cls)}
        settings = dict(settings)
        for name, off in _UNUSED.items():
            check(settings.pop(name, off) == off, f"{name}: no published result used it, and it is not read here")
        for name in settings:
            check(name in fields, f"unknown setting {name!r}{nearest(name, fields)}")
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
        return cls(**values)

    @property
    def flats(self) -> int:
        """N, the blocks that are used once."""
        return self.num_flat_layers if self.num_layers is None else self.num_layers

    @property
    def shared(self) -> int:
        """M, the blocks that are used again."""
        return self.num_crawler_layers if self.num_layers is None else 0

    @property
    def firings(self) -> int:
        """How often Helix runs the shared blocks."""
        return self.flats // self.helix_stride

    def flat_block(self, index: int) -> int:
        """Our number of a flat block."""
        if self.flat_weight_share:
            return index
        if not self.helix_enabled:
            return index if index < self.flats // 2 else index + self.shared
        between = self.shared + (2 if self.helix_cross_attn else 0)
        return index if index < self.helix_stride else index + between

    def shared_block(self, index: int) -> int:
        """Our number of a shared block."""
        if self.flat_weight_share:
            return 2 + index
        if self.helix_enabled:
            return self.helix_stride + (2 if self.helix_cross_attn else 0) + index
        return self.flats // 2 + index

    @property
    def layout(self) -> str:
        """Our notation of the visits; the shared blocks are named ``crawler``."""
        n, m = self.flats, self.shared
        if m == 0:
            return str(n)
        crawl = f"crawler:({m})x{self.crawler_loops}"
        if self.flat_weight_share:
            check(n == 4, f"flat_weight_share is for num_flat_layers 4, got {n}")
            return f"outer:1 inner:1 {crawl} inner outer"
        if self.helix_enabled:
            return helix_layout(n, m, self.helix_stride, attention=self.helix_cross_attn)
        before, after = n // 2, n - n // 2
        return " ".join([*([str(before)] if before else []), crawl, *([str(after)] if after else [])])

    def model(self, context: int = 2048) -> ModelSpec:
        """The model, for sequences of ``context`` tokens, to which the rotation is scaled once."""
        return ModelSpec(
            layout=self.layout,
            vocab_size=self.vocab_size,
            hidden_size=self.model_dim,
            max_position_embeddings=context,
            block=self._block(),
            overrides=tuple(self._overrides()),
            topology=self._topology(),
            stem=tuple(self._stem()),
            loop=tuple(self._loop()),
            head=LinearHeadSpec(logit_softcap=self.logit_softcap or None),
            tie_embeddings=self.tie_embeddings,
            embedding_std=self.tied_embed_init_std,
            zero_init_outputs=True,
        )

    def _block(self) -> BlockSpec:
        head = self.model_dim // self.num_heads
        return BlockSpec(
            mixer=AttentionSpec(
                num_heads=self.num_heads,
                num_kv_heads=self.num_kv_heads,
                qk_norm="before_rope",
                qk_norm_gain=False,
                query_gain=self.qk_gain_init,
                rope=RopeSpec(
                    base=self.rope_base,
                    fraction=(self.rope_dims or head) / head,
                    original_context=self.rotary_reference_length,
                ),
            ),
            ffn=self._ffn(self.mlp_mult, self.mlp_leaky_slope),
            norm=RMSNormSpec(gain=False, eps=EPS, depth_scale=self.ln_scale),
            residual=ScaledResidualSpec(stem_mix=True),
        )

    def _ffn(self, multiple: float, slope: float) -> FeedForwardSpec:
        check(self.mlp_act in _ACTIVATIONS, f"unknown mlp_act {self.mlp_act!r}{nearest(self.mlp_act, _ACTIVATIONS)}")
        kind: Any = _ACTIVATIONS[self.mlp_act]
        plain = FeedForwardSpec(kind=kind, intermediate_size=int(multiple * self.model_dim))
        return plain.replace(negative_slope=slope) if kind == "leaky_relu2" else plain

    def _overrides(self) -> list[BlockOverride]:
        """What single blocks have of their own: the depth, which the program counts in its own order, and the rest."""
        found: list[BlockOverride] = []
        listed = [int(item) for item in self.ve_layers.split(",")] if self.ve_enabled and self.ve_layers else []
        for index in range(2 if self.flat_weight_share else self.flats):
            block = self.flat_block(index)
            own: dict[str, Any] = {"norm.depth": index + 1} if self.ln_scale and block != index else {}
            if self.shared == 0:
                own |= self._chosen(index, self.flats, listed)
            found.append(BlockOverride(where=str(block), set=own))
        for index in range(self.shared):
            own = {"ffn": to_dict(self._shared_ffn()), **self._chosen(index, self.shared, listed)}
            own |= {"norm.depth": self.flats + index + 1} if self.ln_scale else {}
            scales = self.crawler_loop_rope_scales[: 1 if self.helix_enabled else self.crawler_loops]
            if any(scale != 1 for scale in self.crawler_loop_rope_scales):
                own |= {"mixer.rope.loop_scales": list(scales), "mixer.rope.original_context": None}
            found.append(BlockOverride(where=str(self.shared_block(index)), set=self._split(own)))
        if self.helix_enabled and self.helix_cross_attn:
            bridge = {
                "mixer": to_dict(CrossSpec(width=self.helix_dim)),
                "ffn": {"kind": "none"},
                "residual": to_dict(NoResidualSpec()),
                "norm.placement": "final",
            }
            found += [BlockOverride(where=name, set=bridge) for name in ("up", "down")]
        return [override for override in found if override.set]

    def _chosen(self, index: int, count: int, listed: list[int]) -> dict[str, Any]:
        """What only some of ``count`` blocks have."""
        exclusive = {"mixer.exclusive": True} if index >= count - self.xsa_last_n else {}
        return exclusive | ({"mixer.value_embedding": True} if index in listed else {})

    def _split(self, own: dict[str, Any]) -> dict[str, Any]:
        """Options of a shared block, as those of an attention with split heads where there are some."""
        if not self.cross_heads:
            return own
        mixer = to_dict(self._block().mixer) | {"kind": "split", "cross_heads": min(self.cross_heads, self.num_heads)}
        return {"mixer": mixer, **own}

    def _shared_ffn(self) -> FeedForwardPart:
        plain = self._ffn(self.crawler_mlp_mult, self.crawler_mlp_leaky_slope)
        if not self.crawler_mlp_choke_dim:
            return plain
        shape: Any = _CHOKES.get(self.crawler_mlp_choke_shape, self.crawler_mlp_choke_shape)
        choke = ChokeSpec(
            intermediate_size=plain.intermediate_size,
            shape=shape,
            choke_size=self.crawler_mlp_choke_dim,
            activation=plain.kind,  # pyrefly: ignore
        )
        if shape == "grouped":
            choke = choke.replace(groups=self.crawler_mlp_choke_groups)
        return choke.replace(negative_slope=plain.negative_slope) if plain.kind == "leaky_relu2" else choke

    def _topology(self) -> TopologyPart:
        if self.helix_enabled:
            helix = HelixSpec(
                stream="crawler",
                merge="sigmoid",
                merge_cap=self.helix_merge_cap or None,
                hint_cap=self.helix_inject_cap or None,
                visit_embedding="halves" if self.helix_fire_embed else "none",
                skip_after_hint=self.skip_taken_after_hint,
                skip_gate=self.confidence_gated_skips,
            )
            attention = self.helix_cross_attn
            return helix.replace(bridges="attention") if attention else helix.replace(bridge_width=self.helix_dim)
        return UNetSpec() if self.flats > 1 else ChainSpec()

    def _stem(self) -> list[StemPart]:
        found: list[StemPart] = []
        if self.bigram_vocab_size:
            found.append(NgramSpec(buckets=self.bigram_vocab_size, width=self.bigram_dim, trigram=self.trigram))
        found += [EmbeddingNormSpec(), SmearSpec()]
        if self.ve_enabled and self.ve_layers:
            listed = [int(item) for item in self.ve_layers.split(",")]
            connected = any(index < (self.shared or self.flats) for index in listed)
            if connected:
                found.append(ValueEmbeddingSpec(width=self.ve_dim))
            elif self.keep_unconnected:
                found.append(UnconnectedValuesSpec(width=self.ve_dim, factors=len(listed)))
        return found

    def _loop(self) -> list[LoopPart]:
        """The parts of the loop, in an order in which all act as the program has them: the smear before what the anchor
        keeps, the contractive step last."""
        if self.shared == 0 or self.helix_enabled:
            return []
        several = self.crawler_loops > 1
        found: list[LoopPart] = []
        if several and self.inst_dim:
            found.append(FlowSpec(rank=self.inst_dim))
        elif several:
            found.append(LoopEmbeddingSpec())
        if self.crawler_loop_smear:
            found.append(LoopSmearSpec())
        if several and self.anchor_dim:
            found.append(AnchorSpec(width=self.anchor_dim))
        if self.crawler_tap_dim:
            found.append(self._tap())
        if self.crawler_cannon_type != "none":
            form: Any = self.crawler_cannon_type.replace("rmsnorm", "rms")
            found.append(LoopGainSpec(form=form))
        if self.contractive_dt != 1:
            found.append(ContractiveStepSpec(step=self.contractive_dt))
        return found

    def _tap(self) -> TapSpec:
        layers: Any = {"deep": "deepest", "shallow": "first"}.get(self.crawler_tap_layers, self.crawler_tap_layers)
        if layers in ("all", "deepest", "first"):
            return TapSpec(width=self.crawler_tap_dim, per_loop=self.crawler_tap_loop_specific, layers=layers)
        blocks = tuple(int(item) for item in str(layers).split(","))
        return TapSpec(width=self.crawler_tap_dim, per_loop=self.crawler_tap_loop_specific, blocks=blocks)


_UNUSED = {"dtg": False, "f1_corr_rank": 0, "f1_corr_scale_init": 0.1}
"""Settings of the plain program that have to be off."""


def helix_layout(flats: int, shared: int, stride: int, *, attention: bool = False, name: str = "crawler") -> str:
    """The layout of Helix: ``shared`` blocks, named ``name``, run after every ``stride`` of ``flats`` blocks.

    Args:
        flats: blocks of the first stream.
        shared: blocks of the second stream.
        stride: blocks of the first stream between two runs of the second.
        attention: with the blocks ``up`` and ``down`` that make hints by attention.
        name: of the shared blocks.
    """
    again = ["up", "down", name] if attention else [name]
    first = ["up:1", "down:1", f"{name}:{shared}"] if attention else [f"{name}:{shared}"]
    runs, rest = divmod(flats, stride)
    words: list[str] = []
    for run in range(runs):
        words += [str(stride), *(again if run else first)]
    return " ".join([*words, str(rest)] if rest else words)

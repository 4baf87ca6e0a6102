"""Attention that other tools compute: registered functions, a backend like vLLM's, and continuous batching."""

from __future__ import annotations

import ast
import importlib
import inspect
import textwrap
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, ContinuousBatchingConfig, GenerationConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ouroboros.config import AttentionSpec, BlockOverride, RMSNormSpec
from ouroboros.config.parts.delta_rule import DeltaRuleSpec
from ouroboros.config.parts.halt import HaltSpec
from ouroboros.config.parts.head import LinearHeadSpec
from ouroboros.config.parts.latent import BottleneckAttentionSpec, LatentAttentionSpec
from ouroboros.config.parts.loop import InjectionSpec, LoopEmbeddingSpec, LoopNormSpec
from ouroboros.config.parts.osam import OsamSpec
from ouroboros.config.parts.stem import SmearSpec
from ouroboros.errors import OuroborosError
from ouroboros.model.interface import refusal
from ouroboros.model.modeling import OuroborosForCausalLM

Build = Callable[..., OuroborosForCausalLM]
GROUPED = AttentionSpec(num_heads=4, num_kv_heads=2)
LOOPED: dict[str, Any] = {"loop": (InjectionSpec(), LoopEmbeddingSpec(), LoopNormSpec())}
RICH = AttentionSpec(
    num_heads=4, num_kv_heads=2, qk_norm="after_rope", query_gain=1.5, score_channels=7.0, value_residual=0.3,
    exclusive=True, head_gate=True, output_gate=True, qkv_bias=True,
)  # fmt: skip
MODELS = {
    "grouped": {"mixer": GROUPED},
    "rich": {"mixer": RICH, "norm": RMSNormSpec(placement="sandwich"), **LOOPED},
    "another layout": {"mixer": GROUPED, "layout": "1 (2)x3", "tie_embeddings": False},
}
GREEDY = GenerationConfig(do_sample=False, max_new_tokens=5, pad_token_id=30, eos_token_id=None)
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10], [11]]
TEXTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10, 11, 12, 4, 5], [11, 3, 7, 7]]


def check_greedy(model: OuroborosForCausalLM, prompt: list[int], text: list[int]) -> None:
    """Each token of ``text`` has the largest logit in one pass without a cache; rounding may decide between two."""
    assert len(text) == 5 or text[-1] == 30, "its end"
    with torch.no_grad():
        before = model(torch.tensor([prompt + text])).logits[0, len(prompt) - 1 : -1]
    chosen = before.gather(-1, torch.tensor(text)[:, None])[:, 0]
    assert (before.amax(-1) - chosen).max() < 1e-3, (prompt, text)


def plain(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: Any) -> tuple[Tensor, None]:
    """Attention from its formula, as a registered function gets it and gives it."""
    k, v = (x.repeat_interleave(module.num_key_value_groups, dim=1) for x in (k, v))
    scores = q @ k.mT * options["scaling"]
    if mask is None:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
    return (scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1) @ v).transpose(1, 2), None


class TestRegistered:
    """A function that somebody registers with transformers."""

    @pytest.fixture
    def calls(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, dict[str, Any]]]:
        seen: list[tuple[int, dict[str, Any]]] = []

        def watched(module: Any, *tensors: Any, **options: Any) -> tuple[Tensor, None]:
            seen.append((module.layer_idx, options))
            return plain(module, *tensors, **options)

        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "watched", watched)
        monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "watched", sdpa_mask)
        return seen

    @pytest.mark.parametrize("name", MODELS)
    def test_every_visit_asks_it(self, build: Build, ids: Tensor, calls: list[Any], name: str) -> None:
        model = build(**MODELS[name])
        expected = model(ids).logits
        assert calls == [], "by default nobody is asked"
        model.set_attn_implementation("watched")
        torch.testing.assert_close(model(ids, colour="red").logits, expected, rtol=1e-4, atol=1e-5)
        assert [layer for layer, _ in calls] == list(range(model.config.num_hidden_layers))
        assert all(options["colour"] == "red" for _, options in calls), "keywords of the model reach attention"
        for prompt in PROMPTS:
            text = model.generate(torch.tensor([prompt]), generation_config=GREEDY)[0, len(prompt) :].tolist()
            model.set_attn_implementation("sdpa")
            check_greedy(model, prompt, text)
            model.set_attn_implementation("watched")
        model.set_attn_implementation("sdpa")
        del calls[:]
        assert torch.equal(model(ids).logits, expected) and calls == []

    def test_training_padding_and_packing(self, build: Build, ids: Tensor, calls: list[Any]) -> None:
        model = build(mixer=GROUPED).train()
        at = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1]]).expand(2, -1)
        mask = torch.ones_like(ids)
        mask[0, :3] = 0
        labels = ids.clone()
        labels[0, :4] = -100  # what padding sees, and predicts, is not defined
        found: dict[str, list[Tensor]] = {}
        for name in ("sdpa", "watched"):
            model.set_attn_implementation(name)
            model.zero_grad()
            losses = [
                model(ids, labels=labels, **more).loss for more in ({}, {"attention_mask": mask}, {"position_ids": at})
            ]
            sum(losses).backward()
            found[name] = [*losses, *(p.grad for p in model.parameters() if p.grad is not None)]
        assert calls and len(found["sdpa"]) == len(list(model.parameters())) + 3
        for ours, theirs in zip(*found.values(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)

    def test_other_loop_counts(self, build: Build, ids: Tensor, calls: list[Any]) -> None:
        model = build(mixer=GROUPED)
        view = model.with_loops(3)
        expected = view(ids).logits
        view.set_attn_implementation("watched")
        torch.testing.assert_close(view(ids).logits, expected, rtol=1e-4, atol=1e-5)
        assert [layer for layer, _ in calls] == list(range(5))
        assert model.config._attn_implementation == "sdpa", "a view has a configuration of its own"
        with pytest.raises(OuroborosError, match=r"'watched': use model\.with_loops\(n\)"):
            view(ids, loops=2)

    def test_has_no_parameters(self, build: Build) -> None:
        model = build()
        assert len(model.model.attention_calls) == model.config.num_hidden_layers == 4
        assert not list(model.model.attention_calls.parameters()) + list(model.model.attention_calls.buffers())
        assert model.get_decoder() is model.model is model.model.get_decoder()


def dispatching(model: nn.Module) -> dict[int, nn.Module]:
    """The modules whose ``forward`` asks the interface exactly once, by layer, as vLLM finds them: in their source."""
    found: dict[int, nn.Module] = {}
    for module in model.modules():
        tree = ast.parse(textwrap.dedent(inspect.getsource(type(module).forward)))
        names = {
            target.id
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("ALL_ATTENTION_FUNCTIONS")
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        asked = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "id", None) in names]
        if len(asked) != 1:
            continue
        assert "scaling=self.scaling" in ast.unparse(asked[0])
        assert module.config._attn_implementation == "vllm" and module.layer_idx not in found
        found[module.layer_idx] = module
    return found


class Instance:
    """One layer's attention with a cache of its own, for rows made of pieces of several requests."""

    def __init__(self, heads: int, width: int) -> None:
        self.heads, self.width, self.kept = heads, width, {}
        self.scale = 0.0

    def forward(self, query: Tensor, key: Tensor, value: Tensor, pieces: list[tuple[int, int]]) -> Tensor:
        """(tokens, H C) to the same; ``pieces`` are requests and how many tokens of each follow."""
        q, k, v = (x.unflatten(-1, (-1, self.width)).transpose(0, 1) for x in (query, key, value))
        out, start = [], 0
        for request, length in pieces:
            own = slice(start, start + length)
            start += length
            past = self.kept.get(request, (k[:, :0], v[:, :0]))
            keys, values = (torch.cat((p, x[:, own]), dim=1) for p, x in zip(past, (k, v)))
            self.kept[request] = keys, values
            keys, values = (x.repeat_interleave(self.heads // len(x), dim=0) for x in (keys, values))
            seen = torch.ones(length, keys.shape[1], dtype=torch.bool).tril(keys.shape[1] - length)
            y = F.scaled_dot_product_attention(q[:, own], keys, values, seen, scale=self.scale)
            out.append(y.transpose(0, 1).flatten(1))
        return torch.cat(out)


class Replicated(nn.Module):
    """What a linear map is replaced by; only its call is promised."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Backend:
    """Does with a saved model what vLLM's backend for transformers models does, see its ``base.py`` and ``causal.py``.

    Args:
        path: of the model.
        instance_of: which instance serves a layer; vLLM gives each its own.
    """

    def __init__(self, path: Path, instance_of: Callable[[int], int] = lambda layer: layer) -> None:
        config = AutoConfig.from_pretrained(path)
        self.architecture = getattr(transformers, config.architectures[0])  # vLLM looks nowhere else
        assert self.architecture.is_backend_compatible()
        config._attn_implementation = "vllm"
        with torch.device("meta"):
            type(AutoModel.from_config(config).get_decoder())  # is what it compiles
        self.model = AutoModel.from_config(config)
        decoder = self.model.get_decoder()
        assert {"input_ids", "inputs_embeds", "position_ids"} <= inspect.signature(decoder.forward).parameters.keys()
        for module in list(self.model.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(module, name, Replicated(child))
        modules = dispatching(self.model)
        assert set(modules) == set(range(config.num_hidden_layers))
        made = [Instance(config.num_attention_heads, config.head_dim) for _ in modules]
        self.instances = {layer: made[instance_of(layer)] for layer in modules}
        for layer, module in modules.items():
            self.instances[layer].scale = module.scaling
        weights = load_file(path / "model.safetensors")
        own = {name.removeprefix("model."): value for name, value in weights.items() if name.startswith("model.")}
        self.model.load_state_dict(own)
        self.output = weights.get("lm_head.weight", own["embed_tokens.weight"])

    @torch.no_grad()
    def run(self) -> list[Tensor]:
        """Logits (T, V) at all tokens of each text, several in a row as they come: the second in pieces of four, the
        third late and token by token."""
        found: list[list[Tensor]] = [[] for _ in TEXTS]
        done = [0] * len(TEXTS)
        for time in range(99):
            sizes = (9, 4, 1 if time > 1 else 0)
            pieces = {n: text[done[n] :][: sizes[n]] for n, text in enumerate(TEXTS) if text[done[n] :][: sizes[n]]}
            if not pieces and time > 1:
                break
            states = self.model(
                input_ids=torch.tensor([[token for new in pieces.values() for token in new]]),
                inputs_embeds=None,
                use_cache=False,
                position_ids=torch.tensor([[done[n] + at for n, new in pieces.items() for at in range(len(new))]]),
                attention_instances=self.instances,
                pieces=[(n, len(new)) for n, new in pieces.items()],
                return_dict=False,
            )[0][0]
            logits_of = F.linear(states, self.output).split([len(new) for new in pieces.values()])
            for (n, new), logits in zip(pieces.items(), logits_of, strict=True):
                found[n].append(logits)
                done[n] += len(new)
        return [torch.cat(logits) for logits in found]


def computed(model: OuroborosForCausalLM) -> list[Tensor]:
    """What :meth:`Backend.run` returns, in one pass for each text."""
    with torch.no_grad():
        return [model(torch.tensor([text])).logits[0] for text in TEXTS]


class TestVLLM:
    """What vLLM's backend for transformers models asks of a model. vLLM itself needs a machine of another kind."""

    @pytest.fixture(autouse=True)
    def plugin(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Load the entry point, and register attention as vLLM does."""

        def vllm(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
            assert mask is None
            packed = (x.transpose(1, 2).reshape(query.shape[-2], -1) for x in (query, key, value))
            return options["attention_instances"][module.layer_idx].forward(*packed, options["pieces"]), None

        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "vllm", vllm)
        project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text(encoding="utf-8"))
        module, _, name = project["project"]["entry-points"]["vllm.general_plugins"]["ouroboros"].partition(":")
        monkeypatch.setitem(vars(transformers), "OuroborosForCausalLM", None)
        getattr(importlib.import_module(module), name)()

    @pytest.mark.parametrize("name", MODELS)
    def test_computes_what_the_model_computes(self, build: Build, name: str, tmp_path: Path) -> None:
        model = build(noise=0.3, **MODELS[name])
        model.save_pretrained(tmp_path)
        torch.testing.assert_close(Backend(tmp_path).run(), computed(model), rtol=1e-4, atol=1e-4)

    def test_another_loop_count(self, build: Build, tmp_path: Path) -> None:
        model = build(noise=0.3, mixer=GROUPED).with_loops(3)
        model.save_pretrained(tmp_path)
        torch.testing.assert_close(Backend(tmp_path).run(), computed(model), rtol=1e-4, atol=1e-4)

    def test_loops_that_share_a_cache_compute_something_else(self, build: Build, tmp_path: Path) -> None:
        model = build(noise=0.3, mixer=GROUPED)
        model.save_pretrained(tmp_path)
        block_of = [visit.block for visit in model.schedule.visits]
        shared = Backend(tmp_path, lambda layer: block_of[layer]).run()
        assert max((a - b).abs().max() for a, b in zip(shared, computed(model), strict=True)) > 1e-2

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"head": LinearHeadSpec(logit_softcap=5.0)}, "head 'linear' is not the plain product"),
            ({"norm": RMSNormSpec(depth_scale=True)}, r"norm\.depth_scale is a factor"),
            ({"mixer": OsamSpec(buckets=9)}, "mixer 'osam' keeps a state of constant size"),
        ],
    )
    def test_refuses_before_weights_are_loaded(self, build: Build, changes: Any, reason: str) -> None:
        config = build(**changes).config
        config._attn_implementation = "vllm"
        with pytest.raises(OuroborosError, match=f"^vLLM cannot run this model: {reason}"):
            AutoModel.from_config(config)


class TestContinuousBatching:
    @pytest.mark.parametrize("implementation", ["sdpa", "eager"])
    def test_writes_what_generate_writes(self, build: Build, implementation: str) -> None:
        model = build(noise=0.3, mixer=GROUPED)
        model.set_attn_implementation(implementation)
        sizes = ContinuousBatchingConfig(max_batch_tokens=6, num_blocks=64, page_size=4)
        found = model.generate_batch(PROMPTS, generation_config=GREEDY, continuous_batching_config=sizes)
        assert len(found) == len(PROMPTS)
        for prompt, output in zip(PROMPTS, found.values(), strict=True):
            check_greedy(model, prompt, output.generated_tokens)
        assert model.config._attn_implementation == implementation

    def test_a_model_that_does_not_fit(self, build: Build, ids: Tensor) -> None:
        with pytest.raises(
            OuroborosError, match="^continuous batching cannot run this model: registers stand in front"
        ):
            build(registers=2)(ids, cache=object(), use_cache=False)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"mixer": OsamSpec(buckets=9)}, "mixer 'osam' keeps a state of constant size"),
    ({"mixer": DeltaRuleSpec(num_heads=2)}, "mixer 'delta_rule' keeps a state of constant size"),
    ({"mixer": LatentAttentionSpec(num_heads=2)}, "mixer 'latent_attention' keeps latents in place of keys and values"),
    ({"mixer": BottleneckAttentionSpec(num_heads=2)}, "mixer 'bottleneck_attention' makes its keys and values"),
    ({"mixer": AttentionSpec(num_heads=2, window=4)}, "mixer 'attention' has a window of 4 tokens"),
    ({"mixer": AttentionSpec(num_heads=2, k_shift=True)}, "mixer 'attention' mixes neighbouring tokens"),
    ({"stem": (SmearSpec(),)}, "'smear' mixes neighbouring tokens"),
    ({"loop": (HaltSpec(),)}, "loop part 'halt' lets positions stop"),
    ({"registers": 1}, "registers stand in front of every text"),
    ({"share_last_kv": True}, "share_last_kv lets loops read entries that they do not write"),
    ({"overrides": (BlockOverride(where="0", set={"mixer.num_heads": 4}),)}, "its blocks differ in their heads"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "reason"), REFUSED)
def test_refusals_name_the_part(base: Any, changes: dict[str, Any], reason: str) -> None:
    assert refusal(base) == "" and refusal(base.replace(**changes)).startswith(reason)

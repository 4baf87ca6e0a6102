"""The mixer against the recurrence, what it remembers, and that no visit sees what a later token wrote."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from ouroboros.config import MixerPart, ModelSpec, NoFeedForwardSpec
from ouroboros.config.part import _KINDS, part
from ouroboros.config.parts.delta_rule import CHUNK, DeltaRuleSpec
from ouroboros.data.tokenize import byte_tokenizer
from ouroboros.eval.audit import audit
from ouroboros.eval.equivalence import check_causal
from ouroboros.eval.finding import find
from ouroboros.eval.subject import build_perturbed, prepare
from ouroboros.model.modeling import OuroborosForCausalLM
from ouroboros.nn.delta_rule import DeltaRule, read_and_write
from ouroboros.nn.memory import Memory, Recorder
from ouroboros.nn.operators import deltanet
from ouroboros.nn.visit import VisitContext

B, H, D = 2, 3, 12
LONG = 2 * CHUNK + 9
LENGTHS = (1, 5, CHUNK, CHUNK + 1, LONG)


class Cell(Memory):
    """Keeps a state and the ends of filters, like a cache."""

    def __init__(self) -> None:
        self.kept: Tensor | None = None
        self.ends: dict[str, Tensor] = {}
        self.seen = 0

    def state(self) -> Tensor | None:
        return self.kept

    def carry(self, state: Tensor, new_tokens: int) -> None:
        self.kept, self.seen = state, self.seen + new_tokens

    def extend(self, k_BKTC: Tensor, v_BKTC: Tensor) -> tuple[Tensor, Tensor]:
        raise AssertionError

    def last(self, name: str) -> Tensor | None:
        return self.ends.get(name)

    def remember(self, name: str, x: Tensor) -> None:
        self.ends[name] = x


def given(memory: Memory | None = None, padding: Tensor | None = None) -> VisitContext:
    nothing = torch.empty(0)
    return VisitContext((nothing, nothing), padding=padding, memory=memory)


def mixer_of(dtype: torch.dtype = torch.float64, **options: Any) -> DeltaRule:
    """A mixer with every parameter away from its start."""
    mixer = DeltaRule(DeltaRuleSpec(**{"num_heads": H, **options}), D, 1e-5).to(dtype)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return mixer


def terms(T: int, C: int = 6) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys, values and factors of random tokens, float64."""
    q, k, v = torch.randn(3, B, H, T, C, dtype=torch.float64)
    return F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, torch.rand(B, H, T, dtype=torch.float64)


def reference(q: Tensor, k: Tensor, v: Tensor, b: Tensor, start: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Token by token."""
    states = deltanet(k, b, v, start)
    return (states[:, :, :-1] @ q[..., None])[..., 0], states[:, :, -1]


@pytest.mark.parametrize("T", LENGTHS)
def test_chunks_are_the_recurrence(T: int) -> None:
    given_terms = [x.requires_grad_() for x in (*terms(T), torch.randn(B, H, 6, 6, dtype=torch.float64))]
    for inputs in (given_terms[:4], given_terms):
        expected = reference(*inputs)
        found = read_and_write(*inputs, *[None] * (5 - len(inputs)), wants_state=True)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
        cotangents = [torch.randn_like(x) for x in expected]
        sums = [sum((x * c).sum() for x, c in zip(pair, cotangents)) for pair in (expected, found)]
        wanted, got = (torch.autograd.grad(total, inputs, materialize_grads=True) for total in sums)
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("alike", [0.0, 0.9, 1.0])
def test_float32_is_exact_however_alike_the_keys(alike: float) -> None:
    """Equal keys that overwrite each other make the hardest systems."""
    q, k, v, b = terms(10 * CHUNK)
    k = F.normalize((1 - alike) * k + alike * k[:, :, :1], dim=-1)
    b = 1 - (1 - alike) * b
    expected = reference(q, k, v, b)
    found = read_and_write(*(x.float() for x in (q, k, v, b)), None, wants_state=True)
    torch.testing.assert_close(found, expected, check_dtype=False, rtol=0, atol=2e-5)


@pytest.mark.parametrize("conv", [0, 4])
def test_formula_of_the_mixer(conv: int) -> None:
    T, mixer = 9, mixer_of(conv=conv)
    x = torch.randn(B, T, D, dtype=torch.float64)
    projected = [projection(x) for projection in (mixer.q_proj, mixer.k_proj, mixer.v_proj)]
    if mixer.filter is not None:
        weights = mixer.filter.weight.chunk(3, dim=1)
        padded = [F.pad(u, (0, 0, conv - 1, 0)) for u in projected]
        projected = [sum(w[s] * u[:, s : s + T] for s in range(conv)) for u, w in zip(padded, weights)]
    q, k, v = (u.unflatten(-1, (H, -1)).transpose(1, 2) for u in projected)
    b = torch.sigmoid(x @ mixer.b_proj.weight.T + mixer.b_proj.bias).transpose(1, 2)
    y, _ = reference(q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True), v, b)
    torch.testing.assert_close(mixer(x, given()), y.transpose(1, 2).flatten(2) @ mixer.o_proj.weight.T)


def test_the_filter_starts_as_if_absent() -> None:
    plain, filtered = (DeltaRule(DeltaRuleSpec(num_heads=H, conv=conv), D, 1e-5) for conv in (0, 4))
    missing, _ = filtered.load_state_dict(plain.state_dict(), strict=False)
    assert missing == ["filter.weight"]
    x = torch.randn(B, 7, D)
    assert torch.equal(plain(x, given()), filtered(x, given()))


@pytest.mark.parametrize("conv", [0, 4])
def test_pieces_are_the_whole_text(conv: int) -> None:
    mixer, x = mixer_of(conv=conv), torch.randn(B, LONG, D, dtype=torch.float64)
    with torch.no_grad():
        whole = mixer(x, given())
        for cuts in ((0, 1, 2, 5, LONG), (0, CHUNK + 3, LONG - 1, LONG), range(LONG + 1)):
            cell = Cell()
            parts = [mixer(x[:, a:b], given(cell)) for a, b in itertools.pairwise(cuts)]
            torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-13)
            assert cell.seen == LONG and cell.kept is not None and cell.kept.shape == (B, H, D // H, D // H)


@pytest.mark.parametrize("conv", [0, 4])
def test_padding_leaves_the_state_untouched(conv: int) -> None:
    mixer, x, pads = mixer_of(conv=conv), torch.randn(1, 8, D, dtype=torch.float64), 3
    padded = torch.cat((torch.randn(1, pads, D, dtype=torch.float64), x), dim=1)
    real = (torch.arange(8 + pads) >= pads)[None].long()
    cell, other, empty = Cell(), Cell(), Cell()
    with torch.no_grad():
        found = mixer(padded, given(cell, real))[:, pads:]
        torch.testing.assert_close(found, mixer(x, given(other)), rtol=0, atol=1e-13)
        mixer(padded[:, :pads], given(empty, real[:, :pads]))
    torch.testing.assert_close(cell.kept, other.kept)
    assert empty.kept is not None and not empty.kept.any()


def test_sums_and_solutions_stay_wide_in_bfloat16() -> None:
    mixer, x, cell = mixer_of(torch.float32), torch.randn(B, 40, D), Cell()
    exact = mixer(x, given())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = mixer(x, given(cell))
    assert cell.kept is not None and (found.dtype, cell.kept.dtype) == (torch.bfloat16, torch.float32)
    # Rounded projections alone, and not the sums over forty tokens.
    assert (found - exact).abs().max() < 0.05 * exact.abs().max()


def test_is_one_graph() -> None:
    mixer, x = mixer_of(conv=2), torch.randn(B, CHUNK + 5, D, dtype=torch.float64)
    compiled = torch.compile(mixer, backend="eager", fullgraph=True)
    leaves = list(mixer.parameters())
    try:
        found, expected = compiled(x, given()), mixer(x, given())
        torch.testing.assert_close(found, expected)
        gradients = [torch.autograd.grad(y.square().sum(), leaves) for y in (found, expected)]
        torch.testing.assert_close(*gradients)
    finally:
        torch.compiler.reset()


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("registers", [0, 5])
def test_operations_are_counted(T: int, registers: int) -> None:
    """A text alone, and one behind registers, which run by themselves and leave a state."""
    if registers and T == 1:
        return  # one token behind a state is one product
    mixer, spec = mixer_of().requires_grad_(False), DeltaRuleSpec(num_heads=H)
    start, expected = None, T * spec.flops(D, T, registers)
    with FlopCounterMode(display=False) as counter:
        if registers:
            recorder = Recorder()
            mixer(torch.randn(1, registers, D, dtype=torch.float64), given(recorder))
            start = Cell()
            start.kept, start.keeps = recorder.end_state, False
            again, read = spec.prefix_flops(D)
            expected += registers * (spec.flops(D, registers) + again) + T * read
        mixer(torch.randn(1, T, D, dtype=torch.float64), given(start))
    assert expected <= counter.get_total_flops() < expected + T, "rounded down for each token"


def looped(mixer: MixerPart) -> OuroborosForCausalLM:
    """Three blocks with this mixer and no feed-forward network, the second of them in a loop."""
    spec = ModelSpec(layout="1 (1)x3 1", hidden_size=D, vocab_size=257, max_position_embeddings=64)
    return build_perturbed(spec.replace(mixer=mixer, ffn=NoFeedForwardSpec()))


def test_every_loop_starts_with_an_empty_state() -> None:
    """Whatever a visit is handed, computed or cached, its state is that of its own tokens alone."""
    model, ids = looped(DeltaRuleSpec(num_heads=H)), torch.randint(0, 257, (B, 9))
    visits: list[tuple[Any, Tensor, Any]] = []

    def note(mixer: Any, arguments: Any) -> None:
        x_BTD, visit = arguments
        visits.append((mixer, x_BTD, None if visit.memory is None else visit.memory.state()))

    for layer in model.model.decoder.layers:
        layer.self_attn.register_forward_pre_hook(note)
    with torch.no_grad():
        model(ids, use_cache=False)
        store = model(ids, use_cache=True).past_key_values
        assert len(visits) == 10 and all(start is None for _, _, start in visits)
        kept = [layer.read() for layer in store.layers]
        for (mixer, x_BTD, _), state in zip(visits[5:], kept, strict=True):
            cell = Cell()
            mixer(x_BTD, given(cell))
            torch.testing.assert_close(state, cell.kept)
    assert not torch.allclose(kept[1], kept[2])


@dataclass(frozen=True, kw_only=True)
class CarriedSpec(DeltaRuleSpec):
    """The defect: each loop goes on with the state that the one before ended with."""

    kind: Literal["carried"] = "carried"


class Handed(Recorder):
    """A memory within one call, handed from visit to visit."""

    def state(self) -> Tensor | None:  # pyrefly: ignore[bad-override]
        return self.end_state


class Carried(DeltaRule):
    def forward(self, x_BTD: Tensor, visit: VisitContext) -> Tensor:
        assert visit.visit is not None and visit.carried is not None
        memory, name = Handed(), f"state.{visit.visit.block}"
        memory.end_state = visit.carried.get(name)
        y_BTD = super().forward(x_BTD, visit._replace(memory=memory))
        visit.carried[name] = memory.end_state
        return y_BTD


def test_a_state_carried_from_loop_to_loop_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_KINDS, MixerPart, dict(_KINDS[MixerPart]))
    part(module=Carried)(CarriedSpec)
    texts = [b"The quick brown fox jumps over the lazy dog, and then it does so again and again." * 3]
    failed = {}
    for spec in (DeltaRuleSpec(num_heads=H), CarriedSpec(num_heads=H)):
        model = looped(spec)
        audited = audit(model, byte_tokenizer(), texts, window=12, loops=(1, 2, 3))
        checked = find("causal", check_causal, prepare(model))  # of the harness
        failed[spec.kind] = {finding.name for finding in (*audited, checked) if not finding.ok}
    assert failed["delta_rule"] == set()
    assert failed["carried"] >= {"causality (loops 2)", "causality (loops 3)", "causal"}
    assert not any("loops 1" in name for name in failed["carried"]), "nothing is carried there"

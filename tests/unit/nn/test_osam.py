"""The mixer against a recurrence written from the published formulas, and what its options change."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ouroboros.config import FeedForwardSpec, ModelSpec
from ouroboros.config.parts.osam import OsamSpec
from ouroboros.model.configuration import OuroborosConfig
from ouroboros.model.modeling import OuroborosForCausalLM
from ouroboros.nn.memory import Memory
from ouroboros.nn.osam import Osam
from ouroboros.nn.sketch import Sketch, apply_sketch
from ouroboros.nn.visit import VisitContext

B, T, D = 2, 11, 12
SPEC = OsamSpec(buckets=27, readout_hidden=7)
OPTIONS = {
    "published": {},
    "many buckets": {"buckets": 301},
    "no value path": {"value_path": False},
    "kupdate": {"kupdate": 3},
    "frozen phase": {"freeze_phase": True},
    "keys apart": {"sketch_values": False},
    "two tables": {"independent_hashes": True},
    "frequencies": {"frequencies": 4},
    "decay": {"decay": True, "frequencies": 3},
    "root mean square": {"normalisation": "rms", "frequencies": 2},
    "gates": {"gate_cap": 2.0},
    "all": {
        "independent_hashes": True,
        "sketch_values": False,
        "frequencies": 6,
        "decay": True,
        "normalisation": "rms",
        "gate_cap": 1.5,
        "kupdate": 2,
    },
}


class Cell(Memory):
    """Keeps a state, like a cache."""

    def __init__(self) -> None:
        self.kept: Tensor | None = None
        self.seen = 0

    def state(self) -> Tensor | None:
        return self.kept

    def carry(self, state: Tensor, new_tokens: int) -> None:
        self.kept, self.seen = state, self.seen + new_tokens

    def extend(self, k_BKTC: Tensor, v_BKTC: Tensor) -> tuple[Tensor, Tensor]:
        raise AssertionError

    def last(self, name: str) -> Tensor | None:
        raise AssertionError

    def remember(self, name: str, x: Tensor) -> None:
        raise AssertionError


def given(padding: Tensor | None = None, positions: Tensor | None = None, memory: Memory | None = None) -> VisitContext:
    nothing = torch.empty(0)
    return VisitContext((nothing, nothing), padding=padding, positions=positions, memory=memory)


def mixer_of(dtype: torch.dtype = torch.float64, **options: Any) -> Osam:
    """A mixer with every parameter away from its start."""
    mixer = Osam(dataclasses.replace(SPEC, **options), D, 1e-5).to(dtype)
    with torch.no_grad():
        for name, parameter in mixer.named_parameters():
            parameter += (0.5 if name.endswith("_raw") else 0.1) * torch.randn_like(parameter)
    return mixer


def reference(mixer: Osam, x_BTD: Tensor) -> Tensor:
    """The published step, token by token, with sketches as they are; the state is a constant where the
    specification says so, and other options do as their fields say.

    One frequency turns queries and keys by absolute positions, as published. Several turn each coordinate of the
    memory by its own.
    """
    spec = mixer.spec
    hold = Tensor.detach if spec.detach_state else (lambda x: x)
    still = Tensor.detach if spec.freeze_phase else (lambda x: x)
    groups = D // spec.frequencies
    theta_q, theta_k = (0.5 * torch.tanh(still(raw)) for raw in (mixer.theta_q_raw, mixer.theta_k_raw))
    omega = (0.5 * torch.tanh(still(mixer.omega_raw))).repeat_interleave(groups)
    fade = torch.ones(D, dtype=x_BTD.dtype)
    if spec.decay:
        fade = hold(torch.exp(-torch.sigmoid(still(mixer.decay_raw)))).repeat_interleave(groups)
    q_BTD, k_BTD = mixer.q_proj(x_BTD), mixer.k_proj(x_BTD)
    query_table, key_table = mixer.query_sketch, mixer.key_sketch
    S = apply_sketch(torch.eye(D, dtype=x_BTD.dtype), key_table, spec.buckets)
    to_values = S if spec.sketch_values else torch.eye(D, dtype=S.dtype)
    # Key coordinates of every past token, in phase with position 0 and faded as of now.
    sums = torch.zeros(B, D, dtype=torch.complex128)
    values = torch.zeros(B, D, D, dtype=torch.complex128)
    out = []
    for t in range(x_BTD.shape[1]):
        q, k = q_BTD[:, t], k_BTD[:, t]
        angle = theta_q * q - (omega * t if spec.frequencies == 1 else 0)
        query = torch.complex(q * angle.cos(), q * angle.sin())
        turned = torch.exp(-1j * hold(omega) * (0 if spec.frequencies == 1 else t))
        count = (t + 1) ** 0.5
        feature, w = torch.zeros(B, spec.buckets, dtype=S.dtype), torch.zeros(B, D, dtype=S.dtype)
        if t % spec.kupdate == 0:
            memory = sums * turned / count
            if spec.normalisation == "rms":
                parts = torch.view_as_real(sums * turned).unflatten(1, (spec.frequencies, groups))
                size = (parts.square().mean((2, 3), keepdim=True) + 1e-6).sqrt()
                memory = torch.view_as_complex((parts / size).flatten(1, 2))
            a, b = sketched(query, query_table, spec), sketched(memory, key_table, spec)
            feature = torch.fft.ifft(torch.fft.fft(a) * torch.fft.fft(b)).real / spec.buckets**0.5
            if spec.value_path:
                held = hold(query) @ (to_values @ to_values.t()).to(query.dtype)
                u = (values.mT @ (held * turned)[..., None])[..., 0].real
                if spec.normalisation == "count":
                    u = u / count
                w = mixer.value_out(F.gelu(mixer.value_in(mixer.value_norm(u))))
        hidden = F.gelu(mixer.readout_in(feature))
        y = spec.gate_cap * torch.sigmoid(mixer.gate_feature_raw) * mixer.readout_out(hidden)
        if spec.value_path:
            y = y + spec.gate_cap * torch.sigmoid(mixer.gate_value_raw) * w
        out.append(y)
        angle = theta_k * k + omega * t
        key = hold(torch.complex(k * angle.cos(), k * angle.sin()))
        sums = fade * (sums + key)
        if spec.value_path:
            values = fade[:, None] * (values + key[..., None] * hold(mixer.v_proj(x_BTD[:, t]))[:, None])
    return torch.stack(out, dim=1)


def sketched(x: Tensor, table: Sketch, spec: OsamSpec) -> Tensor:
    return torch.complex(*(apply_sketch(part, table, spec.buckets) for part in (x.real, x.imag)))


@pytest.mark.parametrize("detach_state", [True, False])
@pytest.mark.parametrize("name", OPTIONS)
def test_output_and_gradients_are_those_of_the_recurrence(name: str, detach_state: bool) -> None:
    mixer = mixer_of(detach_state=detach_state, **OPTIONS[name])
    x = torch.randn(B, T, D, dtype=torch.float64, requires_grad=True)
    expected, found = reference(mixer, x), mixer(x, given())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    leaves = {"x": x, **{n: p for n, p in mixer.named_parameters() if n not in mixer.untrained}}
    cotangent = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, list(leaves.values()), cotangent)
    for leaf, one, other in zip(leaves, torch.autograd.grad(found, list(leaves.values()), cotangent), wanted):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-13, msg=lambda text, leaf=leaf: f"{leaf}: {text}")


@pytest.mark.parametrize("detach_state", [True, False])
@pytest.mark.parametrize("name", OPTIONS)
def test_no_gradient_reaches_what_is_called_untrained(name: str, detach_state: bool) -> None:
    mixer = mixer_of(detach_state=detach_state, **OPTIONS[name])
    assert {n for n, p in mixer.named_parameters() if not p.requires_grad} == mixer.untrained
    mixer.requires_grad_()  # as loading a checkpoint does
    mixer(torch.randn(B, T, D, dtype=torch.float64), given()).sum().backward()
    without = {n for n, p in mixer.named_parameters() if p.grad is None or not p.grad.any()}
    assert without == mixer.untrained
    frozen = {"theta_q_raw", "theta_k_raw", "omega_raw", "decay_raw"} & dict(mixer.named_parameters()).keys()
    assert not mixer.spec.freeze_phase or frozen <= mixer.untrained


def test_frozen_decays_are_not_trained() -> None:
    mixer = mixer_of(detach_state=False, decay=True, freeze_phase=True)
    assert mixer.untrained == {"theta_q_raw", "theta_k_raw", "omega_raw", "decay_raw"}


@pytest.mark.parametrize("name", OPTIONS)
def test_tokens_one_by_one_are_the_whole_text(name: str) -> None:
    mixer, x = mixer_of(**OPTIONS[name]), torch.randn(B, T, D, dtype=torch.float64)
    with torch.no_grad():
        whole = mixer(x, given())
        for cuts in ((0, 1, 2, 3, T), (0, 4, 5, T), tuple(range(T + 1))):
            cell, parts = Cell(), []
            for a, b in itertools.pairwise(cuts):
                parts.append(mixer(x[:, a:b], given(positions=torch.arange(a, b)[None], memory=cell)))
                assert cell.seen == b
            torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-13)
            assert cell.kept is not None and cell.kept.shape == (B, 2 * D, D + 1 if mixer.spec.value_path else 1)


@pytest.mark.parametrize("name", OPTIONS)
def test_left_padding_changes_nothing(name: str) -> None:
    mixer, x, pads = mixer_of(**OPTIONS[name]), torch.randn(1, T, D, dtype=torch.float64), 3
    padded = torch.cat((torch.randn(1, pads, D, dtype=torch.float64), x), dim=1)
    real = (torch.arange(T + pads) >= pads)[None].to(x.dtype)
    positions = (real.cumsum(-1) - 1).clamp(min=0).long()
    with torch.no_grad():
        cell, other = Cell(), Cell()
        found = mixer(padded, given(real, positions, cell))[:, pads:]
        torch.testing.assert_close(found, mixer(x, given(memory=other)), rtol=0, atol=1e-13)
    torch.testing.assert_close(cell.kept, other.kept)


def test_ten_thousand_streamed_tokens_are_the_parallel_form() -> None:
    """In float32, where both sum up errors; positions are far beyond a full turn. Single tokens and short pieces."""
    N, width = 10_000, 4
    mixer = Osam(dataclasses.replace(SPEC, buckets=11, readout_hidden=4, gate_cap=2.0), width, 1e-5)
    x = torch.randn(1, N, width)
    cell, parts = Cell(), []
    with torch.inference_mode():
        whole = mixer(x, given())
        for size in itertools.cycle((1, 1, 38)):
            at = torch.arange(cell.seen, min(cell.seen + size, N))[None]
            parts.append(mixer(x[:, at[0]], given(positions=at, memory=cell)))
            if cell.seen == N:
                break
    assert (torch.cat(parts, dim=1) - whole).abs().max() < 1e-4
    assert whole[:, -100:].std() > 0.01


def test_positions_that_do_not_read_see_nothing_but_the_bias() -> None:
    mixer, x = mixer_of(kupdate=3), torch.randn(B, T, D, dtype=torch.float64)
    y = mixer(x, given())
    skipped = [t for t in range(T) if t % 3]
    constant = mixer.gates(x.dtype)[0] * mixer.readout_out(F.gelu(mixer.readout_in.bias))
    torch.testing.assert_close(y[:, skipped], constant.expand(B, len(skipped), D))
    assert not torch.allclose(y[:, 3], constant)
    every = mixer_of(kupdate=1)
    every.load_state_dict(mixer.state_dict())
    torch.testing.assert_close(y[:, ::3], every(x, given())[:, ::3])  # all that is remembered is the same


def test_normalisation_by_size_does_not_depend_on_length() -> None:
    """One key again and again: the sum grows with the text, divided by the root of the count too."""
    x = torch.randn(1, 1, D).expand(1, 400, D)
    norms = {}
    for kind in ("count", "rms"):
        mixer = Osam(dataclasses.replace(SPEC, normalisation=kind), D, 1e-5)
        with torch.no_grad():
            mixer.omega_raw.zero_()
            factors = mixer.factors(x, given(), x.dtype)
            sums, _ = mixer.remembered(factors, given())
            count = torch.arange(1.0, 401)[None, :, None]
            norms[kind] = mixer.feature(factors.query, sums, count).norm(dim=-1)[0]
    torch.testing.assert_close(norms["rms"][1:], norms["rms"][1:2].expand(399), rtol=1e-4, atol=0)
    assert norms["count"][399] > 10 * norms["count"][1]


def test_decay_saturates_what_one_frequency_cancels() -> None:
    """Equal keys for many turns of one frequency sum up to nothing; decay leaves the last ones."""
    x = torch.randn(1, 1, D).expand(1, 1200, D)
    sums = {}
    for decay in (False, True):
        mixer = Osam(dataclasses.replace(SPEC, decay=decay), D, 1e-5)
        with torch.no_grad():
            mixer.omega_raw.fill_(math.atanh(2 * 2 * math.pi / 600))
            if decay:
                mixer.decay_raw.fill_(math.log(0.1))
            sums[decay] = mixer.remembered(mixer.factors(x, given(), x.dtype), given())[0].flatten(-2).norm(dim=-1)[0]
    assert sums[False][600] < 1e-2 * sums[False][300]
    assert sums[True][600] > 0.9 * sums[True][300] and sums[True][300] < 0.2 * sums[False][300]


def test_starting_values() -> None:
    spec = dataclasses.replace(SPEC, frequencies=4, decay=True, gate_cap=0.25)
    mixer = Osam(spec, D, 1e-5)
    for name in ("q_proj", "k_proj", "v_proj"):
        weight = getattr(mixer, name).weight.detach()
        torch.testing.assert_close(weight @ weight.t(), torch.eye(D), atol=1e-5, rtol=0)
    theta_q, theta_k = mixer.phases()
    gate, gate_value = mixer.gates()
    assert theta_q.item() == theta_k.item() == pytest.approx(0.024979, abs=1e-6)
    assert gate_value is not None and gate.item() == gate_value.item() == pytest.approx(0.018965, abs=1e-6)
    turn, scales = mixer.turn(), torch.tensor([4 * 1024 ** (i / 3) for i in range(4)])
    assert turn.decay_D is not None
    torch.testing.assert_close(turn.decay_D[:: D // 4], 1 / scales)
    torch.testing.assert_close(turn.frequency_D[:: D // 4], 1.6 / scales)
    assert torch.equal(turn.frequency_D[: D // 4], turn.frequency_D[:1].expand(D // 4))
    other = Osam(dataclasses.replace(spec, gate_start=0.0, time_scales=(1.25, 80.0)), D, 1e-5)
    assert [gate.item() for gate in other.gates() if gate is not None] == [0.125, 0.125]
    decay, frequency = other.turn()
    assert decay is not None
    torch.testing.assert_close(decay[:: D // 4], 1 / torch.tensor([1.25, 5.0, 20.0, 80.0]))
    assert torch.equal(frequency, turn.frequency_D)
    one = Osam(SPEC, D, 1e-5)
    assert one.turn().decay_D is None and one.turn().frequency_D[0].item() == pytest.approx(0.0099987, abs=1e-7)


def test_the_stored_tables_are_used() -> None:
    mixer, x = mixer_of(independent_hashes=True), torch.randn(B, T, D, dtype=torch.float64)
    state = mixer.state_dict()
    assert {"key_buckets", "key_signs", "query_buckets", "query_signs"} <= state.keys()
    assert not torch.equal(mixer.query_sketch.bucket_D, mixer.key_sketch.bucket_D)
    other = mixer_of(independent_hashes=True, hash_seed=7)
    before = other(x, given())
    other.load_state_dict(state)
    assert not torch.allclose(before, mixer(x, given()))
    assert torch.equal(other(x, given()), mixer(x, given()))


def test_dropout_acts_in_training_alone() -> None:
    mixer, x = mixer_of(dropout=0.5), torch.randn(B, T, D, dtype=torch.float64)
    assert not torch.equal(mixer(x, given()), mixer(x, given()))
    mixer.eval()
    torch.testing.assert_close(mixer(x, given()), reference(mixer, x))


def model_of(**options: Any) -> OuroborosForCausalLM:
    spec = ModelSpec(layout="1 (1)x2", vocab_size=31, hidden_size=D).replace(
        mixer=dataclasses.replace(SPEC, **options), ffn=FeedForwardSpec(intermediate_size=20)
    )
    return OuroborosForCausalLM(OuroborosConfig.from_spec(spec)).eval()


@pytest.mark.parametrize("name", ["published", "no value path", "all"])
def test_a_low_precision_model_keeps_a_wide_state_of_one_size(name: str) -> None:
    model, ids = model_of(**OPTIONS[name]), torch.randint(0, 31, (1, 300))
    with torch.no_grad():
        exact = model(ids, use_cache=False).logits
        model.bfloat16()
        cache, sizes = None, set()
        for a, b in ((0, 1), (1, 2), (2, 299), (299, 300)):
            out = model(ids[:, a:b], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            states = [layer.read() for layer in cache.layers]
            assert {state.dtype for state in states} == {torch.float32} and out.logits.dtype == torch.bfloat16
            sizes.add(sum(state.numel() * state.element_size() for state in states))
    per_visit = 2 * D * (D + 1 if model.model.spec.block.mixer.value_path else 1) * 4
    assert sizes == {3 * per_visit}
    assert (out.logits[0, -1].float() - exact[0, -1]).abs().max() < 0.05 * exact.abs().max()


def test_a_model_in_float64_is_one() -> None:
    model = model_of().double()
    assert model(torch.randint(0, 31, (1, 5)), use_cache=False).logits.dtype == torch.float64

"""Each check passes on a sound model and fails on a model with the defect it looks for."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer, StaticLayer

from ouroboros.config import AttentionSpec, FeedForwardSpec, ModelSpec
from ouroboros.eval import equivalence
from ouroboros.eval.finding import Mismatch
from ouroboros.eval.subject import Subject, build_perturbed, prepare
from ouroboros.model import executor, modeling
from ouroboros.model.modeling import OuroborosForCausalLM
from ouroboros.nn import attention, loop
from ouroboros.nn.block import Block
from ouroboros.nn.rope import Rope
from ouroboros.nn.topology import EnterLoop

SPEC = ModelSpec().replace(
    layout="1 (1)x2",
    vocab_size=31,
    hidden_size=16,
    mixer=AttentionSpec(num_heads=2),
    ffn=FeedForwardSpec(intermediate_size=24),
)
Patch = pytest.MonkeyPatch


@pytest.fixture
def subject() -> Subject:
    torch.manual_seed(0)
    return prepare(build_perturbed(SPEC))


def no_mask(patch: Patch) -> None:
    real = attention.attend

    def attend(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float = 0.0, *, once: bool = False
    ) -> Tensor:
        return real(q, k, v, torch.ones(1, 1, q.shape[2], k.shape[2], dtype=torch.bool), dropout)

    patch.setattr(attention, "attend", attend)


def look_ahead_in_later_loops(patch: Patch) -> None:
    real = executor._Run.enter

    def enter(self: Any, step: EnterLoop) -> None:
        x = self.streams[step.stream]
        self.streams[step.stream] = x + 0.1 * x.mean(1, keepdim=True) * (step.loop >= 2)
        real(self, step)

    patch.setattr(executor._Run, "enter", enter)


def positions_from_zero(patch: Patch) -> None:
    real = Rope.forward
    patch.setattr(Rope, "forward", lambda self, positions: real(self, positions - positions[:, :1]))


def no_padding_mask(patch: Patch) -> None:
    real = modeling.create_causal_mask
    patch.setattr(modeling, "create_causal_mask", lambda **given: real(**{**given, "attention_mask": None}))


def beams_not_reordered(patch: Patch) -> None:
    patch.setattr(DynamicLayer, "reorder_cache", lambda self, beams: None)


def static_cache_loses_its_first_token(patch: Patch) -> None:
    real = StaticLayer.update

    def update(self: Any, keys: Tensor, values: Tensor, *rest: Any, **named: Any) -> tuple[Tensor, Tensor]:
        keys, values = real(self, keys, values, *rest, **named)
        return keys, torch.cat((torch.zeros_like(values[:, :, :1]), values[:, :, 1:]), dim=2)

    patch.setattr(StaticLayer, "update", update)


def norm_over_the_batch(patch: Patch) -> None:
    real = Block.forward
    patch.setattr(Block, "forward", lambda self, x, *rest: real(self, x - 0.1 * x.mean(0, keepdim=True), *rest))


def noise_in_evaluation(patch: Patch) -> None:
    real = Block.forward
    patch.setattr(Block, "forward", lambda self, x, *rest: real(self, nn.functional.dropout(x, 0.1), *rest))


def noise_in_training(patch: Patch) -> None:
    real = Block.forward
    patch.setattr(Block, "forward", lambda self, x, *r: real(self, nn.functional.dropout(x, 0.1, self.training), *r))


def copied_weights(patch: Patch) -> None:
    real = OuroborosForCausalLM.with_loops
    patch.setattr(OuroborosForCausalLM, "with_loops", lambda self, loops: copy.deepcopy(real(self, loops)))


def view_without_effect(patch: Patch) -> None:
    patch.setattr(OuroborosForCausalLM, "with_loops", lambda self, loops: self)


def any_cache_accepted(patch: Patch) -> None:
    patch.setattr(modeling, "check_cache_fits", lambda *arguments: None)


def injection_not_neutral(patch: Patch) -> None:
    patch.setattr(
        loop._Concatenated, "reset_parameters", lambda self, init=None: nn.init.normal_(self.weight, std=0.02)
    )


def embedding_not_neutral(patch: Patch) -> None:
    patch.setattr(loop.LoopEmbedding, "reset_parameters", lambda self, init=None: nn.init.normal_(self.weight))


def documents_in_one_row(patch: Patch) -> None:
    patch.setattr(modeling, "find_starts", lambda *given, **rest: None)
    real = modeling.create_causal_mask
    patch.setattr(modeling, "create_causal_mask", lambda **given: real(**{**given, "position_ids": None}))


def other_hidden_states(patch: Patch, change: Callable[[Any, list[Tensor]], Any]) -> None:
    """Hidden states are what ``change`` makes of them and of the states that visits left."""
    real = modeling.OuroborosModel._run

    def run(self: Any, *given: Any, **named: Any) -> Any:
        seen: list[Tensor] = []
        with executor.observe(self, lambda block, visit, before, after: seen.append(after)):
            outputs = real(self, *given, **named)
        if outputs.hidden_states is not None:
            outputs.hidden_states = change(outputs.hidden_states, seen)
        return outputs

    patch.setattr(modeling.OuroborosModel, "_run", run)


def states_of_the_last_loop_alone(patch: Patch) -> None:
    other_hidden_states(patch, lambda states, seen: states[-2:])


def the_last_state_before_the_norm(patch: Patch) -> None:
    other_hidden_states(patch, lambda states, seen: (*states[:-1], seen[-1]))


Check = Callable[[Subject], str]
DEFECTS: list[tuple[Check, Callable[[Patch], None]]] = [
    (equivalence.check_causal, no_mask),
    (equivalence.check_causal, look_ahead_in_later_loops),
    (equivalence.check_cached, positions_from_zero),
    (equivalence.check_chunked, positions_from_zero),
    (equivalence.check_static_cache, static_cache_loses_its_first_token),
    (equivalence.check_static_cache, positions_from_zero),
    (equivalence.check_beams, beams_not_reordered),
    (equivalence.check_left_padding, no_padding_mask),
    (equivalence.check_left_padding, norm_over_the_batch),
    (equivalence.check_packed, documents_in_one_row),
    (equivalence.check_hidden_states, states_of_the_last_loop_alone),
    (equivalence.check_hidden_states, the_last_state_before_the_norm),
    (equivalence.check_hidden_states, positions_from_zero),
    (equivalence.check_dropout, noise_in_evaluation),
    (equivalence.check_dropout, noise_in_training),
    (equivalence.check_loops, copied_weights),
    (equivalence.check_loops, view_without_effect),
    (equivalence.check_loops, any_cache_accepted),
    (equivalence.check_neutral, injection_not_neutral),
    (equivalence.check_neutral, embedding_not_neutral),
]


@pytest.mark.parametrize(("check", "defect"), DEFECTS, ids=lambda function: function.__name__)
def test_defect_is_found(check: Check, defect: Callable[[Patch], None], subject: Subject, monkeypatch: Patch) -> None:
    assert check(subject)
    defect(monkeypatch)
    with pytest.raises(Mismatch) as caught:
        check(Subject(subject.model, subject.ids))  # a fresh subject, because a subject remembers its logits
    assert "\n" not in str(caught.value)


class TestReload:
    def test_what_is_not_in_the_files_is_missed(self, subject: Subject) -> None:
        subject.model.head.scale = 2.0
        with pytest.raises(Mismatch, match="after loading, loops 1: logits differ"):
            equivalence.check_reload(subject)

    def test_rounded_weights(self, subject: Subject, monkeypatch: Patch) -> None:
        """By less than logits may differ."""
        real = OuroborosForCausalLM.save_pretrained

        def save(self: Any, directory: Any, **options: Any) -> None:
            rounded = copy.deepcopy(self)
            with torch.no_grad():
                rounded.model.norm.weight[0] += 1e-7
            real(rounded, directory, **options)

        monkeypatch.setattr(OuroborosForCausalLM, "save_pretrained", save)
        with pytest.raises(Mismatch, match=r"weights altered by saving and loading.*model\.norm\.weight"):
            equivalence.check_reload(subject)

    def test_weights_at_any_address(self, subject: Subject) -> None:
        for parameter in subject.model.parameters():
            askew = torch.empty(parameter.numel() + 1)[1:].view(parameter.shape)
            parameter.data = askew.copy_(parameter.data)
        assert "weights equal bit for bit" in equivalence.check_reload(subject)

    def test_weight_that_is_not_saved(self, subject: Subject, monkeypatch: Patch) -> None:
        real = OuroborosForCausalLM.save_pretrained

        def save(self: OuroborosForCausalLM, directory: str) -> None:
            weights = {name: value for name, value in self.state_dict().items() if name != "model.norm.weight"}
            real(self, directory, state_dict=weights)

        monkeypatch.setattr(OuroborosForCausalLM, "save_pretrained", save)
        with pytest.raises(Mismatch, match=r"loading report: .*model\.norm\.weight"):
            equivalence.check_reload(subject)

    def test_progress_bars_are_as_before(self, subject: Subject) -> None:
        from transformers.utils import logging

        shown = logging.is_progress_bar_enabled()
        equivalence.check_reload(subject)
        assert logging.is_progress_bar_enabled() == shown


class TestCompile:
    def test_graph_break(self, subject: Subject, monkeypatch: Patch) -> None:
        real = Block.forward

        def forward(self: Block, *arguments: Any) -> Tensor:
            torch._dynamo.graph_break()
            return real(self, *arguments)

        monkeypatch.setattr(Block, "forward", forward)
        with pytest.raises(Exception, match="graph_break"):
            equivalence.check_compile(subject)

    def test_no_compiler(self, subject: Subject, monkeypatch: Patch) -> None:
        class InvalidCxxCompiler(RuntimeError):
            pass

        def compiled(*_: Any, **__: Any) -> Any:
            try:
                raise InvalidCxxCompiler
            except InvalidCxxCompiler as error:
                raise RuntimeError("backend failed") from error

        monkeypatch.setattr(torch, "compile", compiled)
        assert equivalence.check_compile(subject).startswith("skipped: this machine has no C++ compiler")

    def test_other_failures_are_not_hidden(self, subject: Subject, monkeypatch: Patch) -> None:
        def compiled(*_: Any, **__: Any) -> Any:
            raise RuntimeError("backend failed")

        monkeypatch.setattr(torch, "compile", compiled)
        with pytest.raises(RuntimeError, match="backend failed"):
            equivalence.check_compile(subject)


class TestSharedCache:
    def test_prefill_alone_is_compared_and_said_so(self) -> None:
        torch.manual_seed(0)
        subject = prepare(build_perturbed(SPEC.replace(share_last_kv=True)))
        detail = equivalence.check_cached(subject)
        assert "approximately by design" in detail and "one cache entry per block (2)" in detail
        assert equivalence.check_chunked(subject).startswith("skipped")
        with pytest.raises(Mismatch):  # else there would be nothing to except it from
            equivalence._fed_gap(subject, [1])

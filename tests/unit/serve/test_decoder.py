"""The loop itself, on logits that are written down, and a window: equal to a slow loop, and to ``generate`` while the
text fits."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.generation import stopping_criteria
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
)

from ouroboros.errors import OuroborosError
from ouroboros.serve.decoder import Advance, LoopDecoder, WindowDecoder
from ouroboros.serve.sampling import Sampling


class Counting(LoopDecoder):
    """Prefers the token after the last one, and notes what it was shown."""

    def __init__(self) -> None:
        self.shown: list[tuple[int, int | None]] = []

    def begin(self, model: Any, input_ids: Tensor, config: Any, prepared: dict[str, Any]) -> Advance:
        def advance(ids: Tensor, token_B1: Tensor | None) -> Tensor:
            self.shown.append((ids.shape[1], None if token_B1 is None else int(token_B1)))
            return torch.nn.functional.one_hot(ids[:, -1] + 1, 9).bfloat16()

        return advance


def test_each_token_is_chosen_and_shown_until_the_criterion() -> None:
    decoder = Counting()

    def no_four(ids: Tensor, scores: Tensor) -> Tensor:
        assert scores.dtype == torch.float32
        scores[:, 4] = -1  # in place
        scores[:, 7] += 0.5
        return scores

    found = decoder._write(
        SimpleNamespace(),
        torch.tensor([[1]]),
        no_four,
        StoppingCriteriaList([MaxLengthCriteria(4)]),
        SimpleNamespace(do_sample=False),
    )
    assert [int(token) for token in found] == [2, 3, 7]
    assert decoder.shown == [(1, None), (2, 2), (3, 3)]


def test_a_long_text_is_kept_in_a_buffer_that_doubles() -> None:
    """Each call sees all of it, at few addresses; the prompt is left as it was."""
    given = torch.tensor([[0, 1, 2]])
    seen: list[tuple[list[int], int]] = []

    class Noting(LoopDecoder):
        def begin(self, model: Any, input_ids: Tensor, config: Any, prepared: dict[str, Any]) -> Advance:
            def advance(ids: Tensor, token_B1: Tensor | None) -> Tensor:
                seen.append((ids[0].tolist(), ids.data_ptr()))
                return torch.nn.functional.one_hot((ids[:, -1] + 1) % 9, 9)

            return advance

    found = Noting()._write(
        SimpleNamespace(),
        given,
        lambda ids, scores: scores,
        StoppingCriteriaList([MaxLengthCriteria(50)]),
        SimpleNamespace(do_sample=False),
    )
    expected = [n % 9 for n in range(50)]
    assert [0, 1, 2, *map(int, found)] == expected and given.tolist() == [[0, 1, 2]]
    assert [text for text, _ in seen] == [expected[:length] for length in range(3, 50)]
    assert len({address for _, address in seen}) == 6  # 3, 6, 12, 24, 48, 96


class Past(StoppingCriteria):
    """Ends a text of more than so many tokens; counts how often it is asked."""

    def __init__(self, length: int) -> None:
        self.length, self.asked = length, 0

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.asked += 1
        return torch.tensor([input_ids.shape[1] > self.length])


def written(*criteria: StoppingCriteria) -> list[int]:
    """What counting up from 1 comes to."""
    found = Counting()._write(
        SimpleNamespace(), torch.tensor([[1]]), [], StoppingCriteriaList(criteria), SimpleNamespace(do_sample=False)
    )
    return [1, *map(int, found)]


def test_the_first_criterion_of_any_kind_ends_the_text() -> None:
    assert written(MaxLengthCriteria(6), MaxLengthCriteria(4)) == [1, 2, 3, 4]
    assert written(MaxLengthCriteria(6), EosTokenCriteria(3)) == [1, 2, 3]
    assert written(EosTokenCriteria(torch.tensor([5, 7])), EosTokenCriteria([6, 4])) == [1, 2, 3, 4]
    assert written(MaxLengthCriteria(4), EosTokenCriteria(1)) == [1, 2, 3, 4], "the prompt's end token ended it"
    other = Past(4)
    assert written(MaxLengthCriteria(8), other) == [1, 2, 3, 4, 5] and other.asked == 4


def test_what_inherits_a_criterion_is_asked() -> None:
    class Later(MaxLengthCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            return super().__call__(input_ids[:, 1:], scores)

    assert written(Later(4)) == [1, 2, 3, 4, 5]


def test_a_length_beyond_the_models_still_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(stopping_criteria.logger, "warning_once", said.append)
    assert written(MaxLengthCriteria(6, max_position_embeddings=4)) == [1, 2, 3, 4, 5, 6]
    assert len(said) == 1 and "maximum length (4)" in said[0]


def prompt(length: int) -> torch.Tensor:
    return torch.randint(0, 256, (1, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("length", [1, 5, 6, 30])
def test_every_step_sees_the_last_tokens_from_position_0(length, model):
    ids = prompt(length)
    expected = ids
    with torch.no_grad():
        for _ in range(9):
            logits = model(expected[:, -6:]).logits[:, -1]
            expected = torch.cat((expected, logits.argmax(-1, keepdim=True)), dim=1)
    found = WindowDecoder(6).generate(model, ids, max_new_tokens=9, do_sample=False)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("sampling", [Sampling(temperature=0.0), Sampling(repetition_penalty=1.3, top_k=20)])
def test_a_text_that_fits_is_what_generate_writes(sampling, model):
    options = {**sampling.options(), "max_new_tokens": 12}
    torch.manual_seed(2)
    expected = model.generate(prompt(4), **options)
    torch.manual_seed(2)
    assert torch.equal(WindowDecoder(16).generate(model, prompt(4), **options), expected)


def test_penalties_see_the_whole_text(model):
    seen = []

    def watch(ids, scores):
        seen.append(ids.shape[1])
        return scores

    WindowDecoder(4).generate(model, prompt(10), max_new_tokens=3, do_sample=False, logits_processor=[watch])
    assert seen == [10, 11, 12]


def test_what_is_not_served(model):
    with pytest.raises(OuroborosError, match="one sequence at a time, got 2"):
        WindowDecoder(8).generate(model, prompt(3).repeat(2, 1), max_new_tokens=1)

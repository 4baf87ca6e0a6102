"""The loop itself, on logits that are written down; the decoders made of it are tested beside ``generate``."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ouroboros.serve.decoder import Advance, LoopDecoder


class Counting(LoopDecoder):
    """Prefers the token after the last one, and notes what it was shown."""

    def __init__(self) -> None:
        self.shown: list[tuple[int, int | None]] = []

    def begin(self, model: Any, input_ids: Tensor, config: Any, prepared: dict[str, Any]) -> Advance:
        def advance(ids: Tensor, token_B1: Tensor | None) -> Tensor:
            self.shown.append((ids.shape[1], None if token_B1 is None else int(token_B1)))
            return torch.nn.functional.one_hot(ids[:, -1] + 1, 9).bfloat16()

        return advance


class Streamed:
    def __init__(self) -> None:
        self.said: list[Any] = []

    def put(self, value: Tensor) -> None:
        self.said += value.tolist()

    def end(self) -> None:
        self.said.append("end")


def test_each_token_is_chosen_shown_and_streamed_until_the_criterion() -> None:
    decoder, streamed = Counting(), Streamed()

    def no_four(ids: Tensor, scores: Tensor) -> Tensor:
        assert scores.dtype == torch.float32
        scores[:, 4] = -1  # in place
        scores[:, 7] += 0.5
        return scores

    found = decoder._write(
        SimpleNamespace(),
        torch.tensor([[1]]),
        no_four,
        lambda ids, scores: torch.tensor([ids.shape[1] == 4]),
        SimpleNamespace(do_sample=False),
        streamed,
    )
    assert found.tolist() == [[1, 2, 3, 7]]
    assert decoder.shown == [(1, None), (2, 2), (3, 3)]
    assert streamed.said == [2, 3, 7, "end"]


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
        lambda ids, scores: torch.tensor([ids.shape[1] == 50]),
        SimpleNamespace(do_sample=False),
    )
    expected = [n % 9 for n in range(50)]
    assert found.tolist() == [expected] and given.tolist() == [[0, 1, 2]]
    assert [text for text, _ in seen] == [expected[:length] for length in range(3, 50)]
    assert len({address for _, address in seen}) == 6  # 3, 6, 12, 24, 48, 96

"""Completions: against sampling token by token without a cache, and against probabilities of one text at a time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ouroboros.api import build, recipe
from ouroboros.data.tokenize import byte_tokenizer
from ouroboros.errors import OuroborosError
from ouroboros.systems.controller.completions import Problem, Writer, read_problems, written

FORMAT = "Question: {question}\\nAnswer: {answer}"
STOP = "abcdefghijklmnopqrst0123456789"  # so many that some completions meet one
PROMPTS = ["Question: 1 + 2?\nAnswer:", "Q", "Question: how many?\nA:"]


def writer(**options) -> Writer:
    """A looped model of bytes, whose probabilities differ enough for draws to depend on them."""
    torch.manual_seed(0)
    spec = recipe("controller", "tiny")
    model = build(spec)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return Writer(model, byte_tokenizer(), **{"max_new_tokens": 12} | options)


def by_hand(w: Writer, prompts: list[str], each: int, temperature: float) -> list[list[int]]:
    """Sampling of the formula: every step reads the whole of each text by itself, and draws for all rows at once."""
    rows = [w.ids(prompt) for prompt in prompts for _ in range(each)]
    new, ended = [[] for _ in rows], [False] * len(rows)
    for _ in range(w.max_new_tokens):
        scores = torch.stack([w.model(row[None], use_cache=False).logits[0, -1] for row in rows])
        tokens = torch.multinomial((scores.float() / temperature).softmax(-1), 1)[:, 0]
        for n, token in enumerate(tokens.tolist()):
            if not ended[n]:
                new[n].append(token)
                rows[n] = torch.cat((rows[n], tokens[n : n + 1]))
                ended[n] = token == w.tokenizer.eos_id or any(s in w.text(torch.tensor(new[n])) for s in w.stop)
        if all(ended):
            break
    return new


@torch.no_grad()
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_samples_are_those_of_sampling_without_a_cache(temperature: float) -> None:
    w = writer(stop=tuple(STOP))
    torch.manual_seed(3)
    made = w.write(PROMPTS, each=4, temperature=temperature)
    torch.manual_seed(3)
    expected = by_hand(w, PROMPTS, 4, temperature)
    assert [c.ids.tolist() for group in made for c in group] == expected
    assert len({len(ids) for ids in expected}) > 2  # some ended early
    for completion in (c for group in made for c in group):
        whole = w.text(completion.ids)
        assert whole.startswith(completion.text) and not set(STOP) & set(completion.text)
        assert (whole == completion.text) == (not set(STOP) & set(whole))


def test_the_end_of_text_ends_a_completion(monkeypatch: pytest.MonkeyPatch) -> None:
    w = writer()
    torch.manual_seed(0)
    drawn, end = torch.randint(256, (6, 3)), w.tokenizer.eos_id
    drawn[2, 0], drawn[0, 1] = end, end
    steps = iter(drawn)
    monkeypatch.setattr(torch, "multinomial", lambda scores, num_samples: next(steps)[:, None])
    made = writer(max_new_tokens=6).write(PROMPTS, temperature=1.0)
    assert [c.ids.tolist() for (c,) in made] == [drawn[:3, 0].tolist(), [end], drawn[:, 2].tolist()]
    assert made[1][0].text == ""


@torch.no_grad()
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_those_of_each_text_by_itself(temperature: float) -> None:
    w = writer()
    prompt = w.ids(PROMPTS[0])
    completions = [torch.arange(65, 65 + length) for length in (5, 1, 8)]
    found = w.log_probs(prompt, completions, temperature)
    assert found.shape == (3, 8) and found.dtype == torch.float32
    assert written(completions).sum(1).tolist() == [5, 1, 8] and not found[~written(completions)].any()
    for row, ids in zip(found, completions, strict=True):
        logits = w.model(torch.cat((prompt, ids))[None], use_cache=False).logits[0, len(prompt) - 1 : -1]
        expected = (logits.double() / temperature).log_softmax(-1)[torch.arange(len(ids)), ids]
        torch.testing.assert_close(row[: len(ids)].double(), expected, rtol=1e-5, atol=1e-4)


def test_greedy_completions_come_in_order_whatever_the_batch() -> None:
    w = writer(max_new_tokens=4)
    problems = [Problem(prompt, "") for prompt in PROMPTS]
    one, three = (list(w.greedy(problems, batch)) for batch in (1, 3))
    assert [p for p, _ in one] == [p for p, _ in three] == problems
    assert [c.ids.tolist() for _, c in one] == [c.ids.tolist() for _, c in three]


def test_a_prompt_that_does_not_fit_is_refused() -> None:
    with pytest.raises(OuroborosError, match="do not fit the model's context"):
        writer(max_new_tokens=10_000).write(["x"])


def test_a_model_that_sees_later_tokens_is_refused() -> None:
    with pytest.raises(OuroborosError, match="pooling 'all', as published, is not causal.*need a causal model"):
        Writer(build(recipe("controller-published", "tiny")), byte_tokenizer())


def test_problems_are_read_by_a_format(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"question": "1 + 1?", "answer": "Two. #### 2"}) + "\n")
    problems = read_problems(f"{path}@{FORMAT}")
    assert problems.items == [Problem("Question: 1 + 1?\nAnswer:", " Two. #### 2")]
    assert problems.stop == ("\nQuestion:",)


@pytest.mark.parametrize(
    ("form", "message"),
    [("", "needs a file of records and a format"), ("@{question}", "has no answer"), ("@{a}: {question}", "no column")],
)
def test_formats_without_an_answer_are_refused(tmp_path: Path, form: str, message: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"question": "1 + 1?"}) + "\n")
    with pytest.raises(OuroborosError, match=message):
        read_problems(f"{path}{form}")

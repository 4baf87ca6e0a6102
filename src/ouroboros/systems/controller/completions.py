"""Completions of problems: reading the problems, writing several completions of each at once, and their probabilities.

Shapes: B sequences, C tokens of the longest completion.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers.generation import StoppingCriteria

from ouroboros.data.formats import find_format
from ouroboros.data.records import read_rows
from ouroboros.data.sources import parse_source, source_files
from ouroboros.data.tokenize import TextTokenizer
from ouroboros.errors import check
from ouroboros.model.modeling import OuroborosForCausalLM
from ouroboros.serve.sampling import Sampling


class Problem(NamedTuple):
    """What the model is given, and the text that it should have written."""

    prompt: str
    reference: str


class Problems(NamedTuple):
    """The problems of a source, and what begins the next one: a completion ends there."""

    items: list[Problem]
    stop: tuple[str, ...]


class Completion(NamedTuple):
    """What was written behind a prompt."""

    ids: Tensor
    """(tokens,), with the token that ended it: the end of text, or the last one of a stop string."""
    text: str
    """Without what ended it."""


def read_problems(source: str, *, base: Path | None = None) -> Problems:
    """The problems of local files of records, written as a source of training is: ``FILE@FORMAT``, where a format has
    the answer at its end, for example ``gsm8k.jsonl@Question: {question}\\nAnswer: {answer}``.

    Raises:
        OuroborosError: no format, one without an answer at the end, or a file that cannot be read; names it.
    """
    ref = parse_source(source, base=base)
    check(
        ref.format is not None and ref.kind == "records",
        f"{source!r}: needs a file of records and a format with the answer at its end, for example"
        " 'FILE.jsonl@Question: {question}\\nAnswer: {answer}'",
    )
    form = find_format(ref.format or "")
    found = []
    for name, path in source_files(ref):
        for number, where, columns in read_rows(path, form):
            rendered = form.render(columns(), where)
            if rendered is None:
                continue
            text, answers = rendered
            whole = answers is not None and len(answers) == 1 and answers[0][1] == len(text)
            check(whole, f"{name}: record {number}: format {form.name!r} has no answer, one alone, at its end")
            start = answers[0][0] if answers else 0
            found.append(Problem(text[:start], text[start:]))
    check(bool(found), f"{source!r}: holds no problem")
    return Problems(found, form.stop)


@dataclass(frozen=True)
class Writer:
    """A model that writes completions with its cache, several prompts side by side.

    A prompt begins with the end-of-text token, as documents do in training. A model in which tokens see later ones is
    refused.
    """

    model: OuroborosForCausalLM
    tokenizer: TextTokenizer
    stop: tuple[str, ...] = ()
    """Strings that end a completion, beside the end of text."""
    max_new_tokens: int = 200
    """Of a completion; one that is cut there counts as it is."""
    dtype: torch.dtype = torch.float32
    """The precision of products; other than float32 by autocast."""

    def __post_init__(self) -> None:
        faults = [part.sees_later for part in self.model.config.model_spec.parts if part.sees_later]
        # Its tokens have other probabilities when they are written than in a pass over the whole text.
        check(not faults, f"{'; '.join(faults)}; rewards need a causal model")

    def ids(self, prompt: str) -> Tensor:
        """The ids (tokens,) of a prompt, on the model's device."""
        found = np.concatenate(([self.tokenizer.eos_id], self.tokenizer.encode(prompt.encode(), name="prompt")))
        return torch.from_numpy(found.astype(np.int64)).to(self.model.device)

    @torch.no_grad()
    def write(self, prompts: Sequence[str], *, each: int = 1, temperature: float = 0.0) -> list[list[Completion]]:
        """``each`` completions of every prompt; temperature 0 takes the most probable tokens. Draws come from torch's
        own generator, which the caller seeds.

        Raises:
            OuroborosError: a prompt leaves no room in the model's context.
        """
        given = [self.ids(prompt) for prompt in prompts]
        longest, context = max(map(len, given)), self.model.config.max_position_embeddings
        check(
            longest + self.max_new_tokens <= context,
            f"a prompt of {longest} tokens and max_new_tokens {self.max_new_tokens} do not fit the model's context of"
            f" {context}; lower max_new_tokens",
        )
        end = self.tokenizer.eos_id
        ids = torch.stack([nn.functional.pad(row, (longest - len(row), 0), value=end) for row in given])
        mask = torch.stack([nn.functional.pad(torch.ones_like(row), (longest - len(row), 0)) for row in given])
        stopping = _StopStrings(self, longest, len(prompts) * each)
        options = Sampling(max_new_tokens=self.max_new_tokens, temperature=temperature, top_p=1.0).options()
        options |= {"num_return_sequences": each, "eos_token_id": end, "pad_token_id": end}
        model: Any = self.model.eval()
        with self.autocast():
            rows = model.generate(ids, attention_mask=mask, stopping_criteria=[stopping], **options)[:, longest:]
        done = [self._completion(row, length) for row, length in zip(rows, stopping.lengths.tolist(), strict=True)]
        return [done[first : first + each] for first in range(0, len(done), each)]

    def _completion(self, row: Tensor, length: int) -> Completion:
        """Of the new tokens of one row, which is filled up with the end of text, and its length where a string ends."""
        ended = (row == self.tokenizer.eos_id).nonzero()
        length = min(length, len(row), int(ended[0]) + 1 if len(ended) else len(row))
        text = self.text(row[:length])
        return Completion(row[:length], text[: min((text.find(s) for s in self.stop if s in text), default=None)])

    def text(self, ids: Tensor) -> str:
        """Ids as text, without the end of text."""
        kept = ids[ids != self.tokenizer.eos_id].cpu().numpy()
        return bytes(self.tokenizer.decode(kept)).decode("utf-8", "replace")

    def log_probs(self, prompt: Tensor, completions: Sequence[Tensor], temperature: float = 1.0) -> Tensor:
        """Log-probabilities (B, C) in nats of the tokens of several completions of one prompt, in one pass without a
        cache; 0 behind the end of a completion.

        They are of the distribution that is sampled: softmax of the logits divided by ``temperature``, in float32.
        """
        # The rows share their beginning, so there is no padding before them, and what is behind no token sees.
        rows = [torch.cat((prompt, completion)) for completion in completions]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        width = ids.shape[1] - len(prompt)
        with self.autocast():
            logits = self.model.eval()(ids[:, :-1], use_cache=False, logits_to_keep=width).logits
        scores, targets = logits.flatten(0, 1).float() / temperature, ids[:, -width:]
        found = -nn.functional.cross_entropy(scores, targets.flatten(), reduction="none").view_as(targets)
        return found.masked_fill(~written(completions), 0.0)

    def autocast(self) -> torch.autocast:
        """The precision of a pass."""
        return torch.autocast(self.model.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def greedy(self, problems: Sequence[Problem], batch: int) -> Iterator[tuple[Problem, Completion]]:
        """Each problem with its most probable completion, token by token, in order, ``batch`` at once."""
        for first in range(0, len(problems), batch):
            some = problems[first : first + batch]
            for problem, (completion,) in zip(some, self.write([problem.prompt for problem in some]), strict=True):
                yield problem, completion


def written(completions: Sequence[Tensor]) -> Tensor:
    """(B, C) boolean: where a completion has a token."""
    lengths = torch.tensor([len(completion) for completion in completions], device=completions[0].device)
    return torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]


class _StopStrings(StoppingCriteria):
    """Ends rows whose new text holds a stop string, and keeps their lengths."""

    def __init__(self, writer: Writer, prompt: int, rows: int) -> None:
        self.writer, self.prompt = writer, prompt
        self.lengths = torch.full((rows,), writer.max_new_tokens)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        new = input_ids[:, self.prompt :]
        for row, ids in enumerate(new if self.writer.stop else ()):
            if self.lengths[row] > new.shape[1] and any(s in self.writer.text(ids) for s in self.writer.stop):
                self.lengths[row] = new.shape[1]
        return (self.lengths <= new.shape[1]).to(input_ids.device)

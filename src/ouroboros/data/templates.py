"""Conversations in the form that a tokenizer's own chat template gives them.

The template's marks are special tokens, which are one id each; what people say never is: a turn that spells one is
refused. So a tokenizer with which such text was made reads special tokens (``TextTokenizer.reads_specials``).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ouroboros.config import DataSpec
from ouroboros.data.formats import ASSISTANT, USER, ChatFormat, Rendered, TextFormat, Turn
from ouroboros.data.tokenize import TextTokenizer, is_made_of_text, load_tokenizer
from ouroboros.errors import OuroborosError, check, first_line


class TemplateChat(ChatFormat):
    """Conversations by the chat template of the transformers tokenizer ``hf``; with ``tells_answers`` it also finds out
    what of a text is an answer, which takes the template twice more for each."""

    def __init__(self, column: str, hf: Any, *, tells_answers: bool = False) -> None:
        super().__init__(column)
        self._hf, self._tells = hf, tells_answers

    @property
    def stop(self) -> tuple[str, ...]:
        asked = [Turn(USER, "x")]
        before = self._text(asked, "chat", prompt=True)
        mark = self._text([*asked, Turn(ASSISTANT, "x")], "chat").removeprefix(f"{before}x").strip()
        return (mark,) if mark else ()

    def _written(self, turns: Sequence[Turn], where: str) -> Rendered:
        text = self._text(turns, where)
        if not self._tells:
            return Rendered(text, ())
        answers = []
        for index in (number for number, turn in enumerate(turns) if turn.role == ASSISTANT):
            before = self._text(turns[:index], where, prompt=True)
            after = self._text(turns[: index + 1], where)
            check(
                text.startswith(after) and after.startswith(before),
                f"{where}: the tokenizer's chat template writes earlier turns in another way once there are later"
                " ones, so data.loss 'answers' cannot tell the answers; leave that option out",
            )
            answers.append((len(before.rstrip(" ")), len(after)))
        return Rendered(text, tuple(answers))

    def conversation(self, earlier: Iterable[tuple[str, str]], line: str) -> str:
        turns = [turn for ask, say in earlier for turn in (Turn(USER, ask), Turn(ASSISTANT, say))]
        return self.asked([*turns, Turn(USER, line)])

    def asked(self, turns: Sequence[Turn]) -> str:
        """The text up to the answer to a conversation of any speakers that the template knows."""
        return self._text(turns, "chat", prompt=True)

    def _text(self, turns: Sequence[Turn], where: str, *, prompt: bool = False) -> str:
        for turn, token in itertools.product(turns, self._hf.all_special_tokens):
            fault = f"{where}: a turn of {turn.role!r} spells the special token {token!r} of the tokenizer"
            check(token not in turn.text, fault)
        messages = [{"role": turn.role, "content": turn.text} for turn in turns]
        try:
            return self._hf.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        except Exception as error:  # a template is a program of its own and may raise whatever it likes
            raise OuroborosError(f"{where}: the tokenizer's chat template fails: {first_line(error)}") from error


def source_format(form: TextFormat, spec: DataSpec) -> TextFormat:
    """``form`` as a source is read: conversations by the tokenizer's own template, if it is one that brings one."""
    path = Path(spec.tokenizer).expanduser()
    is_made = spec.tokenizer == "bytes" or is_made_of_text(spec.tokenizer)
    if not isinstance(form, ChatFormat) or is_made or not path.is_dir():  # one that is not there is an error elsewhere
        return form
    hf = load_tokenizer(path).hf
    has_template = bool(getattr(hf, "chat_template", None))
    return TemplateChat(form.columns[0], hf, tells_answers=spec.loss == "answers") if has_template else form


def chat_format(form: TextFormat | None, tokenizer: TextTokenizer) -> TextFormat | None:
    """``form`` as a model with this tokenizer was trained on it."""
    if isinstance(form, ChatFormat) and tokenizer.reads_specials:
        return TemplateChat(form.columns[0], tokenizer.hf)
    return form

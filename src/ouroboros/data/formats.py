"""How a record becomes text: named formats, templates and conversations.

A template is text with columns in braces, ``Q: {query}\\nA: {response}``; ``{{`` and ``}}`` stand for braces, and
``{data.text}`` is the column ``text`` within ``data``. A column that is empty or null is an empty text. The same
template that made the training text makes the prompt of a chat: what precedes the last column, which is the answer.
"""

from __future__ import annotations

import functools
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ouroboros.errors import OuroborosError, check, nearest
from ouroboros.registry import found, load


@functools.cache
def _parse(template: str) -> tuple[tuple[str, str | None], ...]:
    """(literal text, column that follows it, or None) in order."""
    try:
        pieces = [piece[:3] for piece in string.Formatter().parse(template)]
    except ValueError as error:
        raise OuroborosError(f"format {template!r}: {error}; a brace itself is written twice") from None
    return tuple((text, f"{column}:{rest}" if rest else column) for text, column, rest in pieces)


class Rendered(NamedTuple):
    """The text of a record, and what of it answers what stands before."""

    text: str
    answers: tuple[tuple[int, int], ...] | None
    """Characters from and to, the end of an answer included where the text goes on behind it; None where the format
    knows no answer, so that the text is learned whole."""


@dataclass(eq=False)
class TextFormat:
    """How the columns of a record become one text; a template without a column is refused."""

    name: str
    template: str
    group: str | None = None
    """The column whose content decides between training and held-out parts, so that rewrites of one problem stay on
    one side; None: the text itself decides."""

    def __post_init__(self) -> None:
        check(bool(self.columns), f"format {self.name!r}: names no column; write one in braces, as in '{{text}}'")

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of the template, in order, each once."""
        return tuple(dict.fromkeys(column for _, column in _parse(self.template) if column))

    @property
    def stop(self) -> tuple[str, ...]:
        """What begins the next text of this form: where an answer has ended although no end-of-text came."""
        start = _parse(self.template)[0][0].rstrip()
        return (f"\n{start}",) if start else ()

    def render(self, record: Mapping[str, Any], where: str) -> Rendered | None:
        """The text of ``record``; None where every column is null, empty or only white space. One that is missing or
        holds something else is an error that names ``where`` (file and line) and the column."""
        values = {column: self._value(record, column, where) or "" for column in self.columns}
        if not any(value and not value.isspace() for value in values.values()):
            return None
        text, answer = self._filled(values)
        return Rendered(text, None if answer is None else ((answer, len(text)),))

    def _filled(self, values: Mapping[str, str]) -> tuple[str, int | None]:
        """The template with ``values``, and where its answer begins; None where there is one column only."""
        text, answer = "", None
        for literal, column in _parse(self.template):
            text += literal
            if len(values) > 1 and column == self.columns[-1] and answer is None:
                answer = len(text.rstrip(" "))  # where a prompt ends: the model writes the space itself
            text += values[column] if column else ""
        return text, answer

    def group_of(self, record: Mapping[str, Any], where: str) -> str | None:
        """The content of the ``group`` column; None where the format has none, or the column is null or empty."""
        return (self._value(record, self.group, where) or None) if self.group else None

    def prompt(self, line: str) -> str | None:
        """The text up to the last column, with ``line`` for the first column and nothing for others; None when there is
        one column only.

        Spaces at the end are left out: tokenizers join a space to the word after it, so the model has learned to go on
        from ``A:`` with `` 42``, not from ``A: ``. Line breaks stay.
        """
        values = dict.fromkeys(self.columns, "") | dict.fromkeys(self.columns[:1], line)
        text, answer = self._filled(values)
        return None if answer is None else text[:answer]

    def _value(self, record: Mapping[str, Any], column: str, where: str) -> str | None:
        value = self._find(record, column, where)
        hint = f"; conversations are read by SRC@{column}" if column in CHATS else ""
        check(
            value is None or isinstance(value, str),
            f"{where}: column {column!r} holds {type(value).__name__}, not text (format {self.name!r}){hint}",
        )
        return value

    def _find(self, record: Mapping[str, Any], column: str, where: str) -> Any:
        """What ``column`` holds, within other columns where its name has dots; null within null is null."""
        if column in record:
            return record[column]
        value: Any = record
        for part in column.split("."):
            if isinstance(value, Mapping) and part in value:
                value = value[part]
            elif value is None:
                return None
            else:
                chats = [f"; it holds conversations: write SRC@{name}" for name in CHATS if name in record]
                hint = chats[0] if chats else nearest(column, _names(record))
                raise OuroborosError(f"{where}: no column {column!r} (format {self.name!r}){hint}")
        return value


def _names(record: Mapping[str, Any], before: str = "") -> Iterator[str]:
    """The columns of a record that hold no others, with dots where they are within others."""
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from _names(value, f"{before}{name}.")
        else:
            yield f"{before}{name}"


CHATS = ("messages", "conversations")
"""Columns that usually hold a conversation, and the formats named after them."""
USER, ASSISTANT = "user", "assistant"
_SPEAKER, _SAYS = ("role", "from"), ("content", "value")
_ROLES = {"human": USER, "gpt": ASSISTANT, "bot": ASSISTANT, "model": ASSISTANT}
"""Other names of the same speakers."""


class Turn(NamedTuple):
    """One turn of a conversation; its role is ``system``, ``user``, ``assistant`` or another."""

    role: str
    text: str


class ChatFormat(TextFormat):
    """Conversations: a column with a list of turns, ``{"role": .., "content": ..}`` or ``{"from": .., "value": ..}``.

    Each turn begins a line with its speaker, as the format ``chat`` has them: ``User: Hi`` and ``Assistant: Hello``.
    """

    def __init__(self, column: str) -> None:
        super().__init__(column, f"{{{column}}}")

    @property
    def stop(self) -> tuple[str, ...]:
        return ("\nUser:",)

    def render(self, record: Mapping[str, Any], where: str) -> Rendered | None:
        turns = self.turns(record, where)
        is_said = any(turn.text and not turn.text.isspace() for turn in turns)
        return self._written(turns, where) if is_said else None

    def _written(self, turns: Sequence[Turn], where: str) -> Rendered:
        text, answers = "", []
        for index, (role, says) in enumerate(turns):
            text += ("\n" if index else "") + f"{role[:1].upper()}{role[1:]}:"
            if answers and turns[index - 1].role == ASSISTANT:
                # What the model is to write where its answer ends, as the end-of-text token behind the last turn.
                answers[-1] = (answers[-1][0], len(text))
            start = len(text)
            text += f" {says}"
            if role == ASSISTANT:
                answers.append((start, len(text)))
        return Rendered(text, tuple(answers))

    def turns(self, record: Mapping[str, Any], where: str) -> list[Turn]:
        """The turns of a record; none where the column is null or empty. Errors name ``where`` and the turn."""
        column = self.columns[0]
        value = self._find(record, column, where)
        check(
            value is None or (isinstance(value, Sequence) and not isinstance(value, str)),
            f"{where}: column {column!r} holds {type(value).__name__}, not a list of turns (format {self.name!r})",
        )
        return [_turn(turn, f"{where}: turn {number} of {column!r}") for number, turn in enumerate(value or (), 1)]

    def prompt(self, line: str) -> str:
        return self.conversation((), line)

    def conversation(self, earlier: Iterable[tuple[str, str]], line: str) -> str:
        """The text up to the answer of ``line``, after ``earlier`` pairs of a line and its answer."""
        before = "".join(f"User: {ask}\nAssistant: {say.removeprefix(' ')}\n" for ask, say in earlier)
        return f"{before}User: {line}\nAssistant:"


def _turn(value: Any, where: str) -> Turn:
    """One turn of a conversation, whichever names its parts have."""
    names = value if isinstance(value, Mapping) else ()
    speaker, says = (next((name for name in pair if name in names), "") for pair in (_SPEAKER, _SAYS))
    check(bool(speaker and says), f"{where}: needs 'role' and 'content', or 'from' and 'value'")
    role, said = value[speaker], value[says]
    check(isinstance(role, str) and bool(role.strip()), f"{where}: its {speaker!r} is no name of a speaker")
    parts = [{"text": said or ""}] if isinstance(said, str) or not isinstance(said, Sequence) else said
    texts = [part.get("text") if isinstance(part, Mapping) else None for part in parts]
    check(all(isinstance(text, str) for text in texts), f"{where}: its {says!r} holds something else than text")
    return Turn(_ROLES.get(role.lower(), role.lower()), "".join(map(str, texts)))


def chat_column(record: Mapping[str, Any], text_field: str) -> str | None:
    """The format of a record that has a conversation and no column ``text_field``; None for others."""
    if text_field in record or text_field in _names(record):
        return None
    for name in CHATS:
        turns = record.get(name)
        first = turns[0] if isinstance(turns, Sequence) and turns else None
        if isinstance(first, Mapping) and set(_SPEAKER) & set(first) and set(_SAYS) & set(first):
            return name
    return None


_QUESTION = "Q: {question}\nA: {answer}"
_OWN = (
    TextFormat("tinygsm", "Problem: {question}\n\n{code}"),
    TextFormat("tiny-codes", "Task: {prompt}\n\n{response}"),
    TextFormat("cosmopedia", "{text}"),
    TextFormat("metamath", "Q: {query}\nA: {response}", group="original_question"),
    TextFormat("gsm8k", _QUESTION),
    TextFormat("qa", _QUESTION),
    TextFormat("mbpp", "Task: {text}\n\n{code}"),
    TextFormat("chat", "User: {prompt}\nAssistant: {response}"),
    TextFormat("instruct", "Instruction: {prompt}\nResponse: {response}"),
    *map(ChatFormat, CHATS),
)


@functools.cache
def formats() -> dict[str, TextFormat]:
    """The named formats. Systems add theirs in the place ``formats`` of the registry, as :class:`TextFormat` s."""
    return {form.name: form for form in (*_OWN, *map(load, found("formats").values()))}


def find_format(text: str) -> TextFormat:
    """A format by its name, or of a template such as ``{title}: {body}``, in which ``\\n`` is a line break."""
    hint = f"{nearest(text, formats())} (or a template, '{{title}}: {{body}}')"
    check(text in formats() or "{" in text, f"format {text!r}: unknown{hint}")
    return formats().get(text) or TextFormat(text, text.replace("\\n", "\n"))

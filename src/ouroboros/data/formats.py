"""How a record becomes text: named formats, templates and conversations.

A template is text with columns in braces, ``Q: {query}\\nA: {response}``; ``{{`` and ``}}`` stand for braces, and
``{data.text}`` is the column ``text`` within ``data``. A column that is empty or null is an empty text. The same
template that made the training text makes the prompt of a chat: what precedes the last column, which is the answer.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ouroboros.errors import OuroborosError, check, nearest
from ouroboros.registry import found, load

_PIECE = re.compile(r"\{\{|\}\}|\{([^{}]+)\}|[{}]")


@functools.cache
def _parse(template: str) -> tuple[tuple[str, str | None], ...]:
    """(literal text, column that follows it or None at the end) in order."""
    pieces: list[tuple[str, str | None]] = []
    literal, end = "", 0
    for match in _PIECE.finditer(template):
        literal += template[end : match.start()]
        end = match.end()
        if match[1]:
            pieces.append((literal, match[1]))
            literal = ""
            continue
        if len(match[0]) == 1:
            raise OuroborosError(f"format {template!r}: {match[0]!r} has no partner; a brace itself is written twice")
        literal += match[0][0]
    return (*pieces, (literal + template[end:], None))


class Rendered(NamedTuple):
    """The text of a record, and what of it answers what stands before."""

    text: str
    answers: tuple[tuple[int, int], ...] | None
    """Characters from and to, the end of an answer included where the text goes on behind it; None where the format
    knows no answer, so that the text is learned whole."""


@dataclass(eq=False)
class TextFormat:
    """How the columns of a record become one text.

    Raises:
        OuroborosError: a template without a column, or with a brace that has no partner.
    """

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
        return tuple(dict.fromkeys(column for _, column in _parse(self.template) if column is not None))

    @property
    def stop(self) -> tuple[str, ...]:
        """What begins the next text of this form: where an answer has ended although no end-of-text came."""
        start = _parse(self.template)[0][0].rstrip()
        return (f"\n{start}",) if start else ()

    def render(self, record: Mapping[str, Any], where: str) -> Rendered | None:
        """The text of ``record``; None where every column is null, empty or only white space.

        Raises:
            OuroborosError: a column is missing or holds no text; names ``where`` (file and line) and the column.
        """
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
        """The content of the ``group`` column; None without such a column in the format, or where it is null or empty.

        Raises:
            OuroborosError: as :meth:`render`.
        """
        return (self._value(record, self.group, where) or None) if self.group else None

    def prompt(self, line: str) -> str | None:
        """The text up to the last column, with ``line`` for the first column and nothing for others.

        Spaces at the end are left out: tokenizers join a space to the word after it, so the model has learned to go on
        from ``A:`` with `` 42``, not from ``A: ``. Line breaks stay. None when there is one column: nothing to answer.
        """
        values = dict.fromkeys(self.columns, "") | dict.fromkeys(self.columns[:1], line)
        text, answer = self._filled(values)
        return None if answer is None else text[:answer]

    def _value(self, record: Mapping[str, Any], column: str, where: str) -> str | None:
        value = self._find(record, column, where)
        if value is not None and not isinstance(value, str):
            hint = f"; conversations are read by SRC@{column}" if column in CHATS else ""
            kind = type(value).__name__
            raise OuroborosError(f"{where}: column {column!r} holds {kind}, not text ({self._origin}){hint}")
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
                raise self.missing(column, _names(record), where)
        return value

    def missing(self, column: str, known: Iterable[str], where: str) -> OuroborosError:
        """The error of a column that is not among the ``known`` ones."""
        known = list(known)
        chats = [f"; it holds conversations: write SRC@{name}" for name in CHATS if name in known]
        hint = chats[0] if chats else nearest(column, known)
        return OuroborosError(f"{where}: no column {column!r} ({self._origin}){hint}")

    @property
    def _origin(self) -> str:
        return f"format {self.name!r}"


def _names(record: Mapping[str, Any], before: str = "") -> Iterator[str]:
    """The columns of a record that hold no others, with dots where they are within others."""
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from _names(value, f"{before}{name}.")
        else:
            yield f"{before}{name}"


class FieldFormat(TextFormat):
    """One column as it is: what ``data.text_field`` names."""

    def __init__(self, column: str) -> None:
        super().__init__(column, f"{{{column}}}")

    @property
    def _origin(self) -> str:
        return "data.text_field"


CHATS = ("messages", "conversations")
"""Columns that usually hold a conversation, and the formats named after them."""
USER, ASSISTANT = "user", "assistant"
_SPEAKER, _SAYS = ("role", "from"), ("content", "value")
_ROLES = {"human": USER, "gpt": ASSISTANT, "bot": ASSISTANT, "model": ASSISTANT}
"""Other names of the same speakers."""


class Turn(NamedTuple):
    """One turn of a conversation."""

    role: str
    """``system``, ``user``, ``assistant`` or another."""
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
            text += f"\n{_heading(role)}" if index else _heading(role)
            if answers and turns[index - 1].role == ASSISTANT:
                # What the model is to write where its answer ends, as the end-of-text token behind the last turn.
                answers[-1] = (answers[-1][0], len(text))
            start = len(text)
            text += f" {says}"
            if role == ASSISTANT:
                answers.append((start, len(text)))
        return Rendered(text, tuple(answers))

    def turns(self, record: Mapping[str, Any], where: str) -> list[Turn]:
        """The turns of a record; none where the column is null or empty.

        Raises:
            OuroborosError: the column is missing or holds something else; names ``where`` and the turn.
        """
        column = self.columns[0]
        value = self._find(record, column, where)
        if value is None:
            return []
        if not isinstance(value, Sequence) or isinstance(value, str):
            kind = type(value).__name__
            raise OuroborosError(f"{where}: column {column!r} holds {kind}, not a list of turns ({self._origin})")
        return [_turn(turn, f"{where}: turn {number} of {column!r}") for number, turn in enumerate(value, 1)]

    def prompt(self, line: str) -> str:
        return self.conversation((), line)

    def conversation(self, earlier: Iterable[tuple[str, str]], line: str) -> str:
        """The text up to the answer of ``line``, after ``earlier`` pairs of a line and its answer."""
        before = "".join(f"User: {ask}\nAssistant: {say.removeprefix(' ')}\n" for ask, say in earlier)
        return f"{before}User: {line}\nAssistant:"


def _heading(role: str) -> str:
    return f"{role[:1].upper()}{role[1:]}:"


def _turn(value: Any, where: str) -> Turn:
    """One turn of a conversation, whichever names its parts have."""
    names = value if isinstance(value, Mapping) else ()
    speaker, says = (next((name for name in pair if name in names), "") for pair in (_SPEAKER, _SAYS))
    check(bool(speaker and says), f"{where}: needs 'role' and 'content', or 'from' and 'value'")
    role, text = value[speaker], value[says]
    check(isinstance(role, str) and bool(role.strip()), f"{where}: its {speaker!r} is no name of a speaker")
    return Turn(_ROLES.get(role.lower(), role.lower()), _said(text, f"{where}: its {says!r}"))


def _said(value: Any, where: str) -> str:
    """Text, null, or a list of parts of which each has text."""
    if isinstance(value, str) or value is None:
        return value or ""
    check(isinstance(value, Sequence), f"{where} holds {type(value).__name__}, not text")
    for part in value:
        if not (isinstance(part, Mapping) and isinstance(part.get("text"), str)):
            kind = part.get("type", "unknown") if isinstance(part, Mapping) else type(part).__name__
            raise OuroborosError(f"{where} has a part that is not text ({kind})")
    return "".join(part["text"] for part in value)


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
    """The named formats, by name.

    Systems add theirs in the place ``formats`` of the registry, where an entry is a :class:`TextFormat`.
    """
    return {form.name: form for form in (*_OWN, *map(load, found("formats").values()))}


def find_format(text: str) -> TextFormat:
    """A format by its name, or of a template such as ``{title}: {body}``, in which ``\\n`` is a line break.

    Raises:
        OuroborosError: neither a name nor a template; a template that cannot be read.
    """
    if text in formats():
        return formats()[text]
    if "{" not in text:
        hint = nearest(text, formats())
        raise OuroborosError(f"format {text!r}: unknown{hint} (or a template, '{{title}}: {{body}}')")
    return TextFormat(text, text.replace("\\n", "\n"))

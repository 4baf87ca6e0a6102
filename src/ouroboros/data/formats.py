"""How a record becomes text: named formats and templates.

A template is text with columns in braces, ``Q: {query}\\nA: {response}``; ``{{`` and ``}}`` stand for braces. The same
template that made the training text makes the prompt of a chat: what precedes the last column.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ouroboros.data.published import record_prose
from ouroboros.errors import OuroborosError, check, nearest

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


@dataclass(frozen=True)
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

    def render(self, record: Mapping[str, Any], where: str) -> str | None:
        """The text of ``record``; None where a column is null, empty or only white space.

        Raises:
            OuroborosError: a column is missing or holds no text; names ``where`` (file and line) and the column.
        """
        values = {column: self._value(record, column, where) for column in self.columns}
        if not all(value and not value.isspace() for value in values.values()):
            return None
        return "".join(text + (values[column] or "" if column else "") for text, column in _parse(self.template))

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
        if len(self.columns) < 2:
            return None
        first, last = self.columns[0], self.columns[-1]
        text = ""
        for literal, column in _parse(self.template):
            text += literal
            if column == last:
                break
            text += line if column == first else ""
        return text.rstrip(" ")

    def _value(self, record: Mapping[str, Any], column: str, where: str) -> str | None:
        if column not in record:
            raise self.missing(column, record, where)
        value = record[column]
        if value is not None and not isinstance(value, str):
            raise OuroborosError(f"{where}: column {column!r} holds {type(value).__name__}, not text ({self._origin})")
        return value

    def missing(self, column: str, known: Any, where: str) -> OuroborosError:
        """The error of a column that is not among the ``known`` ones."""
        return OuroborosError(f"{where}: no column {column!r} ({self._origin}){nearest(column, map(str, known))}")

    @property
    def _origin(self) -> str:
        return f"format {self.name!r}"


class FieldFormat(TextFormat):
    """One column as it is: what ``data.text_field`` names."""

    def __init__(self, column: str) -> None:
        super().__init__(column, f"{{{column}}}")

    @property
    def _origin(self) -> str:
        return "data.text_field"


class PublishedFormat(TextFormat):
    """The text rule of R-HRM as published (:func:`ouroboros.data.published.record_prose`), without its end mark:
    documents are separated by the end-of-text token here. Needs no column and reads all of them."""

    def __init__(self) -> None:
        super().__init__("rhrm-published", "")

    def __post_init__(self) -> None:
        """Every record has a text, so there is nothing to check."""

    @property
    def stop(self) -> tuple[str, ...]:
        return ("\nQ:",)

    def render(self, record: Mapping[str, Any], where: str) -> str | None:
        return record_prose(record)


_QUESTION = "Q: {question}\nA: {answer}"

FORMATS: dict[str, TextFormat] = {
    form.name: form
    for form in (
        TextFormat("tinygsm", "Problem: {question}\n\n{code}"),
        TextFormat("tiny-codes", "Task: {prompt}\n\n{response}"),
        TextFormat("cosmopedia", "{text}"),
        TextFormat("metamath", "Q: {query}\nA: {response}", group="original_question"),
        TextFormat("gsm8k", _QUESTION),
        TextFormat("qa", _QUESTION),
        TextFormat("mbpp", "Task: {text}\n\n{code}"),
        TextFormat("chat", "User: {prompt}\nAssistant: {response}"),
        TextFormat("instruct", "Instruction: {prompt}\nResponse: {response}"),
        PublishedFormat(),
    )
}
"""The named formats, by name."""


def find_format(text: str) -> TextFormat:
    """A format by its name, or of a template such as ``{title}: {body}``, in which ``\\n`` is a line break.

    Raises:
        OuroborosError: neither a name nor a template; a template that cannot be read.
    """
    if text in FORMATS:
        return FORMATS[text]
    if "{" not in text:
        raise OuroborosError(f"format {text!r}: unknown{nearest(text, FORMATS)} (or a template, '{{title}}: {{body}}')")
    return TextFormat(text, text.replace("\\n", "\n"))

"""The data of R-HRM: its mixture of sources, and the text that its published pipeline made of a record."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ouroboros.data.formats import Rendered, TextFormat
from ouroboros.data.sources import Part

MIXTURE = (
    Part("tinygsm", "TinyGSM/TinyGSM", 0.40),
    Part("tiny-codes", "nampdn-ai/tiny-codes", 0.30),
    Part("cosmopedia", "HuggingFaceTB/cosmopedia-100k", 0.15),
    Part("metamath", "meta-math/MetaMathQA", 0.15),
)
"""The source ``mix:rhrm``, with the published weights."""


class PublishedFormat(TextFormat):
    """The published text of a record: question and answer, ``text``, ``content``; else Python's repr of the record.

    The end mark that followed is left out, because here the end-of-text token separates documents. The format needs no
    column and reads all of them.
    """

    def __init__(self) -> None:
        super().__init__("rhrm-published", "")

    def __post_init__(self) -> None:
        """Every record has a text, so there is nothing to check."""

    @property
    def stop(self) -> tuple[str, ...]:
        return ("\nQ:",)

    def render(self, record: Mapping[str, Any], where: str) -> Rendered | None:
        parts = []
        for question, answer in (("question", "answer"), ("query", "response")):
            if question in record and answer in record:
                parts.append(f"Q: {record[question]}\nA: {record[answer]}")
                break
        parts += [str(record[column]) for column in ("text", "content") if record.get(column)]
        return Rendered("\n".join(parts) if parts else str(dict(record)), None)


PUBLISHED_FORMAT = PublishedFormat()
"""The format ``@rhrm-published``."""

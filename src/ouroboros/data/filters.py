"""Which documents are left out, in any language: length, runs of symbols, share of letters, repetition.

Nothing here knows a language or an alphabet: a character is what its Unicode category says.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

from ouroboros.config import FilterSpec

NGRAM = 8
"""Words (characters where there are no spaces) in a row whose repetition counts."""
_LONGEST_MEAN_WORD = 16
"""A text whose words are longer on average has no spaces between words (Chinese, Japanese, Thai)."""
_TABLE = re.compile("[-|:+=\u2500-\u257f]+")
"""What the borders of tables are made of: Markdown, reStructuredText, box drawing."""
_REPEATED = re.compile(r"(.)\1+", re.DOTALL)


class Filters:
    """The rules of a :class:`~ouroboros.config.FilterSpec`; false when every rule is off."""

    def __init__(self, spec: FilterSpec) -> None:
        self.spec = spec

    def __bool__(self) -> bool:
        return self.spec != FilterSpec(symbol_rule=self.spec.symbol_rule)

    def reason(self, text: str) -> str | None:
        """Why ``text`` is left out, in the words of the specification; None: it stays. The first rule broken counts."""
        spec = self.spec
        if len(text) < spec.min_characters:
            return "short"
        if spec.max_characters is not None and len(text) > spec.max_characters:
            return "long"
        if spec.symbol_run is not None and _has_symbol_run(text, spec.symbol_run, spec.symbol_rule == "ascii"):
            return "symbols"
        if spec.min_letters > 0 and letter_share(text) < spec.min_letters:
            return "letters"
        if spec.max_repeated_lines < 1 and repeated_lines(text) > spec.max_repeated_lines:
            return "repeated lines"
        if spec.max_repeated_ngrams < 1 and repeated_ngrams(text) > spec.max_repeated_ngrams:
            return "repeated n-grams"
        return None


def _has_symbol_run(text: str, length: int, is_ascii_rule: bool) -> bool:
    """Whether ``length`` symbols stand in a row, by one of the two rules of ``data.filters.symbol_rule``."""
    if is_ascii_rule:
        return re.search(rf"[^A-Za-z0-9\s]{{{length},}}", text) is not None
    for candidate in re.finditer(rf"(?:[^\w\s]|_){{{length},}}", text):
        # Marks, which belong to letters, end a run; the regular expressions take them for symbols.
        symbols = ("M" if unicodedata.category(character)[0] == "M" else character for character in candidate[0])
        for run in "".join(symbols).split("M"):
            if len(_REPEATED.sub(r"\1", run)) >= length and not _TABLE.fullmatch(run):
                return True
    return False


def letter_share(text: str) -> float:
    """Share of letters, marks and numbers among what is not white space; 0 where there is nothing else."""
    counts = {character: count for character, count in Counter(text).items() if not character.isspace()}
    symbols = sum(count for character, count in counts.items() if unicodedata.category(character)[0] not in "LMN")
    return 1 - symbols / sum(counts.values()) if counts else 0.0


def repeated_lines(text: str) -> float:
    """Share of characters in lines that stood before in ``text``; blank lines and white space at the ends aside."""
    lines = [line for line in map(str.strip, text.splitlines()) if line]
    total = sum(map(len, lines))
    return 1 - sum(map(len, set(lines))) / total if total else 0.0


def repeated_ngrams(text: str) -> float:
    """Share of 8-grams of words that stood before in ``text``; of characters without spaces between words."""
    words: Sequence[str] = text.split()
    if sum(map(len, words)) > _LONGEST_MEAN_WORD * len(words):
        words = "".join(words)
    grams = len(words) - NGRAM + 1
    return 1 - len(set(zip(*(words[place:] for place in range(NGRAM)), strict=False))) / grams if grams > 1 else 0.0

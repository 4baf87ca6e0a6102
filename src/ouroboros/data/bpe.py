"""Vocabularies of byte-level BPE (Sennrich et al. 2016): what may be merged, and their training."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Iterable
from concurrent.futures import Future

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from ouroboros.data.lossless import byte_alphabet

OWN = (
    r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+"
    r"|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+(?:[\r\n]+[ \t]*)?"
    r"|\s*[\r\n]+[ \t]*"
    r"|[^\S\r\n]+(?!\S)"
    r"|\s+"
)
"""Units inside which BPE may merge, for prose and code alike: a word with one leading mark or space; up to three
digits; a run of punctuation with the line break and indentation that often follow it (so "):" + newline + eight spaces
can be one token); line breaks with their indentation; other white space."""
QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+"
    r"|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+"
)
"""The units of Qwen3.5, which llama.cpp knows by name: English endings, single digits, punctuation with the line breaks
that follow it but without indentation. Python code becomes 4 to 7 % more tokens than with ours, novels as many."""
LONGEST_UNIT = 1024
"""Letters, marks or spaces in a row beyond which a vocabulary is trained on pieces: training takes time with the square
of a unit's length, and no ordinary text has such units."""
# Both always end a unit between a letter and a line feed, so a text may be encoded in pieces cut there.
SAFE_CUT = re.compile(rb"[A-Za-z]\n")


def train(texts: Iterable[str], entries: int, *, pattern: str = OWN, shows_progress: bool) -> Tokenizer:
    """A vocabulary of at most ``entries`` entries, the bytes among them, of units that ``pattern`` finds; Ctrl-C ends
    its training."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = _units(_bounded(pattern))
    trainer = trainers.BpeTrainer(
        vocab_size=entries,
        initial_alphabet=sorted(byte_alphabet()),
        special_tokens=[],
        show_progress=shows_progress and sys.stderr.isatty(),
    )
    result = Future[None]()

    def work() -> None:
        try:
            result.set_result(backend.train_from_iterator(texts, trainer))
        except BaseException as error:  # it belongs to the thread that waits
            result.set_exception(error)

    # The library does not listen to Ctrl-C. In a thread it goes on, without effect, until the process ends.
    threading.Thread(target=work, daemon=True).start()
    result.result()
    backend.pre_tokenizer = _units(pattern)
    backend.decoder = decoders.ByteLevel()
    return backend


def _units(pattern: str) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _bounded(pattern: str) -> str:
    """``pattern`` with at most :data:`LONGEST_UNIT` repetitions in place of any number."""
    for sign, least in (("+", 1), ("*", 0)):
        pattern = pattern.replace(f"]{sign}", f"]{{{least},{LONGEST_UNIT}}}")
        pattern = pattern.replace(rf"\s{sign}", rf"\s{{{least},{LONGEST_UNIT}}}")
    return pattern

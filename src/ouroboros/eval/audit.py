"""The audit: is a bits-per-byte figure honest? Checks a model, its tokenizer and the scorer together.

The findings, in order:

- ``bytes``: the bytes counted are those of the texts, the tokenizer's table agrees, and the reported
  bits per byte are the reported nats over them; texts with BOM, CRLF, emoji and invalid UTF-8 included.
- ``coverage``: on texts of awkward lengths around the window, plain and sliding, tokens and nats equal an
  independent one-window-at-a-time computation: nothing dropped, nothing scored twice.
- ``independence``: batch size and the other documents do not change a score.
- ``normalisation``, per loop count: probabilities sum to 1 within 1e-4 at every probed position, and the
  scorer itself gives the 256 one-byte continuations of a text no more than 1 in all.
- ``causality``, per loop count: changing all later tokens leaves log-probabilities as they were (within
  1e-5; inputs have one length, so they should be identical bit for bit).
- ``overlap``, when training text is given: no held-out document occurs in training, at most 2 % of the
  held-out bytes lie in passages of 256 bytes that do, and no document of 1 KiB or more lies in such passages
  for half its length.

Shapes: B windows, T positions, V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ouroboros.data.tokenize import TextTokenizer
from ouroboros.errors import OuroborosError
from ouroboros.eval.finding import Finding, find, require
from ouroboros.eval.score import (
    Score,
    at_loops,
    byte_table,
    encode,
    first_bytes,
    score,
    unknown_nats,
    with_text,
)
from ouroboros.eval.windows import Predict, device_of, evaluating, log_probs

CHUNK = 256
"""Bytes of a passage that is looked for in the training text."""
MAX_OVERLAP = 0.02
"""Share of held-out bytes that may occur in training: licence headers and the like."""
SUM_TOLERANCE = 1e-4
CAUSAL_TOLERANCE = 1e-5
TOKEN_TOLERANCE = 1e-5
"""Nats per token by which two computations of one score may differ (float32 sums in another order)."""
AWKWARD = (
    b"\xef\xbb\xbfbyte order mark\r\nand CRLF\r\n",
    "caf\u00e9 \u4e16\u754c \U0001f642 combining e\u0301".encode(),
    b"  two leading spaces, trailing space ",
    b"\xff\xfe\x00 invalid UTF-8 \xc3(",
    b"\n",
)
"""Texts whose bytes are often miscounted."""


@dataclass(frozen=True, kw_only=True)
class Audited:
    """What is audited, at one loop count, and the size of the probes."""

    model: Any
    loops: int | None
    view: Any
    """The model at its loop count."""
    tokenizer: TextTokenizer
    documents: Sequence[bytes]
    window: int
    """Window of the probes: the audited window, at most 256 tokens."""
    scorer: Callable[..., Score]
    predict: Predict | None

    def score(self, documents: Sequence[bytes], **options: Any) -> Score:
        """Call the audited scorer."""
        given = {"window": self.window, "loops": self.loops, "predict": self.predict} | options
        return self.scorer(self.model, self.tokenizer, documents, **given)

    def probe(self, ids: np.ndarray) -> Tensor:
        """Log-probabilities float32[T, V] of one sequence of input ids."""
        inputs = torch.from_numpy(np.asarray(ids, dtype=np.int64))[None].to(device_of(self.model))
        with evaluating(self.view):
            return (self.predict or log_probs)(self.view, inputs)[0].float().cpu()

    def sequence(self, document: bytes) -> np.ndarray:
        """``[eos] + tokens`` of a document, int64[T + 1]."""
        return np.concatenate(([self.tokenizer.eos_id], np.asarray(self.tokenizer.encode(document), dtype=np.int64)))

    def text(self, tokens: int) -> bytes:
        """A text of about ``tokens`` tokens from the documents (exactly that many for bytes)."""
        need, pool = 16 * tokens, b""
        for document in self.documents:
            if len(pool) >= need:
                break
            pool += first_bytes(document, need - len(pool))
        pool *= -(-need // len(pool))
        ids = np.asarray(self.tokenizer.encode(pool), dtype=np.int64)[:tokens]
        return first_bytes(pool, len(self.tokenizer.decode(ids))) or first_bytes(pool, 4)

    def lossless(self, text: bytes) -> bool:
        """Whether the tokenizer accepts ``text``, knows all of its characters and gives it back."""
        try:
            if self.tokenizer.unknown(text):
                return False
            encode(self.tokenizer, text)
        except OuroborosError:
            return False
        return True


def audit(
    model: Any,
    tokenizer: TextTokenizer,
    documents: Sequence[bytes],
    *,
    window: int,
    loops: Sequence[int | None] = (None,),
    scorer: Callable[..., Score] = score,
    predict: Predict | None = None,
    train_documents: Iterable[bytes] | None = None,
) -> list[Finding]:
    """Check a model's score for the ways in which such scores go wrong; the module's docstring lists them.

    Args:
        model, tokenizer, documents: as for :func:`~ouroboros.eval.score.score`; the documents are held out.
        window: window of the score under audit; probes use at most 256 tokens of it.
        loops: loop counts to check, at least one; None is the model as it is.
        scorer: what computes scores, with the signature of :func:`~ouroboros.eval.score.score`.
        predict: log-probabilities when they are not the softmax of the logits; passed on to the scorer.
        train_documents: the training texts.

    Raises:
        OuroborosError: no held-out byte, or a loop count for a model without loops.
    """
    kept = with_text(documents)
    subjects = [
        Audited(
            model=model,
            loops=count,
            view=at_loops(model, count),
            tokenizer=tokenizer,
            documents=kept,
            window=min(window, 256),
            scorer=scorer,
            predict=predict,
        )
        for count in loops
    ]
    findings = [find(name, check, subjects[0]) for name, check in CHECKS.items()]
    for subject in subjects:
        suffix = "" if subject.loops is None else f" (loops {subject.loops})"
        findings += [find(f"{name}{suffix}", check, subject) for name, check in CHECKS_PER_LOOP_COUNT.items()]
    if train_documents is not None:
        findings.append(find("overlap", check_overlap, kept, train_documents))
    return findings


def check_bytes(subject: Audited) -> str:
    """The bytes counted are those of the texts, and the reported bits per byte are the nats over them."""
    table = byte_table(subject.tokenizer)
    groups = [(subject.text(subject.window + 3), subject.text(7)), *((text,) for text in AWKWARD)]
    counted = refused = 0
    for texts in groups:
        expected, lossless = sum(map(len, texts)), all(map(subject.lossless, texts))
        try:
            found = subject.score(texts)
        except OuroborosError:
            if texts is groups[0] or lossless:
                raise
            refused += 1  # a tokenizer that loses bytes has no bits per byte, and the scorer said so
            continue
        tabled = expected
        # A token that stands for any unknown character has no number of bytes.
        if table is not None and lossless:
            tabled = sum(int(table[subject.sequence(text)[1:]].sum()) for text in texts)
        require(
            found.bytes == expected == tabled,
            f"{expected} bytes of text; the scorer counts {found.bytes}, the tokenizer's table {tabled}",
        )
        require(
            math.isclose(found.bits_per_byte * expected * math.log(2), found.nats, rel_tol=1e-6, abs_tol=1e-9),
            f"{found.nats:.6g} nats over {expected} bytes are not {found.bits_per_byte:.6g} bits per byte",
        )
        counted += expected
    return f"{counted} bytes in {len(groups) - refused} texts counted exactly, {refused} texts refused"


def check_coverage(subject: Audited) -> str:
    """Tokens and nats equal an independent computation at awkward lengths and several strides."""
    w = subject.window
    lengths = sorted({1, 2, w - 1, w, w + 1, w + w // 2, 2 * w - 1, 2 * w, 2 * w + 1, 3 * w + 7} - {0})
    strides = sorted({w, max(1, w // 2), max(1, w // 3)}, reverse=True)
    worst = 0.0
    for length in lengths:
        document = subject.text(length)
        sequence = subject.sequence(document)
        tokens = len(sequence) - 1
        for stride in strides:
            found, nats = subject.score([document], stride=stride), _reference_nats(subject, sequence, stride)
            place = f"{tokens} tokens, window {w}, stride {stride}"
            require(found.tokens == tokens, f"{place}: the scorer counts {found.tokens} tokens")
            gap = abs(found.nats - nats)
            require(
                gap <= TOKEN_TOLERANCE * tokens + 1e-6 * abs(nats),
                f"{place}: the scorer gives {found.nats:.6f} nats, one window at a time {nats:.6f}",
            )
            worst = max(worst, gap / tokens)
    return f"{len(lengths)} lengths x {len(strides)} strides, largest difference {worst:.1e} nats per token"


def _reference_nats(subject: Audited, sequence: np.ndarray, stride: int) -> float:
    """Nats of ``sequence[1:]``, target by target; shares no arithmetic with the scorer."""
    w, known = subject.window, -1
    total = float(unknown_nats(subject.tokenizer, sequence[1:]).sum())
    table = torch.empty(0)
    for target in range(1, len(sequence)):
        late = target - 1 - w
        start = 0 if late < 0 else (late // stride + 1) * stride
        if start != known:
            table, known = subject.probe(sequence[start : min(start + w, len(sequence) - 1)]), start
        total -= float(table[target - 1 - start, int(sequence[target])])
    return total


def check_independence(subject: Audited) -> str:
    """Batch size, order and the other documents do not change a score."""
    w = subject.window
    texts = [subject.text(length) for length in (2 * w + 5, 3, w + 1, w, max(1, w // 3))]
    bits = math.log(2) * sum(map(len, texts))
    apart = sum(subject.score([text]).nats for text in texts) / bits
    together = {
        "one window a batch": subject.score(texts, batch_size=1),
        "three windows a batch": subject.score(texts, batch_size=3),
        "documents reversed": subject.score(texts[::-1]),
    }
    gaps = {name: abs(found.nats / bits - apart) for name, found in together.items()}
    for name, gap in gaps.items():
        require(
            gap < TOKEN_TOLERANCE,
            f"{name}: {gap:.3g} bits per byte away from each document by itself ({apart:.6f})",
        )
    return f"largest difference {max(gaps.values()):.1e} bits per byte"


def check_normalisation(subject: Audited) -> str:
    """Probabilities sum to 1, and those of the scorer to no more than that."""
    w = subject.window
    text = subject.sequence(subject.text(w))[:w]
    worst = 0.0
    for ids in (text, np.random.default_rng(0).permutation(text)):
        sums = subject.probe(ids).double().exp().sum(-1)
        gaps = (sums - 1).abs()
        at = int(gaps.nan_to_num(nan=math.inf).argmax())
        require(float(gaps[at]) <= SUM_TOLERANCE, f"probabilities at position {at} sum to {float(sums[at]):.6f}, not 1")
        worst = max(worst, float(gaps[at]))
    for prefix in (b"", subject.text(max(1, w // 8)), subject.text(max(1, w // 2))):
        total = _continuations(subject, prefix)
        require(
            total <= 1 + SUM_TOLERANCE,
            f"by the scorer, the bytes after a text of {len(prefix)} bytes sum to {total:.6f}, above 1",
        )
    return f"{2 * len(text)} positions, largest |sum - 1| {worst:.1e}; bytes by the scorer sum to at most 1"


def _continuations(subject: Audited, prefix: bytes) -> float:
    """Sum of the scorer's probabilities of one byte after ``prefix``, over bytes whose tokens extend the prefix's.

    Those are disjoint events, so an honest scorer gives at most 1 (less with tokens of several bytes, and less
    the end of text).
    """
    head = subject.sequence(prefix)
    texts = []
    for text in filter(subject.lossless, (prefix + bytes([value]) for value in range(256))):
        ids = subject.sequence(text)
        if len(ids) > len(head) and np.array_equal(ids[: len(head)], head):
            texts.append(text)
    if not texts:
        return 0.0
    before = subject.score([prefix]).nats if prefix else 0.0
    found = subject.score(texts).unit_nats
    require(len(found) == len(texts), f"the scorer returns {len(found)} units for {len(texts)} short documents")
    return float(np.exp(before - found).sum())


def check_causality(subject: Audited) -> str:
    """Changing all later tokens leaves log-probabilities as they were."""
    rng, w = np.random.default_rng(0), subject.window
    ids = subject.sequence(subject.text(w))[:w]
    size = len(ids)
    if size < 2:
        return "a window of one token has no later token"
    base = subject.probe(ids)
    places = sorted({0, size // 4, size // 2, size - 2, *rng.integers(0, size - 1, 4).tolist()})
    worst, vocabulary = 0.0, base.shape[-1]
    for place in places:
        other = ids.copy()
        other[place + 1 :] = (ids[place + 1 :] + rng.integers(1, vocabulary, size - place - 1)) % vocabulary
        past, now = base[: place + 1], subject.probe(other)[: place + 1]
        gaps = torch.where(past == now, 0.0, (past - now).abs()).nan_to_num(nan=math.inf).amax(-1)
        worst, first = max(worst, float(gaps.max())), int((gaps > CAUSAL_TOLERANCE).int().argmax())
        require(
            worst <= CAUSAL_TOLERANCE,
            f"tokens after position {place} change the log-probabilities at {first} by {worst:.3g}",
        )
    kind = "bit-identical" if worst == 0 else f"largest change {worst:.1e}"
    return f"{len(places)} cuts of {size} tokens: {kind}"


CHECKS: dict[str, Callable[[Audited], str]] = {
    "bytes": check_bytes,
    "coverage": check_coverage,
    "independence": check_independence,
}
"""By the name of the finding, in order: made at the first loop count."""
CHECKS_PER_LOOP_COUNT: dict[str, Callable[[Audited], str]] = {
    "normalisation": check_normalisation,
    "causality": check_causality,
}


def check_overlap(documents: Sequence[bytes], train_documents: Iterable[bytes]) -> str:
    """No held-out document occurs in training, and hardly a passage of one.

    Training passages are the 256-byte chunks at multiples of 256; they are looked for at every offset of the
    held-out text, so any shared run of 511 bytes is found wherever it lies. Passages of fewer than 8 distinct
    bytes (rulers, blanks) do not count.
    """
    known, passages = set[bytes](), set[int]()
    for document in train_documents:
        known.add(hashlib.sha256(document).digest())
        for start in range(0, len(document) - CHUNK + 1, CHUNK):
            passages.add(hash(bytes(document[start : start + CHUNK])))
    whole = [index for index, document in enumerate(documents) if hashlib.sha256(document).digest() in known]
    shared = [_shared_bytes(document, passages) for document in documents]
    share = sum(shared) / sum(map(len, documents))
    copies = [i for i, document in enumerate(documents) if len(document) >= 1024 and shared[i] >= len(document) / 2]
    detail = (
        f"{len(whole)} of {len(documents)} held-out documents are in training; {100 * share:.2f} % of the held-out"
        f" bytes lie in passages of {CHUNK} bytes that are, {len(copies)} documents by half or more"
    )
    named = sorted({*whole, *copies})[:5]
    if named:
        detail += f" (documents {', '.join(map(str, named))})"
    require(not named and share <= MAX_OVERLAP, detail)
    return detail


def _shared_bytes(document: bytes, passages: set[int]) -> int:
    """Bytes of ``document`` that lie in a known passage."""
    covered = end = 0
    for start in range(len(document) - CHUNK + 1 if passages else 0):
        piece = document[start : start + CHUNK]
        if hash(piece) in passages and len(set(piece)) >= 8:
            covered += start + CHUNK - max(start, end)
            end = start + CHUNK
    return covered

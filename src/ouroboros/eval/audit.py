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
- ``overlap``, when training text or hashes are given: no held-out document occurs in training (sha256), at
  most ``max_overlap`` of the held-out bytes lie in passages of 256 bytes that do, and no document of
  1 KiB or more lies in such passages for half its length.

Shapes: B windows, T positions, V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ouroboros.errors import OuroborosError
from ouroboros.eval.finding import Finding
from ouroboros.eval.score import (
    Predict,
    Score,
    Tokenizer,
    at_loops,
    byte_table,
    data_hash,
    device_of,
    encode,
    evaluating,
    first_bytes,
    log_probs,
    score,
    unknown_characters,
    unknown_nats,
)

CHUNK = 256
"""Bytes of a passage that is looked for in the training text."""
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
class Subject:
    """What is audited, and the size of the probes."""

    model: Any
    tokenizer: Tokenizer
    documents: Sequence[bytes]
    window: int
    """Window of the probes: the audited window, at most 256 tokens."""
    scorer: Callable[..., Score]
    predict: Predict | None
    """None is the softmax of the logits, which a scorer need not be told."""
    device: torch.device
    seed: int

    def score(self, documents: Sequence[bytes], loops: int | None = None, **options: Any) -> Score:
        """Call the audited scorer."""
        extra = {} if self.predict is None else {"predict": self.predict}
        given = {"window": self.window, "loops": loops} | extra | options
        return self.scorer(self.model, self.tokenizer, documents, **given)

    def probe(self, model: Any, ids: np.ndarray) -> Tensor:
        """Log-probabilities float32[T, V] of one sequence of input ids."""
        inputs = torch.from_numpy(np.asarray(ids, dtype=np.int64))[None].to(self.device)
        return (self.predict or log_probs)(model, inputs)[0].float().cpu()

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
            if unknown_characters(self.tokenizer, text):
                return False
            encode(self.tokenizer, text)
        except OuroborosError:
            return False
        return True

    def generator(self) -> np.random.Generator:
        """A fresh generator, so that each check draws the same numbers whatever ran before."""
        return np.random.default_rng(self.seed)


def audit(
    model: Any,
    tokenizer: Tokenizer,
    documents: Sequence[bytes],
    *,
    window: int,
    loops: Sequence[int | None] = (None,),
    scorer: Callable[..., Score] = score,
    predict: Predict | None = None,
    train_documents: Iterable[bytes] | None = None,
    train_hashes: Collection[str] | None = None,
    max_overlap: float = 0.02,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> list[Finding]:
    """Check a model's score for the ways in which such scores go wrong; the module's docstring lists them.

    Args:
        model, tokenizer, documents: as for :func:`~ouroboros.eval.score.score`; the documents are held out.
        window: window of the score under audit; probes use at most 256 tokens of it.
        loops: loop counts to check, at least one; None is the model as it is.
        scorer: what computes scores, with the signature of :func:`~ouroboros.eval.score.score`.
        predict: log-probabilities when they are not the softmax of the logits; passed on to the scorer.
        train_documents: the training texts, for passages and whole documents.
        train_hashes: sha256 hex digests of training documents, for whole documents alone.
        max_overlap: share of held-out bytes that may occur in training (licence headers and the like).
        seed: of the probes.
        device: where inputs go; None means where the model is.

    Raises:
        OuroborosError: no held-out byte, or a loop count for a model without loops.
    """
    kept = [bytes(document) for document in documents if document]
    if not kept:
        raise OuroborosError("no data to audit: every document is empty; give a text with at least one byte")
    subject = Subject(
        model=model,
        tokenizer=tokenizer,
        documents=kept,
        window=min(window, 256),
        scorer=scorer,
        predict=predict,
        device=device_of(model) if device is None else torch.device(device),
        seed=seed,
    )
    checks = {"bytes": _check_bytes, "coverage": _check_coverage, "independence": _check_independence}
    findings = [_guarded(name, check, subject, loops[0]) for name, check in checks.items()]
    for count in loops:
        view = at_loops(model, count)
        suffix = "" if count is None else f" (loops {count})"
        with evaluating(view):
            findings.append(_guarded(f"normalisation{suffix}", _check_sums, subject, view, count))
            findings.append(_guarded(f"causality{suffix}", _check_causality, subject, view))
    if train_documents is not None or train_hashes is not None:
        found = _guarded("overlap", check_overlap, kept, train_documents or (), train_hashes or (), max_overlap)
        findings.append(found)
    return findings


def _guarded(name: str, check: Callable[..., tuple[bool, str]], *arguments: Any) -> Finding:
    """The check's outcome; an error that a user could cause is a failed check, not the end of the audit."""
    started = time.perf_counter()
    try:
        ok, detail = check(*arguments)
    except OuroborosError as error:
        ok, detail = False, str(error)
    return Finding(name=name, ok=ok, detail=detail, seconds=time.perf_counter() - started)


def _check_bytes(subject: Subject, loops: int | None) -> tuple[bool, str]:
    table = byte_table(subject.tokenizer)
    groups = [(subject.text(subject.window + 3), subject.text(7))] + [(text,) for text in AWKWARD]
    counted = refused = 0
    for texts in groups:
        expected = sum(map(len, texts))
        try:
            found = subject.score(texts, loops)
        except OuroborosError:
            if texts is groups[0] or all(map(subject.lossless, texts)):
                raise
            refused += 1  # a tokenizer that loses bytes has no bits per byte, and the scorer said so
            continue
        tabled = expected
        # A token that stands for any unknown character has no number of bytes.
        if table is not None and all(map(subject.lossless, texts)):
            tabled = sum(int(table[subject.sequence(text)[1:]].sum()) for text in texts)
        if found.bytes != expected or tabled != expected:
            return False, f"{expected} bytes of text; the scorer counts {found.bytes}, the tokenizer's table {tabled}"
        if not math.isclose(found.bits_per_byte * expected * math.log(2), found.nats, rel_tol=1e-6, abs_tol=1e-9):
            return False, f"{found.nats:.6g} nats over {expected} bytes are not {found.bits_per_byte:.6g} bits per byte"
        counted += expected
    return True, f"{counted} bytes in {len(groups) - refused} texts counted exactly, {refused} texts refused"


def _check_coverage(subject: Subject, loops: int | None) -> tuple[bool, str]:
    w = subject.window
    lengths = sorted({1, 2, w - 1, w, w + 1, w + w // 2, 2 * w - 1, 2 * w, 2 * w + 1, 3 * w + 7} - {0})
    strides = sorted({w, max(1, w // 2), max(1, w // 3)}, reverse=True)
    view, worst = at_loops(subject.model, loops), 0.0
    for length in lengths:
        document = subject.text(length)
        sequence = subject.sequence(document)
        for stride in strides:
            found = subject.score([document], loops, stride=stride)
            with evaluating(view):
                nats = _reference_nats(subject, view, sequence, stride)
            tokens = len(sequence) - 1
            place = f"{tokens} tokens, window {w}, stride {stride}"
            if found.tokens != tokens:
                return False, f"{place}: the scorer counts {found.tokens} tokens"
            gap = abs(found.nats - nats)
            if not gap <= TOKEN_TOLERANCE * tokens + 1e-6 * abs(nats):
                return False, f"{place}: the scorer gives {found.nats:.6f} nats, one window at a time {nats:.6f}"
            worst = max(worst, gap / tokens)
    return True, f"{len(lengths)} lengths x {len(strides)} strides, largest difference {worst:.1e} nats per token"


def _reference_nats(subject: Subject, model: Any, sequence: np.ndarray, stride: int) -> float:
    """Nats of ``sequence[1:]``, target by target; shares no arithmetic with the scorer."""
    w, known = subject.window, -1
    total = float(unknown_nats(subject.tokenizer, sequence[1:]).sum())
    table = torch.empty(0)
    for target in range(1, len(sequence)):
        late = target - 1 - w
        start = 0 if late < 0 else (late // stride + 1) * stride
        if start != known:
            table, known = subject.probe(model, sequence[start : min(start + w, len(sequence) - 1)]), start
        total -= float(table[target - 1 - start, int(sequence[target])])
    return total


def _check_independence(subject: Subject, loops: int | None) -> tuple[bool, str]:
    w = subject.window
    texts = [subject.text(length) for length in (2 * w + 5, 3, w + 1, w, max(1, w // 3))]
    alone = [subject.score([text], loops) for text in texts]
    bits = math.log(2) * sum(map(len, texts))
    apart = sum(found.nats for found in alone) / bits
    found = {
        "one window a batch": subject.score(texts, loops, batch_size=1),
        "three windows a batch": subject.score(texts, loops, batch_size=3),
        "documents reversed": subject.score(texts[::-1], loops),
    }
    gaps = {name: abs(together.nats / bits - apart) for name, together in found.items()}
    for name, gap in gaps.items():
        if not gap < TOKEN_TOLERANCE:
            return False, f"{name}: {gap:.3g} bits per byte away from each document by itself ({apart:.6f})"
    return True, f"largest difference {max(gaps.values()):.1e} bits per byte"


def _check_sums(subject: Subject, view: Any, loops: int | None) -> tuple[bool, str]:
    rng, w = subject.generator(), subject.window
    text = subject.sequence(subject.text(w))[:w]
    noise = rng.permutation(text)
    worst = 0.0
    for ids in (text, noise):
        sums = subject.probe(view, ids).double().exp().sum(-1)
        gaps = (sums - 1).abs()
        at = int(gaps.nan_to_num(nan=math.inf).argmax())
        if not float(gaps[at]) <= SUM_TOLERANCE:
            return False, f"probabilities at position {at} sum to {float(sums[at]):.6f}, not 1"
        worst = max(worst, float(gaps[at]))
    for prefix in (b"", subject.text(max(1, w // 8)), subject.text(max(1, w // 2))):
        total = _continuations(subject, prefix, loops)
        if not total <= 1 + SUM_TOLERANCE:
            return False, f"by the scorer, the bytes after a text of {len(prefix)} bytes sum to {total:.6f}, above 1"
    return True, f"{2 * len(text)} positions, largest |sum - 1| {worst:.1e}; bytes by the scorer sum to at most 1"


def _continuations(subject: Subject, prefix: bytes, loops: int | None) -> float:
    """Sum of the scorer's probabilities of one byte after ``prefix``, over bytes whose tokens extend the prefix's.

    Those are disjoint events, so an honest scorer gives at most 1 (less with tokens of several bytes, and less
    the end of text).
    """
    head = subject.sequence(prefix)
    texts = []
    for value in range(256):
        text = prefix + bytes([value])
        if not subject.lossless(text):
            continue
        ids = subject.sequence(text)
        if len(ids) > len(head) and np.array_equal(ids[: len(head)], head):
            texts.append(text)
    if not texts:
        return 0.0
    before = subject.score([prefix], loops).nats if prefix else 0.0
    found = subject.score(texts, loops).unit_nats
    if len(found) != len(texts):
        raise OuroborosError(f"the scorer returns {len(found)} units for {len(texts)} short documents")
    return float(np.exp(before - found).sum())


def _check_causality(subject: Subject, view: Any) -> tuple[bool, str]:
    rng, w = subject.generator(), subject.window
    ids = subject.sequence(subject.text(w))[:w]
    size = len(ids)
    if size < 2:
        return True, "a window of one token has no later token"
    base = subject.probe(view, ids)
    places = sorted({0, size // 4, size // 2, size - 2, *rng.integers(0, size - 1, 4).tolist()})
    worst, vocabulary = 0.0, base.shape[-1]
    for place in places:
        other = ids.copy()
        other[place + 1 :] = (ids[place + 1 :] + rng.integers(1, vocabulary, size - place - 1)) % vocabulary
        past, now = base[: place + 1], subject.probe(view, other)[: place + 1]
        gap = torch.where(past == now, 0.0, (past - now).abs()).nan_to_num(nan=math.inf)
        worst = max(worst, float(gap.max()))
        if worst > CAUSAL_TOLERANCE:
            first = int((gap.amax(-1) > CAUSAL_TOLERANCE).nonzero()[0])
            return False, f"tokens after position {place} change the log-probabilities at {first} by {worst:.3g}"
    kind = "bit-identical" if worst == 0 else f"largest change {worst:.1e}"
    return True, f"{len(places)} cuts of {size} tokens: {kind}"


def check_overlap(
    documents: Sequence[bytes], train_documents: Iterable[bytes], train_hashes: Collection[str], max_overlap: float
) -> tuple[bool, str]:
    """Whether held-out documents occur in training, and a sentence that says how much.

    Training passages are the 256-byte chunks at multiples of 256; they are looked for at every offset of the
    held-out text, so any shared run of 511 bytes is found wherever it lies. Passages of fewer than 8 distinct
    bytes (rulers, blanks) do not count.
    """
    hashes, passages = set(train_hashes), set()
    for document in train_documents:
        if document:
            hashes.add(data_hash([document]))
        for start in range(0, len(document) - CHUNK + 1, CHUNK):
            passages.add(hash(bytes(document[start : start + CHUNK])))
    whole = [index for index, document in enumerate(documents) if hashlib.sha256(document).hexdigest() in hashes]
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
    return not whole and not copies and share <= max_overlap, detail


def _shared_bytes(document: bytes, passages: set[int]) -> int:
    """Bytes of ``document`` that lie in a known passage."""
    covered = end = 0
    if passages:
        for start in range(len(document) - CHUNK + 1):
            piece = document[start : start + CHUNK]
            if hash(piece) in passages and len(set(piece)) >= 8:
                covered += start + CHUNK - max(start, end)
                end = start + CHUNK
    return covered

"""Validation during training: bits per byte and nats per token on a fixed sample of the held-out documents."""

from __future__ import annotations

import hashlib
import logging
import math
import time

import torch

from ouroboros.data.prepared import PreparedData
from ouroboros.errors import OuroborosError
from ouroboros.eval.score import Score, beginning, score
from ouroboros.train.log import MetricsLog, Progress
from ouroboros.train.trainer import Trainer

logger = logging.getLogger(__name__)


def validation_sample(data: PreparedData, limit: int) -> list[bytes]:
    """Documents for validation in the order of their sha256, at most ``limit`` bytes in all, the last one cut.

    The order spreads a small sample over a collection that is sorted by name.
    """
    return beginning(sorted(data.documents("valid"), key=lambda document: hashlib.sha256(document).digest()), limit)


def validate(trainer: Trainer, documents: list[bytes]) -> Score | None:
    """Score the model as it would be exported, in the training precision; None on processes that only give their part
    of it."""
    window = min(trainer.recipe.data.sequence_length, trainer.recipe.model.max_position_embeddings)
    with trainer.evaluation_weights() as model:
        if not trainer.workers.is_main:
            return None
        amp = None if trainer.dtype == torch.float32 else trainer.dtype
        return score(model, trainer.data.tokenizer, documents, window=window, amp=amp)


class ValidationFailed(OuroborosError):
    """``max_bad_validations`` validations in a row ended in an error."""


class Validator:
    """Validates during one session: scores, reports, counts, and goes on after failures up to a number in a row.

    The main process scores; all processes learn the outcome and keep the same counters.

    Args:
        trainer: its model is scored, and its counters are kept.
        metrics: where the results are recorded.
        shown: where results are shown to people.
    """

    def __init__(self, trainer: Trainer, metrics: MetricsLog, shown: Progress) -> None:
        spec = trainer.recipe.train
        self.trainer, self._metrics, self._shown = trainer, metrics, shown
        self.sample = validation_sample(trainer.data, spec.eval_bytes) if spec.eval_every else []
        if spec.eval_every and not self.sample:
            useless = [f"train.{name}" for name in ("target_loss", "patience") if getattr(spec, name)]
            logger.warning(
                "the data has no validation split; validation is off%s",
                f", and with it {' and '.join(useless)}" if useless else "",
            )
        self._unsure = spec.target_loss is not None

    def due(self, last: bool) -> bool:
        """Whether to validate after the step just taken, ``last`` of the run or not."""
        every = self.trainer.recipe.train.eval_every
        return bool(self.sample) and (last or self.trainer.counters.step % every == 0)

    def goal(self) -> str:
        """What ends the run early, for people; empty if nothing does."""
        spec, parts = self.trainer.recipe.train, []
        if spec.target_loss is not None and self.sample:
            tokens = sum(len(self.trainer.data.tokenizer.encode(document)) for document in self.sample)
            bits = spec.target_loss * tokens / math.log(2) / sum(map(len, self.sample))
            parts.append(f"at {spec.target_loss:g} nats per token ({bits:.4f} bits per byte) of validation or below")
        if spec.patience and self.sample:
            parts.append(f"after {spec.patience} validations without a new best")
        return f"; stops {' or '.join(parts)}" if parts else ""

    def run(self) -> bool:
        """Validate; true, on all processes, if the score is the best so far.

        Raises:
            ValidationFailed: this was one failure too many; the counters include it.
        """
        begun = time.perf_counter()
        c, crew, spec = self.trainer.counters, self.trainer.workers, self.trainer.recipe.train
        takes_part = crew.is_main or self.trainer.shards is not None
        found, cause = self._score() if takes_part else (None, None)
        mine = [0.0, 0.0, 0.0, 0.0]
        if cause is not None:
            mine[0] = 1.0
        elif found is not None:
            stderr = found.nats_per_token_stderr
            mine[1:] = [found.bits_per_byte, found.nats_per_token, math.nan if stderr is None else stderr]
        failed, *numbers = crew.sum(*mine)
        best = False
        if failed:
            c.failed_validations += 1
            c.failed_validations_in_a_row += 1
            self._report_failure(cause)
        else:
            c.failed_validations_in_a_row = 0
            best = self._count(*(number if math.isfinite(number) else None for number in numbers))
            self._report(found)
        c.seconds += time.perf_counter() - begun
        if failed and c.failed_validations_in_a_row >= spec.max_bad_validations:
            why = f"the last one with {_named(cause)}" if cause is not None else "see the main process"
            raise ValidationFailed(f"{c.failed_validations_in_a_row} validations in a row failed, {why}") from cause
        return best

    def _score(self) -> tuple[Score | None, Exception | None]:
        """The score, or what kept it from being one."""
        try:
            return validate(self.trainer, self.sample), None
        except (RuntimeError, MemoryError, OuroborosError, OSError) as error:
            return None, error

    def _count(self, bits: float | None, nats: float | None, stderr: float | None) -> bool:
        """Keep a score; true if it is the best so far. None stands for a number that is not finite or not known."""
        c = self.trainer.counters
        c.valid_bits_per_byte, c.valid_nats_per_token, c.valid_nats_stderr = bits, nats, stderr
        best = bits is not None and (c.best_bits_per_byte is None or bits < c.best_bits_per_byte)
        if best:
            c.best_bits_per_byte, c.best_step = bits, c.step
        c.validations_without_best = 0 if best else c.validations_without_best + 1
        return best

    def _report(self, found: Score | None) -> None:
        if found is None:
            return
        step = self.trainer.counters.step
        record = {"bits_per_byte": found.bits_per_byte, "stderr": found.stderr}
        record |= {"nats_per_token": found.nats_per_token, "nats_per_token_stderr": found.nats_per_token_stderr}
        self._metrics.write({"kind": "valid", "step": step, **record})
        self._shown.message(
            f"step {step:,}: validation {found.bits_per_byte:.4f} bits/byte, {found.nats_per_token:.4f} nats/token"
        )
        if self._unsure and found.nats_per_token_stderr is None:
            logger.warning(
                "train.target_loss cannot be confirmed: the validation sample of %d bytes is one piece, which has no"
                " standard error; raise train.eval_bytes or data.valid_fraction",
                found.bytes,
            )
            self._unsure = False

    def _report_failure(self, cause: Exception | None) -> None:
        if cause is None:
            return
        c, spec = self.trainer.counters, self.trainer.recipe.train
        logger.warning(
            "step %d: validation failed (%s): %d in a row, %d end the run",
            *(c.step, _named(cause), c.failed_validations_in_a_row, spec.max_bad_validations),
        )
        failures = {"error": _named(cause), "in_a_row": c.failed_validations_in_a_row}
        self._metrics.write({"kind": "valid_failed", "step": c.step, **failures})


def _named(error: Exception | None) -> str:
    """An error's type and message in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(": ")

"""The trainer: plain torch, one optimiser step after another.

Shapes: B sequences, T positions of a window.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ouroboros.accounting import training_flops
from ouroboros.config import LoopTraining, Recipe
from ouroboros.data.masks import micro_divisors, shown
from ouroboros.data.prepared import PreparedData
from ouroboros.data.stream import StreamLoader, open_loader
from ouroboros.errors import OuroborosError, check, first_line
from ouroboros.model.executor import observe
from ouroboros.model.loss import logits_loss, plus
from ouroboros.model.modeling import OuroborosForCausalLM
from ouroboros.optim import (
    build_optimizers,
    choose_muon_dtype,
    clip_and_norm,
    first_beta,
    learning_rate,
    leave_out,
    muon_momentum,
    set_first_beta,
    set_learning_rate,
    set_muon_momentum,
)
from ouroboros.train.average import Average
from ouroboros.train.distill import Teacher
from ouroboros.train.distributed import Workers
from ouroboros.train.draws import Corruption, LoopSampler, check_truncation
from ouroboros.train.guard import Alarm, Guard
from ouroboros.train.lessons import lessons_of
from ouroboros.train.low_rank import LowRank
from ouroboros.train.precision import (
    COMPILED,
    Choices,
    choose_dtype,
    compile_blocks,
    expected_seconds,
    from_compiler,
    uncompiled,
)
from ouroboros.train.quantize import Quantizer
from ouroboros.train.sharding import Shards, shards_of, whole
from ouroboros.train.stop import Counters, EarlyStop, NotFinite, SourceFailed, check_budget, early_stop, share_done
from ouroboros.train.telemetry import LoopTelemetry, part_records
from ouroboros.train.threads import Threads, choose_threads

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepResult:
    """What one step measured."""

    loss: float
    """Mean over the global batch in nats per token, without label smoothing."""
    grad_norm: float
    """Global norm of the gradient before clipping."""
    lr_factor: float
    """Learning rate as a share of its peak."""
    beta: float
    """AdamW's first coefficient."""
    loops: int | None
    """Loop count of this step; None is the layout's own."""
    skipped: bool
    """Whether loss or gradient was not finite, so that no weight changed."""
    telemetry: dict[str, list[dict[str, Any]]] | None
    """Records of loops and parts, if they were asked for and the model has such."""
    seconds: float = 0.0
    """Wall-clock time of the step."""
    alarm: Alarm | None = None
    """What the stability guard found unusual."""


class Trainer:
    """Model, optimisers, data position and counters of one run.

    Args:
        recipe: the resolved one, whose model has the vocabulary of the tokenizer.
        model: it is on its device, and is trained in place.
        data: the prepared shards.
        workers: this process among its peers.
        choices: those of the run that is resumed. None makes new ones, by measurement where the recipe leaves them
            open.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: OuroborosForCausalLM,
        data: PreparedData,
        workers: Workers,
        *,
        choices: Choices | None = None,
    ) -> None:
        spec = recipe.train
        self.recipe, self.model, self.data, self.workers = recipe, model, data, workers
        self.device = next(model.parameters()).device
        check_budget(spec)
        self.counters, self.guard = Counters(), Guard(spec.guard, model.schedule)
        self.loader = open_loader(
            data,
            batch_size=spec.batch_size,
            sequence_length=recipe.data.sequence_length,
            seed=spec.seed,
            rank=workers.rank,
            world_size=workers.world_size,
        )
        check(
            spec.batch_size // workers.world_size % spec.accumulation == 0,
            f"train.batch_size ({spec.batch_size}) must be a multiple of processes ({workers.world_size}) times"
            f" train.accumulation ({spec.accumulation})",
        )
        check_truncation(recipe, model.schedule)
        for sentence in recipe.model.warnings() if workers.is_main else ():
            logger.warning("%s", sentence)
        if spec.activation_checkpointing:
            model.activation_checkpointing_enable()
        self.lessons = lessons_of(recipe, model, data, workers)
        self.wrapped: nn.Module = model
        self.compiled = "compile: off"
        # From logits to losses in one compiled program; without a compiler the model computes its loss in chunks.
        self._criterion: Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]] | None = None
        self.teacher: Teacher | None = None
        self.shards: Shards | None = None
        self.low_rank = LowRank(model, spec.low_rank, spec.seed)
        self.choices = self._choose() if choices is None else self._keep(choices)
        kept = {"muon_dtype": self.choices.muon_dtype, "factors": self.low_rank.factors}
        leave_out(model, recipe.optim, self.low_rank.factors)
        self.average = Average(model, spec) if spec.averages else None
        self.shards = shards_of(spec, model, self.average, workers)
        self.optimizers = build_optimizers(model, recipe.optim, **kept)
        held = {p for optimizer in self.optimizers for group in optimizer.param_groups for p in group["params"]}
        # What no optimiser holds has no say in the norm; in the model's order, which decides how it is rounded.
        self.names = {parameter: name for name, parameter in model.named_parameters()} | self.low_rank.names
        self.optimized = [p for p in self.names if p in held]
        self.quantizer = Quantizer(model, spec.quantize, spec.seed)
        self.sampler = LoopSampler(spec.loops, model.schedule, spec.seed)
        special = [i for i in (data.tokenizer.eos_id, data.tokenizer.unknown_id) if i is not None]
        self.corruption = Corruption(spec.corruption, data.tokenizer.vocab_size, special, spec.seed)
        self._compile()
        by_loop = any(getattr(module, "PARAMETERS_BY_LOOP", False) for module in model.modules())
        if self.shards is None:
            self.wrapped = workers.wrap(model, uneven=by_loop and spec.loops != LoopTraining())
        # Bytes a training token stands for, to show the loss in bits per byte.
        self.bytes_per_token = data.count("train", "bytes") / max(data.count("train", "tokens"), 1)

    def _compile(self) -> None:
        """Compile what the recipe, or the run that is resumed, wants compiled."""
        spec = self.recipe.train
        if spec.compile == "auto" and self.choices.compile is not None:
            spec = dataclasses.replace(spec, compile=self.choices.compile)
        if self.shards is not None:
            spec = dataclasses.replace(spec, compile="off")  # the hooks that gather weights are not compiled
        self.compiled = compile_blocks(self.blocks, spec, self.device, self.expected_seconds, self.dtype)
        if self.compiled == COMPILED:  # the float32 logits are then never written to memory
            self._criterion = torch.compile(logits_loss, dynamic=False)

    def _apart(self) -> contextlib.AbstractContextManager[None]:
        """The context of passes whose gradients are not averaged between processes yet."""
        if self.shards is not None:
            return self.shards.apart()
        return self.wrapped.no_sync() if self.workers.distributed else contextlib.nullcontext()  # pyrefly: ignore

    def _choose(self) -> Choices:
        """Choose what the recipe leaves open, by measurement; processes that train together choose alike."""
        spec, alone = self.recipe.train, not self.workers.distributed
        dtypes = [
            choose_dtype(spec, self.device),
            choose_muon_dtype(self.model, self.recipe.optim, self.low_rank.factors),
        ]
        dtypes = [torch.float32 if self.workers.any(dtype == torch.float32) else dtype for dtype in dtypes]
        self.choices = Choices(dtype=dtypes[0], muon_dtype=dtypes[1], threads=spec.threads or torch.get_num_threads())
        if spec.threads is not None or self.device.type != "cpu" or not alone:
            return self.choices
        return dataclasses.replace(self.choices, threads=choose_threads(self._rehearse))

    def _keep(self, choices: Choices) -> Choices:
        """The choices of the run that is resumed, with the threads that there are."""
        wanted, most = self.recipe.train.threads, torch.get_num_threads()
        if wanted is None and choices.threads > most:
            logger.warning(
                "the run had %d threads, here are %d: it goes on, but not with the same rounding", choices.threads, most
            )
        threads = wanted or min(choices.threads, most)
        now = None if wanted else choices.threads_now
        return dataclasses.replace(choices, threads=threads, threads_now=None if now is None else min(now, threads))

    def threads(self) -> Threads | None:
        """What adapts the number of threads to other programs, where the number was left open and may change.

        It may not where processes wait for each other anyway, nor where blocks are compiled for a number of threads.
        """
        open_ = self.recipe.train.threads is None and self.device.type == "cpu" and not self.workers.distributed
        if not open_ or self.compiled == COMPILED:
            return None
        return Threads(self.choices.threads, self.choices.threads_now)

    @property
    def blocks(self) -> nn.ModuleList:
        """The model's blocks, which are compiled one by one."""
        return self.model.model.decoder.layers

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the forward and backward pass; float32 means that autocast is off."""
        return self.choices.dtype

    @property
    def expected_seconds(self) -> float:
        """See :func:`ouroboros.train.precision.expected_seconds`."""
        return expected_seconds(self.recipe, self.device, self.dtype, self.workers.world_size)

    @property
    def flops_per_token(self) -> int:
        """Forward and backward operations per token, the mean over the run; attention is counted at its mean length."""
        return training_flops(self.recipe.model, self.recipe.train.loops, (self.recipe.data.sequence_length + 1) // 2)

    @property
    def step_tokens(self) -> int:
        """Tokens of one optimiser step over all processes."""
        return self.recipe.train.batch_size * self.recipe.data.sequence_length

    def visits(self, loops: int | None) -> int:
        """Blocks that a step of ``loops`` loops visits; None for the recipe's own number."""
        schedule = self.model.schedule
        return (schedule if loops is None else schedule.with_loops(loops)).num_visits

    @property
    def done(self) -> bool:
        """Whether the budget is spent or validation has ended the run."""
        c = self.counters
        spent = share_done(self.recipe.train, c.step, c.tokens, c.seconds) >= 1.0
        return self.workers.any(spent) or self.early_stop is not None

    @property
    def early_stop(self) -> EarlyStop | None:
        """Why the last validation ends the run, None if it does not."""
        return early_stop(self.recipe.train, self.counters)

    def progress(self, ahead: float = 0.0) -> float:
        """Share of the run done, ``ahead`` steps from now; the main process's clock counts."""
        c = self.counters
        tokens, seconds = ahead * self.step_tokens, ahead * c.seconds / max(c.step, 1)
        here = share_done(self.recipe.train, c.step + ahead, c.tokens + tokens, c.seconds + seconds)
        return self.workers.sum(here if self.workers.is_main else 0.0)[0]

    def warm_up(self) -> float:
        """Compile by one pass that is not used, over a batch of the training shape; returns the seconds it took.

        Compilation is set-up: it counts neither as training time nor as progress of the learning-rate schedule.
        """
        start = time.perf_counter()
        if self.compiled == COMPILED:
            self._rehearse()
        return time.perf_counter() - start

    def _rehearse(self) -> None:
        """A forward and backward pass of the training shape that leaves nothing behind."""
        spec = self.recipe.train
        rows = spec.batch_size // self.workers.world_size // spec.accumulation
        windows = torch.zeros(rows, self.recipe.data.sequence_length + 1, dtype=torch.long, device=self.device)
        self.model.train()
        with self._apart():
            self._losses_or_fall_back(windows[:, :-1], windows[:, 1:], None, None)[0].backward()
        self.model.zero_grad(set_to_none=True)

    def step(self, *, telemetry: bool = False) -> StepResult:
        """One optimiser step over the next global batch.

        Raises:
            NotFinite: ``max_bad_steps`` steps in a row had a non-finite loss or gradient.
            SourceFailed: a source that is streamed cannot be read on.
        """
        start = time.perf_counter()
        c, spec = self.counters, self.recipe.train
        progress = self.progress(0.5)
        # Steps of the whole run at the pace so far: exact for a budget of steps or tokens, an estimate for minutes.
        steps = (c.step + 0.5) / progress if progress > 0 else math.inf
        factor, beta = self._rates(progress, steps)
        factor *= self.guard.state.lr_factor
        set_learning_rate(self.optimizers, factor)
        if self.recipe.optim.momentum_cycle is not None:
            set_first_beta(self.optimizers, beta)
        if self.recipe.optim.muon_momentum_warmup:
            set_muon_momentum(self.optimizers, muon_momentum(c.step, self.recipe.optim))
        # Dropout masks depend on seed, process and step alone, so a resumed run needs no generator state.
        torch.manual_seed(((spec.seed * 1_000_003 + self.workers.rank) * 10_000_019 + c.step) % 2**63)
        loops = self.sampler.loops(c.step, progress)
        batch = self._next_batch()
        records = self._part_records(batch) if telemetry else {}
        probe = LoopTelemetry() if telemetry and self.model.schedule.is_looped else None
        with self.quantizer.acting(c.step, progress), self.guard.watching(self.model, loops):
            loss = self._gradients(batch, loops, probe)
        self.low_rank.take_gradients()
        norm = clip_and_norm(self.optimized, self.recipe.optim.clip_norm)
        bad = self.workers.any(not (math.isfinite(loss) and math.isfinite(norm)))
        if not bad:
            for optimizer in self.optimizers:
                optimizer.step()
            self.low_rank.merge()
            if self.average is not None and self.teacher is None:
                self.average.follow(self.model, c.step + 1, progress)
        if probe is not None:
            records = {"loops": probe.collect(), **records}
        self.model.zero_grad(set_to_none=True)
        # All processes judge by the same numbers, so that they go back, or stop, at the same step.
        mean_loss, shared_norm = self.workers.sum(loss / self.workers.world_size, norm if self.workers.is_main else 0.0)
        alarm = self.guard.judge(c.step + 1, mean_loss, shared_norm, self.guard.measured(self.workers))
        c.step += 1
        c.tokens += self.step_tokens
        seconds = time.perf_counter() - start
        c.seconds += seconds
        self._count_bad(bad, batch)
        result = StepResult(mean_loss, norm, factor, beta, loops, bad, records or None, seconds, alarm)
        if c.bad_in_a_row >= spec.max_bad_steps:
            raise NotFinite(
                f"{c.bad_in_a_row} steps in a row had a non-finite loss or gradient"
                f" (loss {loss}, gradient norm {norm}); lower optim.lr or use train.precision=fp32",
                shown(batch)[0],
            )
        return result

    def _part_records(self, batch: np.ndarray) -> dict[str, Any]:
        with whole(self.model, self.shards) as model:
            return part_records(model, shown(batch)[0]) if self.workers.is_main else {}

    def _rates(self, progress: float, steps: float) -> tuple[float, float]:
        """The share of the peak rate, and AdamW's first coefficient. The last phase begins where it is due."""
        spec, optim = self.recipe.train.distill, self.recipe.optim
        before = 1.0 - spec.fraction
        if spec.fraction and progress >= before:
            if self.teacher is None:
                with self.evaluation_weights() as model:
                    self.teach(model)
            return spec.lr, first_beta(1.0, optim)
        there, steps = progress / before, steps * before
        return learning_rate(there, optim, steps), first_beta(there, optim, steps)

    def teach(self, model: nn.Module) -> Teacher:
        """Let the weights learn from a copy of ``model`` from now on."""
        self.teacher = Teacher(model, self.recipe.train.distill)
        return self.teacher

    def _next_batch(self) -> np.ndarray:
        """This process's part of the next batch. A source that fails ends the run on all processes at the same step."""
        if isinstance(self.loader, StreamLoader):
            error = None
            try:
                self.loader.look_ahead()
            except OuroborosError as caught:
                error = caught
            if self.workers.any(error is not None):
                raise SourceFailed(str(error or "another process could not read its sources on")) from error
        return self.loader.next_batch()

    def _count_bad(self, bad: bool, batch: np.ndarray) -> None:
        c = self.counters
        c.bad_in_a_row = c.bad_in_a_row + 1 if bad else 0
        if bad:
            c.skipped += 1
            logger.warning("step %d: non-finite loss or gradient, step skipped (%d so far)", c.step, c.skipped)

    def _gradients(self, batch: np.ndarray, loops: int | None, probe: LoopTelemetry | None) -> float:
        """Accumulate gradients over micro-batches; the mean loss of this process."""
        self.model.train()
        count = self.recipe.train.accumulation
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        first = self.workers.rank * len(batch)
        parts: list[float] = [count] * count
        if self.recipe.data.loss != "all":
            batch, parts = micro_divisors(batch, count, lambda own: self.workers.sum(own)[0] / self.workers.world_size)
        for index, micro in enumerate(np.split(batch, count)):
            ids, targets = (torch.from_numpy(part).to(self.device, non_blocking=True) for part in shown(micro))
            inputs = self.corruption(ids[:, :-1], self.counters.step, first + index * len(micro))
            last = index == count - 1
            # Gradients are averaged between processes once per step, at the last micro-batch.
            with contextlib.nullcontext() if last else self._apart():
                objective, loss = self._losses_or_fall_back(inputs, targets, loops, probe if index == 0 else None)
                (objective / parts[index]).backward()
            total += loss.detach().double() / parts[index]
        if self.shards is not None:
            self.shards.settle()
        return total.item()

    def _losses_or_fall_back(
        self, inputs: Tensor, targets: Tensor, loops: int | None, probe: LoopTelemetry | None
    ) -> tuple[Tensor, Tensor]:
        """The losses. If the compiler fails when it is first used, that is reported and training runs uncompiled."""
        try:
            return self.losses(inputs, targets, loops, probe)
        except Exception as error:
            if self.compiled != COMPILED or not from_compiler(error):
                raise
            logger.warning("compile: failed (%s); training runs uncompiled", first_line(error))
            self.compiled = "compile: off (the compiler failed)"
            self._criterion = None
            for block in self.blocks:
                block._compiled_call_impl = None
            return self.losses(inputs, targets, loops, probe)

    def losses(
        self, inputs_BT: Tensor, targets_BT: Tensor, loops: int | None = None, probe: LoopTelemetry | None = None
    ) -> tuple[Tensor, Tensor]:
        """What training minimises, and the mean next-token cross-entropy in nats.

        The two are equal without label smoothing and without what parts add to the loss.

        Args:
            inputs_BT: token ids (B, T).
            targets_BT: the tokens that follow them (B, T).
            loops: the loop count of this call; None is the layout's own.
            probe: is shown the state before and after every loop.
        """
        arguments = {"input_ids": inputs_BT, "use_cache": False, "loops": loops}
        arguments["backprop_loops"] = self.recipe.train.loops.backprop
        smoothing = self.recipe.train.label_smoothing
        watched = contextlib.nullcontext() if probe is None else observe(self.model, on_loop=probe)
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32), watched:
            if self.lessons is not None:
                lesson = self.lessons.losses(self.wrapped, arguments, targets_BT, self.counters.step, smoothing)
                return lesson.objective, lesson.plain
            if self.teacher is None and self._criterion is None:
                found = self.wrapped(**arguments, targets=targets_BT, label_smoothing=smoothing)
                return found.loss, found.unsmoothed_loss
            found = self.wrapped(**arguments)
            if self.teacher is not None:
                losses = self.teacher.losses(found.logits, inputs_BT, targets_BT, loops=loops, smoothing=smoothing)
                return plus(losses[0], found.auxiliary_loss), losses[1]
        assert self._criterion is not None
        objective, plain = self._criterion(found.logits, targets_BT, smoothing)
        return plus(objective, found.auxiliary_loss), plain

    @contextlib.contextmanager
    def evaluation_weights(self) -> Iterator[OuroborosForCausalLM]:
        """The model as it is evaluated and exported: averaged weights if there are any and no last phase has gone on
        from them, blocks uncompiled. Where the model is divided all processes have to enter, and the main one alone is
        given it, see :meth:`Shards.whole`."""
        averaged = self.average is not None and self.average.updates and self.teacher is None
        chosen: Any = self.average.module if averaged else self.model  # pyrefly: ignore
        # Compiled programs are made for the training shape; every other shape would be compiled anew.
        with uncompiled(self.blocks), whole(chosen, self.shards) as model:
            yield model

    def state(self) -> dict[str, Any]:
        """Everything besides tensors that a resumed run needs, as JSON."""
        return {
            "counters": dataclasses.asdict(self.counters),
            "guard": self.guard.state_dict(),
            "loader": self.loader.state_dict(),
            "next_batch": self.loader.upcoming_hash(),
            "ema_updates": self.average.updates if self.average is not None else 0,
            **self.quantizer.state(),
            **dataclasses.replace(self.choices, compile="on" if self.compiled == COMPILED else "off").to_dict(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state`.

        Raises:
            OuroborosError: the next batch, or a file that is trained with, is not the one the checkpoint recorded.
        """
        self.quantizer.check_state(state)
        self.counters = Counters(**state["counters"])
        self.guard.load_state_dict(state.get("guard"))
        self.loader.load_state_dict(state["loader"])
        expected = state["next_batch"]
        if expected and not self.workers.distributed and self.loader.peek_hash() != expected:
            raise OuroborosError(
                "resume: the next training batch is not the recorded one; a source or the prepared data has changed"
            )

"""One training loop for pretraining, continued pretraining and SFT, on one process or many.

A batch is a pure function of the step, so the step number is the whole data position, and a killed
run continues from its last checkpoint: on the same number of CPU processes bit for bit, on GPUs up
to kernels that add in no fixed order (the backward passes of attention and of the embedding). Ranks
share each batch by rows; any number of them can continue the checkpoint of any other number.
"""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from ratplus_exp.cost import Shape, attended_keys, peak_tflops
from ratplus_exp.distributed import rank, sum_over_ranks, world_size
from ratplus_exp.memory import gate_statistics
from ratplus_exp.methods import Engine, Method
from ratplus_exp.store import naming, write_atomically
from ratplus_exp.training.batches import Batches, BatchOf
from ratplus_exp.training.checkpoint import Checkpoints
from ratplus_exp.training.divergence import LossMonitor
from ratplus_exp.training.optimizer import adamw, set_learning_rates
from ratplus_exp.training.parallel import (
    Objective,
    distribute,
    prepare_layers,
    reduce_gradients,
)
from ratplus_exp.training.settings import Batch, Schedule, TrainSettings


class Stopped(ValueError):
    """A signal ended the run at a step's end, after a checkpoint."""


class Trainer:
    """Trains a causal model on batch(step, rows, length).

    Args:
        model: a RatPlusForCausalLM, or any model with `.model`, `.lm_head` and, for sparse steps,
            an `engine` keyword.
        batch: the data, a pure function of (step, rows, length); the same on every rank.
        folder: for log.jsonl and checkpoints; the last checkpoint in it is resumed.
        sparse: a fixed pattern for P2's joint training: every batch gives one optimizer step
            through attention with this pattern, one through dense attention, and one scheduler
            step. None: dense steps alone.
        alternate: a batch gives one step, sparse or dense in turn, in place of both: half the
            steps for the same batches.
        sparse_only_steps: the first batches, without a dense step. A trained attention model with a
            new memory keeps its gates shut under dense steps, since it can retrieve without the
            memory; sparse steps alone open them.
        log: called with each logged row, on rank 0.
        device: None: where the model is.
        data: names the data; a checkpoint with another name is refused.
        workers: processes that make batches (`Batches.of`).
    """

    def __init__(
        self,
        model: nn.Module,
        batch: BatchOf,
        schedule: Schedule,
        settings: TrainSettings,
        folder: Path,
        sparse: Method | None = None,
        alternate: bool = False,
        sparse_only_steps: int = 0,
        log: Callable[[dict[str, Any]], None] = lambda row: None,
        device: torch.device | None = None,
        data: str = "",
        workers: int = 0,
    ) -> None:
        schedule.check(world_size())
        assert settings.precision != "auto", "precision=auto is resolved before"
        if settings.seconds and world_size() > 1:  # whose clocks would leave out other steps
            raise ValueError("stage.optimizer.seconds is for one process: use null")
        self.model: Any = model
        self.batches, self.workers = Batches(batch, schedule), workers
        self.schedule, self.settings = schedule, settings
        self.folder, self.log, self.data = folder, log, data
        self.sparse, self.alternate = sparse, alternate
        self.sparse_only_steps = sparse_only_steps
        self.device = device or next(model.parameters()).device
        self.shape = Shape.of(model)
        self.peak = settings.peak_tflops or peak_tflops(self.device)
        if settings.compile or settings.activation_checkpointing:
            prepare_layers(model, settings.compile, settings.activation_checkpointing)
        objective = Objective(model, settings.precision == "bf16")
        self.objective = distribute(objective, settings.parallel, self.device)
        self.optimizer = adamw(model, settings)
        self.step, self.taken, self.tokens, self.seconds = 0, 0, 0, 0.0
        self._begun: float | None = None  # when the first step was done, less earlier runs
        self._signalled = self._stopping = False
        folder.mkdir(parents=True, exist_ok=True)
        self.checkpoints = Checkpoints(folder)
        self.monitor = LossMonitor(settings.spike, self.checkpoints)
        self._load()

    def run(self, description: str = "training") -> None:
        """Train to the end of the schedule, from the last checkpoint on.

        Raises:
            LossDiverged: the loss is not finite, or a spike by settings.spike.
            Stopped: SIGTERM or SIGUSR1 came; the checkpoint holds the steps up to the signal.
        """
        total, settings = self.schedule.steps, self.settings
        bar = tqdm(
            total=total,
            initial=self.step,
            desc=description,
            unit="step",
            mininterval=1.0,
            disable=rank() > 0,
        )
        self._begin_row()
        steps: deque[int] = deque()  # of the batches that are being made
        batches = self.batches.of(self._steps(total, steps), self.workers)
        with self._handle_signals(), bar, closing(batches):
            for batch in batches:
                before, self.step = self.step, steps.popleft()
                micro_batches = self._share(batch)
                scale = set_learning_rates(self.optimizer, settings, self.step, total)
                for name, value in self._train_step(micro_batches).items():
                    self._row[name].append(value)
                self.tokens += sum(ids.numel() for ids, _ in micro_batches) * world_size()
                self.step, self.taken = self.step + 1, self.taken + 1
                self._begun = self._begun or time.perf_counter() - self.seconds
                bar.update(self.step - before)
                last = self.step == total or self._stopping
                if last or self._passed(before, settings.log_every):
                    row = self._finish_row(scale) | self._gate_statistics(micro_batches[0][0][:4])
                    if rank() == 0:
                        self._write_log(row)
                    bar.set_postfix({x: row[x] for x in ("loss", "accuracy") if x in row})
                    if last or self._passed(before, settings.checkpoint_every):
                        self.checkpoints.save(self._state())
                if self._stopping:
                    break
        # Also after a signal to the last step: in a sweep, the next training would begin.
        if sum_over_ranks([self._signalled], self.device)[0]:
            raise Stopped(
                f"stopped by a signal after step {self.step}; the checkpoint is "
                f"{self.checkpoints.kept()[-1]}: run the same command to go on"
            )

    def _steps(self, total: int, made: deque[int]) -> Iterator[int]:
        """The steps from the last checkpoint on, without those that settings.seconds leaves no time
        for; each is appended to `made` as well."""
        step = self.step
        while step < total:
            made.append(step)
            yield step
            step += 1
            if self.settings.seconds and self._begun:
                share = (time.perf_counter() - self._begun) / self.settings.seconds
                step = max(step, min(int(total * share), total - 1))

    def _passed(self, before: int, every: int) -> bool:
        return self.step // every > before // every

    def _begin_row(self) -> None:
        """A row of the log covers the steps since the last one."""
        self._row: dict[str, list[float]] = defaultdict(list)
        self._row_start, self._row_tokens, self._row_flops = time.perf_counter(), self.tokens, 0.0

    def _finish_row(self, scale: float) -> dict[str, float]:
        seconds = time.perf_counter() - self._row_start
        self.seconds += seconds
        row = {name: round(sum(x) / len(x), 5) for name, x in self._row.items()} | {
            "step": self.step,
            "tokens": self.tokens,
            "length": self.schedule.length_at(self.step - 1),
            "lr": self.settings.lr * scale,
            "tokens_per_second": round((self.tokens - self._row_tokens) / seconds),
            "seconds": round(self.seconds, 1),
        }
        if self.peak:
            row["mfu"] = round(self._row_flops / seconds / (self.peak * 1e12 * world_size()), 4)
        self._begin_row()
        return row

    def _share(self, batch: Batch) -> list[tuple[Tensor, Tensor]]:
        """This rank's rows of a batch, in micro-batches."""
        share = len(batch[0]) // world_size()
        rows = slice(rank() * share, (rank() + 1) * share)
        ids, labels = (torch.from_numpy(x[rows]).to(self.device) for x in batch)
        size = self.settings.rows_per_pass or share
        return list(zip(ids.split(size), labels.split(size), strict=True))

    def _train_step(self, micro_batches: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
        row = {}
        for pattern in self._patterns():
            engine = Engine(pattern, counted=frozenset()) if pattern else None
            prefix = "sparse_" if pattern else ""
            for name, value in self._optimizer_step(micro_batches, engine).items():
                row[prefix + name] = value
        return row

    def _patterns(self) -> list[Method | None]:
        """A pattern, or None for dense attention, for each optimizer step on this batch."""
        if self.sparse is None:
            return [None]
        if self.step < self.sparse_only_steps:
            return [self.sparse]
        if self.alternate:
            return [None if self.taken % 2 else self.sparse]
        return [self.sparse, None]

    def _optimizer_step(
        self, micro_batches: list[tuple[Tensor, Tensor]], engine: Engine | None
    ) -> dict[str, float]:
        """One optimizer step on the mean loss over all labelled tokens of all ranks."""
        labelled, signals = sum_over_ranks(
            [sum(int((labels >= 0).sum()) for _, labels in micro_batches), self._signalled],
            self.device,
        )
        self._stopping = signals > 0
        loss_sum = correct = 0.0
        self.model.train()
        for i, (ids, labels) in enumerate(micro_batches, start=1):
            reduce_gradients(self.objective, now=i == len(micro_batches))
            loss, hits = self.objective(ids, labels, engine)
            (loss * world_size() / labelled).backward()  # DDP and FSDP average over ranks
            loss_sum, correct = loss_sum + loss.item(), correct + float(hits)
            keys = attended_keys(engine.method if engine else None, ids.shape[1])
            self._row_flops += ids.numel() * world_size() * self.shape.training_flops(keys)
        loss_sum, correct = sum_over_ranks([loss_sum, correct], self.device)
        kind = "dense" if engine is None else "sparse"
        self.monitor.check("loss", loss_sum / labelled, self.step, kind)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        self.monitor.check("gradient's norm", float(norm), self.step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {
            "loss": loss_sum / labelled,
            "accuracy": correct / labelled,
            "grad_norm": float(norm),
        }

    def _gate_statistics(self, ids: Tensor) -> dict[str, float]:
        """Of a few rows; compiled layers run eagerly, since hooks would recompile them."""
        compiled = self.settings.compile
        with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            return gate_statistics(self.model, ids, forward=self.objective)

    @contextmanager
    def _handle_signals(self) -> Iterator[None]:
        """SIGTERM (preemption) and SIGUSR1 (SLURM's --signal) end the run after a step."""
        if threading.current_thread() is not threading.main_thread():
            yield  # Python handles signals in the main thread alone
            return

        def stop(*_: Any) -> None:
            self._signalled = True

        numbers = (signal.SIGTERM, signal.SIGUSR1)
        before = [signal.signal(number, stop) for number in numbers]
        try:
            yield
        finally:
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)

    def _write_log(self, row: dict[str, Any]) -> None:
        log = self.folder / "log.jsonl"
        with naming(log), log.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.log(row)

    def _state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "taken": self.taken,  # batches; settings.seconds leaves out steps
            "tokens": self.tokens,
            "seconds": self.seconds,
            "data": self.data,
            "recent": self.monitor.state(),
        }

    def _blank_state(self) -> dict[str, Any]:
        """A state of the right shapes; the step that makes the optimizer's moments changes the
        weights, which are loaded next."""
        for p in self.model.parameters():
            p.grad = torch.zeros_like(p)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return self._state()

    def _load(self) -> None:
        groups = self.optimizer.state_dict()["param_groups"]  # rates as set now, not as saved
        if (state := self.checkpoints.load(self._blank_state)) is not None:
            if (data := state.get("data", "")) != self.data:
                raise ValueError(
                    f"the checkpoint in {self.folder} was trained on other data ({data}, now "
                    f"{self.data}): restore the corpus, or set stage.folder"
                )
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"] | {"param_groups": groups})
            self.step, self.tokens, self.seconds = state["step"], state["tokens"], state["seconds"]
            self.taken = state.get("taken", self.step)
            self.monitor.load(state["recent"])
        log = self.folder / "log.jsonl"
        if log.exists() and rank() == 0:  # drop later rows, which come again, and incomplete ones
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
            write_atomically(log, "".join(x for x in lines if _step_of(x) <= self.step))


def _step_of(line: str) -> float:
    """The step of a row of the log; infinite for an incomplete row."""
    try:
        return json.loads(line)["step"] if line.endswith("\n") else math.inf
    except (ValueError, TypeError, KeyError):
        return math.inf

"""One training loop for pretraining, continued pretraining and SFT, on one process or many.

A batch is a pure function of the step, so the step number is the whole data position, and a killed
run continues from its last checkpoint: on the same number of CPU processes bit for bit, on GPUs up
to kernels that add in no fixed order (the backward passes of attention and of the embedding). Ranks
share each batch by rows; any number of them can continue the checkpoint of any other number.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from ratplus_exp.cost import Shape, attended_keys, peak_tflops
from ratplus_exp.distributed import rank, sum_over_ranks, world_size
from ratplus_exp.memory import gate_statistics
from ratplus_exp.methods import Engine, Method
from ratplus_exp.methods.dilated import PREFIXES, Dilated, DilatedAfterPrefix
from ratplus_exp.training.batches import BatchOf, batches
from ratplus_exp.training.checkpoint import Checkpoints
from ratplus_exp.training.divergence import LossMonitor
from ratplus_exp.training.log import Log
from ratplus_exp.training.optimizer import adamw, set_learning_rates
from ratplus_exp.training.parallel import Objective, distribute, prepare_layers, reduce_gradients
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
        alternate: each batch gives one step, alternately sparse and dense, instead of both: half
            the steps for the same batches.
        sparse_only_steps: the first batches, without a dense step. In a trained attention model
            with a new memory, gates stay near zero under dense steps, since the model can retrieve
            without the memory; sparse-only steps increase them.
        prefix: the first part of a context attends densely in a sparse step, too, as in the prefill
            of a method that selects when decoding: a "random" number of eighths of the context, or
            the "prompt", up to the first label of this process's rows.
        log: called with each logged row, on rank 0.
        device: None: where the model is.
        data: names the data; a checkpoint with another name is refused.
        workers: processes that make batches (`batches`).
    """

    def __init__(
        self,
        model: nn.Module,
        batch: BatchOf,
        schedule: Schedule,
        settings: TrainSettings,
        folder: Path,
        sparse: Dilated | None = None,
        alternate: bool = False,
        sparse_only_steps: int = 0,
        prefix: str | None = None,
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
        self.batch, self.workers = batch, workers
        self.schedule, self.settings = schedule, settings
        self.folder, self.data = folder, data
        self.sparse, self.alternate = sparse, alternate
        self.sparse_only_steps, self.prefix = sparse_only_steps, prefix
        self.device = device or next(model.parameters()).device
        self.shape = Shape.of(model)
        peak = settings.peak_tflops or peak_tflops(self.device)
        if settings.compile or settings.activation_checkpointing:
            prepare_layers(model, settings.compile, settings.activation_checkpointing)
        objective = Objective(model, settings.precision == "bf16")
        self.objective = distribute(objective, settings.parallel, self.device)
        self.optimizer = adamw(model, settings)
        self.step, self.taken, self.tokens = 0, 0, 0
        self._begun: float | None = None  # the end of the first step, less earlier runs' seconds
        self._signalled = self._stopping = False
        folder.mkdir(parents=True, exist_ok=True)
        self.log = Log(folder / "log.jsonl", log, peak and peak * 1e12 * world_size())
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
        self.log.begin_row()
        stream = batches(self.batch, self._steps(total), self.workers)
        with self._handle_signals(), bar, closing(stream):
            for step, batch in stream:
                before, self.step = self.step, step
                micro_batches = self._share(batch)
                scale = set_learning_rates(self.optimizer, settings, step, total)
                for name, value in self._train_step(micro_batches).items():
                    self.log.values[name].append(value)
                tokens = sum(ids.numel() for ids, _ in micro_batches) * world_size()
                self.log.tokens += tokens
                self.tokens += tokens
                self.step, self.taken = step + 1, self.taken + 1
                self._begun = self._begun or time.perf_counter() - self.log.seconds
                bar.update(self.step - before)
                last = self.step == total or self._stopping
                if last or self._passed(before, settings.log_every):
                    row = self.log.end_row(
                        step=self.step,
                        tokens=self.tokens,
                        length=self.schedule.length_at(step),
                        lr=settings.lr * scale,
                    )
                    few = micro_batches[0][0][:4]
                    with torch.compiler.set_stance("force_eager"):  # hooks would recompile layers
                        row |= gate_statistics(self.model, few, forward=self.objective)
                    if rank() == 0:
                        self.log.write(row)
                    bar.set_postfix({x: row[x] for x in ("loss", "accuracy") if x in row})
                    if last or self._passed(before, settings.checkpoint_every):
                        self.checkpoints.save(self._state())
                if self._stopping:
                    break
        # Also after a signal to the last step: in a sweep, the next training would begin.
        if sum_over_ranks([self._signalled], self.device)[0]:
            raise Stopped(
                f"stopped by a signal after step {self.step}; the checkpoint is "
                f"{self.checkpoints.kept()[-1]}: run the same command to resume"
            )

    def _steps(self, total: int) -> Iterator[tuple[int, int, int]]:
        """The steps from the last checkpoint on, as (step, rows, length); settings.seconds leaves
        out some."""
        step = self.step
        while step < total:
            length = self.schedule.length_at(step)
            yield step, self.schedule.rows(length), length
            step += 1
            if self.settings.seconds and self._begun:
                share = (time.perf_counter() - self._begun) / self.settings.seconds
                step = max(step, min(int(total * share), total - 1))

    def _passed(self, before: int, every: int) -> bool:
        return self.step // every > before // every

    def _share(self, batch: Batch) -> list[tuple[Tensor, Tensor]]:
        """This rank's rows of a batch, in micro-batches."""
        share = len(batch[0]) // world_size()
        rows = slice(rank() * share, (rank() + 1) * share)
        ids, labels = (torch.from_numpy(x[rows]).to(self.device) for x in batch)
        size = self.settings.rows_per_pass or share
        return list(zip(ids.split(size), labels.split(size), strict=True))

    def _train_step(self, micro_batches: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
        row: dict[str, float] = {}
        for pattern in self._patterns(micro_batches):
            engine = Engine(pattern, counted=frozenset()) if pattern else None
            prefix = "sparse_" if pattern else ""
            result = self._optimizer_step(micro_batches, engine)
            row |= {prefix + name: value for name, value in result.items()}
        return row

    def _patterns(self, micro_batches: list[tuple[Tensor, Tensor]]) -> list[Method | None]:
        """A pattern, or None for dense attention, for each optimizer step on this batch."""
        if (sparse := self.sparse) is None:
            return [None]
        if self.prefix:
            prefix = self._prefix(micro_batches)
            sparse = DilatedAfterPrefix(**asdict(sparse), prefix=prefix)
        if self.step < self.sparse_only_steps:
            return [sparse]
        if self.alternate:
            return [None if self.taken % 2 else sparse]
        return [sparse, None]

    def _prefix(self, micro_batches: list[tuple[Tensor, Tensor]]) -> int:
        """How many of the first queries attend densely in this batch's sparse step."""
        if self.prefix == "prompt":
            labelled = torch.cat([labels for _, labels in micro_batches]) >= 0
            return int(labelled.any(dim=0).int().argmax())
        length = micro_batches[0][0].shape[1]
        return length * int(np.random.default_rng(self.step).integers(PREFIXES)) // PREFIXES

    def _optimizer_step(
        self, micro_batches: list[tuple[Tensor, Tensor]], engine: Engine | None
    ) -> dict[str, float]:
        """One optimizer step on the mean loss over all labelled tokens of all ranks."""
        labelled, signals = sum_over_ranks(
            [sum(int((labels >= 0).sum()) for _, labels in micro_batches), self._signalled],
            self.device,
        )
        self._stopping = signals > 0
        labelled = max(labelled, 1)  # a small batch of documents may have no label
        loss_sum = correct = 0.0
        self.model.train()
        for i, (ids, labels) in enumerate(micro_batches, start=1):
            reduce_gradients(self.objective, now=i == len(micro_batches))
            loss, hits = self.objective(ids, labels, engine)
            (loss * world_size() / labelled).backward()  # DDP and FSDP average over ranks
            loss_sum, correct = loss_sum + loss.item(), correct + float(hits)
            keys = attended_keys(engine.method if engine else None, ids.shape[1])
            self.log.flops += ids.numel() * world_size() * self.shape.training_flops(keys)
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

    @contextmanager
    def _handle_signals(self) -> Iterator[None]:
        """SIGTERM (preemption) and SIGUSR1 (SLURM's --signal) end the run after a step."""

        def stop(*_: Any) -> None:
            self._signalled = True

        before = {x: signal.signal(x, stop) for x in (signal.SIGTERM, signal.SIGUSR1)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "taken": self.taken,  # batches: fewer than steps where settings.seconds leaves out some
            "tokens": self.tokens,
            "seconds": self.log.seconds,
            "data": self.data,
            "recent": self.monitor.recent,
        }

    def _blank_state(self) -> dict[str, Any]:
        """A state of the right shapes; the step that makes the optimizer's moments changes the
        weights, which are loaded next."""
        for group in self.optimizer.param_groups:
            for p in group["params"]:
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
            self.step, self.tokens = state["step"], state["tokens"]
            self.taken, self.log.seconds = state.get("taken", self.step), state["seconds"]
            self.monitor.recent = state["recent"]
        if rank() == 0:
            self.log.drop_after(self.step)

"""One training loop for pretraining, continued pretraining and SFT, on one process or many.

A batch is a pure function of the step, so the step number is all the data position there is, and a
run that was killed goes on from its last checkpoint: on as many CPU processes bit for bit, on GPUs
up to what their kernels leave to chance (the backward pass of attention and of the embedding adds
in no fixed order). Many processes share each batch by rows; the checkpoint of any number of them
can be continued by any other number.
"""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from ratplus_exp.cost import Shape, attended_keys, peak_tflops
from ratplus_exp.memory import gate_statistics
from ratplus_exp.methods import Engine, Method, Uncounted
from ratplus_exp.store.files import naming, write_atomically
from ratplus_exp.training import parallel
from ratplus_exp.training.batches import Batches, BatchOf
from ratplus_exp.training.checkpoint import Checkpoints
from ratplus_exp.training.divergence import Watch
from ratplus_exp.training.optimizer import adamw, set_learning_rates
from ratplus_exp.training.settings import Batch, Schedule, TrainSettings


class Stopped(ValueError):
    """A signal ended the run at a step's end, after a checkpoint."""


class Trainer:
    """Trains a causal model on batch(step, rows, length).

    Args:
        model: a RatPlusForCausalLM, or any model with `.model`, `.lm_head` and, where there are
            sparse steps, an `engine` keyword.
        batch: the data, a pure function of (step, rows, length); the same on every process.
        workers: processes that make batches ahead (`Batches.since`).
        folder: where log.jsonl and the checkpoints go; a checkpoint found there is resumed.
        sparse: a fixed pattern for P2's joint training: every batch takes one optimizer step
            through attention with this pattern and one through dense attention, and one scheduler
            step. None for dense steps alone.
        sparse_only_steps: for so many steps at first, only the step through `sparse` is taken. A
            trained attention model that gets a memory keeps its gates shut while dense steps
            go on, since it can already retrieve without; sparse steps alone open them.
        log: called with each logged row, on rank 0.
        device: where to train; the model is moved there. None: where the model is.
        data: names the data; a checkpoint that was made with other data is refused.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: BatchOf,
        schedule: Schedule,
        settings: TrainSettings,
        folder: Path,
        sparse: Method | None = None,
        sparse_only_steps: int = 0,
        log: Callable[[dict[str, Any]], None] = lambda row: None,
        device: torch.device | None = None,
        data: str = "",
        workers: int = 0,
    ) -> None:
        schedule.check(parallel.world_size())
        assert settings.precision != "auto", "precision=auto is resolved before"
        self.model: Any = model
        self.batches, self.workers = Batches(batch, schedule), workers
        self.schedule, self.settings = schedule, settings
        self.folder, self.log, self.data = folder, log, data
        self.sparse, self.sparse_only_steps = sparse, sparse_only_steps
        self.device = device or next(model.parameters()).device
        self.shape = Shape.of(model)
        self.peak = settings.peak_tflops or peak_tflops(self.device)
        if settings.compile or settings.activation_checkpointing:
            parallel.prepare_layers(model, settings.compile, settings.activation_checkpointing)
        objective = parallel.Objective(model, settings.precision == "bf16")
        self.objective = parallel.spread(objective, settings.parallel, self.device)
        self.optimizer = adamw(model, settings)
        self.step = 0
        self.tokens = 0
        self.seconds = 0.0
        self._flops = 0.0  # of the steps since the last logged row
        self._signalled = self._stopping = False
        folder.mkdir(parents=True, exist_ok=True)
        self.checkpoints = Checkpoints(folder)
        self.watch = Watch(settings.spike, self.checkpoints)
        self._load()

    def run(self, description: str = "training") -> None:
        """Train to the end of the schedule, from wherever the checkpoint left off.

        Raises:
            LossDiverged: the loss is not finite, or a spike by settings.spike.
            Stopped: SIGTERM or SIGUSR1 came; the checkpoint holds the steps up to the signal.
        """
        total, settings, first = self.schedule.steps, self.settings, parallel.rank() == 0
        bar = tqdm(
            total=total,
            initial=self.step,
            desc=description,
            unit="step",
            mininterval=1.0,
            disable=not first,
        )
        sums: dict[str, list[float]] = {}
        started, window_tokens = time.perf_counter(), 0
        batches = self.batches.since(self.step, self.workers)
        with self._listening(), bar, closing(batches):
            for batch in batches:
                micro_batches = self._share(batch)
                scale = set_learning_rates(self.optimizer, settings, self.step, total)
                for name, value in self._train_step(micro_batches).items():
                    sums.setdefault(name, []).append(value)
                tokens = sum(ids.numel() for ids, _ in micro_batches) * parallel.world_size()
                self.step, self.tokens = self.step + 1, self.tokens + tokens
                window_tokens += tokens
                bar.update()
                if self.step % settings.log_every == 0 or self.step == total or self._stopping:
                    now = time.perf_counter()
                    self.seconds += now - started
                    row = {name: round(sum(x) / len(x), 5) for name, x in sums.items()}
                    row |= {
                        "step": self.step,
                        "tokens": self.tokens,
                        "length": self.schedule.length_at(self.step - 1),
                        "lr": settings.lr * scale,
                        "tokens_per_second": round(window_tokens / (now - started)),
                        "seconds": round(self.seconds, 1),
                    }
                    if self.peak:
                        peak = self.peak * 1e12 * parallel.world_size()
                        row["mfu"] = round(self._flops / (now - started) / peak, 4)
                    row |= self._gate_statistics(micro_batches[0][0][:4])
                    if first:
                        self._write_log(row)
                    bar.set_postfix(loss=row.get("loss"), accuracy=row.get("accuracy"))
                    sums, started, window_tokens, self._flops = {}, now, 0, 0.0
                    if (
                        self.step % settings.checkpoint_every == 0
                        or self.step == total
                        or self._stopping
                    ):
                        self.checkpoints.save(self._state())
                if self._stopping:
                    break
        # A signal to the last step ends the run too: in a sweep, the next training would begin.
        if parallel.total([self._signalled], self.device)[0]:
            raise Stopped(
                f"stopped by a signal after step {self.step}; the checkpoint is "
                f"{self.checkpoints.latest()}: run the same command to go on"
            )

    def _share(self, batch: Batch) -> list[tuple[Tensor, Tensor]]:
        """This process's rows of a batch, in micro-batches."""
        share = len(batch[0]) // parallel.world_size()
        mine = slice(parallel.rank() * share, (parallel.rank() + 1) * share)
        ids, labels = (torch.from_numpy(x[mine]).to(self.device) for x in batch)
        rows = self.settings.rows_per_pass or share
        return list(zip(ids.split(rows), labels.split(rows), strict=True))

    def _train_step(self, micro_batches: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
        row = {}
        if self.sparse is not None:
            engine = Engine(self.sparse, usage=Uncounted())
            sparse = self._optimizer_step(micro_batches, engine)
            row = {f"sparse_{name}": value for name, value in sparse.items()}
            if self.step < self.sparse_only_steps:
                return row
        return row | self._optimizer_step(micro_batches, None)

    def _optimizer_step(
        self, micro_batches: list[tuple[Tensor, Tensor]], engine: Engine | None
    ) -> dict[str, float]:
        """One optimizer step on the mean loss over all labelled tokens of all processes."""
        world = parallel.world_size()
        labelled, stop = parallel.total(
            [sum(int((labels >= 0).sum()) for _, labels in micro_batches), self._signalled],
            self.device,
        )
        self._stopping = stop > 0
        loss_sum = correct = 0.0
        self.model.train()
        for i, (ids, labels) in enumerate(micro_batches, start=1):
            parallel.reduce_gradients(self.objective, now=i == len(micro_batches))
            loss, hits = self._loss(ids, labels, engine)
            (loss * world / labelled).backward()  # DDP and FSDP take the mean over processes
            loss_sum, correct = loss_sum + loss.item(), correct + float(hits)
            keys = attended_keys(engine.method if engine else None, ids.shape[1])
            self._flops += ids.numel() * world * self.shape.training_flops(keys)
        loss_sum, correct = parallel.total([loss_sum, correct], self.device)
        kind = "dense" if engine is None else "sparse"
        self.watch.check("loss", loss_sum / labelled, self.step, kind)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        self.watch.check("gradient's norm", float(norm), self.step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {
            "loss": loss_sum / labelled,
            "accuracy": correct / labelled,
            "grad_norm": float(norm),
        }

    def _loss(self, ids: Tensor, labels: Tensor, engine: Engine | None) -> tuple[Tensor, Tensor]:
        """Summed cross-entropy of the labelled tokens, and how many of them are argmax-right."""
        return self.objective(ids, labels, engine)

    def _gate_statistics(self, ids: Tensor) -> dict[str, float]:
        """Of a few rows; compiled layers run eagerly here, since hooks would recompile them."""
        compiled = self.settings.compile
        with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            return gate_statistics(self.model, ids, forward=self.objective)

    @contextmanager
    def _listening(self) -> Iterator[None]:
        """SIGTERM (preemption) and SIGUSR1 (SLURM's --signal) end the run after a step."""
        if threading.current_thread() is not threading.main_thread():
            yield  # Python handles signals in the main thread alone
            return

        def stop(*_: Any) -> None:
            self._signalled = True

        before = {
            number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGUSR1)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
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
            "tokens": self.tokens,
            "seconds": self.seconds,
            "data": self.data,
            "recent": self.watch.state(),
        }

    def _blank_state(self) -> dict[str, Any]:
        """A state of the right shapes; the weights change, since they are about to be loaded."""
        for p in self.model.parameters():
            p.grad = torch.zeros_like(p)
        self.optimizer.step()  # makes the moments
        self.optimizer.zero_grad(set_to_none=True)
        return self._state()

    def _load(self) -> None:
        groups = self.optimizer.state_dict()["param_groups"]  # rates as set now, not as saved
        state = self.checkpoints.load(self._blank_state)
        if state is None:
            self._trim_log()
            return
        if (data := state.get("data", "")) != self.data:
            raise ValueError(
                f"the checkpoint in {self.folder} was trained on other data ({data}, now "
                f"{self.data}): restore the corpus, or set stage.folder"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"] | {"param_groups": groups})
        self.step, self.tokens, self.seconds = state["step"], state["tokens"], state["seconds"]
        self.watch.load(state["recent"])
        self._trim_log()

    def _trim_log(self) -> None:
        """Leave the rows up to this step: later ones will be written again, torn ones never."""
        log = self.folder / "log.jsonl"
        if log.exists() and parallel.rank() == 0:
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
            write_atomically(log, "".join(x for x in lines if _step_of(x) <= self.step))


def _step_of(line: str) -> float:
    """Of a row of the log; infinite where it was not written whole."""
    try:
        return json.loads(line)["step"] if line.endswith("\n") else math.inf
    except (ValueError, TypeError, KeyError):
        return math.inf

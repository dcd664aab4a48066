"""One training loop for pretraining, continued pretraining and SFT.

A batch is a pure function of the step, so the step number is all the data position there is, and a
run that was killed goes on bit for bit from its last checkpoint.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ratplus_exp.memory import Memory, gate_statistics
from ratplus_exp.methods import Engine, Method

Batch = tuple[np.ndarray, np.ndarray]  # token ids and next-token labels, (rows, length)


@dataclass(frozen=True)
class Schedule:
    """Context lengths over a run: (tokens of training, context length), one after the other."""

    stages: Sequence[tuple[int, int]]
    tokens_per_step: int

    @property
    def steps(self) -> int:
        return sum(self._steps(tokens) for tokens, _ in self.stages)

    def length_at(self, step: int) -> int:
        for tokens, length in self.stages:
            step -= self._steps(tokens)
            if step < 0:
                return length
        return self.stages[-1][1]

    def rows_at(self, step: int) -> int:
        return max(1, self.tokens_per_step // self.length_at(step))

    def _steps(self, tokens: int) -> int:
        return math.ceil(tokens / self.tokens_per_step)


@dataclass(frozen=True)
class TrainSettings:
    """Optimizer and precision. lr is for all parameters but the memory's, which have memory_lr."""

    lr: float = 3e-3
    memory_lr: float = 3e-3
    min_lr_ratio: float = 0.1
    warmup: float = 0.02
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    accumulate: int = 1
    precision: str = "fp32"  # or "bf16": matmuls in bfloat16, parameters and memory in fp32
    log_every: int = 20
    checkpoint_every: int = 500

    def __post_init__(self) -> None:
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(f"precision is {self.precision}: use fp32 or bf16")
        if min(self.log_every, self.checkpoint_every, self.accumulate) < 1:
            raise ValueError("log_every, checkpoint_every and accumulate must be at least 1")
        if self.checkpoint_every % self.log_every:  # a checkpoint holds no half-averaged row
            raise ValueError(
                f"checkpoint_every ({self.checkpoint_every}) must be a multiple of log_every "
                f"({self.log_every})"
            )


class LossDiverged(RuntimeError):
    """The loss is not finite; the message names the last good checkpoint."""


class Trainer:
    """Trains a causal model on batch(step, rows, length).

    Args:
        model: a RatPlusForCausalLM, or any model with `.model`, `.lm_head` and an `engine` keyword.
        batch: the data, a pure function of (step, rows, length).
        folder: where log.jsonl and checkpoint.pt go; a checkpoint found there is resumed.
        sparse: a fixed pattern for P2's joint training: every batch takes one optimizer step
            through attention with this pattern and one through dense attention, and one scheduler
            step. None for dense steps alone.
        sparse_only_steps: for so many steps at first, only the step through `sparse` is taken. A
            trained attention model that gets a memory keeps its gates shut while dense steps
            go on, since it can already retrieve without; sparse steps alone open them.
        log: called with each logged row.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Callable[[int, int, int], Batch],
        schedule: Schedule,
        settings: TrainSettings,
        folder: Path,
        sparse: Method | None = None,
        sparse_only_steps: int = 0,
        log: Callable[[dict[str, Any]], None] = lambda row: None,
    ) -> None:
        self.model: Any = model
        self.batch, self.schedule, self.settings = batch, schedule, settings
        self.folder, self.log = folder, log
        self.sparse, self.sparse_only_steps = sparse, sparse_only_steps
        self.device = next(model.parameters()).device
        self.optimizer = _optimizer(model, settings, fused=True)
        self.step = 0
        self.tokens = 0
        self.seconds = 0.0
        folder.mkdir(parents=True, exist_ok=True)
        if self.checkpoint_path.exists():
            self._load()

    @property
    def checkpoint_path(self) -> Path:
        return self.folder / "checkpoint.pt"

    def run(self, description: str = "training") -> None:
        """Train to the end of the schedule, from wherever the checkpoint left off."""
        total, settings = self.schedule.steps, self.settings
        bar = tqdm(total=total, initial=self.step, desc=description, unit="step", mininterval=1.0)
        sums: dict[str, list[float]] = {}
        started, window_tokens = time.perf_counter(), 0
        with ThreadPoolExecutor(1) as pool:
            ahead = pool.submit(self._data, self.step) if self.step < total else None
            while ahead is not None:
                micro_batches = ahead.result()
                ahead = pool.submit(self._data, self.step + 1) if self.step + 1 < total else None
                scale = self._set_learning_rates(self.step / total)
                for name, value in self._train_step(micro_batches).items():
                    sums.setdefault(name, []).append(value)
                tokens = sum(ids.numel() for ids, _ in micro_batches)
                self.step, self.tokens = self.step + 1, self.tokens + tokens
                window_tokens += tokens
                bar.update()
                if self.step % settings.log_every == 0 or self.step == total:
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
                    row |= gate_statistics(self.model, micro_batches[0][0][:4])
                    self._write_log(row)
                    bar.set_postfix(loss=row.get("loss"), accuracy=row.get("accuracy"))
                    sums, started, window_tokens = {}, now, 0
                    if self.step % settings.checkpoint_every == 0 or self.step == total:
                        self._save()
        bar.close()

    def _data(self, step: int) -> list[tuple[Tensor, Tensor]]:
        rows, length = self.schedule.rows_at(step), self.schedule.length_at(step)
        ids, labels = (torch.from_numpy(x).to(self.device) for x in self.batch(step, rows, length))
        parts = self.settings.accumulate
        return list(zip(ids.chunk(parts), labels.chunk(parts), strict=True))

    def _train_step(self, micro_batches: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
        row = {}
        if self.sparse is not None:
            sparse = self._optimizer_step(micro_batches, Engine(self.sparse))
            row = {f"sparse_{name}": value for name, value in sparse.items()}
            if self.step < self.sparse_only_steps:
                return row
        return row | self._optimizer_step(micro_batches, None)

    def _optimizer_step(
        self, micro_batches: list[tuple[Tensor, Tensor]], engine: Engine | None
    ) -> dict[str, float]:
        """One optimizer step on the mean loss over all labelled tokens of all micro-batches."""
        labelled = sum(int((labels >= 0).sum()) for _, labels in micro_batches)
        loss_sum = correct = 0.0
        self.model.train()
        for ids, labels in micro_batches:
            loss, hits = self._loss(ids, labels, engine)
            (loss / labelled).backward()
            loss_sum, correct = loss_sum + loss.item(), correct + hits
        if not math.isfinite(loss_sum):
            raise LossDiverged(
                f"the loss is {loss_sum} at step {self.step}; the last good checkpoint is "
                f"{self.checkpoint_path}: lower the learning rate and run again"
            )
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {
            "loss": loss_sum / labelled,
            "accuracy": correct / labelled,
            "grad_norm": float(norm),
        }

    def _loss(self, ids: Tensor, labels: Tensor, engine: Engine | None) -> tuple[Tensor, float]:
        """Summed cross-entropy of the labelled tokens, and how many of them are argmax-right."""
        bf16 = self.settings.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            hidden = self.model.model(ids, use_cache=False, engine=engine).last_hidden_state
            wanted = labels >= 0
            logits = self.model.lm_head(hidden[wanted]).float()
        labels = labels[wanted]
        return F.cross_entropy(logits, labels, reduction="sum"), float(
            (logits.detach().argmax(-1) == labels).sum()
        )

    def _set_learning_rates(self, progress: float) -> float:
        """Linear warmup, then a cosine to min_lr_ratio; returns the factor on the peak rates."""
        warmup, floor = self.settings.warmup, self.settings.min_lr_ratio
        if progress < warmup:
            scale = (progress * self.schedule.steps + 1) / max(1, warmup * self.schedule.steps)
        else:
            turn = math.cos(math.pi * (progress - warmup) / (1 - warmup))
            scale = floor + (1 - floor) * 0.5 * (1 + turn)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * min(scale, 1.0)
        return min(scale, 1.0)

    def _write_log(self, row: dict[str, Any]) -> None:
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.log(row)

    def _save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
        }
        partial = self.checkpoint_path.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, self.checkpoint_path)

    def _load(self) -> None:
        state = torch.load(self.checkpoint_path, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        groups = self.optimizer.state_dict()["param_groups"]  # rates as set now, not as saved
        self.optimizer.load_state_dict(state["optimizer"] | {"param_groups": groups})
        self.step, self.tokens, self.seconds = state["step"], state["tokens"], state["seconds"]
        log = self.folder / "log.jsonl"
        if log.exists():  # rows written after the checkpoint will be written again
            lines = log.read_text().splitlines(keepends=True)
            whole = [line for line in lines if line.endswith("\n")]
            log.write_text("".join(x for x in whole if json.loads(x)["step"] <= self.step))


def _optimizer(model: nn.Module, settings: TrainSettings, fused: bool) -> torch.optim.AdamW:
    """AdamW over three groups: the memory, and the rest with and without weight decay."""
    memory = {id(p) for m in model.modules() if isinstance(m, Memory) for p in m.parameters()}
    parameters = [p for p in model.parameters() if p.requires_grad]
    rest = [p for p in parameters if id(p) not in memory]
    groups = [
        ([p for p in rest if p.ndim >= 2], settings.lr, settings.weight_decay),
        ([p for p in rest if p.ndim < 2], settings.lr, 0.0),
        ([p for p in parameters if id(p) in memory], settings.memory_lr, 0.0),
    ]
    return torch.optim.AdamW(
        [
            {"params": params, "lr": lr, "peak_lr": lr, "weight_decay": decay}
            for params, lr, decay in groups
            if params
        ],
        betas=settings.betas,
        fused=fused,
    )

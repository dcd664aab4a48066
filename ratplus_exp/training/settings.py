"""What a training is told: its context lengths, its optimizer, and how it is executed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

Kind = Literal["fsdp", "ddp"]
CHOICES = {
    "precision": ("auto", "fp32", "bf16"),
    "decay": ("matrices", "all"),
    "parallel": get_args(Kind),
}
BOUNDS: dict[str, tuple[Callable[[float], bool], str]] = {
    **dict.fromkeys(
        ("lr", "memory_lr", "weight_decay"),
        (lambda x: 0 <= x < math.inf, "0 or a positive number"),
    ),
    "min_lr_ratio": (lambda x: 0 <= x <= 1, "a share from 0 to 1"),
    **dict.fromkeys(("warmup", "betas"), (lambda x: 0 <= x < 1, "numbers from 0 to less than 1")),
    **dict.fromkeys(("clip", "peak_tflops"), (lambda x: x > 0, "a positive number")),
    **dict.fromkeys(
        ("rows_per_pass", "log_every", "checkpoint_every"), (lambda x: x >= 1, "at least 1")
    ),
    "spike": (lambda x: x > 1, "more than 1, for instance 2, or null"),
}
Batch = tuple[np.ndarray, np.ndarray]  # token ids and next-token labels, (rows, length)


@dataclass(frozen=True)
class Schedule:
    """Context lengths over a run: (tokens of training, context length), one after the other."""

    stages: Sequence[tuple[int, int]]
    tokens_per_step: int

    def __post_init__(self) -> None:
        numbers = [self.tokens_per_step, *(number for stage in self.stages for number in stage)]
        pairs = self.stages and all(len(stage) == 2 for stage in self.stages)
        if not pairs or not all(type(number) is int and number > 0 for number in numbers):
            raise ValueError(
                f"the schedule is {list(self.stages)} in steps of {self.tokens_per_step} tokens: "
                "use whole numbers from 1 on, [[tokens, length], …]"
            )

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

    def check(self, processes: int) -> None:
        """ValueError where a batch's rows can't be shared out evenly."""
        for _, length in self.stages:
            rows = max(1, self.tokens_per_step // length)
            if rows % processes:
                raise ValueError(
                    f"a batch of {rows} rows of {length} tokens cannot be shared by {processes} "
                    "processes: change tokens_per_step or the number of processes"
                )

    def _steps(self, tokens: int) -> int:
        return math.ceil(tokens / self.tokens_per_step)


@dataclass(frozen=True)
class TrainSettings:
    """Optimizer and execution. lr is for all parameters but the memory's, which have memory_lr.

    rows_per_pass: rows that a process takes through the model at a time; its gradients are added up
        over its share of a batch, whatever the number of processes. None: the whole share at once.
    decay: what decays, the "matrices" outside the memory or "all" parameters, as in P2.
    precision: "fp32", or "bf16": matmuls in bfloat16, weights and the memory's scan in fp32; or
        "auto", which `precision.fastest` resolves before there is a Trainer.
    spike: stop where a loss exceeds the mean of the last 100 this many times; None: never.
    activation_checkpointing: keep only the input of each layer and compute the rest again.
    compile: torch.compile each decoder layer.
    parallel: how many processes share the work: "fsdp" shards the weights, "ddp" copies them.
    peak_tflops: of one GPU, for the MFU; None: of the GPU at hand, where it is known.
    """

    lr: float = 3e-3
    memory_lr: float = 3e-3
    min_lr_ratio: float = 0.1
    warmup: float = 0.02
    weight_decay: float = 0.1
    decay: str = "matrices"
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    rows_per_pass: int | None = None
    precision: str = "fp32"
    spike: float | None = None
    activation_checkpointing: bool = False
    compile: bool = False
    parallel: Kind = "fsdp"
    peak_tflops: float | None = None
    log_every: int = 20
    checkpoint_every: int = 500

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if (value := getattr(self, name)) not in choices:
                raise ValueError(f"{name} is {value}: use one of {', '.join(choices)}")
        for name, (allowed, what) in BOUNDS.items():
            values = getattr(self, name)
            for value in values if isinstance(values, tuple) else (values,):
                if value is not None and not allowed(value):  # nothing holds of NaN
                    raise ValueError(f"{name} is {value}: use {what}")
        if len(self.betas) != 2:
            raise ValueError(f"betas is {self.betas}: use two numbers")
        if self.checkpoint_every % self.log_every:  # a checkpoint holds no half-averaged row
            raise ValueError(
                f"checkpoint_every ({self.checkpoint_every}) must be a multiple of log_every "
                f"({self.log_every})"
            )

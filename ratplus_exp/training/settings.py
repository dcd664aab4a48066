"""Settings of a training: context lengths, optimizer, execution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from ratplus_exp.settings import OF_LIST, Amount, Below1, Positive, Rate, Settings, Share

Kind = Literal["fsdp", "ddp"]
Precision = Literal["auto", "fp32", "bf16"]
Batch = tuple[np.ndarray, np.ndarray]  # token ids and next-token labels, (rows, length)
IGNORE = -100  # the label of tokens that are not in the loss


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

    def rows(self, length: int) -> int:
        """Rows of a batch at this context length."""
        return self.tokens_per_step // length

    def check(self, processes: int) -> None:
        """ValueError if a batch has no row, or the processes can't share its rows evenly."""
        for _, length in self.stages:
            if not (rows := self.rows(length)):
                raise ValueError(
                    f"a batch of stage.tokens_per_step={self.tokens_per_step} tokens has no row of "
                    f"{length}: raise it, or lower the lengths of stage.schedule"
                )
            if rows % processes:
                raise ValueError(
                    f"a batch of {rows} rows of {length} tokens cannot be shared by {processes} "
                    "processes: change tokens_per_step or the number of processes"
                )

    def _steps(self, tokens: int) -> int:
        return math.ceil(tokens / self.tokens_per_step)


@dataclass(frozen=True)
class TrainSettings(Settings):
    """Optimizer and execution; conf/stage/common/training.yaml has the defaults.

    lr: of all parameters but the memory's, which have memory_lr.
    rows_per_pass: rows of a process in one forward pass; gradients accumulate over its share of a
        batch. None: the whole share at once.
    decay: which weights decay, the "matrices" outside the memory or "all" parameters, as in P2.
    precision: "fp32", or "bf16": matmuls in bfloat16, weights and the memory's scan in fp32; or
        "auto", which `precision.fastest` resolves before there is a Trainer.
    seconds: of training at most, after the first step: steps of the schedule are skipped evenly to
        reach its end in time, so it may be far longer. On one process. None: all steps.
    spike: stop where a loss exceeds the mean of the last 100 this many times; None: never.
    activation_checkpointing: keep only the input of each layer and recompute the rest.
    compile: torch.compile each decoder layer.
    parallel: of several processes, "fsdp" shards the weights, "ddp" copies them.
    peak_tflops: of one GPU, for the MFU; None: of the GPU in use, if it is a known one.
    """

    lr: Rate
    memory_lr: Rate
    min_lr_ratio: Share
    warmup: Below1
    weight_decay: Rate
    decay: Literal["matrices", "all"]
    betas: Annotated[tuple[Below1, Below1], OF_LIST]
    clip: Amount
    rows_per_pass: Positive | None
    precision: Precision
    seconds: Amount | None
    spike: Annotated[float, Field(gt=1, le=1e9)] | None
    activation_checkpointing: bool
    compile: bool
    parallel: Kind
    peak_tflops: Amount | None
    log_every: Positive
    checkpoint_every: Positive

    def __post_init__(self) -> None:
        if self.checkpoint_every % self.log_every:  # a checkpoint holds no half-averaged row
            raise ValueError(
                f"checkpoint_every ({self.checkpoint_every}) must be a multiple of log_every "
                f"({self.log_every})"
            )

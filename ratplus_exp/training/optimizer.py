"""AdamW with a separate learning rate for the memory, and the schedule of both rates."""

from __future__ import annotations

import math

import torch
from torch import nn

from ratplus_exp.memory import Memory
from ratplus_exp.training.settings import TrainSettings


def adamw(model: nn.Module, settings: TrainSettings) -> torch.optim.AdamW:
    """AdamW over three groups: the memory, and the matrices and vectors of the rest."""
    memory = {id(p) for m in model.modules() if isinstance(m, Memory) for p in m.parameters()}
    parameters = [p for p in model.parameters() if p.requires_grad]
    rest = [p for p in parameters if id(p) not in memory]
    others = settings.weight_decay if settings.decay == "all" else 0.0
    groups = [
        ([p for p in rest if p.ndim >= 2], settings.lr, settings.weight_decay),
        ([p for p in rest if p.ndim < 2], settings.lr, others),
        ([p for p in parameters if id(p) in memory], settings.memory_lr, others),
    ]
    return torch.optim.AdamW(
        [
            {"params": params, "lr": lr, "peak_lr": lr, "weight_decay": decay}
            for params, lr, decay in groups
            if params
        ],
        betas=settings.betas,
        fused=True,
    )


def set_learning_rates(
    optimizer: torch.optim.Optimizer, settings: TrainSettings, step: int, steps: int
) -> float:
    """Linear warmup, then a cosine to min_lr_ratio; returns the factor on the peak rates."""
    warmup, floor, progress = settings.warmup, settings.min_lr_ratio, step / steps
    if progress < warmup:
        scale = min(1.0, (progress * steps + 1) / max(1, warmup * steps))
    else:
        cosine = math.cos(math.pi * (progress - warmup) / (1 - warmup))
        scale = min(1.0, floor + (1 - floor) * 0.5 * (1 + cosine))
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * scale
    return scale

"""precision=auto: the type that the device multiplies fastest."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F

Type = Literal["fp32", "bf16"]
MOST = 1024  # inputs and outputs that are measured
FLOPS = 1e8  # of a measured product, forward: milliseconds, and without bf16 instructions tenths
GAIN = 1.1  # bf16 must be so many times faster, since it rounds


def fastest(
    device: torch.device,
    inputs: int,
    outputs: int,
    seconds: Callable[[Type, int, int], float] | None = None,
) -> Type:
    """bf16 where the device multiplies it clearly faster than fp32, else fp32.

    A GPU that has bf16 takes it. A CPU is measured, in a fraction of a second.

    inputs, outputs: of the model's typical linear layer. seconds: measures (type, inputs, outputs);
    None: a linear layer's forward and backward pass on this CPU.
    """
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    fp32, bf16 = ((seconds or _seconds)(kind, inputs, outputs) for kind in ("fp32", "bf16"))
    return "bf16" if fp32 > GAIN * bf16 else "fp32"


def _seconds(kind: Type, inputs: int, outputs: int) -> float:
    """The shortest of a few linear layers' passes, cast as in training."""
    inputs, outputs = min(inputs, MOST), min(outputs, MOST)
    rows = int(FLOPS / (2 * inputs * outputs))
    x = torch.ones(rows, inputs, requires_grad=True)
    weight = torch.ones(outputs, inputs, requires_grad=True)
    times = []
    for _ in range(3):
        started = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "bf16"):
            out = F.linear(x, weight)
        torch.autograd.grad(out.sum(), (x, weight))
        times.append(time.perf_counter() - started)
    return min(times)

"""precision=auto: the type that the device multiplies fastest."""

from __future__ import annotations

import time
from typing import Literal

import torch
import torch.nn.functional as F

Type = Literal["fp32", "bf16"]
LARGEST = 1024  # inputs and outputs of a measured layer
FLOPS = 1e8  # of its forward pass: milliseconds, or tenths of a second without bf16 instructions
GAIN = 1.1  # bf16 rounds, so it must be this many times faster


def fastest(device: torch.device, inputs: int, outputs: int) -> Type:
    """bf16 where the device multiplies it clearly faster than fp32, else fp32.

    A GPU with bf16 instructions uses bf16. A CPU is measured, in a fraction of a second.

    inputs, outputs: of the model's typical linear layer.
    """
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    fp32, bf16 = _seconds("fp32", inputs, outputs), _seconds("bf16", inputs, outputs)
    return "bf16" if fp32 > GAIN * bf16 else "fp32"


def _seconds(kind: Type, inputs: int, outputs: int) -> float:
    """The shortest of three forward and backward passes of a linear layer on this CPU, cast as in
    training."""
    inputs, outputs = min(inputs, LARGEST), min(outputs, LARGEST)
    x = torch.ones(int(FLOPS / (2 * inputs * outputs)), inputs, requires_grad=True)
    weight = torch.ones(outputs, inputs, requires_grad=True)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "bf16"):
            out = F.linear(x, weight)
        torch.autograd.grad(out.sum(), (x, weight))
        times.append(time.perf_counter() - start)
    return min(times)

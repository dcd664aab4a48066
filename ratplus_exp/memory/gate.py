"""The exponentially decaying memory of Eq. 1, with a gate of the input or constant rates."""

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ratplus_kernels
from ratplus_exp.memory.base import Memory


class Gate(Memory):
    """Eq. 1 of P1: k̃_t = g_t ⊙ k̃_{t-1} + (1 − g_t) ⊙ k_t, and the same for ṽ, g_t = σ(W_g x_t + b).

    One gate per channel, shared by K and V. The state is the last k̃ and ṽ, (2, B, heads, head_dim).
    """

    sees_input: ClassVar[bool] = True
    weight: nn.Parameter | None
    bias: Tensor

    def __init__(self, d_model: int, num_heads: int, head_dim: int, **settings: Any) -> None:
        super().__init__(d_model, num_heads, head_dim, **settings)
        self.state_size = 2 * num_heads * head_dim
        channels = num_heads * head_dim * (1 if self.shared_gate else 2)
        self.weight = nn.Parameter(torch.empty(channels, d_model)) if self.sees_input else None
        bias = torch.empty(channels)
        if self.learned:
            self.bias = nn.Parameter(bias)
        else:
            self.register_buffer("bias", bias)

    def gate_logits(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """W_g x + b for x (B, T, d_model): (B, T, heads, head_dim), twice the heads if the gates
        are separate; infinite (g = 1) after a row's last token, so that its state stays."""
        if self.weight is None:
            z = self.bias.expand(*x.shape[:2], -1)
        else:
            z = F.linear(x, self.weight, self.bias)
        z = z.unflatten(-1, (-1, self.head_dim))
        if lengths is None:
            return z
        padding = torch.arange(z.shape[1], device=z.device) >= lengths[:, None]
        return z.masked_fill(padding[..., None, None], torch.inf)

    def forward(
        self, x: Tensor, k: Tensor, v: Tensor, state: Tensor | None, lengths: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        z = self.gate_logits(x, lengths)
        if self.shared_gate:
            new_k, new_v, state = _recur(z, k, v, state)
        else:
            by_k, by_v = (_recur(part, k, v, state) for part in z.chunk(2, dim=2))
            new_k, new_v, state = by_k[0], by_v[1], torch.stack((by_k[2][0], by_v[2][1]))
        return new_k if "k" in self.memory_on else k, new_v if "v" in self.memory_on else v, state

    @torch.no_grad()
    def initialize(self, std: float, bias: float | tuple[float, float]) -> None:
        """Random W_g, and as bias one logit for all channels, or a pair of effective lengths in
        tokens (shortest, longest) over which the channels of every head are spread evenly in the
        logarithm. A constant gate g has effective length 1 / (1 − g), so length L is the logit
        log(L − 1). Length 1 (g = 0) has no gradient, so only fixed rates may have it.
        """
        if self.weight is not None:
            nn.init.normal_(self.weight, std=std)
        if isinstance(bias, int | float):
            self.bias.fill_(bias)
            return
        shortest, longest = bias
        if shortest > longest or shortest < 1 or (shortest == 1 and self.learned):
            least = "1 <" if self.learned else "1 <="
            raise ValueError(f"gate lengths need {least} shortest <= longest, got {bias}")
        steps = torch.linspace(math.log(shortest), math.log(longest), self.head_dim)
        self.bias.copy_(torch.log(torch.expm1(steps)).repeat(len(self.bias) // self.head_dim))

    def statistics(self, x: Tensor, real: Tensor) -> dict[str, Tensor]:
        z = self.gate_logits(x)
        return {"length": effective_length(z, real), "gate": z.sigmoid()[real].mean()}


class Ema(Gate):
    """Control: one learned rate per channel, g = σ(b), independent of the input."""

    sees_input = False


class FixedEma(Ema):
    """Control: fixed rates."""

    learned = False


def _recur(z: Tensor, k: Tensor, v: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """k̃, ṽ and the final state by one gate: a step for a single token with a state, else a scan."""
    if z.shape[1] == 1 and state is not None:
        k, v, state = ratplus_kernels.memory_step(z[:, 0], k[:, 0], v[:, 0], state)
        return k[:, None], v[:, None], state
    return ratplus_kernels.memory_scan(z, k, v, state)


@torch.no_grad()
def effective_length(z: Tensor, mask: Tensor) -> Tensor:
    """Effective length in tokens of each channel's memory, (H, D), from gate logits z (B, T, H, D).

    The memory at t weights token s by w_{t,s} = (1 − g_s) Π_{r=s+1..t} g_r, and the zero initial
    state, as token −1, by the rest. The mean lag m_t = Σ_s w_{t,s} (t − s) then follows
    m_t = g_t (m_{t-1} + 1), and 1 + m_t is the effective length, 1 / (1 − g) in the limit for a
    constant gate. The result is its mean over the positions where mask (B, T) is true.
    """
    gate = torch.sigmoid(z.float())
    # m_t = g_t m_{t-1} + g_t is the scan of Eq. 1 with input g / (1 − g), clamped to be finite.
    lag, _, _ = ratplus_kernels.memory_scan(
        z, (gate / (1 - gate).clamp_min(1e-6)), torch.zeros_like(gate)
    )
    weight = mask[..., None, None].to(lag.dtype)
    return 1 + (lag * weight).sum((0, 1)) / weight.sum()

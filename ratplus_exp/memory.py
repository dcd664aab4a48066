"""The exponentially decaying memory of Eq. 1 as a module: a gate, and the scan it drives."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels


class Memory(nn.Module):
    """Eq. 1 of P1: k̃_t = g_t ⊙ k̃_{t-1} + (1 − g_t) ⊙ k_t, and the same for ṽ, g_t = σ(W_g x_t + b).

    One gate a channel, shared by K and V. A leaf module with parameters of its own, so that
    Hugging Face's weight initialisation reaches it and an optimizer can give it its own learning
    rate: P1 trains memory parameters and the rest at two rates.

    Args:
        d_model: width of x.
        num_heads, head_dim: of the keys and values (under GQA, the KV heads).
    """

    def __init__(self, d_model: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        self.weight = nn.Parameter(torch.empty(num_heads * head_dim, d_model))
        self.bias = nn.Parameter(torch.empty(num_heads * head_dim))

    def gate_logits(self, x: Tensor) -> Tensor:
        """W_g x + b for x (B, T, d_model): (B, T, heads, head_dim)."""
        z = F.linear(x, self.weight, self.bias)
        return z.unflatten(-1, (self.num_heads, self.head_dim))

    def forward(
        self,
        x: Tensor,
        k: Tensor,
        v: Tensor,
        state: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """k̃, ṽ (B, T, heads, head_dim) and the final state (2, B, heads, head_dim) in fp32.

        x is (B, T, d_model); k (before RoPE) and v are (B, T, heads, head_dim); state is the final
        state of the tokens before, or None at the start of a sequence. Where rows have fewer than
        T real tokens, lengths (B,) says how many: the gates are shut behind them (g = 1), so the
        final state is the one at each row's last token.
        """
        z = self._gate_logits_of_rows(x, lengths)
        if z.shape[1] == 1 and state is not None:
            k, v, state = kernels.memory_step(z[:, 0], k[:, 0], v[:, 0], state)
            return k[:, None], v[:, None], state
        return kernels.memory_scan(z, k, v, state)

    def prefill(
        self,
        x: Tensor,
        k: Tensor,
        v: Tensor,
        rope: tuple[Tensor, Tensor],
        block_size: int,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, kernels.Blocks]:
        """`forward` of a whole prompt, RoPE on k̃, and its blocks, in one pass: see
        `kernels.memory_prefill`. For inference."""
        z = self._gate_logits_of_rows(x, lengths)
        return kernels.memory_prefill(z, k, v, rope, block_size)

    def _gate_logits_of_rows(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        z = self.gate_logits(x)
        if lengths is None:
            return z
        behind = torch.arange(z.shape[1], device=z.device) >= lengths[:, None]
        return z.masked_fill(behind[..., None, None], torch.inf)

    @torch.no_grad()
    def initialize(self, std: float, bias: float | tuple[float, float]) -> None:
        """Small random W_g, and a bias that sets where the gates start.

        bias is either one logit for all channels, or a pair of effective lengths in tokens
        (shortest, longest), both above 1, over which the channels of every head are spread evenly
        in the logarithm. A constant gate g has effective length 1 / (1 − g), so length L needs the
        logit log(L − 1).
        """
        nn.init.normal_(self.weight, std=std)
        if isinstance(bias, int | float):
            self.bias.fill_(bias)
            return
        shortest, longest = bias
        if not 1 < shortest <= longest:
            raise ValueError(f"gate lengths need 1 < shortest <= longest, got {bias}")
        steps = torch.linspace(math.log(shortest), math.log(longest), self.head_dim)
        self.bias.copy_(torch.log(torch.expm1(steps)).repeat(self.num_heads))


@torch.no_grad()
def effective_length(z: Tensor, mask: Tensor | None = None) -> Tensor:
    """How many tokens the memory of each channel reaches back, from gate logits z (B, T, H, D).

    The memory at t weighs token s by w_{t,s} = (1 − g_s) Π_{r=s+1..t} g_r, and what is left goes to
    the zero initial state, which counts as the token before the first. The mean lag
    m_t = Σ_s w_{t,s} (t − s) then obeys m_t = g_t (m_{t-1} + 1), and 1 + m_t is the effective
    length: in the long run 1 / (1 − g) for a constant gate. Returned is its mean over all positions
    (those where mask (B, T) is true), one number a channel: (H, D).
    """
    gate = torch.sigmoid(z.float())
    # m_t = g_t m_{t-1} + g_t: the scan of Eq. 1 with input g / (1 − g), kept finite by the clamp.
    lag, _, _ = kernels.memory_scan(z, (gate / (1 - gate).clamp_min(1e-6)), torch.zeros_like(gate))
    if mask is None:
        return 1 + lag.mean((0, 1))
    weight = mask[..., None, None].to(lag.dtype)
    return 1 + (lag * weight).sum((0, 1)) / weight.sum()


@torch.no_grad()
def gate_statistics(
    model: Any,
    ids: Tensor,
    attention_mask: Tensor | None = None,
    forward: Callable[[Tensor], Any] | None = None,
) -> dict[str, float]:
    """Mean gate and effective memory length (tokens; mean and median over channels) on ids (B, T).

    attention_mask (B, T) is zero at left padding, which does not count. forward runs the model on
    ids where it can't be called itself, as inside FSDP. Empty where the model has no memory.
    """
    # Inside the model rows start at their first token.
    real = (torch.ones_like(ids) if attention_mask is None else attention_mask.flip(1)).bool()
    lengths: list[Tensor] = []
    gates: list[Tensor] = []

    def measure(memory: Memory, args: tuple[Any, ...]) -> None:
        z = memory.gate_logits(args[0])
        lengths.append(effective_length(z, real))
        gates.append(z.sigmoid()[real].mean())

    hooks = [
        module.register_forward_pre_hook(measure)
        for module in model.modules()
        if isinstance(module, Memory)
    ]
    try:
        if hooks and forward is not None:
            forward(ids)
        elif hooks:
            model.model(ids, attention_mask, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    if not lengths:
        return {}
    return {
        "gate_mean": round(float(torch.stack(gates).mean()), 4),
        "effective_memory_length": round(float(torch.stack(lengths).mean()), 3),
        "effective_memory_length_median": round(float(torch.stack(lengths).median()), 3),
    }

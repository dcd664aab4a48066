"""The exponentially decaying memory of Eq. 1 as a module: a gate, and the scan it drives."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ratplus_kernels


class Memory(nn.Module):
    """Eq. 1 of P1: k̃_t = g_t ⊙ k̃_{t-1} + (1 − g_t) ⊙ k_t, and the same for ṽ, g_t = σ(W_g x_t + b).

    One gate a channel, shared by K and V. A leaf module with parameters of its own, so that
    Hugging Face's weight initialisation reaches it and an optimizer can give it its own learning
    rate: P1 trains memory parameters and the rest at two rates.

    Args:
        d_model: width of x.
        num_heads, head_dim: of the keys and values (under GQA, the KV heads).
        memory_on: "kv" as in the papers; for ablations "k" or "v", which leaves the other as it is.
        shared_gate: False gives K and V gates of their own: K's are the first half of the rows.

    Raises:
        ValueError: memory_on is unknown, or gates that nothing would be shared by are separate.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        head_dim: int,
        memory_on: str = "kv",
        shared_gate: bool = True,
    ) -> None:
        super().__init__()
        if memory_on not in ("kv", "k", "v"):
            raise ValueError(f"memory_on={memory_on} is unknown: use kv, k or v")
        if memory_on != "kv" and not shared_gate:
            raise ValueError(f"memory_on={memory_on} has one gate only: leave shared_gate=true")
        self.head_dim, self.memory_on, self.shared_gate = head_dim, memory_on, shared_gate
        channels = num_heads * head_dim * (1 if shared_gate else 2)
        self.weight = nn.Parameter(torch.empty(channels, d_model))
        self.bias = nn.Parameter(torch.empty(channels))

    @classmethod
    def of(cls, config: Any, head_dim: int) -> Memory | None:
        """The memory that a model's config asks for."""
        if not config.memory:
            return None
        settings = {"memory_on": config.memory_on, "shared_gate": config.shared_gate}
        return cls(config.hidden_size, config.num_key_value_heads, head_dim, **settings)

    @property
    def as_in_the_papers(self) -> bool:
        """Whether K and V both have a memory, by one gate."""
        return self.memory_on == "kv" and self.shared_gate

    def gate_logits(self, x: Tensor) -> Tensor:
        """W_g x + b for x (B, T, d_model): (B, T, heads, head_dim), with gates apart twice as many
        heads."""
        return F.linear(x, self.weight, self.bias).unflatten(-1, (-1, self.head_dim))

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
        if self.shared_gate:
            new_k, new_v, state = _remembered(z, k, v, state)
        else:
            by_k, by_v = (_remembered(part, k, v, state) for part in z.chunk(2, dim=2))
            new_k, new_v, state = by_k[0], by_v[1], torch.stack((by_k[2][0], by_v[2][1]))
        return new_k if "k" in self.memory_on else k, new_v if "v" in self.memory_on else v, state

    def prefill(
        self,
        x: Tensor,
        k: Tensor,
        v: Tensor,
        rope: tuple[Tensor, Tensor],
        block_size: int,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, ratplus_kernels.Blocks]:
        """`forward` of a whole prompt, RoPE on k̃, and its blocks, in one pass: see
        `ratplus_kernels.memory_prefill`. For inference, and the memory as in the papers."""
        assert self.as_in_the_papers
        z = self._gate_logits_of_rows(x, lengths)
        return ratplus_kernels.memory_prefill(z, k, v, rope, block_size)

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
        self.bias.copy_(torch.log(torch.expm1(steps)).repeat(len(self.bias) // self.head_dim))


def _remembered(
    z: Tensor, k: Tensor, v: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """k̃, ṽ and the final state by one gate, token by token where there is one after others."""
    if z.shape[1] == 1 and state is not None:
        k, v, state = ratplus_kernels.memory_step(z[:, 0], k[:, 0], v[:, 0], state)
        return k[:, None], v[:, None], state
    return ratplus_kernels.memory_scan(z, k, v, state)


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
    lag, _, _ = ratplus_kernels.memory_scan(
        z, (gate / (1 - gate).clamp_min(1e-6)), torch.zeros_like(gate)
    )
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

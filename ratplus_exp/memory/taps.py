"""Controls that mix a few neighbouring tokens, without decay or gate."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ratplus_exp.memory.base import Memory


class Taps(Memory):
    """A causal filter: k̃_t = Σ_i w_i ⊙ k_{t-i} over a few taps i; ṽ has separate weights.

    The state is the inputs of the last taps − 1 tokens, (1 or 2, B, taps − 1, heads, head_dim).
    """

    taps: ClassVar[int]
    per_head: ClassVar[bool]  # one weight per head, or one per channel

    def __init__(self, d_model: int, num_heads: int, head_dim: int, **settings: Any) -> None:
        super().__init__(d_model, num_heads, head_dim, **settings)
        width = 1 if self.per_head else head_dim
        self.state_size = len(self.memory_on) * (self.taps - 1) * num_heads * head_dim
        self.filter = nn.Parameter(torch.empty(len(self.memory_on), self.taps, num_heads, width))

    def forward(
        self, x: Tensor, k: Tensor, v: Tensor, state: Tensor | None, lengths: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide, length = torch.promote_types(k.dtype, torch.float32), k.shape[1]
        before = self.taps - 1
        states = {"k": k, "v": v}
        inputs = torch.stack([states[name] for name in self.memory_on]).to(wide)
        if state is None:
            state = inputs.new_zeros(*inputs.shape[:2], before, *inputs.shape[3:])
        inputs = torch.cat((state, inputs), dim=2)  # (·, B, taps − 1 + T, heads, head_dim)
        weights = self.filter.to(wide)[:, :, None, None].unbind(1)
        out = weights[0] * inputs[:, :, before:]
        for lag in range(1, self.taps):
            out = out.addcmul(weights[lag], inputs[:, :, before - lag :][:, :, :length])
        # A copy in both cases, since a view would keep all inputs alive in a cache.
        if lengths is None:
            state = inputs[:, :, length:].clone()
        else:
            last = lengths[:, None] + torch.arange(before, device=k.device)
            index = last[None, ..., None, None].expand(len(inputs), -1, -1, *inputs.shape[3:])
            state = inputs.gather(2, index)
        states |= dict(zip(self.memory_on, out.to(k.dtype), strict=True))
        return states["k"], states["v"], state

    @torch.no_grad()
    def initialize(self, std: float, bias: float | tuple[float, float]) -> None:
        """The identity."""
        self.filter.zero_()
        self.filter[:, 0] = 1

    def statistics(self, x: Tensor, real: Tensor) -> dict[str, Tensor]:
        """The effective length is the mean lag by absolute weights, plus 1."""
        size = self.filter.detach().float().abs()
        lag = torch.arange(self.taps, device=size.device)[:, None, None]
        return {"length": 1 + (size * lag).sum(1) / size.sum(1)}


class Convolution(Taps):
    """Control: FlashMoBA's short depthwise convolution of keys, without its SiLU and residual path
    (the filter starts as the identity)."""

    taps, per_head = 4, False


class Shift(Taps):
    """Control: KV shifting attention (Xu et al., 2024), token t mixed with t − 1, by α for keys and
    β for values, one pair per KV head."""

    taps, per_head = 2, True

    @torch.no_grad()
    def initialize(self, std: float, bias: float | tuple[float, float]) -> None:
        """α_1 and β_1 from U(0, 1), α_2 = 1 − α_1 and β_2 = 1 − β_1, as in the paper; the identity
        for std 0."""
        super().initialize(std, bias)
        if std:
            self.filter[:, 0].uniform_()
            self.filter[:, 1] = 1 - self.filter[:, 0]

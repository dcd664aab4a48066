"""Other ways to run Eq. 1, to be compared with `memory_scan`.

A `recur(gate, x)` solves h_t = g_t h_{t-1} + x_t along the first dimension, with gate
(T, 1, B, H, D) and x (T, 2, B, H, D) for K and V; `scan` makes the whole operation of it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Recurrence = Callable[[Tensor, Tensor], Tensor]


def naive_loop(z: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Token by token, differentiated by autograd."""
    gates, kv = torch.sigmoid(z.float()).unbind(1), torch.stack((k, v)).float().unbind(2)
    states = [torch.zeros_like(kv[0])]
    for g, x in zip(gates, kv, strict=True):
        states.append(g * states[-1] + (1 - g) * x)
    memory = torch.stack(states[1:], dim=2).to(k.dtype)
    return memory[0], memory[1]


def chunked(gate: Tensor, x: Tensor) -> Tensor:
    """All chunks step together, then the states are carried from chunk to chunk."""
    length, size = len(x), 32
    pad = (0, 0) * (x.ndim - 1) + (0, -length % size)
    product = F.pad(gate, pad, value=1.0).unflatten(0, (-1, size)).clone()
    x = F.pad(x, pad).unflatten(0, (-1, size)).clone()
    for i in range(1, size):
        x[:, i].addcmul_(product[:, i], x[:, i - 1])
        product[:, i] *= product[:, i - 1]
    for chunk in range(1, len(x)):
        x[chunk].addcmul_(product[chunk], x[chunk - 1, -1])
    return x.flatten(0, 1)[:length]


def associative(gate: Tensor, x: Tensor) -> Tensor:
    """P2's formulation: torch's associative_scan over K and V side by side, in fp32."""
    from torch._higher_order_ops.associative_scan import associative_scan

    def combine(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]):
        return left[0] * right[0], right[0] * left[1] + right[1]

    pairs = (gate.expand_as(x).contiguous(), x.contiguous())
    mode = "pointwise" if x.is_cuda else "generic"
    return associative_scan(combine, pairs, dim=0, combine_mode=mode)[1]


def scan(recur: Recurrence) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """k̃ and ṽ of z, k and v (B, T, H, D), by `recur`."""

    def run(z: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        memory = _Scan.apply(recur, z.float(), torch.stack((k, v)).float()).to(k.dtype)
        return memory[0], memory[1]

    return run


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, recur: Recurrence, z: Tensor, kv: Tensor) -> Tensor:
        z, x = z.movedim(1, 0).unsqueeze(1), kv.movedim(2, 0)  # (T, 1 or 2, B, H, D)
        states = recur(torch.sigmoid(z), torch.sigmoid(-z) * x)
        ctx.recur = recur
        ctx.save_for_backward(z, x, states)
        return states.movedim(0, 2)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[None, Tensor, Tensor]:
        z, x, states = ctx.saved_tensors
        gate, keep = torch.sigmoid(z), torch.sigmoid(-z)
        following = torch.cat((gate[1:], torch.zeros_like(gate[:1])))
        d = ctx.recur(following.flip(0), grad.movedim(2, 0).flip(0)).flip(0)
        previous = torch.cat((torch.zeros_like(states[:1]), states[:-1]))
        dz = (gate * keep * d * (previous - x)).sum(1)
        return None, dz.movedim(0, 1), (keep * d).movedim(0, 2)


def hgrn_inputs(z: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """chunk_hgrn computes h = exp(g) h + x, so 1 − g is multiplied in before: (B, T, 2 H D)."""
    x, z = torch.cat((k.flatten(2), v.flatten(2)), dim=-1), z.flatten(2).repeat(1, 1, 2)
    return torch.sigmoid(-z) * x, F.logsigmoid(z)


def chunk_hgrn(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    from fla.ops.hgrn import chunk_hgrn

    k, v = chunk_hgrn(x, g)[0].chunk(2, dim=-1)
    return k, v


def hgrn(z: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return chunk_hgrn(*hgrn_inputs(z, k, v))

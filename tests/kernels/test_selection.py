"""Selection inside a kernel: the k best in any order of bits, ties to the lowest index."""

from __future__ import annotations

import math

import pytest
import torch

from ratplus_kernels.selection import running_count, select

triton = pytest.importorskip("triton")
tl = triton.language

from ratplus_kernels.selection_triton import select_blocks as select_in_registers  # noqa: E402


@triton.jit
def _select(scores, own, out, top_k, ROWS: tl.constexpr, N: tl.constexpr):
    row, block = tl.arange(0, ROWS), tl.arange(0, N)
    place = row[:, None] * N + block[None, :]
    selected = select_in_registers(tl.load(scores + place), tl.load(own + row), top_k)
    tl.store(out + place, selected.to(tl.int8))


def by_hand(scores, own, top_k):
    out = torch.zeros(scores.shape, dtype=torch.bool)
    for row, (values, last) in enumerate(zip(scores.tolist(), own.tolist(), strict=True)):
        between = sorted(range(1, last), key=lambda n: (-values[n], n))
        forced = {0, last}
        out[row, list(forced) + between[: top_k - len(forced)]] = True
    return out


VALUES = {
    "random": lambda g: torch.randn(8, 32, generator=g),
    "far apart": lambda g: torch.randn(8, 32, generator=g).mul(30).exp() - 1,
    "few": lambda g: torch.randint(-2, 3, (8, 32), generator=g).float(),
    "zeros of both signs": lambda g: torch.randn(8, 32, generator=g).sign() * 0.0,
    "subnormal": lambda g: torch.randint(-3, 4, (8, 32), generator=g) * 2.0**-149,
    "extreme": lambda g: torch.tensor([3e38, -math.inf, 0.0, 1.0])[
        torch.randint(0, 4, (8, 32), generator=g)
    ],
}


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("top_k", [2, 3, 7, 31, 40])
def test_takes_the_best_between_the_first_and_the_own_block(triton_device, values, top_k):
    scores = values(torch.Generator().manual_seed(top_k))
    own = torch.tensor([31, 30, 17, 5, 2, 1, 0, 31], dtype=torch.int32)
    wanted = by_hand(scores, own, top_k)
    out = torch.full(scores.shape, 7, dtype=torch.int8, device=triton_device)
    _select[(1,)](scores.to(triton_device), own.to(triton_device), out, top_k, ROWS=8, N=32)
    assert torch.equal(out.cpu(), wanted.to(torch.int8))
    block, last = torch.arange(32), own[:, None]
    forced = (block == 0) | (block == last)
    assert torch.equal(select(scores, top_k, allowed=block <= last, forced=forced), wanted)


@pytest.mark.parametrize("length", [1, 512, 513, 1500])
def test_running_count(length):
    mask = torch.rand(2, 3, length, generator=torch.Generator().manual_seed(length)) < 0.3
    assert torch.equal(running_count(mask).long(), mask.cumsum(-1))

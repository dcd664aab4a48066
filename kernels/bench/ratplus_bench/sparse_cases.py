"""Cases of the sparse methods: Quest's decoding step, MoBA's prefill, SnapKV's selection."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import ratplus_kernels
from ratplus_bench import flex
from ratplus_bench.timing import Case, Form, Machine
from ratplus_exp.methods import Engine, Method, MoBA, Quest, SnapKV, Uncounted
from ratplus_kernels.snapkv import attention_mass_torch

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def cases(machine: Machine) -> Iterator[Case]:
    if machine.dry:
        yield _quest((1, 2, 1, 12, 4), 4, 2, machine)
        for correlated in (False, True):
            yield _moba((1, 2, 1, 12, 4), 4, 2, correlated, machine)
        yield from _snapkv((1, 2, 1, 12, 4), 4, 6, machine)
        return
    for length in (4096, 32_768, 131_072):
        blocks = length // 64
        for top_k in sorted({max(2, blocks // 16), 16}):
            for batch, kv_heads in ((1, 32), (1, 8), (16, 32)):
                if batch * length <= 16 * 32_768:
                    yield _quest((batch, 32, kv_heads, length, 128), 64, top_k, machine)
            for correlated in (False, True):
                yield _moba((1, 32, 32, length, 128), 64, top_k, correlated, machine)
        for kv_heads in (32, 8):
            yield from _snapkv((1, 32, kv_heads, length, 128), 64, length // 16, machine)


def _engines(method: Method) -> tuple[Engine, Engine]:
    """The engine as models have it, which takes the kernel, and the definition: a recorder makes it
    select by itself."""
    return (
        Engine(method, usage=Uncounted()),
        Engine(method, usage=Uncounted(), recorder=lambda *_: None),
    )


def _name(shape: tuple[int, ...]) -> str:
    return " ".join(f"{name}={size}" for name, size in zip("BHKTD", shape, strict=True))


def _qkv(shape: tuple[int, ...], queries: int, machine: Machine, seed: int) -> list[Tensor]:
    """q (B, H, queries, D), k and v (B, K, T, D)."""
    b, h, kv, t, d = shape
    generator = torch.Generator(machine.device).manual_seed(seed)
    return [
        torch.empty(size, dtype=machine.dtype, device=machine.device).normal_(generator=generator)
        for size in ((b, h, queries, d), (b, kv, t, d), (b, kv, t, d))
    ]


def _sdpa(backend: SDPBackend, causal: bool) -> Callable[..., Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(
                q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
            )

    return run


def _dense(causal: bool) -> list[Form]:
    """Attention over everything, by each backend: what sparsity is meant to beat."""
    return [
        Form(f"dense, SDPA {name}", _sdpa(backend, causal), gpu=True, check=False)
        for name, backend in BACKENDS.items()
    ]


def _quest(shape: tuple[int, ...], size: int, top_k: int, machine: Machine) -> Case:
    b, h, kv, t, d = shape
    blocks = t // size
    engines = _engines(Quest(size, top_k))

    def inputs(seed: int) -> tuple:
        q, k, v = _qkv(shape, 1, machine, seed)
        bounds = engines[0].block_representatives(k)
        return q, k, v, bounds, torch.full((b, 1), t - 1, device=machine.device)

    def decode(
        engine: Engine, q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, last: Tensor
    ) -> Tensor:
        return engine.decode(q, k, v, last, bounds, layer=0, all_seen=True)

    kernel, definition = (partial(decode, engine) for engine in engines)

    def gathered(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, _: Tensor) -> Tensor:
        """The usual recipe: scores, top-k, a gather of whole blocks, dense attention over them."""
        groups = q.shape[1] // k.shape[1]
        halves = torch.cat((q.clamp(max=0), q.clamp(min=0)), dim=-1)  # (B, H, 1, 2 D)
        scores = halves @ bounds.repeat_interleave(groups, 1).transpose(-1, -2)
        scores[..., 0] = scores[..., -1] = torch.inf
        best = scores.topk(top_k, dim=-1).indices.view(b, kv, groups * top_k)
        index = best[..., None, None].expand(-1, -1, -1, size, d)
        k, v = (x.unflatten(2, (-1, size)).gather(2, index).view(b, h, -1, d) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v)

    return Case(
        "Quest decode step", f"{_name(shape)} k={top_k}", inputs,
        [
            Form("kernel", kernel),
            *_dense(causal=False),
            Form("torch definition", definition),
            Form("torch gather", gathered),
            Form("torch gather, compiled", _compiled(gathered), gpu=True),
            Form(
                "FlexAttention over the selected blocks (selection not timed)",
                flex.attend, flex.decode_inputs(size, top_k), gpu=True,
            ),
        ],
        # Bounds of every block, then keys and values of each query head's own choice.
        bytes=b * (2 * blocks * kv * d + 2 * top_k * size * h * d) * machine.dtype.itemsize,
        reference=definition if t <= 4096 else None,
    )  # fmt: skip


def _moba(
    shape: tuple[int, ...], size: int, top_k: int, correlated: bool, machine: Machine
) -> Case:
    b, h, _, t, d = shape
    blocks = t // size
    engines = _engines(MoBA(size, top_k))

    def inputs(seed: int) -> tuple:
        q, k, v = _qkv(shape, t, machine, seed)
        if correlated:
            q = _slow_walk(q, seed)
        # Given, so that a form's error is not that of other means, which select other blocks.
        return q, k, v, engines[0].block_representatives(k)

    def prefill(engine: Engine, q: Tensor, k: Tensor, v: Tensor, means: Tensor | None) -> Tensor:
        return engine.prefill(q, k, v, None, layer=0, representatives=means)

    kernel, definition = (partial(prefill, engine) for engine in engines)

    gate = b * h * d * t * blocks  # its causal half

    def executed(q: Tensor, k: Tensor, v: Tensor, means: Tensor) -> float:
        tiles = flex.selected(q, means, size, top_k, unite=True)
        return float(tiles.sum()) * flex.TILE * size * 4 * d + gate

    forms = [
        Form("kernel", kernel, executed=executed),
        Form("kernel, finding the means", lambda q, k, v, _: kernel(q, k, v, None), check=False),
        *([] if correlated else _dense(causal=True)),  # to which queries make no difference
    ]
    if t <= 4096:
        forms.append(Form("torch definition", definition))
    if t <= 32_768:  # its mask takes H · T² / block_size bytes
        forms.append(
            Form(
                "FlexAttention over tiles' unions (selection not timed)",
                flex.attend,
                flex.prefill_inputs(size, top_k),
                gpu=True,
                executed=executed,
            )
        )
    seen = sum(min(n + 1, top_k) - 0.5 for n in range(blocks)) * size * size  # pairs a head
    return Case(
        "MoBA prefill, correlated queries" if correlated else "MoBA prefill, random queries",
        f"{_name(shape)} k={top_k}", inputs, forms,
        bytes=4 * b * h * t * d * machine.dtype.itemsize,
        flops=b * h * d * 4 * seen + gate,
        reference=definition if t <= 4096 else None,
    )  # fmt: skip


def _slow_walk(noise: Tensor, seed: int) -> Tensor:
    """Queries that change slowly from token to token, as those of a real prompt do.

    q_t = g q_{t-1} + √(1 − g²) noise_t with g = 0.99, from a first token of the same variance: a
    query correlates by 0.5 with that 69 tokens before. Random queries are the worst case of a
    kernel that computes the union of its tile's choices.
    """
    b, h, _, d = noise.shape
    gate, x = 0.99, noise.transpose(1, 2)
    scale = math.sqrt((1 + gate) / (1 - gate))  # Eq. 1 weighs its input by 1 − g
    generator = torch.Generator(noise.device).manual_seed(seed + 1_000_003)
    start = torch.randn(2, b, h, d, device=noise.device, generator=generator) / scale
    z = torch.full_like(x, math.log(gate / (1 - gate)))
    return (ratplus_kernels.memory_scan(z, x, x, start)[0] * scale).transpose(1, 2).contiguous()


def _snapkv(shape: tuple[int, ...], window: int, kept: int, machine: Machine) -> Iterator[Case]:
    b, h, kv, t, d = shape
    kept = max(kept, window)
    engine, _ = _engines(SnapKV(top_k=kept, window=window))
    name = f"{_name(shape)} window={window} kept={kept}"
    itemsize = machine.dtype.itemsize
    keys = b * kv * t * d * itemsize
    rows = 4 * b * kv * kept * d * itemsize  # two tensors, read and written

    def inputs(seed: int) -> tuple:
        q, k, v = _qkv(shape, window, machine, seed)
        return q, k, v, flex.window_lse(q, k)

    def recipe(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> tuple:
        """As it is usually written: a matrix of probabilities, top-k, two gathers."""
        k_all = k.repeat_interleave(h // kv, 1)
        logits = q @ k_all.transpose(-1, -2) / math.sqrt(d)
        token = torch.arange(t, device=q.device)
        logits = logits.masked_fill(token > token[-window:, None], -torch.inf)
        scores = logits.softmax(-1, dtype=torch.float32).sum(2).view(b, kv, -1, t).sum(2)
        scores = F.avg_pool1d(scores[..., :-window], 5, stride=1, padding=2)
        best = scores.topk(kept - window, dim=-1).indices.sort(-1).values
        best = torch.cat((best, token[-window:].expand(b, kv, -1)), dim=-1)
        index = best[..., None].expand(-1, -1, -1, d)
        return k.gather(2, index), v.gather(2, index)

    def mass(q: Tensor, k: Tensor, v: Tensor, lse: Tensor) -> Tensor:
        return ratplus_kernels.attention_mass(q, k)

    def mass_with_lse(q: Tensor, k: Tensor, v: Tensor, lse: Tensor) -> Tensor:
        return ratplus_kernels.attention_mass(q, k, lse)

    def definition(q: Tensor, k: Tensor, v: Tensor, lse: Tensor) -> Tensor:
        return attention_mass_torch(q, k)

    exact = definition if t <= 32_768 else None
    for suite, form in (
        ("SnapKV scores, with the prefill's LSE", mass_with_lse),
        ("SnapKV scores, without", mass),
    ):
        forms = [Form("kernel", form), Form("torch definition", definition)]
        yield Case(suite, name, inputs, forms, bytes=keys, reference=exact)

    def choice(seed: int) -> tuple:
        _, k, v = _qkv(shape, window, machine, seed)
        generator = torch.Generator(machine.device).manual_seed(seed)
        scores = torch.rand(b, kv, t, device=machine.device, generator=generator)
        return k, v, scores.topk(kept, dim=-1).indices.sort(-1).values

    def gather_torch(k: Tensor, v: Tensor, best: Tensor) -> tuple:
        index = best[..., None].expand(-1, -1, -1, d)
        return k.gather(2, index), v.gather(2, index)

    yield Case(
        "SnapKV gather", name, choice,
        [Form("kernel", ratplus_kernels.gather_tokens), Form("torch", gather_torch)],
        bytes=rows, reference=gather_torch,
    )  # fmt: skip

    def kernel(q: Tensor, k: Tensor, v: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        return ratplus_kernels.gather_tokens(k, v, engine.keep(q, k, v, layer=0)[0])

    yield Case(
        "SnapKV selection, all of it", name, inputs,
        [
            Form("kernel", kernel),
            Form("torch recipe", recipe),
            Form("torch recipe, compiled", _compiled(recipe), gpu=True),
        ],
        bytes=keys + rows,
    )  # fmt: skip


@cache
def _compiled(run: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(run, dynamic=False)

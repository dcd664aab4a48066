"""Cases of the sparse methods, run as models run them, by the engine of ratplus_exp: Quest's
decoding step, MoBA's prefill, SnapKV's selection."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from ratplus_bench.timing import Case, Form, Machine
from ratplus_exp.methods import Engine, Method, MoBA, Quest, SnapKV, States, Step
from ratplus_kernels import attention_mass, gather_tokens, memory_scan
from ratplus_kernels.dispatch import definitions

Shape = tuple[int, int, int, int, int]  # B, H, K, T, D
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
}
in_torch = definitions()
TILE = 128  # queries that FlexAttention handles together


def cases(machine: Machine) -> Iterator[Case]:
    if machine.dry:
        tiny = _shape(12, machine)
        yield quest(tiny, 4, 2, machine)
        for correlated in (False, True):
            yield moba(tiny, 4, 2, correlated, machine)
        yield from snapkv(tiny, 4, 6, machine)
        return
    for length in (4096, 32_768, 131_072):
        for top_k in sorted({length // 1024, 16}):
            for batch, kv_heads in ((1, 32), (1, 8), (16, 32)):
                if batch * length <= 16 * 32_768:
                    yield quest((batch, 32, kv_heads, length, 128), 64, top_k, machine)
            for correlated in (False, True):
                yield moba(_shape(length, machine), 64, top_k, correlated, machine)
        for kv_heads in (32, 8):
            yield from snapkv((1, 32, kv_heads, length, 128), 64, length // 16, machine)


def plans(machine: Machine) -> Iterator[Case]:
    """The plans of Quest's step and of MoBA's prefill."""
    from ratplus_kernels.moba_prefill_triton import Plan, moba_prefill_triton
    from ratplus_kernels.quest_decode_triton import PLAN, quest_decode_triton

    cuts = [PLAN._replace(programs=programs) for programs in (512, 2048)]
    cuts += [PLAN._replace(stages=3), PLAN._replace(tile=128, warps=8), PLAN._replace(scored=64)]
    tiles = [Plan(64, 4, 1), Plan(64, 4, 2), Plan(128, 8, 1), Plan(128, 8, 2)]
    # Partial outputs that may stay in the L2 cache, at the cost of more launches.
    tiles += [Plan(64, 4, 3, room=mebibytes << 20) for mebibytes in (32, 128)]
    size = 4 if machine.dry else 64
    steps = [(4096, 4), (4096, 16), (32_768, 32), (131_072, 128)]
    prefills = [(32_768, 32), (131_072, 16)]
    if machine.dry:
        steps = prefills = [(12, 2)]
    for length, top_k in steps:
        case = quest(_shape(length, machine), size, top_k, machine)
        yield case.with_plans(partial(quest_decode_triton, block_size=size, top_k=top_k), cuts)
    for length, top_k in prefills:
        case = moba(_shape(length, machine), size, top_k, True, machine)
        yield case.with_plans(partial(moba_prefill_triton, block_size=size, top_k=top_k), tiles)


def _shape(length: int, machine: Machine) -> Shape:
    return (1, 2, 1, length, 4) if machine.dry else (1, 32, 32, length, 128)


def _engine(method: Method) -> Engine:
    return Engine(method, counted=frozenset())


def _name(shape: Shape) -> str:
    return " ".join(f"{name}={size}" for name, size in zip("BHKTD", shape, strict=True))


def _qkv(shape: Shape, queries: int, machine: Machine, seed: int) -> list[Tensor]:
    """q (B, H, queries, D), k and v (B, K, T, D)."""
    b, h, kv, t, d = shape
    return machine.normal(seed, (b, h, queries, d), (b, kv, t, d), (b, kv, t, d))


def _dense(machine: Machine, causal: bool) -> dict[str, Form]:
    """Attention to all tokens, by each backend: the baseline of sparse attention."""

    def sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            grouped = q.shape[1] != k.shape[1]
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)

    return {
        f"dense, SDPA {name}": Form(partial(sdpa, backend), comparable=False)
        for name, backend in (BACKENDS if machine.cuda else {}).items()
    }


def quest(shape: Shape, size: int, top_k: int, machine: Machine) -> Case:
    b, h, kv, t, d = shape
    engine = _engine(Quest(size, top_k))

    def inputs(seed: int) -> tuple:
        q, k, v = _qkv(shape, 1, machine, seed)
        bounds = engine.block_representatives(k)
        return q, k, v, bounds, torch.full((b, 1), t - 1, device=machine.device)

    def decode(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, last: Tensor) -> Tensor:
        states = States(q, k, v, Step(last), representatives=bounds, all_seen=True)
        return engine.decode(states, layer=0)

    def gathered(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, _: Tensor) -> Tensor:
        """The usual recipe: scores, top-k, a gather of whole blocks, dense attention to them."""
        scores = engine.method.score(q.unflatten(1, (kv, -1)), bounds)
        scores[..., 0] = scores[..., -1] = torch.inf
        best = scores.topk(top_k, dim=-1).indices.flatten(2)
        index = best[..., None, None].expand(-1, -1, -1, size, d)
        k, v = (x.unflatten(2, (-1, size)).gather(2, index).view(b, h, -1, d) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v)

    forms = {
        "kernel": Form(decode),
        **_dense(machine, causal=False),
        "torch definition": Form(in_torch(decode)),
        "torch gather": Form(gathered),
    }
    if machine.cuda:
        forms["torch gather, compiled"] = Form(torch.compile(gathered, dynamic=False))
        forms["FlexAttention over the selected blocks (selection not timed)"] = Form(
            flex, lambda q, k, v, bounds, last: (q, k, v, _mask(engine, q, k, bounds, last))
        )
    return Case(
        "Quest decode step", f"{_name(shape)} k={top_k}", inputs, forms,
        # Bounds of every block, then keys and values of each query head's own choice.
        bytes=2 * b * d * (t // size * kv + top_k * size * h) * machine.dtype.itemsize,
        exact=t <= 4096,
    )  # fmt: skip


def moba(shape: Shape, size: int, top_k: int, correlated: bool, machine: Machine) -> Case:
    b, h, _, t, d = shape
    engine, blocks = _engine(MoBA(size, top_k)), t // size

    def inputs(seed: int) -> tuple:
        q, k, v = _qkv(shape, t, machine, seed)
        if correlated:
            q = _slow_walk(q)
        # Given, so that a form's error is not that of other means, which select other blocks.
        return q, k, v, engine.block_representatives(k)

    def prefill(q: Tensor, k: Tensor, v: Tensor, means: Tensor) -> Tensor:
        step = Step(torch.arange(t, device=q.device)[None])
        return engine.prefill(States(q, k, v, step, representatives=means), layer=0)

    seen = sum(min(n + 1, top_k) - 0.5 for n in range(blocks)) * size * size  # pairs per head
    flops = b * h * d * (4 * seen + t * blocks)  # the causal half of the gate's scores
    forms = {"kernel": Form(prefill)}
    if not correlated:  # dense attention takes the same time for all queries
        forms |= _dense(machine, causal=True)
    if t <= 4096:
        forms["torch definition"] = Form(in_torch(prefill))
    if machine.cuda and t <= 32_768:  # the mask takes H · T² / size bytes
        forms["FlexAttention over tiles' unions (selection not timed)"] = Form(
            flex,
            lambda q, k, v, means: (q, k, v, _mask(engine, q, k, means)),
            executed=lambda q, k, v, means: tile_flops(engine, q, means),
        )
    return Case(
        f"MoBA prefill, {'correlated' if correlated else 'random'} queries",
        f"{_name(shape)} k={top_k}", inputs, forms,
        bytes=4 * b * h * t * d * machine.dtype.itemsize,
        flops=flops,
        exact=t <= 4096,
    )  # fmt: skip


def tile_flops(engine: Engine, q: Tensor, means: Tensor) -> float:
    """Of attention in which every tile of queries computes all blocks that any of them selects."""
    tiles = sum(int(_union(x).sum()) for x in _selected(engine, q, means))
    return 4.0 * tiles * min(TILE, q.shape[2]) * engine.method.block_size * q.shape[3]


def _slow_walk(noise: Tensor) -> Tensor:
    """Queries (B, H, T, D) that change slowly from token to token, as those of a real prompt do.

    q_t = g q_{t-1} + √(1 − g²) noise_t with g = 0.99: a correlation of 0.5 at 69 tokens. Random
    queries are the worst case of a kernel that computes the union of its tile's choices.
    """
    gate, x = 0.99, noise.transpose(1, 2)
    scale = math.sqrt((1 + gate) / (1 - gate))  # Eq. 1 weighs its input by 1 − g
    z = torch.full_like(x, math.log(gate / (1 - gate)))
    start = x[:, -1].float().expand(2, -1, -1, -1) / scale
    return (memory_scan(z, x, x, start)[0] * scale).transpose(1, 2).contiguous()


def snapkv(shape: Shape, window: int, kept: int, machine: Machine) -> Iterator[Case]:
    b, h, kv, t, d = shape
    kept = max(kept, window)
    engine = _engine(SnapKV(top_k=kept, window=window))
    name = f"{_name(shape)} window={window} kept={kept}"
    keys = b * kv * t * d * machine.dtype.itemsize
    rows = 4 * b * kv * kept * d * machine.dtype.itemsize  # two tensors, read and written

    def prompt(seed: int) -> tuple:
        return tuple(_qkv(shape, window, machine, seed))

    def choice(seed: int) -> tuple:
        k, v, scores = machine.normal(seed, (b, kv, t, d), (b, kv, t, d), (b, kv, t))
        return k, v, scores.topk(kept, dim=-1).indices.sort(-1).values

    def keep(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return gather_tokens(k, v, engine.keep(q, k, v, layer=0)[0])

    for suite, run, inputs, moved in (
        ("scores", attention_mass, lambda seed: prompt(seed)[:2], keys),
        ("gather", gather_tokens, choice, rows),
        ("selection, all of it", keep, prompt, keys + rows),
    ):
        forms = {"kernel": Form(run), "torch definition": Form(in_torch(run))}
        if run is keep and machine.cuda:
            forms["torch definition, compiled"] = Form(in_torch(torch.compile(run, dynamic=False)))
        exact = t <= 32_768 and run is not keep  # another choice is not an error
        yield Case(f"SnapKV {suite}", name, inputs, forms, moved, exact=exact)


_compiled_flex = torch.compile(flex_attention, dynamic=False)


def flex(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    return _compiled_flex(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


def _mask(
    engine: Engine, q: Tensor, k: Tensor, representatives: Tensor, last: Tensor | None = None
) -> BlockMask:
    """Over the selected blocks. `create_block_mask` would evaluate H · T² pairs."""
    size, lengths = engine.method.block_size, (q.shape[2], k.shape[2])
    bits = torch.cat(list(_selected(engine, q, representatives, last)), dim=2)

    def seen(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return bits[b, h, query, key // size] & (key <= query)

    union = _union(bits)
    index = union.int().argsort(dim=-1, descending=True, stable=True).int()
    return BlockMask.from_kv_blocks(
        union.sum(-1, dtype=torch.int32), index, BLOCK_SIZE=(TILE, size),
        mask_mod=None if last is not None else seen, seq_lengths=lengths,
    )  # fmt: skip


def _selected(
    engine: Engine, q: Tensor, representatives: Tensor, last: Tensor | None = None
) -> Iterator[Tensor]:
    """The choice of every query, (B, H, ≤ 1024, N) bool, a few tiles at a time; last: their
    positions, where they are not 0 to T − 1."""
    positions = torch.arange(q.shape[2], device=q.device)[None] if last is None else last
    for queries, at in zip(q.split(8 * TILE, 2), positions.split(8 * TILE, 1), strict=True):
        yield engine.select_blocks(queries, representatives, at, 0).flatten(1, 2)


def _union(bits: Tensor) -> Tensor:
    """What any query of a tile selects, (B, H, tiles, N): the blocks computed for that tile."""
    return bits.unflatten(2, (-1, min(TILE, bits.shape[2]))).any(3)

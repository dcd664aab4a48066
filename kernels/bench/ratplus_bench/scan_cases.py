"""Cases of the memory scan: forward, backward, the prefill's epilogue, and one decoding step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import ratplus_kernels
from ratplus_bench import scan_forms
from ratplus_bench.report import PLANS
from ratplus_bench.timing import Case, Form, Machine
from ratplus_kernels.memory_scan import memory_prefill_torch, memory_scan_torch


def cases(machine: Machine) -> Iterator[Case]:
    if machine.dry:
        shapes = [(1, 5, 2, 4)]
    else:
        lengths = (4096, 32_768, 131_072)
        shapes = [(1, t, 32, 128) for t in lengths]  # P2's 7B
        shapes += [(1, t, 16, 128) for t in lengths]  # P2's 1.5B
        shapes += [(1, 32_768, 8, 128), (4, 4096, 32, 128), (16, 4096, 32, 128)]
    for shape in shapes:
        yield _forward(shape, machine)
        yield _prefill(shape, machine)
        yield _backward(shape, machine)
        yield _both(shape, machine)
    for batch in (1,) if machine.dry else (1, 16, 64, 256):
        yield _step((batch, *shapes[0][2:]), machine)


def plans(machine: Machine) -> Iterator[Case]:
    """The kernel's ways to be cut up, each a form: what `default_plan` should choose from."""
    from ratplus_kernels import memory_scan_triton as scan

    sizes = ((4, 4, (1, 2), (4,)),) if machine.dry else (
        (tokens, channels, (1, 4), (2, 4, 8)) for tokens in (32, 64) for channels in (16, 32, 64)
    )  # fmt: skip
    candidates = [
        scan.Plan(tokens, channels, chunks, warps, stages=1 if machine.dry else 3)
        for tokens, channels, cuts, widths in sizes
        for chunks in cuts
        for warps in widths
    ]
    shapes = [(1, 4096, 32, 128), (1, 32_768, 32, 128), (1, 32_768, 8, 128)]
    for shape in [(1, 5, 2, 4)] if machine.dry else shapes:
        for case, passes in ((_forward(shape, machine), 0), (_backward(shape, machine), 1)):
            yield replace(
                case,
                suite=case.suite + PLANS,
                forms=[Form(str(plan), *_planned(plan, passes)) for plan in candidates],
            )


def _planned(plan: Any, backward: int) -> tuple[Callable[..., Any], Callable[..., tuple] | None]:
    """run and setup of the forward or backward kernel under a plan."""
    from ratplus_kernels import memory_scan_triton as scan

    if not backward:
        return lambda z, k, v: scan.forward(z, k, v, None, plan=plan)[:2], None
    return lambda z, k, v, *rest: _run_backward(plan, z, k, v, *rest), _backward_inputs


def _name(shape: tuple[int, ...]) -> str:
    return " ".join(f"{name}={size}" for name, size in zip("BTHD", shape, strict=True))


def _inputs(shape: tuple[int, ...], machine: Machine) -> Callable[[int], tuple]:
    """z, k and v as the shares of one fused projection, as the model has them."""

    def make(seed: int) -> tuple:
        b, t, h, d = shape
        generator = torch.Generator(machine.device).manual_seed(seed)
        fused = torch.empty(b, t, 3, h, d, dtype=machine.dtype, device=machine.device)
        fused.normal_(generator=generator)
        return fused.unbind(2)

    return make


def _size(shape: tuple[int, ...]) -> int:
    b, t, h, d = shape
    return b * t * h * d


def _forward(shape: tuple[int, ...], machine: Machine) -> Case:
    _, length, heads, _ = shape
    forms = [Form("kernel", ratplus_kernels.memory_scan)]
    if length <= 8192:  # a launch a token
        forms.append(Form("torch", memory_scan_torch))
    if heads == 32 or machine.dry:
        forms += _BASELINES
    return Case(
        "memory scan, forward", _name(shape), _inputs(shape, machine), forms,
        bytes=5 * _size(shape) * machine.dtype.itemsize,
        reference=_first_two(memory_scan_torch) if length <= 4096 else None,
    )  # fmt: skip


def _prefill(shape: tuple[int, ...], machine: Machine) -> Case:
    """The scan with RoPE and the blocks' representatives, and what they would cost apart."""
    size = 4 if machine.dry else 64
    inputs = _inputs(shape, machine)
    # A capture that failed may leave the GPU's own generator unusable, so each has its own.
    generator = torch.Generator(machine.device).manual_seed(0)
    angle = torch.rand(
        1, shape[1], 1, shape[3] // 2, device=machine.device, generator=generator
    ).repeat(1, 1, 1, 2)
    rope = (angle.cos(), angle.sin())

    def fused(z: Tensor, k: Tensor, v: Tensor) -> Any:
        k, v, _, blocks = ratplus_kernels.memory_prefill(z, k, v, rope, size)
        return k, v, *blocks

    def apart(z: Tensor, k: Tensor, v: Tensor) -> Any:
        k, v, _ = ratplus_kernels.memory_scan(z, k, v)
        first, second = k.chunk(2, dim=-1)
        k = (k * rope[0] + torch.cat((-second, first), dim=-1) * rope[1]).to(v.dtype)
        blocks = k.unflatten(1, (-1, size))
        return k, v, blocks.amin(2), blocks.amax(2), blocks.mean(2)

    def reference(z: Tensor, k: Tensor, v: Tensor) -> Any:
        wide = (rope[0].double(), rope[1].double())
        return memory_prefill_torch(z, k, v, wide, size)[:2]

    whole = shape[1] % size == 0
    forms = [Form("kernel", fused)]
    if whole:
        forms.append(Form("kernel, then torch for the rest", apart))
    return Case(
        "memory prefill (scan, RoPE, representatives)", _name(shape), inputs, forms,
        bytes=(5 + 3 / size) * _size(shape) * machine.dtype.itemsize + angle.nbytes,
        reference=reference if shape[1] <= 4096 else None,
    )  # fmt: skip


def _backward(shape: tuple[int, ...], machine: Machine) -> Case:
    """The kernel's backward pass alone, with the forward's outputs at hand."""
    return Case(
        "memory scan, backward", _name(shape), _inputs(shape, machine),
        [Form("kernel", partial(_run_backward, None), _backward_inputs)],
        bytes=10 * _size(shape) * machine.dtype.itemsize,
    )  # fmt: skip


def _backward_inputs(z: Tensor, k: Tensor, v: Tensor) -> tuple:
    k_out, v_out, state = ratplus_kernels.memory_scan(z, k, v)
    generator = torch.Generator(k.device).manual_seed(0)
    grads = (torch.empty_like(x).normal_(generator=generator) for x in (k_out, v_out))
    return z, k, v, k_out, v_out, *grads, state


def _run_backward(plan: Any, z: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> tuple:
    from ratplus_kernels import memory_scan_triton

    return memory_scan_triton.backward(plan, z, k, v, None, *rest)


def _both(shape: tuple[int, ...], machine: Machine) -> Case:
    _, length, heads, _ = shape
    forms = [Form("kernel", both(_first_two(ratplus_kernels.memory_scan)))]
    if length <= 8192:
        forms.append(Form("torch", both(_first_two(memory_scan_torch))))
    if heads == 32 or machine.dry:
        forms.append(Form("associative_scan, compiled (P2)", both(_compiled_scan), gpu=True))
        forms.append(Form("chunk_hgrn (fla-core)", _hgrn_both, gpu=True))
    return Case(
        "memory scan, forward and backward", _name(shape), _inputs(shape, machine), forms,
        bytes=15 * _size(shape) * machine.dtype.itemsize,
    )  # fmt: skip


def _step(shape: tuple[int, ...], machine: Machine) -> Case:
    b, h, d = shape

    def inputs(seed: int) -> tuple:
        z, k, v = _inputs((b, 1, h, d), machine)(seed)
        generator = torch.Generator(machine.device).manual_seed(seed)
        state = torch.randn(2, b, h, d, device=machine.device, generator=generator)
        return z[:, 0], k[:, 0], v[:, 0], state

    def in_torch(z: Tensor, k: Tensor, v: Tensor, state: Tensor) -> Any:
        k, v, state = memory_scan_torch(z[:, None], k[:, None], v[:, None], state)
        return k[:, 0], v[:, 0], state

    return Case(
        "memory step", f"B={b} H={h} D={d}", inputs,
        [Form("kernel", ratplus_kernels.memory_step), Form("torch", in_torch)],
        bytes=b * h * d * (5 * machine.dtype.itemsize + 16), reference=in_torch,
    )  # fmt: skip


def _first_two(run: Callable[..., tuple]) -> Callable[..., tuple]:
    return lambda *inputs: run(*inputs)[:2]


def both(run: Callable[..., tuple]) -> Callable[..., tuple]:
    """Forward and backward of run(z, k, v): the gradients of z, k and v."""

    def forward_backward(*inputs: Tensor) -> tuple:
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = run(*leaves)
        return torch.autograd.grad(out, leaves, [x.detach() for x in out])

    return forward_backward


# P2's own formulation, written afresh: associative_scan, compiled, on K and V in fp32.
_compiled_scan = scan_forms.scan(torch.compile(scan_forms.associative_pointwise, dynamic=False))


def _hgrn_inputs(z: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """chunk_hgrn computes h = exp(g) h + x, so 1 − g is multiplied in before: (B, T, 2 H D)."""
    x = torch.cat((k.flatten(2), v.flatten(2)), dim=-1)
    z = z.flatten(2)
    z = torch.cat((z, z), dim=-1)
    return torch.sigmoid(-z) * x, torch.nn.functional.logsigmoid(z)


def _chunk_hgrn(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    from fla.ops.hgrn import chunk_hgrn

    return chunk_hgrn(x, g)[0].chunk(2, dim=-1)


def _hgrn_both(z: Tensor, k: Tensor, v: Tensor) -> tuple:
    return both(lambda *inputs: _chunk_hgrn(*_hgrn_inputs(*inputs)))(z, k, v)


def _accelerated_inputs(z: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """accelerated-scan takes (B, channels, T), contiguous."""
    x, g = _hgrn_inputs(z, k, v)
    return g.exp().transpose(1, 2).contiguous(), x.transpose(1, 2).contiguous()


def _accelerated_scan(gates: Tensor, tokens: Tensor) -> Tensor:
    from accelerated_scan.scalar import scan

    return scan(gates, tokens)


_BASELINES = [
    Form("associative_scan, compiled (P2)", _compiled_scan, gpu=True),
    Form("chunk_hgrn (fla-core)", _chunk_hgrn, _hgrn_inputs, gpu=True),
    Form("chunk_hgrn's inputs", _hgrn_inputs, gpu=True, check=False),
    Form("accelerated-scan, scalar", _accelerated_scan, _accelerated_inputs, gpu=True, check=False),
]

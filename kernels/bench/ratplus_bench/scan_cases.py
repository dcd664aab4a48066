"""Cases of the memory scan: forward, prefill, backward, both, and one decoding step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ratplus_bench import scan_baselines as other
from ratplus_bench.timing import Case, Form, Machine
from ratplus_exp.methods import Engine, MoBA, Quest
from ratplus_exp.models.forward_pass import rotate
from ratplus_kernels import memory_prefill, memory_scan, memory_step
from ratplus_kernels.dispatch import definitions

Shape = tuple[int, int, int, int]  # B, T, H, D
# P2's 7B and 1.5B, then shapes of fewer and of more programs.
SHAPES: list[Shape] = [(1, t, h, 128) for h in (32, 16) for t in (4096, 32_768, 131_072)]
SHAPES += [(1, 32_768, 8, 128), (4, 4096, 32, 128), (16, 4096, 32, 128)]
PLANNED: list[Shape] = [(1, t, 32, 128) for t in (32_768, 131_072, 4096)] + [(1, 32_768, 8, 128)]
# Tokens, channels and segments of a tile, chunks, warps, stages.
PLANS = [
    (128, 32, 16, 1, 4, 3), (128, 32, 16, 1, 4, 2), (128, 32, 8, 1, 4, 2), (64, 32, 8, 1, 4, 3),
    (128, 32, 16, 1, 8, 2), (256, 32, 32, 1, 8, 2), (128, 16, 16, 1, 4, 3), (64, 16, 16, 1, 4, 3),
    (128, 32, 16, 2, 4, 2), (64, 32, 16, 2, 4, 2),
]  # fmt: skip
TINY: list[Shape] = [(1, 5, 2, 4)]
# (B, H, D): the pocket tier's step of 1536 tokens, and a larger one.
CPU_SHAPES, CPU_LENGTHS = ((3, 4, 32), (4, 4, 64)), (256, 512, 1024, 2048, 4096, 8192)

in_torch = definitions()(memory_scan)
p2 = other.scan(torch.compile(other.associative, dynamic=False))
CPU_FORMS: dict[str, Callable[..., tuple]] = {
    "torch (used in training)": memory_scan,
    "naive loop": other.naive_loop,
    "chunked": other.scan(other.chunked),
    "torch.associative_scan": other.scan(other.associative),
}


def cases(machine: Machine) -> Iterator[Case]:
    shapes = TINY if machine.dry else SHAPES
    for shape in shapes:
        yield from _of_shape(shape, machine)
    for batch in (1,) if machine.dry else (1, 16, 64, 256):
        yield _step(batch, *shapes[0][2:], machine)


def plans(machine: Machine) -> Iterator[Case]:
    """The plans of the kernels, each a form: `default_plan` should choose the fastest."""
    from ratplus_kernels.memory_scan_triton import Plan, forward

    def prefill(
        z: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, plan: Plan
    ) -> tuple[Tensor, ...]:
        return forward(z, k, v, None, (cos, sin), _block(machine), plan)[:2]

    cuts = PLANS if not machine.dry else [(4, 4, 2, chunks, 4, 1) for chunks in (1, 2)]
    plans = [Plan(*cut) for cut in cuts]
    for shape in TINY if machine.dry else PLANNED:
        scan, with_rope, back, _ = _of_shape(shape, machine)
        yield scan.with_plans(partial(forward, initial=None), plans)
        yield back.with_plans(_backward, plans)
        yield with_rope.with_plans(prefill, plans)


def cpu_cases(machine: Machine) -> Iterator[Case]:
    for (b, h, d), t in product(CPU_SHAPES, (8,) if machine.dry else CPU_LENGTHS):
        forms = dict(CPU_FORMS)
        if not machine.dry and t <= 512:  # longer ones compile for more than 20 s
            forms["torch.associative_scan, compiled"] = p2
        tensor = 4 * b * t * h * d  # bytes
        for suite, form_of, tensors in (
            ("forward", lambda run: run, 5),
            ("forward and backward", both, 15),
        ):
            yield Case(
                f"memory scan on a CPU, {suite}", _name(b, t, h, d), _inputs((b, t, h, d), machine),
                {form: Form(form_of(run)) for form, run in forms.items()},
                bytes=tensors * tensor, exact=t <= 1024,
            )  # fmt: skip


def _of_shape(shape: Shape, machine: Machine) -> tuple[Case, Case, Case, Case]:
    b, t, h, d = shape
    name, inputs, exact = _name(*shape), _inputs(shape, machine), t <= 4096
    tensor = b * t * h * d * machine.dtype.itemsize  # bytes
    block = _block(machine)
    scans, gradients = {"kernel": Form(memory_scan)}, {"kernel": Form(both(memory_scan))}
    if t <= 8192:  # one launch per token
        scans["torch"], gradients["torch"] = Form(in_torch), Form(both(in_torch))
    if machine.cuda and h == 32:
        hgrn, plus = "chunk_hgrn (fla-core)", "associative_scan, compiled (P2)"
        gradients |= {plus: Form(both(p2)), hgrn: Form(both(other.hgrn))}
        scans |= {
            plus: Form(p2),
            hgrn: Form(other.chunk_hgrn, other.hgrn_inputs),
            "chunk_hgrn's inputs": Form(other.hgrn_inputs, comparable=False),
        }

    def with_rope(seed: int) -> tuple:
        angle = machine.normal(seed, (1, t, 1, d // 2))[0].float().repeat(1, 1, 1, 2)
        return *inputs(seed), angle.cos(), angle.sin()

    prefills = {"kernel": Form(partial(_prefill, block))}
    if t % block == 0:
        prefills["kernel, then torch for the rest"] = Form(partial(_scan_then_torch, block))
    return (
        Case("memory scan, forward", name, inputs, scans, bytes=5 * tensor, exact=exact),
        Case(
            "memory prefill (scan, RoPE, representatives)", name, with_rope, prefills,
            bytes=(5 + 3 / block) * tensor + 4 * t * d, exact=exact,
        ),
        Case(
            "memory scan, backward", name, inputs,
            {"kernel": Form(partial(_backward, plan=None), _backward_inputs)}, bytes=10 * tensor,
        ),
        Case("memory scan, forward and backward", name, inputs, gradients, bytes=15 * tensor),
    )  # fmt: skip


def _step(b: int, h: int, d: int, machine: Machine) -> Case:
    def inputs(seed: int) -> tuple:
        z, k, v = (x[:, 0] for x in _inputs((b, 1, h, d), machine)(seed))
        return z, k, v, machine.normal(seed, (2, b, h, d))[0].float()

    return Case(
        "memory step", f"B={b} H={h} D={d}", inputs,
        {"kernel": Form(memory_step), "torch": Form(definitions()(memory_step))},
        bytes=b * h * d * (5 * machine.dtype.itemsize + 16), exact=True,
    )  # fmt: skip


def _block(machine: Machine) -> int:
    return 4 if machine.dry else 64


def _name(b: int, t: int, h: int, d: int) -> str:
    return f"B={b} T={t} H={h} D={d}"


def _inputs(shape: Shape, machine: Machine) -> Callable[[int], tuple]:
    """z, k and v as the shares of one fused projection, as models have them."""
    b, t, h, d = shape
    return lambda seed: machine.normal(seed, (b, t, 3, h, d))[0].unbind(2)


def _prefill(size: int, z: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> tuple:
    k, v, _, blocks = memory_prefill(z, k, v, (cos, sin), size)
    return k, v, *blocks


def _scan_then_torch(size: int, z: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> tuple:
    k, v, _ = memory_scan(z, k, v)
    k = rotate(k, (cos, sin)).to(v.dtype)
    methods = Quest(size, 2), MoBA(size, 2)
    return k, v, *(Engine(x).block_representatives(k.transpose(1, 2)) for x in methods)


def _backward_inputs(z: Tensor, k: Tensor, v: Tensor) -> tuple:
    k_out, v_out, state = memory_scan(z, k, v)
    return z, k, v, None, k_out, v_out, k_out.clone(), v_out.clone(), state


def _backward(*inputs: Tensor, plan: Any) -> tuple:
    """The kernel's backward pass alone, from stored outputs of the forward pass."""
    from ratplus_kernels.memory_scan_triton import backward

    return backward(plan, *inputs)


def both(run: Callable[..., tuple]) -> Callable[..., tuple]:
    """Forward and backward of run(z, k, v): the gradients of z, k and v by those of k̃ and ṽ."""

    def forward_backward(*inputs: Tensor) -> tuple:
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = run(*leaves)[:2]
        return torch.autograd.grad(out, leaves, [x.detach() for x in out])

    return forward_backward

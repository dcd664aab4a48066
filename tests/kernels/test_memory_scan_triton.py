"""The memory scan's Triton kernels against float64 loops: interpreted on a CPU, real on a GPU.

On a CPU the shapes are tiny and the numbers fp32 (the interpreter knows no bf16); on a GPU the same
tests take real shapes and bf16 too.
"""

from __future__ import annotations

import math

import pytest
import torch

import ratplus_kernels
from ratplus_kernels.dispatch import definitions

GPU = torch.cuda.is_available()
DTYPES = [torch.float32, torch.bfloat16] if GPU else [torch.float32]
SHAPES = [
    (2, 9, 1, 5),
    (1, 1, 1, 4),
    (1, 8, 2, 4),
]  # (B, T, H, D), with and without ragged tiles
if GPU:
    SHAPES += [(1, 4096, 32, 128), (2, 1000, 4, 80), (4, 333, 2, 64), (1, 131_072, 8, 128)]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2**-7}


def close(out, wanted, dtype):
    """Close relative to the tensor's own scale, and everywhere finite."""
    scale = wanted.abs().max().clamp_min(1e-3)
    worst = (out.double() - wanted.double()).abs().max() / scale
    assert worst < TOLERANCE[dtype], f"off by {float(worst):.2e} of the largest value"


def inputs(shape, dtype, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    z, k, v = (2 * torch.randn(shape, generator=generator) for _ in range(3))
    initial = torch.randn(2, shape[0], *shape[2:], generator=generator)
    return *(x.to(device, dtype) for x in (z, k, v)), initial.to(device)


def loop(z, k, v, initial=None):
    """Eq. 1 token by token in float64: k̃, ṽ and the final state."""
    z, kv = z.double(), torch.stack((k, v)).double()
    state = torch.zeros_like(kv[:, :, 0]) if initial is None else initial.double()
    out = []
    for t in range(z.shape[1]):
        state = torch.sigmoid(z[:, t]) * state + torch.sigmoid(-z[:, t]) * kv[:, :, t]
        out.append(state)
    memory = torch.stack(out, dim=2)
    return memory[0], memory[1], state


@pytest.fixture(params=[1, 3], ids=["one chunk", "three chunks"])
def chunks(request, monkeypatch, triton_device):
    """Cut every sequence into so many chunks, as a GPU with few heads to fill it would."""
    from ratplus_kernels import memory_scan_triton

    default = memory_scan_triton.default_plan
    monkeypatch.setattr(
        memory_scan_triton,
        "default_plan",
        lambda *shape, **way: default(*shape, **way)._replace(chunks=request.param),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("with_state", [False, True], ids=["from zero", "from a state"])
def test_forward_is_the_float64_loop(triton_device, chunks, shape, with_state, dtype):
    z, k, v, initial = inputs(shape, dtype, triton_device)
    initial = initial if with_state else None
    k_out, v_out, state = ratplus_kernels.memory_scan(z, k, v, initial)
    assert k_out.dtype == v_out.dtype == dtype and state.dtype == torch.float32
    wanted = loop(z, k, v, initial)
    close(k_out, wanted[0], dtype)
    close(v_out, wanted[1], dtype)
    close(state, wanted[2], torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [s for s in SHAPES if s[1] < 10_000], ids=str)
@pytest.mark.parametrize("with_state", [False, True], ids=["from zero", "from a state"])
def test_gradients_are_those_of_the_float64_loop(triton_device, chunks, shape, with_state, dtype):
    tensors = inputs(shape, dtype, triton_device)[: 4 if with_state else 3]
    leaves = [x.clone().requires_grad_() for x in tensors]
    exact = [x.double().requires_grad_() for x in tensors]
    out, wanted = ratplus_kernels.memory_scan(*leaves), loop(*exact)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator).to(triton_device) for x in out]
    weights[0] = weights[0].to(dtype)
    weights[1] = weights[1].to(dtype)
    torch.autograd.backward(out, weights)
    torch.autograd.backward(wanted, [x.double() for x in weights])
    for leaf, truth in zip(leaves, exact, strict=True):
        close(leaf.grad, truth.grad, dtype)


def test_strided_inputs_and_strided_gradients(triton_device):
    b, t, h, d = (2, 700, 4, 64) if GPU else (2, 5, 2, 4)
    generator = torch.Generator().manual_seed(2)
    fused = torch.randn(b, t, 5 * h * d, generator=generator).to(triton_device).requires_grad_()
    z, k, v = (fused[..., i * h * d : (i + 1) * h * d].unflatten(-1, (h, d)) for i in (4, 2, 3))
    k_out, v_out, _ = ratplus_kernels.memory_scan(z, k, v)
    # A heads-first gradient, as attention gives it, and one that is the same everywhere.
    weight = torch.randn(b, h, t, d, generator=generator).to(triton_device)
    ((k_out.transpose(1, 2) * weight).sum() + v_out.sum()).backward()
    exact = fused.detach().double().requires_grad_()
    z, k, v = (exact[..., i * h * d : (i + 1) * h * d].unflatten(-1, (h, d)) for i in (4, 2, 3))
    k_true, v_true, _ = loop(z, k, v)
    ((k_true.transpose(1, 2) * weight).sum() + v_true.sum()).backward()
    close(k_out, k_true, torch.float32)
    close(fused.grad, exact.grad, torch.float32)


def test_open_and_shut_gates(triton_device):
    _, k, v, initial = inputs((1, 6, 1, 4), torch.float32, triton_device)
    for z in (-1e4, -math.inf):
        k_out, v_out, _ = ratplus_kernels.memory_scan(torch.full_like(k, z), k, v, initial)
        assert torch.equal(k_out, k) and torch.equal(v_out, v)
    for z in (1e4, math.inf):
        k_out, _, state = ratplus_kernels.memory_scan(torch.full_like(k, z), k, v, initial)
        assert torch.equal(state, initial)
        assert torch.equal(k_out, initial[0, :, None].expand_as(k))
    z = torch.full_like(k, 20.0)  # 1 − g = 2e-9, lost if found as 1 − sigmoid(z)
    _, _, state = ratplus_kernels.memory_scan(z, torch.ones_like(k), torch.ones_like(v))
    assert float(state.max()) == pytest.approx(6 / (1 + math.exp(20)), rel=1e-4)
    z = torch.full_like(k, -30.0)  # products of such gates underflow
    close(ratplus_kernels.memory_scan(z, k, v)[0], loop(z, k, v)[0], torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_steps_go_on_where_a_prefill_ends(triton_device, dtype):
    b, t, h, d = (2, 300, 8, 128) if GPU else (2, 5, 2, 3)
    z, k, v, initial = inputs((b, t, h, d), dtype, triton_device)
    wanted = loop(z, k, v, initial)
    *_, state = ratplus_kernels.memory_scan(z[:, : t - 2], k[:, : t - 2], v[:, : t - 2], initial)
    for i in (t - 2, t - 1):
        k_i, v_i, state = ratplus_kernels.memory_step(z[:, i], k[:, i], v[:, i], state)
        assert k_i.dtype == dtype and state.dtype == torch.float32
        close(k_i, wanted[0][:, i], dtype)
        close(v_i, wanted[1][:, i], dtype)
    close(state, wanted[2], torch.float32)


def test_a_step_that_must_learn_has_gradients(triton_device):
    z, k, v, initial = inputs((1, 1, 1, 4), torch.float32, triton_device)
    k.requires_grad_()
    ratplus_kernels.memory_step(z[:, 0], k[:, 0], v[:, 0], initial)[0].sum().backward()
    torch.testing.assert_close(k.grad, torch.sigmoid(-z))


def rope_of(positions, dim):
    angle = positions[..., None] * 100.0 ** -(torch.arange(dim // 2) / (dim // 2))
    angle = torch.cat((angle, angle), dim=-1)[:, :, None]  # (B or 1, T, 1, D)
    return angle.cos(), angle.sin()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2], ids=["one row of angles", "angles for each row"])
@pytest.mark.parametrize("length", [5, 8])
def test_prefill_rotates_keys_and_sums_up_blocks(triton_device, chunks, dtype, rows, length):
    size, h, d = 4, 2, 8
    if GPU:
        size, h, d, length = 64, 8, 128, 200 * length
    z, k, v, initial = inputs((2, length, h, d), dtype, triton_device)
    rope = rope_of(torch.arange(length) + 3 * torch.arange(rows)[:, None], d)
    rope = tuple(x.to(triton_device) for x in rope)
    k_out, v_out, state, blocks = ratplus_kernels.memory_prefill(z, k, v, rope, size, initial)
    wanted, v_true, state_true = loop(z, k, v, initial)
    cos, sin = rope[0].double(), rope[1].double()
    rotated = torch.empty_like(wanted)
    for i in range(d // 2):
        x, y = wanted[..., i], wanted[..., i + d // 2]
        rotated[..., i] = x * cos[..., i] - y * sin[..., i]
        rotated[..., i + d // 2] = y * cos[..., i] + x * sin[..., i]
    close(k_out, rotated, dtype)
    close(v_out, v_true, dtype)
    close(state, state_true, torch.float32)
    for n in range(math.ceil(length / size)):
        block = rotated[:, n * size : (n + 1) * size]
        close(blocks.bounds[:, :, n, :d], block.amin(1), dtype)
        close(blocks.bounds[:, :, n, d:], block.amax(1), dtype)
        close(blocks.mean[:, :, n], block.mean(1), dtype)
        stored = k_out[:, n * size : (n + 1) * size]  # bounds hold for what is stored, exactly
        assert torch.equal(blocks.bounds[:, :, n, :d], stored.amin(1))
        assert torch.equal(blocks.bounds[:, :, n, d:], stored.amax(1))
    assert blocks.mean.shape == (2, h, math.ceil(length / size), d)


def test_prefill_in_torch_agrees_with_the_kernel(triton_device):
    z, k, v, initial = inputs((1, 7, 2, 4), torch.float32, triton_device)
    rope = tuple(x.to(triton_device) for x in rope_of(torch.arange(7)[None], 4))
    kernel = ratplus_kernels.memory_prefill(z, k, v, rope, 2, initial)
    with definitions():
        definition = ratplus_kernels.memory_prefill(z, k, v, rope, 2, initial)
    for out, wanted in zip(kernel, definition, strict=True):
        for a, b in zip(out, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [0, 3, 48])
def test_block_sizes_must_be_powers_of_two(size):
    x = torch.zeros(1, 4, 1, 4)
    with pytest.raises(ValueError, match="power of 2"):
        ratplus_kernels.memory_prefill(x, x, x, (x, x), size)


@pytest.mark.parametrize("start", [False, True], ids=["from nothing", "from a state"])
def test_the_operator_says_truly_what_it_does(triton_device, start):
    """Its schema, its shapes without data, and its gradients, by torch's own checks."""
    from ratplus_kernels.memory_scan_operator import scan

    z, k, v = torch.randn(3, 2, 5, 2, 4, device=triton_device).requires_grad_().unbind(0)
    state = torch.randn(2, 2, 2, 4, device=triton_device).requires_grad_() if start else None
    torch.library.opcheck(scan, (z, k, v, state))

"""Eq. 1 against a float64 loop: in torch, and by the kernels, interpreted on a CPU, real on a GPU.

Under the interpreter shapes are tiny and numbers fp32 (it has no bf16); on a GPU the kernels' tests
take real shapes and bf16 too.
"""

from __future__ import annotations

import importlib
import math
from typing import NamedTuple

import pytest
import torch

from ratplus_kernels import memory_prefill, memory_scan, memory_step

GPU = torch.cuda.is_available()
KERNEL_DTYPES = [torch.float32, torch.bfloat16] if GPU else [torch.float32]
# (B, T, H, D), with and without ragged tiles
SHAPES = [(2, 9, 1, 5), (1, 1, 1, 4), (2, 8, 2, 4)]
if GPU:
    SHAPES += [(1, 4096, 32, 128), (2, 1000, 4, 80), (4, 333, 2, 64), (1, 131_072, 8, 128)]
TOLERANCE = {  # of the torch form, in each number
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    torch.float32: {"rtol": 1e-5, "atol": 1e-6},
    torch.bfloat16: {"rtol": 2**-7, "atol": 1e-6},  # one step of the output's own rounding
}
OF_LARGEST = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2**-7}


class Form(NamedTuple):
    device: torch.device
    dtype: torch.dtype
    kernel: bool

    def inputs(self, shape, seed=0):
        """z, k, v and an initial state."""
        if not self.kernel and math.prod(shape) > 1000:
            pytest.skip("a shape for kernels")
        generator = torch.Generator().manual_seed(seed)
        z, k, v = (2 * torch.randn(shape, generator=generator) for _ in range(3))
        initial = torch.randn(2, shape[0], *shape[2:], generator=generator)
        return *(x.to(self.device, self.dtype) for x in (z, k, v)), initial.to(self.device)

    def close(self, out, wanted):
        if self.kernel:
            near(out, wanted)
        else:
            torch.testing.assert_close(out.double(), wanted, **TOLERANCE[out.dtype])


def near(out, wanted):
    """Close relative to the tensor's own scale, and everywhere finite."""
    scale = wanted.abs().max().clamp_min(1e-3)
    worst = (out.double() - wanted.double()).abs().max() / scale
    assert worst < OF_LARGEST[out.dtype], f"off by {float(worst):.2e} of the largest value"


FORMS = [("torch", dtype) for dtype in TOLERANCE]
FORMS += [(chunks, dtype) for chunks in (1, 3) for dtype in KERNEL_DTYPES]


@pytest.fixture(params=FORMS, ids=lambda form: "-".join(map(str, form)))
def form(request, monkeypatch):
    """The torch form, or the kernels on sequences in one chunk or in three, as a GPU with few heads
    to fill it would cut them."""
    chunks, dtype = request.param
    if chunks == "torch":
        return Form(torch.device("cpu"), dtype, False)
    device = request.getfixturevalue("triton_device")
    from ratplus_kernels import memory_scan_triton as module

    default = module.default_plan
    monkeypatch.setattr(
        module, "default_plan", lambda *x, **way: default(*x, **way)._replace(chunks=chunks)
    )
    return Form(device, dtype, True)


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


with_or_without_state = pytest.mark.parametrize(
    "with_state", [False, True], ids=["from zero", "from a state"]
)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@with_or_without_state
def test_scan_is_the_float64_loop(form, shape, with_state):
    tensors = form.inputs(shape)[: 4 if with_state else 3]
    before = [tensor.clone() for tensor in tensors]
    k_out, v_out, state = out = memory_scan(*tensors)
    assert k_out.dtype == v_out.dtype == form.dtype
    assert state.dtype == torch.promote_types(form.dtype, torch.float32)  # never rounded to inputs'
    for x, wanted in zip(out, loop(*tensors), strict=True):
        form.close(x, wanted)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
    assert state.untyped_storage().nbytes() == state.nbytes  # it doesn't hold on to the sequence


@pytest.mark.parametrize("shape", [s for s in SHAPES if s[1] < 10_000], ids=str)
@with_or_without_state
def test_gradients_are_those_of_the_float64_loop(form, shape, with_state):
    tensors = form.inputs(shape)[: 4 if with_state else 3]
    leaves = [x.clone().requires_grad_() for x in tensors]
    exact = [x.double().requires_grad_() for x in tensors]
    out, wanted = memory_scan(*leaves), loop(*exact)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator).to(x) for x in out]
    torch.autograd.backward(out, weights)
    torch.autograd.backward(wanted, [x.double() for x in weights])
    for leaf, truth in zip(leaves, exact, strict=True):
        near(leaf.grad, truth.grad)


@pytest.mark.parametrize("heads_first", [False, True])
def test_strided_inputs_and_strided_gradients(form, heads_first):
    """Views of a fused projection, or of heads before tokens."""
    b, t, h, d = (2, 700, 4, 64) if GPU and form.kernel else (2, 5, 2, 4)
    shape = (5, b, h, t, d) if heads_first else (b, t, 5 * h * d)
    generator = torch.Generator().manual_seed(2)
    fused = torch.randn(shape, generator=generator).to(form.device, form.dtype).requires_grad_()
    weight = torch.randn(b, h, t, d, generator=generator).to(form.device)

    def run(scan, x):
        parts = x.transpose(2, 3) if heads_first else x.unflatten(-1, (5, h, d)).movedim(2, 0)
        assert not any(parts[i].is_contiguous() for i in (4, 2, 3))
        k_out, v_out, _ = scan(parts[4], parts[2], parts[3])
        # A heads-first gradient, as attention gives it, and one that is the same everywhere.
        ((k_out.transpose(1, 2) * weight).sum() + v_out.sum()).backward()
        return k_out, v_out

    exact = fused.detach().double().requires_grad_()
    for x, wanted in zip(run(memory_scan, fused), run(loop, exact), strict=True):
        form.close(x, wanted)
    near(fused.grad, exact.grad)


def test_open_and_shut_gates_pass_and_hold_bitwise(form):
    _, k, v, initial = form.inputs((1, 6, 1, 4))
    for z in (-1e4, -math.inf):
        k_out, v_out, state = memory_scan(torch.full_like(k, z), k, v, initial)
        assert torch.equal(k_out, k) and torch.equal(v_out, v)
        assert torch.equal(state, torch.stack((k, v))[:, :, -1].to(state))
    for z in (1e4, math.inf):
        k_out, v_out, state = memory_scan(torch.full_like(k, z), k, v, initial)
        assert torch.equal(state, initial.to(state))
        assert torch.equal(k_out, initial[0, :, None].expand_as(k).to(k))
        assert torch.equal(v_out, initial[1, :, None].expand_as(v).to(v))
    z = torch.full_like(k, 20.0)  # 1 − g = 2e-9, lost if found as 1 − sigmoid(z)
    _, _, state = memory_scan(z, torch.ones_like(k), torch.ones_like(v))
    wanted = 1 - (1 - 1 / (1 + math.exp(20))) ** 6
    assert state.flatten().tolist() == pytest.approx([wanted] * state.numel(), rel=1e-5)
    k = torch.randn(1, 6 if form.kernel else 400, 1, 4).to(form.device, form.dtype)
    z = torch.full_like(k, -30.0)  # products of such gates underflow
    form.close(memory_scan(z, k, -k)[0], loop(z, k, -k)[0])


def test_steps_go_on_where_a_scan_ends(form):
    b, t, h, d = (2, 300, 8, 128) if GPU and form.kernel else (2, 5, 2, 3)
    z, k, v, initial = form.inputs((b, t, h, d))
    wanted = loop(z, k, v, initial)
    *_, state = memory_scan(z[:, : t - 3], k[:, : t - 3], v[:, : t - 3], initial)
    for i in range(t - 3, t):
        k_i, v_i, state = memory_step(z[:, i], k[:, i], v[:, i], state)
        assert k_i.shape == (b, h, d) and k_i.dtype == form.dtype
        form.close(k_i, wanted[0][:, i])
        form.close(v_i, wanted[1][:, i])
    assert state.dtype == torch.promote_types(form.dtype, torch.float32)
    form.close(state, wanted[2])


def test_a_step_that_must_learn_has_gradients(triton_device):
    z, k, v, initial = Form(triton_device, torch.float32, True).inputs((1, 1, 1, 4))
    k.requires_grad_()
    memory_step(z[:, 0], k[:, 0], v[:, 0], initial)[0].sum().backward()
    torch.testing.assert_close(k.grad, torch.sigmoid(-z))


def test_gradients_through_shut_and_open_gates_are_finite_and_right():
    z = torch.tensor([math.inf, -1e4, 0.5], dtype=torch.float64).view(1, 3, 1, 1).repeat(2, 1, 3, 4)
    k, v, initial = torch.randn_like(z), torch.randn_like(z), torch.randn(2, 2, 3, 4).double()
    for x in (z, k, v, initial):
        x.requires_grad_()
    memory_scan(z, k, v, initial)[2].sum().backward()
    gate = 1 / (1 + math.exp(-0.5))
    wanted = torch.tensor([0.0, gate, 1 - gate], dtype=torch.float64).view(1, 3, 1, 1)
    torch.testing.assert_close(k.grad, wanted.expand_as(k))
    assert torch.equal(initial.grad, torch.zeros_like(initial))  # the open gate forgets it
    assert z.grad.isfinite().all() and not z.grad[:, :2].any()


def test_shapes_that_differ_are_refused_by_name():
    z = k = v = torch.zeros(2, 9, 3, 4)
    with pytest.raises(ValueError, match=r"one shape \(B, T, H, D\); got \(2, 9, 3, 4\).*\(2, 8"):
        memory_scan(z, k[:, :-1], v)


# Sizes for B · H · D · 2 = 12 numbers a token: segments that step together, tokens a tile.
@pytest.mark.parametrize(
    ("length", "operation", "tile", "tiles", "segments"),
    [
        (40, 1, 16 * 12, 3, {1}),  # the last tile is shorter
        (128, 48, 64 * 12, 2, {4}),
        (135, 48, 64 * 12, 3, {4, 1}),  # seven tokens too few for segments
        (97, 24, 32 * 12, 4, {2, 1}),
        (67, 48, 1000 * 12, 2, {4, 1}),  # three tokens that don't divide
        (1, 48, 64 * 12, 1, {1}),
    ],
)
def test_tiles_and_segments_change_nothing(monkeypatch, length, operation, tile, tiles, segments):
    module = importlib.import_module("ratplus_kernels.memory_scan")
    monkeypatch.setattr(module, "_OPERATION", operation)
    monkeypatch.setattr(module, "_TILE", tile)
    cut = list(module._tiles(length, 12))
    assert len(cut) == tiles and {n for _, n in cut} == segments
    generator = torch.Generator().manual_seed(length)
    draw = {"dtype": torch.float64, "generator": generator}
    z, k, v = (torch.randn(1, 3, length, 2, **draw).transpose(1, 2) for _ in range(3))
    given = [x.requires_grad_() for x in (z, k, v, torch.randn(2, 1, 3, 2, **draw))]
    ours, theirs = memory_scan(*given), loop(*given)
    torch.testing.assert_close(ours, theirs, **TOLERANCE[torch.float64])
    weights = [torch.randn(x.shape, **draw) for x in theirs]
    for x, y in zip(
        torch.autograd.grad(ours, given, weights),
        torch.autograd.grad(theirs, given, weights),
        strict=True,
    ):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-11)


def rope_of(positions, dim):
    angle = positions[..., None] * 100.0 ** -(torch.arange(dim // 2) / (dim // 2))
    angle = torch.cat((angle, angle), dim=-1)[:, :, None]  # (B or 1, T, 1, D)
    return angle.cos(), angle.sin()


@pytest.mark.parametrize("rows", [1, 2], ids=["one row of angles", "angles for each row"])
@pytest.mark.parametrize(("length", "size"), [(5, 4), (8, 4), (7, 2)])
def test_prefill_rotates_keys_and_sums_up_blocks(form, rows, length, size):
    h, d = 2, 8
    if GPU and form.kernel:
        size, h, d, length = 16 * size, 8, 128, 200 * length
    z, k, v, _ = form.inputs((2, length, h, d))
    rope = rope_of(torch.arange(length) + 3 * torch.arange(rows)[:, None], d)
    rope = tuple(x.to(form.device) for x in rope)
    k_out, v_out, state, blocks = memory_prefill(z, k, v, rope, size)
    wanted, v_true, state_true = loop(z, k, v)
    cos, sin = rope[0].double(), rope[1].double()
    rotated = torch.empty_like(wanted)
    for i in range(d // 2):
        x, y = wanted[..., i], wanted[..., i + d // 2]
        rotated[..., i] = x * cos[..., i] - y * sin[..., i]
        rotated[..., i + d // 2] = y * cos[..., i] + x * sin[..., i]
    for x, y in ((k_out, rotated), (v_out, v_true), (state, state_true)):
        near(x, y)
    for n in range(math.ceil(length / size)):
        block = rotated[:, n * size : (n + 1) * size]
        near(blocks.bounds[:, :, n, :d], block.amin(1))
        near(blocks.bounds[:, :, n, d:], block.amax(1))
        near(blocks.mean[:, :, n], block.mean(1))
        stored = k_out[:, n * size : (n + 1) * size]  # bounds hold for what is stored, exactly
        assert torch.equal(blocks.bounds[:, :, n, :d], stored.amin(1))
        assert torch.equal(blocks.bounds[:, :, n, d:], stored.amax(1))
    assert blocks.mean.shape == (2, h, math.ceil(length / size), d)


@pytest.mark.parametrize("size", [0, 3, 48])
def test_block_sizes_must_be_powers_of_two(size):
    x = torch.zeros(1, 4, 1, 4)
    with pytest.raises(ValueError, match="power of 2"):
        memory_prefill(x, x, x, (x, x), size)


@pytest.mark.parametrize("start", [False, True], ids=["from nothing", "from a state"])
def test_the_operator_says_truly_what_it_does(triton_device, start):
    """Its schema, its shapes without data, and its gradients, by torch's own checks."""
    from ratplus_kernels.memory_scan_triton import scan

    z, k, v = torch.randn(3, 2, 5, 2, 4, device=triton_device).requires_grad_().unbind(0)
    state = torch.randn(2, 2, 2, 4, device=triton_device).requires_grad_() if start else None
    torch.library.opcheck(scan, (z, k, v, state))

"""Eq. 1 against a float64 loop over every number."""

from __future__ import annotations

import importlib
import math

import pytest
import torch

from ratplus_kernels import memory_scan, memory_step

B, T, H, D = 2, 9, 3, 4
TOLERANCE = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    torch.float32: {"rtol": 1e-5, "atol": 1e-6},
    torch.bfloat16: {"rtol": 2**-7, "atol": 1e-6},  # one step of the output's own rounding
}


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


def loop(z, x, start):
    """h_t = g_t h_{t-1} + (1 − g_t) x_t for one stream: all states, (B, T, H, D) float64."""
    out = torch.empty(x.shape, dtype=torch.float64)
    batch, length, heads, dim = x.shape
    for b in range(batch):
        for h in range(heads):
            for d in range(dim):
                state = float(start[b, h, d])
                for t in range(length):
                    gate = sigmoid(float(z[b, t, h, d]))
                    state = gate * state + (1 - gate) * float(x[b, t, h, d])
                    out[b, t, h, d] = state
    return out


def inputs(length=T, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    z, k, v = (2 * torch.randn(B, length, H, D, generator=generator) for _ in range(3))
    initial = torch.randn(2, B, H, D, generator=generator)
    return z.to(dtype), k.to(dtype), v.to(dtype), initial


def check(z, k, v, initial, tolerance):
    start = torch.zeros(2, *k[:, 0].shape) if initial is None else initial
    k_out, v_out, state = memory_scan(z, k, v, initial)
    for out, wanted in ((k_out, loop(z, k, start[0])), (v_out, loop(z, v, start[1]))):
        assert out.dtype == k.dtype
        torch.testing.assert_close(out.double(), wanted, **tolerance)
    last = torch.stack((loop(z, k, start[0]), loop(z, v, start[1])))[:, :, -1]
    assert state.dtype == torch.promote_types(k.dtype, torch.float32)
    # The state is never rounded to the inputs' type.
    torch.testing.assert_close(state.double(), last, **TOLERANCE[state.dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("with_state", [False, True], ids=["from zero", "from a state"])
@pytest.mark.parametrize("length", [1, T])
def test_scan_is_the_float64_loop(dtype, with_state, length):
    z, k, v, initial = inputs(length, dtype)
    check(z, k, v, initial if with_state else None, TOLERANCE[dtype])


def test_views_of_a_fused_projection_give_what_their_copies_give():
    fused = torch.randn(B, T, 5 * H * D, generator=torch.Generator().manual_seed(1))
    z, k, v = (fused[..., i * H * D : (i + 1) * H * D].unflatten(-1, (H, D)) for i in (4, 2, 3))
    assert not (z.is_contiguous() or k.is_contiguous() or v.is_contiguous())
    check(z, k, v, None, TOLERANCE[torch.float32])
    heads_first = torch.randn(3, B, H, T, D).transpose(2, 3)
    check(*heads_first, None, TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("z", [-1e4, -math.inf])
def test_an_open_gate_passes_the_input_through_bitwise(dtype, z):
    _, k, v, initial = inputs(dtype=dtype)
    k_out, v_out, state = memory_scan(torch.full_like(k, z), k, v, initial)
    assert torch.equal(k_out, k) and torch.equal(v_out, v)
    assert torch.equal(state, torch.stack((k, v))[:, :, -1].float())


@pytest.mark.parametrize("z", [1e4, math.inf])
def test_a_shut_gate_holds_the_state_bitwise(z):
    _, k, v, initial = inputs()
    k_out, v_out, state = memory_scan(torch.full_like(k, z), k, v, initial)
    assert torch.equal(state, initial)
    assert torch.equal(k_out, initial[0, :, None].expand_as(k))
    assert torch.equal(v_out, initial[1, :, None].expand_as(v))


def test_a_long_run_of_tiny_gates_stays_finite():
    z = torch.full((1, 400, 1, 1), -30.0)  # the product of these gates underflows
    k = torch.randn(1, 400, 1, 1)
    check(z, k, -k, None, TOLERANCE[torch.float32])


def test_almost_shut_gates_keep_small_inputs():
    z = torch.full((1, 50, 1, 1), 20.0)  # 1 − g = 2e-9, which g in fp32 cannot hold
    ones = torch.ones_like(z)
    _, _, state = memory_scan(z, ones, ones)
    wanted = 1 - (1 - 1 / (1 + math.exp(20))) ** 50
    assert state.flatten().tolist() == pytest.approx([wanted, wanted], rel=1e-5)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_step_by_step_is_the_full_scan(dtype):
    z, k, v, initial = inputs(dtype=dtype)
    k_full, v_full, last = memory_scan(z, k, v, initial)
    state = initial
    for t in range(T):
        k_t, v_t, state = memory_step(z[:, t], k[:, t], v[:, t], state)
        assert k_t.shape == (B, H, D)
        torch.testing.assert_close(k_t, k_full[:, t], **TOLERANCE[dtype])
        torch.testing.assert_close(v_t, v_full[:, t], **TOLERANCE[dtype])
    torch.testing.assert_close(state, last, **TOLERANCE[state.dtype])


def test_inputs_are_left_as_they_were():
    tensors = inputs()
    before = [tensor.clone() for tensor in tensors]
    memory_scan(*tensors)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


def test_the_final_state_does_not_hold_on_to_the_sequence():
    *_, state = memory_scan(*inputs())
    assert state.untyped_storage().nbytes() == state.nbytes


@pytest.mark.parametrize("length", [1, 5])
def test_gradients_of_every_input_are_right(length):
    tensors = [x.double().requires_grad_() for x in inputs(length)]
    assert torch.autograd.gradcheck(memory_scan, tensors)


def test_gradients_through_shut_and_open_gates_are_finite_and_right():
    _, k, v, initial = (x.double() for x in inputs(3))
    z = torch.tensor([math.inf, -1e4, 0.5], dtype=torch.float64).view(1, 3, 1, 1).expand_as(k)
    z, k, v, initial = (x.clone().requires_grad_() for x in (z, k, v, initial))
    _, _, state = memory_scan(z, k, v, initial)
    state.sum().backward()
    gate = sigmoid(0.5)
    wanted = torch.tensor([0.0, gate, 1 - gate], dtype=torch.float64).view(1, 3, 1, 1)
    torch.testing.assert_close(k.grad, wanted.expand_as(k))
    assert torch.equal(initial.grad, torch.zeros_like(initial))  # the open gate forgets it
    assert z.grad.isfinite().all() and not z.grad[:, :2].any()


def test_shapes_that_differ_are_refused_by_name():
    z, k, v, _ = inputs()
    with pytest.raises(ValueError, match=r"one shape \(B, T, H, D\); got \(2, 9, 3, 4\).*\(2, 8"):
        memory_scan(z, k[:, :-1], v)


def plain(z, k, v, start):
    """Eq. 1 token by token, for autograd to differentiate."""
    states, state = [], start
    for t in range(z.shape[1]):
        gate = torch.sigmoid(z[:, t])
        state = gate * state + (1 - gate) * torch.stack((k[:, t], v[:, t]))
        states.append(state)
    every = torch.stack(states, dim=2)
    return every[0], every[1], state


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
    ours, theirs = memory_scan(*given), plain(*given)
    torch.testing.assert_close(ours, theirs, **TOLERANCE[torch.float64])
    weights = [torch.randn(x.shape, **draw) for x in theirs]
    for x, y in zip(
        torch.autograd.grad(ours, given, weights),
        torch.autograd.grad(theirs, given, weights),
        strict=True,
    ):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-11)

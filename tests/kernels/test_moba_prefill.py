"""MoBA's prefill against attention to a plainly chosen set of blocks, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from block_attention import attend, states

from ratplus_exp.methods import Engine, MoBA, States, Step
from ratplus_kernels import moba_prefill
from ratplus_kernels.moba_prefill import moba_prefill_torch

SHAPES = {
    "GQA": {"batch": 2, "length": 29, "block_size": 4, "top_k": 4},
    "MHA": {"kv_heads": 2, "length": 30, "block_size": 8, "top_k": 2},
    "odd sizes": {"heads": 3, "kv_heads": 1, "dim": 5, "length": 23, "block_size": 5, "top_k": 3},
    "wide heads": {"heads": 1, "kv_heads": 1, "dim": 20, "length": 18, "block_size": 4, "top_k": 3},
    "long blocks": {"heads": 1, "kv_heads": 1, "length": 250, "block_size": 80, "top_k": 2},
    "more than there is": {"length": 19, "block_size": 4, "top_k": 9},
    "less than a block": {"length": 3, "block_size": 4, "top_k": 2},
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def inputs(block_size, top_k, length, **sizes):
    return states(queries=length, length=length, **sizes)


def step_of(q):
    return Step(torch.arange(q.shape[2], device=q.device)[None])


def definition(q, k, v, block_size, top_k, means=None):
    """What models compute where no kernel runs."""
    engine = Engine(MoBA(block_size, top_k), recorder=lambda *_: None)
    return engine.prefill(States(q, k, v, step_of(q), representatives=means), layer=0)


def check(out, q, k, v, block_size, top_k, means=None):
    assert out.shape == q.shape and out.dtype == q.dtype
    group, compared = q.shape[1] // k.shape[1], 0
    means = means_of(k.double(), block_size) if means is None else means.double().nan_to_num()
    for b in range(len(q)):
        for h in range(q.shape[1]):
            keys, values = k[b, h // group], v[b, h // group]
            scores = q[b, h].double() @ means[b, h // group].T
            for i in range(q.shape[2]):
                wanted, margin = attend(q[b, h, i], keys, values, i, scores[i], block_size, top_k)
                if margin == 0 or margin > 1e-5 * float(scores[i].abs().max()):  # no near-tie
                    compared += 1
                    torch.testing.assert_close(out[b, h, i].double(), wanted, rtol=1e-5, atol=1e-5)
    assert compared > 0.8 * len(q) * q.shape[1] * q.shape[2]


def check_rows(out, q, k, v, block_size, top_k, means, rows, tolerance):
    """The same of some queries of a long prompt, all at once: one KV head, no ties."""
    q, out, k, v, means = (x.double() for x in (q[0, :, rows], out[0, :, rows], k, v, means))
    scores = q @ means[0, 0].T
    block = torch.arange(means.shape[2], device=q.device)
    own = rows[:, None] // block_size
    free = (block > 0) & (block < own)
    best = scores.masked_fill(~free, -torch.inf).sort(descending=True, stable=True)
    room = top_k - 1 - (own > 0).int()
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    chosen.scatter_(2, best.indices, ((block < room) & (best.values > -torch.inf)))
    chosen |= (block == 0) | (block == own)
    token = torch.arange(k.shape[2], device=q.device)
    seen = chosen[:, :, token // block_size] & (token <= rows[:, None])
    logits = (q @ k[0, 0].T / math.sqrt(q.shape[-1])).masked_fill(~seen, -torch.inf)
    edge = best.values.gather(2, room.clamp(max=len(block) - 1).expand(len(q), -1, -1))
    last = best.values.gather(2, (room - 1).clamp(0, len(block) - 1).expand(len(q), -1, -1))
    clear = (last - edge > 1e-5 * scores.abs().amax(2, keepdim=True)) | (edge == -torch.inf)
    clear |= room == 0
    assert clear.double().mean() > 0.8
    wanted = (logits.softmax(-1) @ v[0, 0]) * clear
    torch.testing.assert_close(out * clear, wanted, rtol=tolerance, atol=tolerance)


@pytest.fixture(params=["engine", "gathered", "gathered, a block at a time", "kernel"])
def form(request, monkeypatch):
    """A form of the operation, and the device of its inputs."""
    if request.param == "engine":
        return definition, "cpu"
    if request.param == "kernel":
        device = request.getfixturevalue("triton_device")
        return lambda q, k, v, *sizes: moba_prefill(q, k, v, **named(*sizes)), device
    if request.param != "gathered":
        monkeypatch.setitem(moba_prefill_torch.__globals__, "PAIRS", 1)
    return moba_prefill_torch, "cpu"


def named(block_size, top_k, means=None):
    return {"block_size": block_size, "top_k": top_k, "means": means}


@shapes
def test_every_form_is_right(shape, form):
    run, device = form
    q, k, v = inputs(**shape, device=device)
    size, top_k = shape["block_size"], shape["top_k"]
    check(run(q, k, v, size, top_k), q, k, v, size, top_k)


def test_half_precision_is_near_and_stays_half(form):
    run, device = form
    q, k, v = (x.half() for x in inputs(4, 30, length=60, device=device))
    # All blocks are chosen, so that rounding cannot change a selection.
    out, wanted = run(q, k, v, 4, 30), run(*(x.float() for x in (q, k, v)), 4, 30)
    assert out.dtype == torch.float16
    torch.testing.assert_close(out.float(), wanted.float(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("length", [44, 60])
def test_ties_go_to_the_lowest_block(form, length):
    run, device = form
    q, k, v = inputs(4, 5, length=length, integers=True, device=device)
    check(run(q, k, v, 4, 5), q, k, v, 4, 5)


def test_many_blocks_are_gated_in_segments(triton_device, monkeypatch):
    from ratplus_kernels import moba_prefill_triton as kernel

    monkeypatch.setattr(kernel, "SEGMENT", 32)
    q, k, v = inputs(1, 5, length=40, heads=1, kv_heads=1, device=triton_device)
    check(moba_prefill(q, k, v, block_size=1, top_k=5), q, k, v, 1, 5)


@pytest.mark.parametrize("room", [1, 40 * 2 * 8 * 4], ids=["spans", "heads"])
def test_partial_outputs_fit_their_room(triton_device, room):
    from ratplus_kernels.moba_prefill_triton import PLAN, moba_prefill_triton

    q, k, v = inputs(4, 4, length=40, heads=2, kv_heads=1, device=triton_device)
    out = moba_prefill_triton(q, k, v, None, 4, 4, PLAN._replace(room=room))
    check(out, q, k, v, 4, 4)


def means_of(k, size):
    return torch.stack([block.mean(2) for block in k.split(size, dim=2)], 2)


def test_nothing_behind_a_query_matters(form):
    run, device = form
    outs = []
    for filler in (1.0, -50.0):
        q, k, v = inputs(4, 3, length=30, device=device)
        k[:, :, 22:], v[:, :, 22:] = filler, filler
        outs.append(run(q, k, v, 4, 3)[:, :, :22])
    assert torch.equal(*outs)


def test_means_that_are_there_are_used(form):
    run, device = form
    q, k, v = inputs(4, 3, length=22, device=device)
    means = means_of(k, 4).flip(3)
    means[:, :, 5] = 0 if device == "cpu" else torch.nan  # unfinished
    check(run(q, k, v, 4, 3, means), q, k, v, 4, 3, means=means)


def test_gradients_go_through_the_engine(triton_device):
    # Packed: CUDA's attention to a mask takes rows of fp32 at multiples of 16 bytes alone.
    q, k, v = (x.contiguous() for x in inputs(4, 3, length=20, device=triton_device))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    assert moba_prefill(q, k, v, block_size=4, top_k=3) is None
    Engine(MoBA(4, 3)).prefill(States(q, k, v, step_of(q)), layer=0).sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in (q, k, v))


def test_no_room_for_the_forced_blocks_is_refused():
    with pytest.raises(ValueError, match="top_k=1 has no room"):
        moba_prefill(*inputs(4, 1, length=9), block_size=4, top_k=1)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("top_k", [16, "1/16"])
@pytest.mark.parametrize("length", [4100, 32_768, 131_072])
@pytest.mark.parametrize("block_size", [64, 128])
def test_real_shapes_on_a_gpu(dtype, top_k, length, block_size):
    real_shape(dtype, top_k, length, block_size, "cuda")


def real_shape(dtype, top_k, length, block_size, device):
    top_k = max(2, length // (16 * block_size)) if top_k == "1/16" else top_k
    q, k, v = inputs(block_size, top_k, length=length, dim=128, dtype=dtype, device=device)
    # Given, since in bf16 two sums may be rounded to two means, of other scores.
    means = means_of(k, block_size)
    out = moba_prefill(q, k, v, block_size=block_size, top_k=top_k, means=means)
    rows = torch.tensor([*range(0, length, length // 40), length - 1], device=device)
    tolerance = 1e-4 if dtype == torch.float32 else 2**-6
    check_rows(out, q, k, v, block_size, top_k, means, rows, tolerance)

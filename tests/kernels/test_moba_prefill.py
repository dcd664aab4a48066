"""MoBA's prefill against attention to a plainly chosen set of blocks, in float64."""

from __future__ import annotations

import pytest
import torch
from block_attention import attend, states

from ratplus_exp.methods import Engine, MoBA
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


def definition(q, k, v, block_size, top_k, means=None):
    """What models compute where no kernel runs."""
    engine = Engine(MoBA(block_size, top_k), recorder=lambda *_: None)
    return engine.prefill(q, k, v, None, layer=0, representatives=means)


def check(out, q, k, v, block_size, top_k, rows=None, tolerance=1e-5, near=1e-5):
    assert out.shape == q.shape and out.dtype == q.dtype
    group, compared = q.shape[1] // k.shape[1], 0
    rows = range(q.shape[2]) if rows is None else rows
    for b in range(len(q)):
        for h in range(q.shape[1]):
            keys, values = k[b, h // group], v[b, h // group]
            # In their own type, as a kernel has them.
            means = torch.stack([block.double().mean(0) for block in keys.split(block_size)])
            scores = q[b, h].double() @ means.to(k.dtype).double().T
            for i in rows:
                wanted, margin = attend(q[b, h, i], keys, values, i, scores[i], block_size, top_k)
                if margin == 0 or margin > near * float(scores[i].abs().max()):  # no near-tie
                    compared += 1
                    torch.testing.assert_close(
                        out[b, h, i].double(), wanted, rtol=tolerance, atol=tolerance
                    )
    assert compared > 0.8 * len(q) * q.shape[1] * len(rows)


@pytest.fixture(params=["engine", "gathered", "gathered, a block at a time"])
def torch_form(request, monkeypatch):
    if request.param == "engine":
        return definition
    if request.param != "gathered":
        monkeypatch.setitem(moba_prefill_torch.__globals__, "PAIRS", 1)
    return moba_prefill_torch


@shapes
def test_the_torch_forms_are_right(shape, torch_form):
    q, k, v = inputs(**shape)
    size, top_k = shape["block_size"], shape["top_k"]
    check(torch_form(q, k, v, size, top_k), q, k, v, size, top_k)


def test_ties_of_the_torch_forms_go_to_the_lowest_block(torch_form):
    q, k, v = inputs(4, 5, length=60, integers=True)
    check(torch_form(q, k, v, 4, 5), q, k, v, 4, 5)


@shapes
def test_the_kernel_is_right(triton_device, shape):
    q, k, v = inputs(**shape, device=triton_device)
    size, top_k = shape["block_size"], shape["top_k"]
    check(moba_prefill(q, k, v, block_size=size, top_k=top_k), q, k, v, size, top_k)


@pytest.mark.parametrize("form", ["engine", "kernel"])
def test_ties_go_to_the_lowest_block(triton_device, form):
    q, k, v = inputs(4, 5, length=44, integers=True, device=triton_device)
    if form == "engine":
        out = definition(q, k, v, 4, 5)
    else:
        out = moba_prefill(q, k, v, block_size=4, top_k=5)
    check(out, q, k, v, 4, 5)


def test_many_blocks_are_gated_in_segments(triton_device, monkeypatch):
    from ratplus_kernels import moba_prefill_triton as kernel

    monkeypatch.setattr(kernel, "SEGMENT", 32)
    q, k, v = inputs(1, 5, length=40, heads=1, kv_heads=1, device=triton_device)
    check(moba_prefill(q, k, v, block_size=1, top_k=5), q, k, v, 1, 5)


@pytest.mark.parametrize("form", ["engine", "kernel"])
def test_nothing_behind_a_query_matters(triton_device, form):
    q, k, v = inputs(4, 3, length=30, device=triton_device)
    outs = []
    for filler in (1.0, -50.0):
        k[:, :, 22:], v[:, :, 22:] = filler, filler
        if form == "engine":
            out = definition(q, k, v, 4, 3)
        else:
            out = moba_prefill(q, k, v, block_size=4, top_k=3)
        outs.append(out[:, :, :22])
    assert torch.equal(*outs)


@pytest.mark.parametrize("form", ["engine", "kernel"])
def test_means_that_are_there_are_used(triton_device, form):
    q, k, v = inputs(4, 3, length=22, device=triton_device)
    means = torch.stack([block.mean(2) for block in k.split(4, dim=2)], 2)
    means[:, :, 5] = torch.nan if form == "kernel" else 0  # unfinished
    if form == "engine":
        out = definition(q, k, v, 4, 3, means)
    else:
        out = moba_prefill(q, k, v, block_size=4, top_k=3, means=means)
    check(out, q, k, v, 4, 3)


def test_gradients_go_through_the_engine(triton_device):
    q, k, v = (x.requires_grad_() for x in inputs(4, 3, length=20, device=triton_device))
    assert moba_prefill(q, k, v, block_size=4, top_k=3) is None
    Engine(MoBA(4, 3)).prefill(q, k, v, None, layer=0).sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in (q, k, v))


def test_no_room_for_the_forced_blocks_is_refused():
    with pytest.raises(ValueError, match="top_k=1 has no room"):
        moba_prefill(*inputs(4, 1, length=9), block_size=4, top_k=1)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("top_k", [16, "1/16"])
@pytest.mark.parametrize("length", [4096, 4100, 32_768, 131_072])
@pytest.mark.parametrize("block_size", [64, 128])
def test_real_shapes_on_a_gpu(dtype, top_k, length, block_size):
    top_k = max(2, length // (16 * block_size)) if top_k == "1/16" else top_k
    sizes = {"length": length, "dim": 128, "dtype": dtype}
    q, k, v = inputs(block_size, top_k, **sizes, device="cuda")
    out = moba_prefill(q, k, v, block_size=block_size, top_k=top_k)
    rows = [*range(0, length, length // 40), length - 1]
    exact = dtype == torch.float32
    # A mean in bf16 may be rounded the other way, which moves scores by one part in 256.
    near, tolerance = (1e-5, 1e-4) if exact else (2e-3, 2**-6)
    check(out, q, k, v, block_size, top_k, rows, tolerance, near)

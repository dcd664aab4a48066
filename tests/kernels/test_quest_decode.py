"""Quest's decoding step against attention to a plainly chosen set of blocks, in float64."""

from __future__ import annotations

import pytest
import torch
from block_attention import attend, states

from ratplus_exp.methods import Engine, Quest, States, Step
from ratplus_kernels import quest_decode

SHAPES = {
    "GQA, several queries": {"batch": 2, "queries": 2, "length": 37, "block_size": 4, "top_k": 4},
    "MHA": {"kv_heads": 2, "length": 30, "block_size": 4, "top_k": 3},
    "odd sizes": {"heads": 3, "kv_heads": 1, "dim": 5, "length": 23, "block_size": 5, "top_k": 3},
    "blocks of one token": {"length": 9, "block_size": 1, "top_k": 4},
    "long blocks": {"heads": 1, "kv_heads": 1, "length": 290, "block_size": 80, "top_k": 3},
    "many blocks": {"length": 331, "block_size": 2, "top_k": 40},
    "forced blocks alone": {"length": 30, "block_size": 4, "top_k": 2},
    "more than there is": {"batch": 2, "length": 19, "block_size": 4, "top_k": 9},
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def inputs(block_size, top_k, **sizes):
    """Rows that end in different places: the first one at the last slot."""
    q, k, v = states(**sizes)
    batch, queries, length = len(q), q.shape[2], k.shape[2]
    last = [length - 1 - 11 * b for b in range(batch)]
    positions = torch.tensor([list(range(end - queries + 1, end + 1)) for end in last])
    return q, k, v, representatives(k, block_size), positions.to(q.device)


def definition(q, k, v, reps, positions, block_size, top_k):
    """What models compute where no kernel runs."""
    engine = Engine(Quest(block_size, top_k), recorder=lambda *_: None)
    return engine.decode(States(q, k, v, Step(positions), representatives=reps), layer=0)


def representatives(k, block_size):
    blocks = k.split(block_size, dim=2)
    low, high = (
        torch.stack([f(block, 2) for block in blocks], 2) for f in (torch.amin, torch.amax)
    )
    return torch.cat((low, high), dim=-1)


def check(out, q, k, v, reps, positions, block_size, top_k, tolerance=1e-5):
    assert out.shape == q.shape and out.dtype == q.dtype
    group, dim, compared = q.shape[1] // k.shape[1], q.shape[-1], 0
    for b in range(len(q)):
        for h in range(q.shape[1]):
            low, high = reps[b, h // group].double().split(dim, dim=-1)
            for i, position in enumerate(positions[b].tolist()):
                query = q[b, h, i].double()
                terms = torch.maximum(query * low, query * high)
                wanted, margin = attend(
                    query, k[b, h // group], v[b, h // group], position, terms.sum(-1),
                    block_size, top_k,
                )  # fmt: skip
                sizes = terms.abs().sum(-1)[: position // block_size]
                rounding = 1e-6 * max(sizes.tolist(), default=0.0)
                if margin == 0 or margin > rounding:  # no near-tie
                    compared += 1
                    torch.testing.assert_close(
                        out[b, h, i].double(), wanted, rtol=tolerance, atol=tolerance
                    )
    assert compared > 0.9 * q.shape[:3].numel()


def gathered(q, k, v, *others):
    """On slots of a longer cache, other slots of which are not read."""
    k, v = (torch.cat((x, torch.full_like(x, torch.nan)), 2)[:, :, : x.shape[2]] for x in (k, v))
    return kernel(q, k, v, *others)


def kernel(*states_and_sizes):
    *states, block_size, top_k = states_and_sizes
    return quest_decode(*states, block_size=block_size, top_k=top_k)


@pytest.fixture(params=[definition, gathered, kernel], ids=["engine", "gathered", "kernel"])
def form(request):
    """A form of the operation, and the device of its inputs."""
    if request.param is kernel:
        return kernel, request.getfixturevalue("triton_device")
    return request.param, "cpu"


@shapes
def test_every_form_is_right(shape, form):
    run, device = form
    args = inputs(**shape, device=device)
    size, top_k = shape["block_size"], shape["top_k"]
    check(run(*args, size, top_k), *args, size, top_k)


def test_ties_go_to_the_lowest_block(form):
    run, device = form
    args = inputs(batch=2, length=60, block_size=4, top_k=5, integers=True, device=device)
    check(run(*args, 4, 5), *args, 4, 5)


@pytest.mark.parametrize("programs", [1, 24, 512])
@pytest.mark.parametrize("fused", [2, 128], ids=["scored apart", "scored while selecting"])
def test_however_the_work_is_shared_out(triton_device, monkeypatch, programs, fused):
    from ratplus_kernels import quest_decode_triton as kernel

    monkeypatch.setattr(kernel, "PLAN", kernel.Plan(programs, scored=4))
    monkeypatch.setattr(kernel, "FUSED", fused)
    args = inputs(batch=2, length=41, block_size=4, top_k=5, device=triton_device)
    check(quest_decode(*args, block_size=4, top_k=5), *args, 4, 5)


def test_nothing_behind_a_query_is_read(triton_device):
    q, k, v, reps, positions = inputs(batch=2, length=41, block_size=4, top_k=4)
    for b, end in enumerate(positions[:, -1].tolist()):
        k[b, :, end + 1 :] = v[b, :, end + 1 :] = torch.nan
        reps[b, :, end // 4 :] = torch.nan  # the query's own block may be unfinished
    args = [x.to(triton_device) for x in (q, k, v, reps, positions)]
    check(quest_decode(*args, block_size=4, top_k=4), *args, 4, 4)


def test_no_room_for_the_forced_blocks_is_refused():
    with pytest.raises(ValueError, match="top_k=1 has no room"):
        quest_decode(*inputs(length=9, block_size=4, top_k=1), block_size=4, top_k=1)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("top_k", [16, "1/16"])
@pytest.mark.parametrize("length", [4096, 32_768, 131_072])
@pytest.mark.parametrize(("heads", "kv_heads"), [(32, 32), (32, 8)], ids=["MHA", "GQA"])
def test_real_shapes_on_a_gpu(dtype, top_k, length, heads, kv_heads):
    top_k = length // 1024 if top_k == "1/16" else top_k
    sizes = {"heads": heads, "kv_heads": kv_heads, "length": length, "dim": 128, "dtype": dtype}
    # Aligned, as caches are.
    args = [x.contiguous() for x in inputs(**sizes, block_size=64, top_k=top_k, device="cuda")]
    out = quest_decode(*args, block_size=64, top_k=top_k)
    check(out, *args, 64, top_k, tolerance=1e-5 if dtype == torch.float32 else 2**-7)

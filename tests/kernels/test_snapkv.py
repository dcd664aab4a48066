"""SnapKV's selection, in torch and in Triton, against a plain recipe in float64."""

from __future__ import annotations

import math

import pytest
import torch

from ratplus_exp.methods import Engine, SnapKV
from ratplus_kernels import attention_mass, gather_tokens

GPU = torch.cuda.is_available()
CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16] if GPU else [torch.float32]
# (B, query heads, KV heads, T, window, D)
SHAPES = [(2, 4, 2, 19, 3, 6), (1, 1, 1, 4, 4, 8)]
if GPU:
    SHAPES += [(1, 32, 32, 4096, 64, 128), (2, 32, 8, 10_000, 64, 128), (1, 8, 8, 131_072, 64, 128)]


@pytest.fixture(params=["torch", "triton"])
def device(request):
    return request.getfixturevalue("triton_device") if request.param == "triton" else CPU


def inputs(shape, dtype, device, seed=0):
    b, h, kv, t, w, d = shape
    generator = torch.Generator().manual_seed(seed)
    q = 2 * torch.randn(b, h, w, d, generator=generator)
    k, v = (torch.randn(b, t, kv, d, generator=generator) for _ in range(2))
    # Strided, as the model's caches may be.
    return tuple(x.to(device, dtype) for x in (q, k.transpose(1, 2), v.transpose(1, 2)))


def window_logits(q, k):
    """Causal scaled logits in float64, (B, H, W, T)."""
    w, t = q.shape[2], k.shape[2]
    k = k.double().repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    logits = torch.einsum("bhwd,bhtd->bhwt", q.double(), k) / math.sqrt(q.shape[-1])
    for i in range(w):
        logits[:, :, i, t - w + i + 1 :] = -math.inf
    return logits


def pooled_scores(q, k, pooling, kernel):
    """The score of every token before the window, (B, K, T − W) float64."""
    t = k.shape[2] - q.shape[2]
    mass = window_logits(q, k).softmax(-1).sum(2)[..., :t]
    mass = mass.unflatten(1, (k.shape[1], -1)).sum(2)
    half = kernel // 2
    padded = torch.nn.functional.pad(mass, (half, half))
    shifted = torch.stack([padded[..., i : i + t] for i in range(kernel)])
    return shifted.mean(0) if pooling == "avg" else shifted.amax(0)


def keep(q, k, v, top_k, pooling="avg", kernel=5):
    """What models keep: keys, values, and their positions."""
    method = SnapKV(top_k=top_k, window=q.shape[2], pooling=pooling, kernel=kernel)
    kept, _ = Engine(method).keep(q, k, v, 0)
    return *gather_tokens(k, v, kept), kept


def check(q, k, v, top_k, out, pooling, kernel):
    """Right tokens (ties within rounding excused), ascending, window last, and their own rows."""
    k_kept, v_kept, kept = out
    t, w = k.shape[2], q.shape[2]
    count = min(top_k, t)
    assert kept.shape == (*k.shape[:2], count)
    assert (kept.diff(dim=-1) > 0).all()
    assert (kept[..., count - w :] == torch.arange(t - w, t, device=kept.device)).all()
    scores = pooled_scores(q, k, pooling, kernel)
    best = kept[..., : count - w]
    if best.shape[-1]:
        worst_kept = scores.gather(-1, best).amin(-1)
        left_out = scores.scatter(-1, best, -math.inf).amax(-1)
        assert (worst_kept >= left_out - 1e-4 * scores.amax(-1)).all()
    for kept_rows, rows in ((k_kept, k), (v_kept, v)):
        for b in range(k.shape[0]):
            for head in range(k.shape[1]):
                assert torch.equal(kept_rows[b, head], rows[b, head, kept[b, head]])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_mass_is_the_windows_attention(device, shape, dtype):
    q, k, _ = inputs(shape, dtype, device)
    wanted = window_logits(q, k).softmax(-1).sum(2).unflatten(1, (k.shape[1], -1)).sum(2)
    torch.testing.assert_close(attention_mass(q, k).double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("pooling", "kernel"), [("avg", 5), ("max", 7), ("avg", 1)])
def test_keeps_the_window_and_what_it_attends_to(device, shape, dtype, pooling, kernel):
    q, k, v = inputs(shape, dtype, device)
    top_k = max(shape[4], shape[3] // 4 + shape[4])
    check(q, k, v, top_k, keep(q, k, v, top_k, pooling, kernel), pooling, kernel)


def test_a_budget_of_everything_keeps_everything(device):
    q, k, v = inputs(SHAPES[0], torch.float32, device)
    everything = torch.arange(19, device=device).expand(*k.shape[:3])
    for top_k in (19, 100):
        assert torch.equal(keep(q, k, v, top_k)[2], everything)
    for gathered, states in zip(gather_tokens(k, v, everything), (k, v), strict=True):
        assert torch.equal(gathered, states)


def test_a_budget_of_the_window_keeps_the_window(device):
    q, k, v = inputs(SHAPES[0], torch.float32, device)
    assert torch.equal(keep(q, k, v, 3)[0], k[:, :, -3:])


def test_of_equal_scores_the_earliest_stay(device):
    _, k, v = inputs((1, 1, 1, 12, 2, 4), torch.float32, device)
    q = torch.zeros(1, 1, 2, 4, device=device)  # every token it sees gets the same mass
    *_, kept = keep(q, k, v, 6, kernel=1)
    assert kept.flatten().tolist() == [0, 1, 2, 3, 10, 11]


def test_shapes_that_do_not_fit_are_refused():
    q, k, _ = inputs(SHAPES[0], torch.float32, CPU)
    with pytest.raises(ValueError, match="K dividing H"):
        attention_mass(q[:, :3], k)
    with pytest.raises(ValueError, match="needs as many keys"):
        attention_mass(q, k[:, :, :2])

"""How the methods call PyTorch's attention: with what keys, masks and back ends."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from engine_runs import attend, attend_by_hand, states
from torch.utils._python_dispatch import TorchDispatchMode

from ratplus_exp.methods import Dilated, Engine, MoBA, States, Step
from ratplus_exp.methods.dilated import DilatedAfterPrefix


@pytest.fixture
def calls(monkeypatch):
    """The calls of scaled_dot_product_attention: (keys, whether masked, whether grouped)."""
    calls = []
    attention = F.scaled_dot_product_attention

    def watched(q, k, v, attn_mask=None, is_causal=False, enable_gqa=False):
        calls.append((k.shape[2], attn_mask is not None, enable_gqa))
        return attention(q, k, v, attn_mask=attn_mask, is_causal=is_causal, enable_gqa=enable_gqa)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    return calls


def test_cudnn_which_plans_anew_for_every_length_is_off():
    assert not torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize("method", [Dilated(dilation=4, local=2, initial=1), MoBA(4, 4)], ids=str)
def test_no_call_has_both_a_mask_and_groups(calls, method):
    """CUDA's fused kernels take one of the two."""
    q, k, v = states(2)
    attend(Engine(method), q, k, v, [30, 9, 17], 3)
    assert any(masked for _, masked, _ in calls)
    assert not any(masked and grouped for _, masked, grouped in calls)


@pytest.mark.parametrize("sizes", [(4, 2, 1), (4, 9, 3), (3, 0, 0), (0, 3, 2), (50, 40, 1)])
def test_dilated_decoding_reads_what_the_pattern_sees(calls, sizes):
    method = Dilated(**dict(zip(("dilation", "local", "initial"), sizes, strict=True)))
    q, k, v = states(2, batch=2)
    engine = Engine(method)
    out, _ = attend(engine, q, k, v, [30, 30], 7)
    decoded = calls[-7:]
    attended = method.attended(torch.arange(30, 37)).tolist()
    assert decoded == [(keys, False, False) for keys in attended]
    torch.testing.assert_close(out, attend_by_hand(method, q, k, v, [30, 30], 7))


@pytest.mark.parametrize("prefix", [0, 7, 30])
def test_queries_of_a_dense_prefix_see_all_before_them(prefix):
    q, k, v = (x.double() for x in states(2, length=30))
    method = DilatedAfterPrefix(dilation=4, prefix=prefix)
    out = method.attend_prefill(States(q, k, v, Step(torch.arange(30)[None])))
    for t in range(30):
        where = [j for j in range(t + 1) if t < prefix or j == t or (j + 1) % 4 == 0]
        keys, values = (x[:, :, where].repeat_interleave(2, dim=1) for x in (k, v))
        weights = (keys @ q[:, :, t, :, None] / q.shape[-1] ** 0.5).softmax(dim=2)
        torch.testing.assert_close(out[:, :, t], (weights * values).sum(2))
    assert method.attended(torch.arange(30)).tolist() == [
        t + 1 if t < prefix else len({t, *range(3, t + 1, 4)}) for t in range(30)
    ]


def test_dilated_attention_is_one_graph():
    """In training each layer is compiled."""
    q, k, v = states(2, length=600)
    method = Dilated(dilation=64, local=64, initial=1)
    given = States(q, k, v, Step(torch.arange(600)[None]))
    compiled = torch.compile(method.attend_prefill, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(given), method.attend_prefill(given))


def test_dilated_training_takes_few_operations():
    """Slices of whole sequences would give as many gradients of full size."""
    counted = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            counted.append(str(op))
            return op(*args, **(kwargs or {}))

    q, k, v = (torch.randn(1, 1, 4096, 4, requires_grad=True) for _ in range(3))
    given = States(q, k, v, Step(torch.arange(4096)[None]))
    with Count():
        Dilated(dilation=64, local=64, initial=1).attend_prefill(given).sum().backward()
    assert len(counted) < 150

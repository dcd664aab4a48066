"""What generates through the kernels is what generates through the engine's masks."""

from __future__ import annotations

import pytest
import torch
from brute_force import seen
from test_in_model import generate

import ratplus_kernels
from ratplus_exp.methods import Dense, Dilated, Engine, MoBA, Quest, SnapKV, States, Step
from ratplus_exp.methods import dilated as dilated_module
from ratplus_exp.models import forward_pass

# Small, since the interpreter is slow.
SIZES = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
SELECT = {"memory_kind": "ema_fixed", "memory_on": "select", "gate_bias": (1.0, 8.0)}
NEW_TOKENS = 4  # from the sixth block into the seventh
METHODS = {
    "quest_decode": Quest(block_size=4, top_k=3),
    "moba_prefill": MoBA(block_size=4, top_k=3),
    "attention_mass": SnapKV(top_k=12, window=4),
}


@pytest.fixture(params=[(22, 22), (22, 9, 17)], ids=["alike", "of different length"])
def batch(request, make_ids, left_pad):
    """What to generate from, and how many tokens."""
    rows = [make_ids(1, n, seed=n + i)[0] for i, n in enumerate(request.param)]
    ids, mask = left_pad(rows)
    return {"ids": ids, "mask": mask, "count": NEW_TOKENS}


@torch.no_grad()
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("config", [{"memory": False}, SELECT], ids=["own keys", "other keys"])
def test_generates_through_its_kernel_as_without(
    make_model, monkeypatch, triton_device, batch, name, config
):
    """By the keys that it attends to, and by the memory's."""
    model = make_model(num_hidden_layers=1, **SIZES, **config)
    plain, through = Engine(METHODS[name]), Engine(METHODS[name])
    logits, tokens = generate(model, engine=plain, **batch)  # float64 never goes to a kernel
    called = []
    kernel = getattr(ratplus_kernels, name)
    monkeypatch.setattr(
        ratplus_kernels, name, lambda *a, **b: called.append(name) or kernel(*a, **b)
    )
    monkeypatch.setattr(Engine, "select_blocks", None)  # nothing may select beside the kernel
    model = model.to(triton_device, torch.float32)
    logits_through, tokens_through = generate(model, engine=through, **batch)
    assert called
    assert torch.equal(tokens_through, tokens)
    torch.testing.assert_close(logits_through, logits.float(), rtol=1e-4, atol=1e-4)
    rows = len(batch["ids"])
    torch.testing.assert_close(through.usage.fractions(rows), plain.usage.fractions(rows))


@pytest.fixture
def ratplus(make_model):
    return make_model(num_hidden_layers=1, **SIZES)


@pytest.fixture
def prefills(monkeypatch):
    """The results of `ratplus_kernels.memory_prefill`; representatives are found nowhere else."""
    results, prefill = [], ratplus_kernels.memory_prefill

    def watched(*args):
        monkeypatch.setattr(Engine, "block_representatives", None)
        results.append(prefill(*args))
        return results[-1]

    monkeypatch.setattr(ratplus_kernels, "memory_prefill", watched)
    return results


@torch.no_grad()
@pytest.mark.parametrize("name", ["quest_decode", "moba_prefill"])
@pytest.mark.parametrize("kind", ["gate", "ema_fixed"])
def test_one_pass_of_memory_rope_and_blocks_gives_the_same(
    make_model, triton_device, prefills, batch, name, kind
):
    lowest = 1.0 if kind == "ema_fixed" else 1.5
    ratplus = make_model(num_hidden_layers=1, memory_kind=kind, gate_bias=(lowest, 8.0), **SIZES)
    logits, tokens = generate(ratplus, engine=Engine(METHODS[name]), **batch)
    assert not prefills
    model = ratplus.to(triton_device, torch.float32)
    logits_through, tokens_through = generate(model, engine=Engine(METHODS[name]), **batch)
    assert len(prefills) == 1
    assert torch.equal(tokens_through, tokens)
    torch.testing.assert_close(logits_through, logits.float(), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["quest_decode", "moba_prefill"])
def test_one_pass_is_defined_as_the_separate_ones(ratplus, monkeypatch, prefills, batch, name):
    """With its torch definition in place of the kernel."""
    logits, tokens = generate(ratplus, engine=Engine(METHODS[name]), **batch)
    monkeypatch.setattr(forward_pass, "use_triton", lambda *tensors: True)
    logits_through, tokens_through = generate(ratplus, engine=Engine(METHODS[name]), **batch)
    assert len(prefills) == 1
    assert torch.equal(tokens_through, tokens)
    torch.testing.assert_close(logits_through, logits)


@pytest.mark.parametrize(
    "method", [Dense(), SnapKV(top_k=12, window=4), Quest(block_size=6, top_k=3)], ids=str
)
def test_one_pass_is_for_blocks_that_it_can_make(ratplus, make_ids, monkeypatch, prefills, method):
    monkeypatch.setattr(forward_pass, "use_triton", lambda *tensors: True)
    with torch.no_grad():
        ratplus(make_ids(1, 22), past_key_values=ratplus.new_cache(Engine(method)))
    quest = METHODS["quest_decode"]
    ratplus(make_ids(1, 22), past_key_values=ratplus.new_cache(Engine(quest)))  # with gradients
    with torch.no_grad():
        ratplus(make_ids(1, 22), use_cache=False, engine=Engine(quest))
    assert not prefills


@torch.no_grad()
@pytest.mark.parametrize(
    "variant",
    [{"memory_on": "k"}, {"shared_gate": False}, {"memory_kind": "conv"}, SELECT],
    ids=str,
)
def test_one_pass_is_for_the_memory_of_the_papers(
    make_model, make_ids, monkeypatch, prefills, variant
):
    monkeypatch.setattr(forward_pass, "use_triton", lambda *tensors: True)
    model = make_model(num_hidden_layers=1, **SIZES, **variant)
    model(make_ids(1, 22), past_key_values=model.new_cache(Engine(METHODS["quest_decode"])))
    assert not prefills


@torch.no_grad()
@pytest.mark.parametrize(
    "method", [METHODS["quest_decode"], METHODS["moba_prefill"], Dilated()], ids=str
)
def test_a_subclass_does_not_inherit_a_kernel_for_another_score(triton_device, method):
    other = type("Other", (type(method),), {})(**vars(method))
    q, k = torch.randn(2, 1, 2, 20, 8, device=triton_device)
    positions = torch.arange(20, device=triton_device)[None]
    bounds = torch.zeros(1, 2, 5, 16, device=triton_device)
    prompt = States(q, k, k, Step(positions))
    step = States(q[:, :, -1:], k, k, Step(positions[:, -1:]), None, bounds, all_seen=True)
    calls = {"attend_prefill": prompt, "attend_decode": step}
    own = [name for name, states in calls.items() if getattr(method, name)(states) is not None]
    assert own
    assert all(getattr(other, name)(calls[name]) is None for name in own)
    assert other.represent_blocks(None) is None


@pytest.mark.parametrize("length", [1, 5, 30, 47])
@pytest.mark.parametrize(("chunk", "at_once"), [(1, 2), (7, 16), (16, 1), (64, 16)])
@pytest.mark.parametrize(
    "sizes", [(4, 2, 1), (4, 9, 3), (3, 0, 0), (4, 2, 9), (0, 3, 2), (1, 2, 0), (50, 2, 1)]
)
def test_dilated_prefill_in_chunks_is_its_mask(monkeypatch, length, chunk, at_once, sizes):
    monkeypatch.setattr(dilated_module, "CHUNK", chunk)
    monkeypatch.setattr(dilated_module, "AT_ONCE", at_once)
    method = Dilated(**dict(zip(("dilation", "local", "initial"), sizes, strict=True)))
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, heads, length, 4, generator=generator, dtype=torch.float64)
        for heads in (4, 2, 2)
    )
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    position = torch.arange(length)
    mask = torch.zeros(length, length, dtype=torch.bool)
    for t in range(length):
        mask[t, seen(method, None, 0, t)] = True
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
    out = method.attend_prefill(States(q, k, v, Step(position[None])))
    torch.testing.assert_close(out, wanted)
    assert torch.equal(method.attended(position), mask.sum(-1))
    grads = [torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (out, wanted)]
    for grad, wanted_grad in zip(*grads, strict=True):
        torch.testing.assert_close(grad, wanted_grad)


def test_a_replayed_step_counts_its_own_tokens():
    """Its positions are one tensor, with another value in each step."""
    engine = Engine(Quest(4, 3))
    q, k, v = torch.randn(1, 2, 1, 8), *torch.randn(2, 1, 2, 16, 8)
    bounds, positions = engine.block_representatives(k), torch.tensor([[5]])
    counted = []
    for position in (5, 15):
        positions.fill_(position)
        for layer in (1, 2):
            given = States(q, k, v, Step(positions), None, bounds, all_seen=True)
            engine.decode(given, layer)
            counted.append(float(engine.usage.counts[-1][0]))
    assert counted == [6, 6, 12, 12]  # blocks of 4: two of two so far, then three whole ones

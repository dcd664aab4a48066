"""The memory as a module: state over calls and rows, where gates start, how far they reach."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

import kernels
from ratplus_exp.memory import KINDS, Gate, Memory, check_memory, effective_length

B, T, C, H, D = 3, 10, 6, 2, 4


def make(**settings):
    torch.manual_seed(0)
    module = Gate(C, H, D, **settings)
    module.initialize(1.0, (1.5, 8.0))
    return module.double()


@pytest.fixture
def memory():
    return make()


VARIANTS = [
    {},
    {"memory_on": "k"},
    {"memory_on": "v"},
    {"shared_gate": False},
]
every_variant = pytest.mark.parametrize("settings", VARIANTS, ids=str)


def inputs(length=T):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(B, length, C, generator=generator).double()
    k, v = torch.randn(2, B, length, H, D, generator=generator).double()
    return x, k, v


@every_variant
def test_follows_the_equation(settings):
    memory, (x, k, v) = make(**settings), inputs()
    gates = (x @ memory.weight.T + memory.bias).sigmoid().unflatten(-1, (-1, H, D))  # (B, T, ·)
    assert gates.shape[2] == (1 if settings.get("shared_gate", True) else 2)
    *out, _ = memory(x, k, v)
    for i, (name, plain) in enumerate({"k": k, "v": v}.items()):
        gate = gates[:, :, -i]  # the last is V's: the only one, or the second
        wanted, state = torch.empty_like(plain), torch.zeros_like(plain[:, 0])
        for t in range(T):
            state = gate[:, t] * state + (1 - gate[:, t]) * plain[:, t]
            wanted[:, t] = state
        assert_close(out[i], wanted if name in settings.get("memory_on", "kv") else plain)


@every_variant
def test_prefill_then_steps_equal_the_full_prefill(settings):
    memory = make(**settings)
    x, k, v = inputs()
    k_full, v_full, last = memory(x, k, v)
    k_part, v_part, state = memory(x[:, :6], k[:, :6], v[:, :6])
    ks, vs = [k_part], [v_part]
    for t in range(6, T):
        now = slice(t, t + 1)
        k_t, v_t, state = memory(x[:, now], k[:, now], v[:, now], state)
        ks.append(k_t)
        vs.append(v_t)
    assert_close(torch.cat(ks, 1), k_full)
    assert_close(torch.cat(vs, 1), v_full)
    assert_close(state, last)


@pytest.mark.parametrize(("length", "steps"), [(1, 1), (2, 0)])
def test_a_single_token_after_others_is_a_step(memory, monkeypatch, length, steps):
    called = []
    step = kernels.memory_step
    monkeypatch.setattr(kernels, "memory_step", lambda *a: called.append(a) or step(*a))
    x, k, v = inputs(length)
    *_, state = memory(x, k, v)
    assert not called
    memory(x, k, v, state)
    assert len(called) == steps


@every_variant
def test_a_right_padded_row_ends_in_the_state_of_the_row_alone(settings):
    memory = make(**settings)
    x, k, v = inputs()
    lengths = torch.tensor([T, 1, 6])
    k_out, v_out, state = memory(x, k, v, lengths=lengths)
    for row, length in enumerate(lengths.tolist()):
        one = slice(row, row + 1)
        alone = memory(x[one, :length], k[one, :length], v[one, :length])
        assert_close(k_out[one, :length], alone[0])
        assert_close(v_out[one, :length], alone[1])
        assert_close(state[:, one], alone[2])


def test_padding_is_held_from_a_given_state_too(memory):
    x, k, v = inputs()
    *_, before = memory(x, k, v)
    *_, state = memory(x, k, v, before, lengths=torch.tensor([0, 4, T]))
    assert torch.equal(state[:, 0], before[:, 0])
    assert_close(state[:, 1:2], memory(x[1:2, :4], k[1:2, :4], v[1:2, :4], before[:, 1:2])[2])


def test_gate_is_shared_by_keys_and_values_but_not_by_channels(memory):
    x, k, _ = inputs()
    k_out, v_out, _ = memory(x, k, k)
    assert torch.equal(k_out, v_out)
    z = memory.gate_logits(x)
    assert z.shape == (B, T, H, D)
    assert z[0, 0].unique().numel() == H * D


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"memory_on": "q"}, "memory_on=q is unknown: use kv, k or v"),
        ({"memory_on": "k", "shared_gate": False}, "one gate only: leave shared_gate=true"),
    ],
)
def test_variants_that_there_are_not_are_refused(settings, problem):
    with pytest.raises(ValueError, match=problem):
        Gate(C, H, D, **settings)


@pytest.mark.parametrize("shared_gate", [True, False])
def test_gates_start_at_the_effective_lengths_asked_for(shared_gate):
    memory = Gate(C, H, D, shared_gate=shared_gate)
    memory.initialize(0.0, (2.0, 16.0))  # zero weights
    gate = memory.gate_logits(torch.randn(1, 1, C)).sigmoid()[0, 0]
    wanted = torch.tensor([2.0, 4.0, 8.0, 16.0])  # even in the logarithm, the same in every head
    assert_close(1 / (1 - gate), wanted.expand_as(gate), rtol=1e-4, atol=0)
    assert len(gate) == (H if shared_gate else 2 * H)


def test_one_logit_starts_all_gates_alike_with_small_random_weights():
    memory = Gate(64, 8, 64)
    memory.initialize(0.02, -4.0)
    assert torch.equal(memory.bias, torch.full((8 * 64,), -4.0))
    assert float(memory.weight.detach().std()) == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("lengths", [(1.0, 8.0), (0.5, 8.0), (8.0, 2.0)])
def test_lengths_that_no_gate_has_are_refused(lengths):
    with pytest.raises(ValueError, match="1 < shortest <= longest"):
        Gate(C, H, D).initialize(0.02, lengths)


def reach(z):
    """Mean over positions of 1 + Σ_s w_{t,s} (t − s), one channel, gate logits z.

    The zero initial state is one more token, at position −1, with the weight Π g that is left.
    """
    gate = [1 / (1 + math.exp(-float(x))) for x in z]
    total = []
    for t in range(len(gate)):
        lag = 0.0
        for s in range(-1, t):
            own = 1 - gate[s] if s >= 0 else 1.0
            lag += own * math.prod(gate[s + 1 : t + 1]) * (t - s)
        total.append(1 + lag)
    return total


@pytest.mark.parametrize("shift", [-2.0, 0.0, 4.0])
def test_effective_length_is_the_double_sum_over_positions(shift):
    z = torch.randn(2, 12, H, D, generator=torch.Generator().manual_seed(2)) + shift
    mask = torch.rand(2, 12, generator=torch.Generator().manual_seed(3)) < 0.6
    everywhere, masked = effective_length(z), effective_length(z, mask)
    assert everywhere.shape == masked.shape == (H, D)
    for h in range(H):
        for d in range(D):
            lengths = torch.tensor([reach(z[b, :, h, d]) for b in range(2)])
            assert float(everywhere[h, d]) == pytest.approx(float(lengths.mean()), rel=1e-4)
            assert float(masked[h, d]) == pytest.approx(float(lengths[mask].mean()), rel=1e-4)


@pytest.mark.parametrize("length", [1.5, 4.0, 64.0])
def test_a_constant_gate_reaches_as_far_as_its_length_says(length):
    z = torch.full((1, 2000, 1, 1), math.log(length - 1))
    settled = torch.arange(2000)[None] > 1000
    assert float(effective_length(z, settled)) == pytest.approx(length, rel=1e-3)

"""The memory as a module: state over calls and rows, where gates start, how far they reach."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

import ratplus_kernels
from ratplus_exp.memory import KINDS, Gate
from ratplus_exp.memory.gate import effective_length
from ratplus_exp.models import config_for

B, T, C, H, D = 3, 10, 6, 2, 4


def make(kind="gate", **settings):
    torch.manual_seed(0)
    module = KINDS[kind](C, H, D, **settings)
    module.initialize(1.0, (1.0 if kind == "ema_fixed" else 1.5, 8.0))
    if kind in ("conv", "shift"):
        module.filter.data.normal_()
    return module.double()


@pytest.fixture
def memory():
    return make()


VARIANTS = [
    {},
    {"memory_on": "k"},
    {"memory_on": "v"},
    {"shared_gate": False},
    {"kind": "ema"},
    {"kind": "ema", "shared_gate": False},
    {"kind": "ema_fixed"},
    {"kind": "ema_fixed", "memory_on": "k"},
    {"kind": "conv"},
    {"kind": "conv", "memory_on": "k"},
    {"kind": "conv", "memory_on": "v"},
    {"kind": "shift"},
]
every_variant = pytest.mark.parametrize("settings", VARIANTS, ids=str)


def inputs(length=T):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(B, length, C, generator=generator).double()
    k, v = torch.randn(2, B, length, H, D, generator=generator).double()
    return x, k, v


@every_variant
def test_follows_the_equation(settings):
    """Token by token: Eq. 1 by gates of the input or constant ones, or a few taps."""
    memory, (x, k, v) = make(**settings), inputs()
    on = settings.get("memory_on", "kv")
    *out, _ = memory(x, k, v, None, None)
    for i, (name, plain) in enumerate({"k": k, "v": v}.items()):
        wanted, state = torch.zeros_like(plain), torch.zeros_like(plain[:, 0])
        for t in range(T):
            if settings.get("kind") in ("conv", "shift"):
                for lag, weight in enumerate(memory.filter[on.find(name)]):
                    if lag <= t:
                        wanted[:, t] += weight * plain[:, t - lag]
                continue
            z = memory.bias if memory.weight is None else x[:, t] @ memory.weight.T + memory.bias
            gates = z.sigmoid().unflatten(-1, (-1, H, D))
            assert gates.shape[-3] == (1 if settings.get("shared_gate", True) else 2)
            gate = gates[..., -i, :, :]  # the last is V's: the only one, or the second
            state = gate * state + (1 - gate) * plain[:, t]
            wanted[:, t] = state
        assert_close(out[i], wanted if name in on else plain)


def test_kinds_have_their_own_parameters_and_taps():
    shapes = {
        kind: {name: tuple(x.shape) for name, x in make(kind).named_parameters()} for kind in KINDS
    }
    assert shapes == {
        "gate": {"weight": (H * D, C), "bias": (H * D,)},
        "ema": {"bias": (H * D,)},
        "ema_fixed": {},
        "conv": {"filter": (2, 4, H, D)},
        "shift": {"filter": (2, 2, H, 1)},
    }
    assert make("ema_fixed").state_dict()["bias"].shape == (H * D,)


@every_variant
def test_gradients_are_those_of_finite_differences(settings):
    memory, (x, k, v) = make(**settings), inputs(4)
    parameters = list(memory.parameters())

    def run(k, v, *values):
        by_name = dict(zip(dict(memory.named_parameters()), values, strict=True))
        return torch.func.functional_call(memory, by_name, (x, k, v, None, None))

    assert torch.autograd.gradcheck(run, (k.requires_grad_(), v.requires_grad_(), *parameters))


@every_variant
def test_a_state_is_as_large_as_it_says(settings):
    memory = make(**settings)
    assert memory(*inputs(), None, None)[2].numel() == B * memory.state_size


@every_variant
def test_prefill_then_steps_equal_the_full_prefill(settings):
    memory = make(**settings)
    x, k, v = inputs()
    k_full, v_full, last = memory(x, k, v, None, None)
    k_part, v_part, state = memory(x[:, :6], k[:, :6], v[:, :6], None, None)
    ks, vs = [k_part], [v_part]
    for t in range(6, T):
        now = slice(t, t + 1)
        k_t, v_t, state = memory(x[:, now], k[:, now], v[:, now], state, None)
        ks.append(k_t)
        vs.append(v_t)
    assert_close(torch.cat(ks, 1), k_full)
    assert_close(torch.cat(vs, 1), v_full)
    assert_close(state, last)


@pytest.mark.parametrize(("length", "steps"), [(1, 1), (2, 0)])
def test_a_single_token_after_others_is_a_step(memory, monkeypatch, length, steps):
    called = []
    step = ratplus_kernels.memory_step
    monkeypatch.setattr(ratplus_kernels, "memory_step", lambda *a: called.append(a) or step(*a))
    x, k, v = inputs(length)
    *_, state = memory(x, k, v, None, None)
    assert not called
    memory(x, k, v, state, None)
    assert len(called) == steps


@every_variant
def test_a_right_padded_row_ends_in_the_state_of_the_row_alone(settings):
    memory = make(**settings)
    x, k, v = inputs()
    lengths = torch.tensor([T, 1, 6])
    k_out, v_out, state = memory(x, k, v, None, lengths)
    for row, length in enumerate(lengths.tolist()):
        one = slice(row, row + 1)
        alone = memory(x[one, :length], k[one, :length], v[one, :length], None, None)
        assert_close(k_out[one, :length], alone[0])
        assert_close(v_out[one, :length], alone[1])
        assert_close(state[:, one], alone[2])


@every_variant
def test_padding_is_held_from_a_given_state_too(settings):
    memory, (x, k, v) = make(**settings), inputs()
    *_, before = memory(x, k, v, None, None)
    *_, state = memory(x, k, v, before, torch.tensor([0, 4, T]))
    assert torch.equal(state[:, 0], before[:, 0])
    alone = memory(x[1:2, :4], k[1:2, :4], v[1:2, :4], before[:, 1:2], None)
    assert_close(state[:, 1:2], alone[2])


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"memory_kind": "lstm"}, "=lstm is unknown: use one of gate, ema, ema_fixed, conv, shift"),
        ({"memory_on": "q"}, "memory_on=q is unknown: use kv, k, v or select"),
        ({"memory_on": "k", "shared_gate": False}, "one gate only: leave shared_gate=true"),
        ({"memory_kind": "conv", "shared_gate": False}, "conv has no gate: leave shared_gate=true"),
        ({"memory_on": "select"}, "memory_kind=gate no gradient to learn from: use ema_fixed"),
    ],
)
@pytest.mark.parametrize("family", ["ratplus", "olmo2"])
def test_unknown_or_exclusive_settings_are_refused(family, settings, problem):
    with pytest.raises(ValueError, match=problem):
        config_for({"model_type": family} | settings, memory=True)


@pytest.mark.parametrize("shared_gate", [True, False])
@pytest.mark.parametrize(
    ("kind", "wanted"),
    [("gate", [2.0, 4, 8, 16]), ("ema", [2.0, 4, 8, 16]), ("ema_fixed", [1.0, 2, 4, 8])],
)
def test_gates_start_at_the_effective_lengths_asked_for(kind, wanted, shared_gate):
    memory = KINDS[kind](C, H, D, shared_gate=shared_gate)
    memory.initialize(0.0, (wanted[0], wanted[-1]))  # zero weights
    gate = memory.gate_logits(torch.randn(1, 1, C)).sigmoid()[0, 0]
    wanted = torch.tensor(wanted)  # even in the logarithm, the same in every head
    assert_close(1 / (1 - gate), wanted.expand_as(gate), rtol=1e-4, atol=0)
    assert len(gate) == (H if shared_gate else 2 * H)


def test_one_logit_starts_all_gates_alike_with_small_random_weights():
    memory = Gate(64, 8, 64)
    memory.initialize(0.02, -4.0)
    assert torch.equal(memory.bias, torch.full((8 * 64,), -4.0))
    assert float(memory.weight.detach().std()) == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("lengths", [(1.0, 8.0), (0.5, 8.0), (8.0, 2.0)])
def test_lengths_that_no_gate_has_are_refused(lengths):
    for kind in ("gate", "ema"):
        with pytest.raises(ValueError, match="1 < shortest <= longest"):
            KINDS[kind](C, H, D).initialize(0.02, lengths)


@pytest.mark.parametrize("lengths", [(0.5, 8.0), (8.0, 2.0)])
def test_lengths_that_no_fixed_rate_has_are_refused(lengths):
    with pytest.raises(ValueError, match="1 <= shortest <= longest"):
        KINDS["ema_fixed"](C, H, D).initialize(0.02, lengths)


def test_taps_start_as_the_identity_and_shifts_as_their_paper_says():
    x, k, v = inputs()
    for kind, std in (("conv", 0.0), ("conv", 1.0), ("shift", 0.0)):
        memory = KINDS[kind](C, H, D).double()
        memory.initialize(std, -4.0)
        k_out, v_out, _ = memory(x, k, v, None, None)
        assert torch.equal(k_out, k) and torch.equal(v_out, v)
    torch.manual_seed(0)
    shift = KINDS["shift"](C, 1000, D)
    shift.initialize(0.02, -4.0)
    now, before = shift.filter.detach().unbind(1)
    assert_close(now + before, torch.ones(2, 1000, 1))
    assert float(now.min()) >= 0 and float(now.max()) <= 1
    assert float(now.mean()) == pytest.approx(0.5, abs=0.05)
    assert float(now.std()) == pytest.approx(12**-0.5, rel=0.05)


def test_bf16_keys_are_filtered_in_fp32():
    memory, (x, k, v) = make("conv").float(), inputs()
    k_low, v_low, state = memory(x, k.bfloat16(), v.bfloat16(), None, None)
    wanted, *_ = memory(x, k.bfloat16().float(), v.float(), None, None)
    assert k_low.dtype == v_low.dtype == torch.bfloat16 and state.dtype == torch.float32
    assert torch.equal(k_low, wanted.bfloat16())


def test_statistics_of_taps_are_the_lag_of_their_weights():
    memory = KINDS["shift"](C, 1, D)
    memory.filter.data.copy_(torch.tensor([[1.0, 0.0], [-0.5, 1.5]])[..., None, None])
    found = memory.statistics(torch.empty(0), torch.empty(0))
    assert_close(found, {"length": torch.tensor([1.0, 1.75])[:, None, None]})


def test_statistics_of_rates_are_their_lengths():
    memory = KINDS["ema_fixed"](C, H, D)
    memory.initialize(0.0, (1.0, 64.0))
    found = memory.statistics(torch.randn(1, 2000, C), torch.arange(2000)[None] > 1000)
    assert_close(found["length"], torch.tensor([1.0, 4, 16, 64]).expand(H, D), rtol=1e-3, atol=0)
    assert float(found["gate"]) == pytest.approx((0 + 3 / 4 + 15 / 16 + 63 / 64) / 4)


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
    everywhere, masked = (effective_length(z, x) for x in (torch.ones_like(mask), mask))
    assert everywhere.shape == masked.shape == (H, D)
    for h in range(H):
        for d in range(D):
            lengths = torch.tensor([reach(z[b, :, h, d]) for b in range(2)])
            assert float(everywhere[h, d]) == pytest.approx(float(lengths.mean()), rel=1e-4)
            assert float(masked[h, d]) == pytest.approx(float(lengths[mask].mean()), rel=1e-4)

"""The controls of the memory in whole models: decoding, padding, saving, training, selecting."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tiny_models import TINY
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM

from ratplus_exp.memory import KINDS, Gate, Memory, gate_statistics
from ratplus_exp.methods import Engine, MoBA, Quest, SnapKV
from ratplus_exp.models import add_memory, config_for, new_model
from ratplus_exp.training.optimizer import adamw

every_kind = pytest.mark.parametrize("kind", KINDS)
FIXED = {"memory_kind": "ema_fixed", "gate_bias": (1.0, 8.0)}
SELECT = FIXED | {"memory_on": "select"}
SPARSE = [Quest(4, 3), MoBA(4, 3), SnapKV(top_k=12, window=4)]


def memories(model):
    return [module for module in model.modules() if isinstance(module, Memory)]


@pytest.fixture
def of_kind(make_model):
    """of_kind(kind, **config): a model whose memory is far from the identity."""

    def make(kind, **config):
        model = make_model(**{"memory_kind": kind} | config)
        for memory in memories(model):
            if not isinstance(memory, Gate):
                torch.nn.init.normal_(memory.filter)
        return model

    return make


@torch.no_grad()
@every_kind
def test_decoding_and_left_padding_equal_one_pass_over_each_row(of_kind, make_ids, left_pad, kind):
    model = of_kind(kind)
    rows, more = [make_ids(1, n, seed=n)[0] for n in (12, 1)], make_ids(2, 6)
    ids, mask = left_pad(rows)
    cache = model.new_cache()
    prompt = model(ids, mask, past_key_values=cache).logits
    parts = more.split([1, 4, 1], dim=1)
    steps = torch.cat([model(part, past_key_values=cache).logits for part in parts], dim=1)
    for i, row in enumerate(rows):
        whole = model(torch.cat((row, more[i]))[None], use_cache=False).logits[0]
        assert_close(prompt[i, mask[i] == 1], whole[: len(row)])
        assert_close(steps[i], whole[len(row) :])


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "config"),
    [*((kind, {}) for kind in KINDS), ("ema_fixed", SELECT)],
    ids=[*KINDS, "only selects"],
)
@pytest.mark.parametrize("method", SPARSE, ids=str)
def test_a_batch_generates_what_its_rows_do(of_kind, make_ids, left_pad, kind, config, method):
    """Beams too: what the cache holds moves with its row."""
    model = of_kind(kind, **config)
    rows = [make_ids(1, n, seed=n)[0] for n in (26, 9, 2)]
    ids, mask = left_pad(rows)
    for beams in (1, 2):
        settings = {"max_new_tokens": 7, "do_sample": False, "num_beams": beams}

        def generate(ids, mask, settings=settings):
            cache = model.new_cache(Engine(method))
            return model.generate(ids, attention_mask=mask, past_key_values=cache, **settings)

        tokens = generate(ids, mask)[:, 26:]
        for i, row in enumerate(rows):
            alone = generate(row[None], torch.ones_like(row[None]))
            assert torch.equal(tokens[i], alone[0, len(row) :])


@torch.no_grad()
@every_kind
@pytest.mark.parametrize("family", ["ratplus", "llama"])
def test_saved_loaded_and_added(make_ids, tmp_path, kind, family):
    ids, settings = make_ids(2, 12), {"memory_kind": kind, "gate_bias": (1.5, 8.0)}
    attention = new_model(config_for(TINY | {"model_type": family}, False), 0).eval()
    added = add_memory(attention, **settings)
    weights = added.state_dict()
    assert all(torch.equal(weights[name], x) for name, x in attention.state_dict().items())
    if not isinstance(memories(added)[0], Gate):
        assert torch.equal(added(ids).logits, attention(ids).logits)
    for tensor in added.state_dict().values():
        tensor.add_(0.1 * torch.rand_like(tensor))
    added.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).memory_kind == kind
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.state_dict().keys() == added.state_dict().keys() == weights.keys()
    assert torch.equal(loaded(ids).logits, added(ids).logits)
    fresh = new_model(config_for(TINY | {"model_type": family} | settings, True), 0)
    assert fresh.state_dict().keys() == weights.keys()


@every_kind
def test_gradients_reach_what_is_learned_at_the_memory_s_own_rate(make_model, make_ids, kind):
    model, ids = make_model(memory_kind=kind).train(), make_ids(2, 8)
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    mine = {id(p) for memory in memories(model) for p in memory.parameters()}
    assert bool(mine) == (kind != "ema_fixed")
    rates = SimpleNamespace(
        lr=1.0, memory_lr=2.0, weight_decay=0.1, decay="matrices", betas=(0.9, 0.95)
    )
    groups = adamw(model, rates).param_groups
    for group in groups:
        assert all((id(p) in mine) == (group["lr"] == 2.0) for p in group["params"])
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


@every_kind
def test_statistics_are_those_that_a_kind_has(of_kind, make_ids, left_pad, kind):
    model = of_kind(kind)
    ids, mask = left_pad([make_ids(1, 20)[0], make_ids(1, 7)[0]])
    found = gate_statistics(model, ids, mask)
    assert ("gate_mean" in found) == (kind not in ("conv", "shift"))
    longest = {"conv": 4, "shift": 2}.get(kind, 20)
    assert 1 < found["effective_memory_length_median"] < longest
    assert 1 < found["effective_memory_length"] < longest


# Keys to select by, and others to attend to.


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_memory_that_only_selects_is_dense_attention_bitwise(
    make_model, make_ids, left_pad, dtype
):
    attention = make_model(memory=False, dtype=dtype)
    select = make_model(dtype=dtype, **SELECT)
    missing, unexpected = select.load_state_dict(attention.state_dict(), strict=False)
    assert all(name.endswith("memory.bias") for name in missing) and not unexpected
    ids, mask = left_pad([make_ids(1, 20)[0], make_ids(1, 13)[0]])
    for use_cache in (False, True):
        both = [model(ids, mask, use_cache=use_cache).logits for model in (select, attention)]
        assert torch.equal(both[0][mask == 1], both[1][mask == 1])
    settings = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    assert torch.equal(select.generate(ids, **settings), attention.generate(ids, **settings))


@torch.no_grad()
@pytest.mark.parametrize("method", SPARSE, ids=str)
@pytest.mark.parametrize("family", ["ratplus", "llama", "olmo2", "qwen3"])
@pytest.mark.parametrize("position", ["after_norm", "before_norm"])
def test_selects_as_the_memory_and_attends_as_attention(make_ids, method, family, position):
    """In the first layer, whose input is the same for all: what is selected is what the model with
    the memory on keys and values selects, out of the attention model's keys and values."""
    place = {} if family == "ratplus" else {"memory_position": position}
    architecture = TINY | {"model_type": family, "num_hidden_layers": 1}
    attention = new_model(config_for(architecture, False), 0).double().eval()
    models = {
        "attention": attention,
        "memory": add_memory(attention, **FIXED, **place).eval(),
        "select": add_memory(attention, **SELECT, **place).eval(),
    }
    ids, selected, caches = make_ids(2, 30), {}, {}
    for name, model in models.items():
        those = selected[name] = []
        engine = Engine(method, recorder=lambda *seen, into=those: into.append(seen[-1]))
        caches[name] = model.new_cache(engine)
        for part in ids.split([25] + [1] * 5, dim=1):
            model(part, past_key_values=caches[name])
    assert all(map(torch.equal, selected["select"], selected["memory"]))
    assert not all(map(torch.equal, selected["select"], selected["attention"]))
    layers = {name: cache.layers[0] for name, cache in caches.items()}
    if method.phase == "decode":
        assert torch.equal(layers["select"].select_by, layers["memory"].keys)
    if method.phase != "once":
        assert torch.equal(layers["select"].keys, layers["attention"].keys)
        assert torch.equal(layers["select"].values, layers["attention"].values)


def test_a_memory_that_only_selects_trains_as_attention(make_model, make_ids):
    ids = make_ids(2, 8)
    grads = []
    for settings in ({"memory": False}, SELECT):
        model = make_model(**settings).train()
        model(ids, labels=ids).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    assert grads[0].keys() == grads[1].keys()
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])
    assert gate_statistics(model, ids)["gate_mean"] > 0

"""P2's checkpoints: written here in the released layout, converted, checked, damaged."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from p2_layout import to_p2
from tiny_models import backbones
from torch.nn.functional import gelu
from torch.testing import assert_close

from ratplus_exp.models import RatPlusConfig, RatPlusForCausalLM, config_for
from ratplus_exp.models.p2_checkpoint import from_p2, p2_shapes, read_p2

VOCABULARY, WIDTH, LAYERS, HEADS = 29, 32, 2, 4


def config(memory=True, **fields):
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
    }
    return RatPlusConfig(**sizes | fields, memory=memory)


def released(memory=True, dtype=torch.float64, prefix="", old_gate=False):
    """A state dict as P2's trainer leaves it; prefix and old_gate are its two variants."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return (0.3 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)

    state = {"embedding.wte.weight": draw(VOCABULARY, WIDTH)}
    for i in range(LAYERS):
        layer = f"backbone.layers.{i}.{prefix}"
        state[f"{layer}seq_layer.in_proj.weight"] = draw((5 if memory else 4) * WIDTH, WIDTH)
        if old_gate:
            rows = state[f"{layer}seq_layer.in_proj.weight"].split((4 * WIDTH, WIDTH))
            (
                state[f"{layer}seq_layer.in_proj.weight"],
                state[f"{layer}seq_layer.fgate_proj.weight"],
            ) = (x.clone() for x in rows)
        state[f"{layer}seq_layer.input_norm.weight"] = 1 + draw(WIDTH)
        state[f"{layer}seq_layer.out_proj.weight"] = draw(WIDTH, WIDTH)
        state[f"{layer}hidden_layer.fc1.weight"] = draw(4 * WIDTH, WIDTH)
        state[f"{layer}hidden_layer.fc2.weight"] = draw(WIDTH, 4 * WIDTH)
        state[f"{layer}hidden_layer.ln.weight"] = 1 + draw(WIDTH)
    state["backbone.ln.weight"] = 1 + draw(WIDTH)
    state["head.lm_head.weight"] = state["embedding.wte.weight"]
    return state


def save(path, state, **more):
    """A `.pth` with what else P2's trainer puts into it, its settings as an EasyDict."""
    module = types.ModuleType("easydict")
    module.EasyDict = type("EasyDict", (dict,), {"__module__": "easydict"})
    settings = module.EasyDict(model=module.EasyDict(backbone="sequence"), seed=1)
    settings.name = "set as an attribute"
    sys.modules["easydict"] = module
    try:
        torch.save({"config": settings, "step": 7, "optimizer": {}, "task": state} | more, path)
    finally:
        del sys.modules["easydict"]
    return path


def formulas(state, ids, memory):
    """Logits (T, V) of one row of ids, from P2's names and P1's equations alone."""
    length, size = len(ids), WIDTH // HEADS

    def norm(x, weight):
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight

    def rotated(x):  # (T, WIDTH); channel c of a head turns with channel c + size / 2
        x = x.view(length, HEADS, size)
        out = torch.empty_like(x)
        for t in range(length):
            for c in range(size // 2):
                angle = torch.tensor(t * 10_000.0 ** (-2 * c / size), dtype=torch.float64)
                first, second = x[t, :, c], x[t, :, c + size // 2]
                out[t, :, c] = first * angle.cos() - second * angle.sin()
                out[t, :, c + size // 2] = second * angle.cos() + first * angle.sin()
        return out

    def decayed(x, gate):
        rows, last = [], torch.zeros(WIDTH, dtype=torch.float64)
        for t in range(length):
            last = gate[t] * last + (1 - gate[t]) * x[t]
            rows.append(last)
        return torch.stack(rows)

    x = state["embedding.wte.weight"][ids]
    for i in range(LAYERS):
        layer = {
            name.removeprefix(f"backbone.layers.{i}."): weight
            for name, weight in state.items()
            if name.startswith(f"backbone.layers.{i}.")
        }
        shares = norm(x, layer["seq_layer.input_norm.weight"]) @ layer["seq_layer.in_proj.weight"].T
        o, q, k, v, *gate = shares.split(WIDTH, dim=-1)
        if memory:
            k, v = decayed(k, gate[0].sigmoid()), decayed(v, gate[0].sigmoid())
        q, k, v = rotated(q), rotated(k), v.view(length, HEADS, size)
        out = torch.zeros(length, HEADS, size, dtype=torch.float64)
        for t in range(length):
            for head in range(HEADS):
                scores = k[: t + 1, head] @ q[t, head] / size**0.5
                out[t, head] = scores.softmax(0) @ v[: t + 1, head]
        x = x + (o.sigmoid() * out.reshape(length, WIDTH)) @ layer["seq_layer.out_proj.weight"].T
        hidden = norm(x, layer["hidden_layer.ln.weight"]) @ layer["hidden_layer.fc1.weight"].T
        x = x + gelu(hidden) @ layer["hidden_layer.fc2.weight"].T
    return norm(x, state["backbone.ln.weight"]) @ state["head.lm_head.weight"].T


@backbones
def test_a_converted_model_computes_the_papers_formulas(tmp_path, make_ids, memory):
    state = released(memory)
    model = RatPlusForCausalLM(config(memory)).double().eval()
    model.load_state_dict(from_p2(read_p2(save(tmp_path / "7.pth", state)), config(memory)))
    ids = make_ids(1, 12)
    with torch.no_grad():
        logits = model(ids).logits[0]
    assert_close(logits, formulas(state, ids[0], memory), rtol=1e-5, atol=1e-5)  # RoPE in fp32


@backbones
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_there_and_back_is_bitwise(memory, dtype):
    state = released(memory, dtype)
    back = to_p2(from_p2(state, config(memory)), config(memory))
    assert back.keys() == state.keys()
    assert all(
        torch.equal(back[name], x) and back[name].dtype == dtype for name, x in state.items()
    )


def test_back_and_there_is_bitwise(make_model):
    model = make_model(num_key_value_heads=4, gate_bias=0.0)
    state = model.state_dict()
    again = from_p2(to_p2(state, model.config), model.config)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], x) for name, x in state.items())


@pytest.mark.parametrize(
    "variant",
    [{"prefix": "_orig_mod."}, {"old_gate": True}, {"prefix": "_orig_mod.", "old_gate": True}],
)
def test_compiled_and_older_files_hold_the_same_model(variant):
    wanted = from_p2(released(), config())
    found = from_p2(released(**variant), config())
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], x) for name, x in wanted.items())


@pytest.mark.parametrize(
    ("width", "layers", "heads", "memory", "billions"),
    [
        (2048, 24, 16, True, 1.47),
        (2560, 28, 20, True, 2.65),
        (4096, 32, 32, True, 7.65),
        (4096, 32, 32, False, 7.11),
    ],
)
def test_shapes_are_those_of_the_published_sizes(width, layers, heads, memory, billions):
    architecture = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }
    shape = config_for(architecture, memory)
    with torch.device("meta"):
        state = {name: torch.empty(size) for name, size in p2_shapes(shape).items()}
        model = RatPlusForCausalLM(shape)
    state["head.lm_head.weight"] = state["embedding.wte.weight"]
    ours = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    for layer in range(layers):
        attention = f"model.layers.{layer}.attention"
        assert ours[f"{attention}.in_proj.weight"] == (4 * width, width)
        assert (f"{attention}.memory.weight" in ours) == memory
    total = sum(x.numel() for name, x in state.items() if name != "head.lm_head.weight")
    assert round(total / 1e9, 2) == billions
    gates = layers * width if memory else 0  # our gates' biases
    assert sum(p.numel() for p in model.parameters()) == total + gates


# Damage, each kind by its own message.


def without(state, name):
    return {key: x for key, x in state.items() if key != name}


HEAD = "head.lm_head.weight"
FC1 = "backbone.layers.1.hidden_layer.fc1.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: without(s, FC1), rf"architecture: {FC1} is missing\. Choose the model"),
        (lambda s: s | {"backbone.extra": s[FC1]}, r"backbone\.extra is unexpected"),
        (lambda s: s | {FC1: s[FC1][1:]}, rf"{FC1} has shape \(127, 32\), not \(128, 32\)"),
        (
            lambda s: without(s, FC1) | {"a.b": s[FC1], "backbone.ln.weight": s[FC1]},
            rf"{FC1} is missing; a\.b is unexpected; backbone\.ln\.weight has shape",
        ),
        (
            lambda s: released(memory=False),
            "has no gate rows: choose a model with backbone=attention",
        ),
        (
            lambda s: s | {"head.lm_head.weight": s["head.lm_head.weight"] + 1},
            "differ, but this model ties",
        ),
    ],
)
def test_a_damaged_state_dict_is_refused_by_name(damage, message):
    with pytest.raises(ValueError, match=message):
        from_p2(damage(released()), config())


def test_gates_in_an_attention_model_are_refused():
    with pytest.raises(ValueError, match="has gate rows: choose a model with backbone=ratplus"):
        from_p2(released(), config(memory=False))


@pytest.mark.parametrize(
    "fields", [{"memory_on": "k"}, {"shared_gate": False}, {"memory_kind": "ema"}], ids=str
)
def test_variants_of_the_memory_have_no_place_in_the_layout(fields):
    with pytest.raises(ValueError, match="by one gate: see memory_kind, memory_on"):
        from_p2(released(), config(**fields))


def test_an_untied_head_is_taken_where_the_config_says_so():
    state = released() | {"head.lm_head.weight": torch.ones(VOCABULARY, WIDTH)}
    ours = from_p2(state, config(tie_word_embeddings=False))
    assert torch.equal(ours["lm_head.weight"], torch.ones(VOCABULARY, WIDTH))


class Bomb:
    def __reduce__(self):
        return (exec, ("raise AssertionError('code in a checkpoint was run')",))


def test_files_that_are_no_checkpoint_are_refused(tmp_path):
    path = save(tmp_path / "7.pth", released())
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"7\.pth is damaged .*download it again"):
        read_p2(path)
    torch.save({"model": released()}, path)
    with pytest.raises(ValueError, match="no state dict under 'task'"):
        read_p2(path)
    with pytest.raises(ValueError, match=r"more than tensors and settings .*'task' alone"):
        read_p2(save(path, released(), optimizer=Bomb()))
    with pytest.raises(ValueError, match="there is no .*none.pth: set checkpoint"):
        read_p2(tmp_path / "none.pth")

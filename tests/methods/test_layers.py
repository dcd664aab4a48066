"""A method for each layer, against each layer's definition in plain Python."""

import pytest
import torch
from brute_force import seen
from engine_runs import attend, attend_by_hand, states
from plain_python import rows_of

from ratplus_exp.methods import Dense, Dilated, Engine, Layers, MoBA, Quest, SnapKV
from ratplus_exp.methods.evicting import TOVA
from ratplus_exp.methods.exact import TopKTokens
from ratplus_exp.methods.kascade import Shared
from ratplus_exp.methods.snapkv import PyramidKV

EVERY = (
    *(Dense(), Dilated(dilation=4, local=2), Quest(4, 4), MoBA(4, 3), SnapKV(top_k=12, window=4)),
    *(TOVA(top_k=12), Dilated(dilation=2), TopKTokens(top_k=8)),
)
HYBRIDS = {  # with the queries that are counted: of the prompt (False), of decoding (True)
    "every": (EVERY, (False, True)),
    "dense and Quest": ((Dense(), Quest(4, 4)), (True,)),
    "MoBA and dense": ((MoBA(4, 3), Dense(), Dense()), (False,)),
    "MoBA and SnapKV": ((MoBA(4, 3), SnapKV(top_k=12, window=4)), (False, True)),
    "two dilations": ((Dilated(dilation=2), Dilated(dilation=8, local=3)), (False, True)),
}
STEPS, PROMPTS = 7, [30, 9, 17]


def layers(*methods):
    return Layers(layers=methods, names=tuple(type(method).__name__ for method in methods))


@pytest.mark.parametrize(("methods", "counted"), HYBRIDS.values(), ids=HYBRIDS)
@pytest.mark.parametrize("prompts", [PROMPTS, [30, 30, 30]], ids=["ragged", "alike"])
def test_each_layer_attends_as_its_method_is_defined(methods, counted, prompts):
    """And the usage is the fraction of all layers, over the queries that some layer is sparse
    for."""
    q, k, v = states(2)
    engine, read = Engine(layers(*methods)), [0.0] * 3
    rows = rows_of(q, k, v, prompts, STEPS)
    positions = [
        [t for t in range(row.prompt + STEPS) if (t >= row.prompt) in counted] for row in rows
    ]
    for layer, method in enumerate(methods):
        out, _ = attend(engine, q, k, v, prompts, STEPS, layer)
        wanted = attend_by_hand(method, q, k, v, prompts, STEPS)
        torch.testing.assert_close(out, wanted, equal_nan=True)
        for b, row in enumerate(rows):
            every = (len(seen(method, row, head, t)) for t in positions[b] for head in range(4))
            read[b] += sum(every) / 4 / len(methods)
    shares = [x / sum(t + 1 for t in row) for x, row in zip(read, positions, strict=True)]
    assert engine.usage.fractions(3).tolist() == pytest.approx(shares, rel=1e-6)


@torch.no_grad()
def test_a_model_with_one_method_in_every_layer_is_the_model_with_that_method(make_model, make_ids):
    ids = make_ids(2, 30)
    for memory in (False, True):
        model = make_model(memory=memory)
        for method in EVERY:
            logits = []
            for of_layer in (method, layers(method, method)):
                cache = model.new_cache(Engine(of_layer))
                parts = (ids[:, :21], *ids[:, 21:].split(1, dim=1))
                logits.append(torch.cat([model(x, past_key_values=cache).logits for x in parts], 1))
            assert torch.equal(*logits)


def test_lists_that_do_not_fit_a_model_are_refused():
    hybrid = layers(Dense(), Shared(top_k=8, every=2))
    with pytest.raises(ValueError, match="layer 1 reuses the selection of layer 0"):
        hybrid.check_layers(2)
    with pytest.raises(ValueError, match="lists 2 layers, but the model has 3"):
        hybrid.check_layers(3)
    pyramid, snapkv = PyramidKV(top_k=12, window=4), SnapKV(top_k=12, window=4)
    with pytest.raises(ValueError, match="select 59 instead of 48"):
        layers(pyramid, pyramid, snapkv, snapkv).check_layers(4)
    layers(snapkv, pyramid, pyramid, snapkv).check_layers(4)
    layers(*(PyramidKV(top_k=256, window=w) for w in (8, 16))).check_layers(4)
    layers(Shared(top_k=8, every=2), Shared(top_k=8, every=2), Dense(), Dense()).check_layers(8)

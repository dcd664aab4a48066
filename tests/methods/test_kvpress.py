"""What methods keep beside what kvpress's own code keeps (docs/kvpress.csv), on random tensors."""

import os
import subprocess
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest
import torch
from hydra.utils import get_class
from omegaconf import OmegaConf

from ratplus_exp.methods.__main__ import AGREEMENT, CONF, KVPRESS, ROOT
from ratplus_exp.methods.selection import Selection, grouped
from ratplus_exp.models.forward_pass import rotate
from ratplus_exp.models.modeling import _rope
from ratplus_exp.settings import build

PYTHON = Path(os.environ.get("KVPRESS_PYTHON", ROOT / ".venv-kvpress/bin/python"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.exists(), reason="run `make kvpress`, or set KVPRESS_PYTHON"),
]
LAYERS, BATCH, HEADS, LENGTH, DIM = 4, 2, 8, 256, 32
SIZES = {"top_k": 64, "window": 16}
KV_HEADS = (2, 8)
STATES = [(kv_heads, layer, True) for kv_heads in KV_HEADS for layer in range(LAYERS)]
WITHOUT_ROPE = ("TOVAPress()", "ObservedAttentionPress()", "ExpectedAttentionPress(n_sink=0)")


@pytest.fixture(scope="module")
def kvpress(tmp_path_factory):
    """(kept, scores) of kvpress by (press, arguments of `states`)."""
    jobs = [(row["press"], x) for row in AGREEMENT for x in STATES]
    jobs += [(press, (kv_heads, 0, False)) for press in WITHOUT_ROPE for kv_heads in KV_HEADS]
    given = [states(*x) | {"press": press, "top_k": SIZES["top_k"]} for press, x in jobs]
    folder = tmp_path_factory.mktemp("kvpress")
    torch.save(given, folder / "given.pt")
    script = Path(__file__).with_name("kvpress_presses.py")
    subprocess.run([PYTHON, script, folder / "given.pt", folder / "found.pt"], check=True)
    found = torch.load(folder / "found.pt")
    assert found["version"] == KVPRESS, "kvpress is not the version of the page: `make kvpress`"
    return dict(zip(jobs, found["results"], strict=True))


@pytest.mark.parametrize("row", AGREEMENT, ids=lambda row: row["press"])
def test_keeps_the_stated_share_of_what_kvpress_keeps(row, kvpress):
    method = method_of(row)
    ours = torch.cat([kept(method, states(*x)).flatten(0, 1) for x in STATES])
    theirs = torch.cat([kvpress[row["press"], x][0].flatten(0, 1) for x in STATES])
    equal, common = (ours == theirs).all(-1).double().mean(), (ours & theirs).sum() / ours.sum()
    measured = {"equal_sets": f"{100 * equal:.0f}", "common_tokens": f"{100 * common:.0f}"}
    assert row == row | measured


@pytest.mark.parametrize("kv_heads", KV_HEADS)
def test_scores_are_equal_but_for_the_stated_difference(kv_heads, kvpress):
    given, group = states(kv_heads, 0, False), HEADS // kv_heads
    tova, h2o, expected = (kvpress[press, (kv_heads, 0, False)][1] for press in WITHOUT_ROPE)
    mean = scores("tova", given).mean(1, keepdim=True) / group
    torch.testing.assert_close(tova[..., :-1], mean.expand_as(tova)[..., :-1])
    seen = torch.arange(LENGTH, 0, -1)  # by how many queries
    torch.testing.assert_close(h2o * seen, scores("h2o", given) / group)
    torch.testing.assert_close(expected, scores("expected_attention", given))


@cache
def states(kv_heads, layer, rope):
    """Queries before RoPE, keys and values, around a mean for each head, and RoPE's cosines and
    sines, beyond the last token."""
    generator = torch.Generator().manual_seed(layer)
    q, k, v = (
        torch.randn(BATCH, heads, LENGTH, DIM, generator=generator)
        + torch.randn(heads, 1, DIM, generator=generator)
        for heads in (HEADS, kv_heads, kv_heads)
    )
    cos, sin = (x[0, :, 0] for x in _rope(torch.arange(LENGTH + 512)[None] * rope, DIM, 1e4))
    return {"layer": layer, "layers": LAYERS, "q": q, "k": k, "v": v, "cos": cos, "sin": sin}


def method_of(row):
    cls = get_class(OmegaConf.load(CONF / f"{row['method']}.yaml").target)
    sizes = {field.name: SIZES[field.name] for field in fields(cls) if field.name in SIZES}
    own = OmegaConf.to_container(OmegaConf.from_dotlist(row["fields"].split()))
    return build(cls, sizes | own)


def scores(name, given):
    method = method_of({"method": name, "fields": ""})
    tokens = Selection(method).represent(given["k"], given["v"])
    observed = queries(given)[:, :, -method.observed :]
    return method.score(grouped(observed, tokens.shape[1]), tokens)[:, :, 0, 0]


def kept(method, given):
    """Our kept tokens (B, K, T) bool; a pattern's are those that the last query sees."""
    position = torch.arange(LENGTH)
    if not method.phase:
        return method.pattern(position[-1], position).expand(given["k"].shape[:3])
    selection = Selection(method, layers=LAYERS)
    tokens, _ = selection.keep(queries(given), given["k"], given["v"], given["layer"])
    return (tokens[..., None] == position).any(2)


def queries(given):
    return rotate(given["q"], (given["cos"][:LENGTH], given["sin"][:LENGTH]))

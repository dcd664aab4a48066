"""A new method as CONTRIBUTING.md adds it: one file and one YAML, and every stage runs it."""

import re
from pathlib import Path

import torch

from ratplus_exp.analysis import tidy
from ratplus_exp.config import method_of
from ratplus_exp.methods import Engine
from ratplus_exp.store import Store

DOCS = Path(__file__).parents[2] / "CONTRIBUTING.md"


def test_the_documented_method_runs(job, tiny_models, tmp_path, monkeypatch):
    code, config = re.findall(r"```(?:python|yaml)\n(.*?)```", DOCS.read_text(), re.DOTALL)[:2]
    (tmp_path / "extra").mkdir()
    (tmp_path / "extra" / "centroid.py").write_text(code)
    (tmp_path / "conf" / "method").mkdir(parents=True)
    yaml = config.replace("ratplus_exp.methods.centroid", "centroid")
    (tmp_path / "conf" / "method" / "centroid.yaml").write_text(yaml)
    monkeypatch.syspath_prepend(tmp_path / "extra")
    overrides = [
        f"hydra.searchpath=[file://{tmp_path / 'conf'}]",
        "method=centroid",
        "budget=1/4",
        f"model.path={tiny_models['ratplus']}",
        "model.sha256=null",
        "data.length=128",
        "data.tasks=[S-1]",
        "data.examples=2",
    ]
    cfg = job(*overrides)
    (row,) = tidy(Store(job.folder / "results")).itertuples()
    assert (row.method, row.budget, row.n) == ("centroid", "1/4", 2)
    assert 0 < row.budget_measured < 0.4

    method = method_of(cfg)
    torch.manual_seed(0)
    q, k = torch.randn(1, 2, 1, 4), torch.randn(1, 2, 128, 4)
    engine = Engine(method)
    blocks = engine.select_blocks(q, engine.block_representatives(k), torch.tensor([[127]]), 0)
    assert blocks.sum(-1).eq(method.top_k).all()

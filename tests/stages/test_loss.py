"""stage=loss against a model that runs over each document by hand."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch

from ratplus_exp.methods import Dilated, Engine
from ratplus_exp.models.loading import load_model, load_tokenizer, weights_digest
from ratplus_exp.report import drawing
from ratplus_exp.stages import sweep
from ratplus_exp.store import Store
from ratplus_exp.tasks import Forms
from ratplus_exp.text.facts import Facts

CELLS = "+stage.cells.of={method: dilated, dilation: [1, 4], local: [0, 8], initial: 0}"
CPU = torch.device("cpu")


def test_losses_are_those_of_the_documents_tokens(job, pair, tiny_models):
    job("stage=loss", *pair, CELLS, "data.examples=3")
    cells = list(Store(job.folder / "results").cells("loss"))
    assert len(cells) == 8
    with job.ready("stage=loss", *pair) as cfg:
        forms = Forms(**cfg.data.forms)
    for cell in cells:
        folder = tiny_models[cell.key["backbone"]]
        model, facts = load_model(folder, CPU), Facts(load_tokenizer(folder), forms, other_rate=0.0)
        sizes = {n: cell.key["settings"][n] for n in ("dilation", "local", "initial")}
        losses, recalled, last = [], [], []
        for index in range(3):
            ids, labels = map(torch.tensor, facts.batch("held-out/0", index, 1, 256))
            with torch.no_grad():
                out = model(ids, use_cache=False, engine=Engine(Dilated(**sizes))).logits
            nll = -out[0, :-1].double().log_softmax(-1)
            for t in range(255):
                loss = float(nll[t, ids[0, t + 1]])
                losses.append(loss)
                if labels[0, t] >= 0:
                    recalled.append((loss, int(out[0, t].argmax()) == int(ids[0, t + 1])))
                    last += [loss] if t >= 256 * 7 // 8 else []
        metrics = cell.metrics()
        assert metrics["all_loss"] == pytest.approx(np.mean(losses), abs=1e-4)
        assert metrics["all_perplexity"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-3)
        mean, right = np.mean(recalled, axis=0)
        assert metrics["recallable_loss"] == pytest.approx(mean, abs=1e-4)
        assert metrics["recallable_accuracy"] == pytest.approx(100 * right)
        assert metrics["recallable_by_bin"][-1] == pytest.approx(np.mean(last), abs=1e-4)
        seen = [
            sum((j + 1) % sizes["dilation"] == 0 or t - j <= sizes["local"] for j in range(t + 1))
            for t in range(256)
        ]
        read = sum(seen) / sum(range(257))
        assert metrics["budget_measured"] == pytest.approx(read, abs=1e-5)
    table = pd.read_csv(job.folder / "job" / "loss.csv")
    assert table["Method"].tolist()[1] == "dilated dilation=1 local=8" and len(table) == 8


def test_p2s_models_run_under_the_pattern_they_were_adapted_to(job, pair, tiny_models, monkeypatch):
    monkeypatch.setattr(drawing.plt, "close", (drawn := []).append)
    few = [f"stage.init={tiny_models['attention']}", "stage.schedule=[[256,64]]"]
    for local in (0, 8):
        sizes = ["stage.joint.dilation=4", f"stage.joint.local={local}"]
        job("experiment=pocket_dilated", *few, "stage.tokens_per_step=128", *sizes)
    cells = [f"stage.cells.{grid}.local=[0,8]" for grid in ("dilated", "adapted")]
    cells += ["stage.cells.dilated.dilation=[2,4]", "stage.cells.adapted.dilation=4"]
    words = ["experiment=p2_dilation", *pair, *cells, "pair.adapted=[pocket_ratplus_adapted]"]
    job(*words, "data.examples=1")
    losses = {}
    for cell in Store(job.folder / "results").cells("loss"):
        model = cell.key["model"].rpartition("_")[2]
        dilation, local = (cell.key["settings"].get(x, 0) for x in ("dilation", "local"))
        losses[model, dilation, local] = cell.metrics()
        if model == "adapted":
            trained = job.folder / f"training/pocket_ratplus_0_dilated{dilation}_{local}/model"
            assert weights_digest(trained).startswith(cell.key["checkpoint"])
    names = [x.rpartition("_")[2] for x in pd.read_csv(job.folder / "job" / "loss.csv")["Model"]]
    assert names == [*5 * ["attention/0"], *5 * ["ratplus/0"], *2 * ["adapted/0"]]
    lines = {"attention": "Attention", "ratplus": "RAT+", "adapted": "RAT+, pocket_ratplus_adapted"}
    for local, *panels in zip((0, 8), *(figure.axes for figure in drawn), strict=True):
        by_dilation, by_part = ({x.get_label(): x.get_ydata() for x in p.lines} for p in panels)
        for model, label in lines.items():
            places = [(0, 0), (2, local), (4, local)][2 * (model == "adapted") :]
            want = [losses[model, *place]["recallable_loss"] for place in places]
            np.testing.assert_allclose(by_dilation[label], want)
            parts = {label: (4, local)} | (
                {} if model == "adapted" else {f"{label}, dense": (0, 0)}
            )
            for line, place in parts.items():
                want = np.array(losses[model, *place]["recallable_by_bin"], float)
                np.testing.assert_allclose(by_part[line], want)
    for name in ("loss", "loss_by_position"):
        assert all((job.folder / "job" / f"{name}{x}").stat().st_size for x in (".png", ".pdf"))
    with pytest.raises(ValueError, match=r"no model.safetensors in .*_0_dilated16_0"):
        job(*words, "stage.cells.adapted.dilation=16")


def test_a_killed_run_goes_on_at_the_next_document(job, pair, monkeypatch):
    def killed(self, *args):
        monkeypatch.undo()
        raise KeyboardInterrupt

    words = ["stage=loss", *pair, CELLS, "data.examples=2", "data.batch_size=1"]
    monkeypatch.setattr(sweep.Loss, "metrics", killed)
    with pytest.raises(KeyboardInterrupt):
        job(*words)
    store = Store(job.folder / "results")
    (begun,) = store.cells("loss")
    lines = (begun.path / "samples.jsonl").read_text()
    assert len(lines.splitlines()) == 2 and not begun.done()
    job(*words)
    assert all(cell.done() == 2 for cell in store.cells("loss"))
    assert (begun.path / "samples.jsonl").read_text() == lines
    with pytest.raises(ValueError, match="would have 1 to 2 samples: set data.examples=2"):
        job("stage=loss", *pair, CELLS, "+stage.cells.more={method: dense}", "data.examples=1")
    both = "+stage.cells={a: {method: moba, selector: [topk, random]}}"
    job("stage=loss", *pair, "data.examples=1", "budget=1/4", both)
    methods = pd.read_csv(job.folder / "job" / "loss.csv")["Method"]
    assert methods.tolist() == 2 * ["moba top_k=16", "moba top_k=16 random"]


def test_a_corpus_and_layers_of_their_own(job, tiny_models, tmp_path, capsys):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("the grass is green. the sky is blue. " * 100)
    folder = tiny_models["attention"]
    corpus = [f"corpus.path={tmp_path / 'texts'}", f"corpus.folder={tmp_path / 'corpus'}"]
    job("stage=tokenize", "corpus=local", *corpus, f"stage.init={folder}")
    words = ["model=pocket_attention", f"model.path={folder}", "model.sha256=null"]
    words += ["stage=loss", "stage.workers=1", "+corpus=local", *corpus, "data.length=128"]
    with pytest.raises(ValueError, match="set data.examples="):
        job(*words, "method=dense")
    job(*words, "data.examples=2", "method=dilated", "method.dilation=[1,4]", "method.local=0")
    [cell] = Store(job.folder / "results").cells("loss")
    metrics = json.loads((cell.path / "metrics.json").read_text())
    assert metrics["all_loss"] > 0 and metrics["recallable_loss"] is None
    sparse = sum(j < 1 or (j + 1) % 4 == 0 or j == t for t in range(128) for j in range(t + 1))
    share = (1 + sparse / sum(range(129))) / 2
    assert metrics["budget_measured"] == pytest.approx(share, abs=1e-5)
    assert "[dilated dilation=1 initial=1, dilated dilation=4 initial=1]" in capsys.readouterr().out
    with pytest.raises(ValueError, match="leaves dense: use a pattern"):
        job(*words, "data.examples=2", "method=quest", "budget=1/4")
    with pytest.raises(ValueError, match="lists 3 layers, but the model has 2"):
        job(*words, "data.examples=2", "method=dilated", "method.dilation=[1,4,8]")

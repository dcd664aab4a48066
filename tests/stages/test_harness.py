"""lm-evaluation-harness under a method: the pipeline's own answers, scores and log-likelihoods."""

import json
import subprocess
import sys
import textwrap
from importlib import import_module

import pytest
import torch
from omegaconf import OmegaConf

from ratplus_exp.methods import Dense, Engine, MoBA
from ratplus_exp.models.loading import load_model, load_tokenizer
from ratplus_exp.provenance import REPOSITORY
from ratplus_exp.store import Store
from ratplus_exp.tasks import Forms, Ruler

lm_eval = pytest.importorskip("lm_eval", reason="pip install -e '.[lm-eval]' to run this")
TaskManager = import_module("lm_eval.tasks").TaskManager
Instance = import_module("lm_eval.api.instance").Instance
harness = import_module("ratplus_exp.harness")

FOLDER = REPOSITORY / "outputs/reference/pocket/models/ratplus/0"
WORDS = ("data=pocket", "budget=1/8")
TASKS = ("MK-2", "MV")
N = 3

GENERATE = """
    task: niah_{name}
    dataset_path: json
    dataset_kwargs: {{data_files: {{test: {folder}/{name}.jsonl}}, cache_dir: {folder}/cache}}
    test_split: test
    output_type: generate_until
    doc_to_text: prompt
    doc_to_target: "{{{{answers | join(', ')}}}}"
    generation_kwargs: {{max_gen_toks: 32, until: []}}
    process_results: !function scores.scores
    metric_list: [{{metric: exact, aggregation: mean}}, {{metric: substring, aggregation: mean}}]
"""
SCORES = """
    from ratplus_exp.tasks import exact, substring

    def scores(doc, results):
        answers = tuple(doc["answers"])
        return {f.__name__: f(results[0], answers, False) for f in (exact, substring)}
"""
CHOOSE = """
    task: niah_choose
    dataset_path: json
    dataset_kwargs: {{data_files: {{test: {folder}/MK-2.jsonl}}, cache_dir: {folder}/cache}}
    test_split: test
    output_type: multiple_choice
    doc_to_text: prompt
    doc_to_choice: choices
    doc_to_target: right
    metric_list: [{{metric: acc, aggregation: mean}}]
"""


@pytest.fixture(scope="module")
def samples():
    """The first N samples of each task, as `stage=eval` has them."""
    forms = Forms(**OmegaConf.load(REPOSITORY / "conf/data/pocket.yaml").forms)
    niah = Ruler(load_tokenizer(FOLDER), 1024, forms)
    return {task: [niah.sample(task, 0, i) for i in range(N)] for task in TASKS}


@pytest.fixture(scope="module")
def tasks(samples, tmp_path_factory):
    """A folder for `--include_path`: the samples and their tasks."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "scores.py").write_text(textwrap.dedent(SCORES))
    for name in TASKS:
        others = [sample.answers[0] for sample in samples[name]]
        lines = [
            {"prompt": x.prompt, "answers": x.answers, "choices": others, "right": i}
            for i, x in enumerate(samples[name])
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
        text = textwrap.dedent(GENERATE.format(name=name, folder=folder))
        (folder / f"{name}.yaml").write_text(text)
    (folder / "choose.yaml").write_text(textwrap.dedent(CHOOSE.format(folder=folder)))
    return folder


def evaluate(folder, names, *words):
    return lm_eval.simple_evaluate(
        model="ratplus",
        model_args=",".join((f"pretrained={FOLDER}", *WORDS, *words)),
        tasks=names,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        batch_size=2,
        device="cpu",
        bootstrap_iters=0,
    )


@pytest.mark.parametrize("method", ["dense", "quest", "moba", "snapkv"])
def test_answers_and_scores_are_those_of_stage_eval(job, tasks, method):
    found = evaluate(tasks, [f"niah_{task}" for task in TASKS], f"method={method}")
    job(*WORDS, f"method={method}", f"data.tasks=[{','.join(TASKS)}]", f"data.examples={N}")
    measured = []
    for cell in Store(job.folder / "results").cells("eval"):
        records = list(cell.records().values())
        name = f"niah_{cell.key['task']}"
        answers = {x["doc_id"]: x["filtered_resps"][0] for x in found["samples"][name]}
        assert [answers[i] for i in range(N)] == [x["prediction"] for x in records]
        for score in ("exact", "substring"):
            mean = sum(x[score] for x in records) / N
            assert found["results"][name][f"{score},none"] == pytest.approx(mean)
        measured += [x["budget_measured"] for x in records]
        assert method != "dense" or sum(x["exact"] for x in records) > 0
    budget = found["config"]["budget_measured"]
    assert budget == pytest.approx(sum(measured) / len(measured), abs=1e-5)
    assert (budget == 1) == (method == "dense")


@pytest.mark.parametrize("method", [Dense(), MoBA(block_size=16, top_k=8)])
def test_choices_are_scored_as_by_a_pass_of_each(samples, tasks, method):
    """Two at a time in the harness; here one at a time, token by token from all logits."""
    found = evaluate(tasks, ["niah_choose"], f"method={type(method).__name__.lower()}")
    model, tokenizer = load_model(FOLDER, torch.device("cpu")), load_tokenizer(FOLDER)
    choices = [x.answers[0] for x in samples["MK-2"]]
    for record in found["samples"]["niah_choose"]:
        prompt = samples["MK-2"][record["doc_id"]].prompt
        for choice, (scored, greedy) in zip(choices, record["filtered_resps"], strict=True):
            start, whole = (tokenizer.encode(x) for x in (prompt, f"{prompt} {choice}"))
            with torch.no_grad():
                cache = model.new_cache(Engine(method))
                logits = model(torch.tensor([whole]), past_key_values=cache).logits
            log_p = logits[0].log_softmax(-1)
            steps = range(len(start), len(whole))
            expected = sum(float(log_p[t - 1, whole[t]]) for t in steps)
            assert scored == pytest.approx(expected, abs=1e-3)
            assert greedy == all(int(log_p[t - 1].argmax()) == whole[t] for t in steps)


def test_a_method_changes_log_likelihoods_and_rolling_ones_are_sums(samples):
    text = samples["MV"][0].prompt
    request = Instance("loglikelihood_rolling", {}, (text,), 0)
    found = {}
    for method in ("dense", "moba"):
        model = harness.RatPlus(FOLDER, data="pocket", budget="1/8", method=method, device="cpu")
        (found[method],) = model.loglikelihood_rolling([request], disable_tqdm=True)
        ids = [model.tokenizer.eos_token_id, *model.tokenizer.encode(text)]
        with torch.no_grad():
            cache = model.model.new_cache(Engine(model.method))
            logits = model.model(torch.tensor([ids]), past_key_values=cache).logits
        log_p = logits[0].log_softmax(-1)
        expected = sum(float(log_p[t - 1, ids[t]]) for t in range(1, len(ids)))
        assert found[method] == pytest.approx(expected, rel=1e-4)
    assert abs(found["dense"] - found["moba"]) > 0.1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"selector": "random"}, "selector=random is not supported here: use topk"),
        ({"data.protocol": "split"}, "data.protocol=split is not supported here: use whole"),
        ({"cut": "right"}, "use left or middle"),
        ({"batch_size": "auto"}, "batch_size=auto: use a number"),
        ({"budget": "1/7"}, "1/7"),
        (
            {"method": "layers", "method.layers": "[quest,quest,moba]"},
            "lists 3 layers, but the model has 4",
        ),
        ({"data": "ruler"}, "data.length=4096 is more than the 1024 positions"),
    ],
)
def test_what_the_harness_cannot_have_is_refused(words, message):
    with pytest.raises(ValueError, match=message):
        harness.RatPlus(FOLDER, **{"data": "pocket", "device": "cpu"} | words)


@pytest.mark.parametrize("method", ["quest", "snapkv"])
def test_methods_that_leave_prompts_dense_have_no_log_likelihoods(tasks, method):
    with pytest.raises(ValueError, match="log-likelihoods are of prompt tokens"):
        evaluate(tasks, ["niah_choose"], f"method={method}")


def test_sampling_and_penalties_are_refused_and_long_prompts_cut():
    model = harness.RatPlus(FOLDER, data="pocket", device="cpu", cut="middle")
    rows, mask = model.tok_batch_encode(["the grass is green.", "sky"], left_truncate_len=4)
    ids = model.tok_encode("the grass is green.")
    assert rows[0].tolist() == ids[:2] + ids[-2:] and mask.tolist() == [[1] * 4, [0] * 3 + [1]]
    model.cut = "left"
    rows_left, _ = model.tok_batch_encode(["the grass is green."], left_truncate_len=3)
    assert rows_left[0].tolist() == ids[-3:]
    for option in ({"do_sample": True}, {"repetition_penalty": 1.2}):
        with pytest.raises(ValueError, match="decoding is greedy"):
            model._model_generate(rows, 8, [], attention_mask=mask, **option)


@pytest.mark.slow
def test_the_command_is_the_harness_own(tasks, tmp_path):
    words = ",".join((f"pretrained={FOLDER}", *WORDS, "method=moba"))
    command = (
        f"-m ratplus_exp.harness run --model ratplus --model_args {words} --tasks niah_choose "
    )
    command += f"--include_path {tasks} --output_path {tmp_path}/found.json --device cpu"
    out = subprocess.run([sys.executable, *command.split()], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr[-2000:]
    (file,) = tmp_path.rglob("*.json")
    config = json.loads(file.read_text())["config"]
    assert (config["budget"], config["method"]) == ("1/8", "MoBA(block_size=16, top_k=8)")

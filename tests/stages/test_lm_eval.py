"""Saved models under lm-evaluation-harness (`--model hf`), and what its hf model asks of them."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from transformers import AutoModelForCausalLM, Olmo2ForCausalLM

from ratplus_exp.models import add_memory, attach_engine
from ratplus_exp.models.loading import load_tokenizer
from ratplus_exp.models.saving import save_model

TEXTS = ["the grass is green.", "the sky is blue. the sun is", "here we go. the", "there and"]
CHOICES = [" blue.", " the sun is yellow."]


@pytest.fixture(scope="module")
def folders(tiny_models, stock_model, tmp_path_factory):
    """Saved models of each kind: P2's backbone, a family with the memory, a stock decoder."""
    root = tmp_path_factory.mktemp("lm_eval")
    tokenizer = load_tokenizer(tiny_models["ratplus"])
    folder = stock_model(Olmo2ForCausalLM, initializer_range=0.3, bos_token_id=None)
    stock = Olmo2ForCausalLM.from_pretrained(folder)
    save_model(add_memory(stock, gate_bias=1.0), tokenizer, root / "olmo2_ratplus")
    save_model(attach_engine(stock), tokenizer, root / "olmo2")
    ratplus = AutoModelForCausalLM.from_pretrained(tiny_models["ratplus"])
    save_model(ratplus, tokenizer, root / "ratplus")
    return {path.name: path for path in root.iterdir()}


def loglikelihood(model, tokenizer, text, choice):
    """Summed log-probability of a choice's tokens after a text, and whether each is the argmax."""
    start, whole = (tokenizer.encode(x, add_special_tokens=False) for x in (text, text + choice))
    with torch.no_grad():
        log_p = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    steps = range(len(start), len(whole))
    greedy = all(int(log_p[t - 1].argmax()) == whole[t] for t in steps)
    return sum(float(log_p[t - 1, whole[t]]) for t in steps), greedy


@pytest.mark.parametrize("name", ["ratplus", "olmo2_ratplus", "olmo2"])
def test_rows_padded_on_the_right_without_a_mask_score_as_alone(folders, name):
    """The harness scores in batches like this: pads behind each row, and no attention mask."""
    model = AutoModelForCausalLM.from_pretrained(folders[name]).eval()
    tokenizer = load_tokenizer(folders[name])
    rows = [tokenizer.encode(text + CHOICES[1], add_special_tokens=False) for text in TEXTS]
    batch = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for i, row in enumerate(rows):
        batch[i, : len(row)] = torch.tensor(row)
    with torch.no_grad():
        together = model(batch).logits
        for i, row in enumerate(rows):
            alone = model(torch.tensor([row])).logits[0]
            torch.testing.assert_close(together[i, : len(row)], alone, rtol=1e-4, atol=1e-4)


def test_a_fresh_process_loads_by_trust_remote_code(folders, tmp_path):
    """Nothing but transformers is imported there: the saved folders name the classes."""
    code = """
        import sys, torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        for folder in sys.argv[1:]:
            model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
            tokenizer.padding_side = "left"
            batch = tokenizer(["the sky", "the grass is green."], padding=True, return_tensors="pt")
            new = model.generate(**batch, max_length=12, do_sample=False, use_cache=True)
            print(type(model).__name__, new.tolist())
    """
    chosen = [folders["ratplus"], folders["olmo2_ratplus"]]
    out = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *chosen],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_MODULES_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
    )
    assert out.returncode == 0, out.stderr[-2000:]
    for folder, line in zip(chosen, out.stdout.strip().split("\n")[-2:], strict=True):
        kind, tokens = line.split(" ", 1)
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        assert kind == type(model).__name__
        batch = load_tokenizer(folder)(
            ["the sky", "the grass is green."], padding=True, return_tensors="pt"
        )
        new = model.generate(**batch, max_length=12, do_sample=False)
        assert json.loads(tokens) == new.tolist()


def test_the_harness_itself(folders, tmp_path):
    """A local task of two choices, scored by the harness and by hand."""
    lm_eval = pytest.importorskip("lm_eval", reason="pip install lm_eval to run this")
    from lm_eval.tasks import TaskManager

    model = AutoModelForCausalLM.from_pretrained(folders["olmo2_ratplus"]).eval()
    tokenizer = load_tokenizer(folders["olmo2_ratplus"])
    right = 0
    with (tmp_path / "colours.jsonl").open("w") as file:
        for i, text in enumerate(TEXTS):
            scores = [loglikelihood(model, tokenizer, text, choice)[0] for choice in CHOICES]
            right += int(scores[i % 2] > scores[1 - i % 2])
            file.write(json.dumps({"text": text, "choices": CHOICES, "answer": i % 2}) + "\n")
    (tmp_path / "colours.yaml").write_text(
        textwrap.dedent(
            f"""
            task: colours
            dataset_path: json
            dataset_kwargs: {{data_files: {{test: {tmp_path / "colours.jsonl"}}}}}
            test_split: test
            output_type: multiple_choice
            doc_to_text: "{{{{text}}}}"
            doc_to_choice: choices
            doc_to_target: answer
            target_delimiter: ""
            metric_list: [{{metric: acc}}]
            """
        )
    )
    results = lm_eval.simple_evaluate(
        model="hf",
        model_args=f"pretrained={folders['olmo2_ratplus']},trust_remote_code=True,dtype=float32",
        tasks=["colours"],
        task_manager=TaskManager(include_path=str(tmp_path)),
        batch_size=2,
        device="cpu",
        bootstrap_iters=0,
    )
    assert results["results"]["colours"]["acc,none"] == pytest.approx(right / len(TEXTS))

"""The recipe of the pocket pair on an OLMo2 that transformers saved: text to tokens, the memory
added, joint continued pretraining, fine-tuning, evaluation."""

import json

import torch

from ratplus_exp.models import Olmo2RatPlusForCausalLM
from ratplus_exp.models.loading import load_model
from ratplus_exp.results import Store, tidy


def test_olmo2_takes_the_same_path_as_the_pocket_pair(job, tiny_models, tmp_path):
    from transformers import Olmo2Config, Olmo2ForCausalLM

    from ratplus_exp.models.loading import load_tokenizer

    tokenizer = load_tokenizer(tiny_models["attention"])
    torch.manual_seed(0)
    config = Olmo2Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    start = tmp_path / "olmo2"
    Olmo2ForCausalLM(config).save_pretrained(start)
    tokenizer.save_pretrained(start)
    texts = tmp_path / "texts"
    texts.mkdir()
    lines = [{"text": f"the grass is green. the {i} sky is blue. here we go."} for i in range(60)]
    (texts / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    both = ["model=olmo2_1b_ratplus", "data=pocket"]
    corpus = ["corpus=local", f"corpus.path={texts}", f"stage.init={start}"]
    small = ["stage.tokens_per_step=128", "stage.optimizer.log_every=1"]
    small += ["stage.optimizer.checkpoint_every=2", "stage.optimizer.rows_per_pass=2"]
    job("stage=tokenize", *both, *corpus, "stage.workers=1")
    joint = ["stage.schedule=[[512,32]]", "stage.joint={dilation:4,local:4,initial:1}"]
    job("stage=continued_pretrain", *both, *corpus, *small, *joint)
    folder = job.folder / "training" / "olmo2_1b_ratplus_continued"
    model = load_model(folder / "model", torch.device("cpu"))
    assert type(model) is Olmo2RatPlusForCausalLM
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert all({"sparse_loss", "loss", "gate_mean"} <= row.keys() for row in rows)
    assert all(row["gate_mean"] < 0.05 for row in rows)  # −4 is 0.018
    job(
        "stage=sft",
        *both,
        *small,
        f"stage.init={folder / 'model'}",
        "stage.schedule=[[512,128]]",
        "stage.mixture={S-1: 1}",
    )
    trained = job.folder / "training" / "olmo2_1b_ratplus_sft" / "model"
    few = ["data.tasks=[S-1]", "data.examples=2", "budget=1/4"]
    job(*both, f"model.path={trained}", "data.length=128", *few)
    cells = tidy(Store(job.folder / "results"))
    assert set(cells["n"]) == {2} and cells["effective_memory_length"].notna().all()

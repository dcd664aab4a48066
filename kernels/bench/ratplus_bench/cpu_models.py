"""Prefill and decoding of models on one CPU thread, beside transformers' own: `make bench-cpu`.

The pocket pair in batches of 25, and Llama's shape with 135M parameters (random weights), with
fewer layers for longer prompts, so that none takes minutes. SnapKV's examples stand beside
kvpress's, where `make kvpress` has installed it.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ratplus_bench.models import measure
from ratplus_bench.timing import Machine, Row
from ratplus_exp.methods import Dense, Engine, Method, MoBA, Quest, SnapKV
from ratplus_exp.models.hf import attach_engine
from ratplus_exp.models.loading import load_model
from ratplus_exp.models.prefill import PromptBatch
from ratplus_exp.provenance import REPOSITORY

POCKET = REPOSITORY / "outputs/reference/pocket/models"
LLAMA = {
    "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9,
    "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49_152, "tie_word_embeddings": True,
}  # fmt: skip
LENGTHS = {1024: 30, 4096: 10, 16_384: 2}  # tokens, and the model's layers
EXAMPLES = "an example on a CPU: prompt, SnapKV, answer"
KVPRESS = Path(os.environ.get("KVPRESS_PYTHON", REPOSITORY / ".venv-kvpress/bin/python"))


@torch.inference_mode()
def rows(machine: Machine) -> Iterator[Row]:
    """Every model and length: dense, Quest and MoBA at 1/16, transformers with SDPA."""
    for name in ("attention", "ratplus"):
        model = load_model(POCKET / name / "0", machine.device)
        prompts = (2 if machine.dry else 25, 992)
        case = f"pocket {name} B={prompts[0]} T={prompts[1]}"
        for form, method in _methods(992, block=16).items():
            yield from measure(model, method, prompts, case, form, machine)
    for length, layers in ({64: 1} if machine.dry else LENGTHS).items():
        config = LlamaConfig(**LLAMA, num_hidden_layers=layers)
        model, case = LlamaForCausalLM(config).eval(), f"Llama, {layers} layers T={length}"
        others = [*measure(model, None, (1, length), case, "transformers, SDPA", machine)]
        attach_engine(model)
        for form, method in _methods(length, block=64).items():
            yield from measure(model, method, (1, length), case, form, machine)
        yield from others
    yield from _examples(machine)


def _methods(length: int, block: int) -> dict[str, Method]:
    blocks = max(2, length // block // 16)
    sparse = {"block_size": block, "top_k": blocks}
    return {"dense": Dense(), "MoBA 1/16": MoBA(**sparse), "Quest 1/16": Quest(**sparse)}


def _examples(machine: Machine) -> Iterator[Row]:
    """SnapKV for whole examples, in a batch and one by one, ours and kvpress's."""
    length, top_k, window, answer = (64, 16, 8, 2) if machine.dry else (1024, 256, 64, 32)
    config = LLAMA | {"num_hidden_layers": 1 if machine.dry else LENGTHS[1024]}
    model = LlamaForCausalLM(LlamaConfig(**config)).eval()
    attach_engine(model)
    engine, batches = Engine(SnapKV(top_k=top_k, window=window)), [4, 1]

    def run(batch: int) -> None:
        ids, cache = torch.randint(10, 500, (batch, length)), model.new_cache(engine, room=answer)
        PromptBatch(model, ids, torch.ones_like(ids)).prefill(cache)
        for _ in range(answer):
            model(ids[:, :1], past_key_values=cache)

    took = {"": [machine.call_seconds(partial(run, batch)) / batch for batch in batches]}
    if KVPRESS.exists():
        settings = {
            "config": config, "length": length, "top_k": top_k, "window": window,
            "answer": answer, "repeats": 1 if machine.dry else 3, "batches": batches,
        }  # fmt: skip
        script = Path(__file__).with_name("kvpress_examples.py")
        command = [str(KVPRESS), str(script), json.dumps(settings)]
        found = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
        took["kvpress, "] = json.loads(found)
    case = f"Llama 135M T={length}, {top_k} kept, {answer} steps"
    for form, every in took.items():
        for batch, seconds in zip(batches, every, strict=True):
            note = f"{1 / seconds:.3g} examples/s"
            yield Row(EXAMPLES, case, f"{form}B={batch}", seconds, note=note)

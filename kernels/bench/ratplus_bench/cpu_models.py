"""Prefill and decoding of models on one CPU thread, beside transformers' own: `make bench-cpu`.

The pocket pair in batches of 25, and Llama's shape with 135M parameters (random weights), whose
prefill is cut by layers so that none takes minutes; decoding runs whole models on a cache of random
states. SnapKV's examples stand beside kvpress's, where `make kvpress` has installed it. Times are
medians of processor seconds, which other processes disturb less than the clock on the wall, and so
are the rates of the floors here.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from ratplus_bench.timing import Machine, Row
from ratplus_exp.cost import Shape
from ratplus_exp.methods import Dense, Engine, Method, MoBA, Quest, SnapKV, States, Step
from ratplus_exp.models.hf import attach_engine
from ratplus_exp.models.loading import load_model
from ratplus_exp.models.prefill import PromptBatch
from ratplus_exp.provenance import REPOSITORY

POCKET = REPOSITORY / "outputs/reference/pocket/models"
LAYERS, LENGTHS = 30, {1024: 30, 4096: 10, 16_384: 2}  # tokens, and layers of the prefill
STEPS, SUITES = 9, ("prefill on a CPU, a prompt", "decoding step on a CPU")
EXAMPLES = "an example on a CPU: prompt, SnapKV, answer"
STOCK = "transformers, SDPA"
KVPRESS = Path(os.environ.get("KVPRESS_PYTHON", REPOSITORY / ".venv-kvpress/bin/python"))


@torch.inference_mode()
def rows(machine: Machine) -> Iterator[Row]:
    """Every model and length: dense, Quest or MoBA at 1/16, transformers with SDPA."""
    matmul, bandwidth = _rates(256 if machine.dry else 1024)
    machine = replace(machine, matmul=matmul, bandwidth=bandwidth)
    for name in ("attention", "ratplus"):
        model, batch = load_model(POCKET / name / "0", machine.device), 2 if machine.dry else 25
        yield from _Case(machine, model, f"pocket {name} B={batch} T=992", batch, 992, 16).ours()
    shape = {
        "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 1 if machine.dry else LAYERS,
        "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64,
        "vocab_size": 49_152, "tie_word_embeddings": True,
    }  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**shape, attn_implementation="sdpa")).eval()
    cases = [
        _Case(machine, model, f"Llama 135M T={n}", 1, n, 64, layers)
        for n, layers in ({64: 1} if machine.dry else LENGTHS).items()
    ]
    stock = [list(case.stock()) for case in cases]  # first: `attach_engine` changes the model
    attach_engine(model)
    for case, others in zip(cases, stock, strict=True):
        yield from [*case.ours(), *others]
    yield from _examples(model, shape, machine.dry)


def _examples(model: Any, config: dict[str, Any], dry: bool) -> Iterator[Row]:
    """SnapKV for whole examples, in a batch and one by one, ours and kvpress's."""
    length, top_k, window, answer = (64, 16, 8, 2) if dry else (1024, 256, 64, 32)
    repeats, batches = 1 if dry else 3, [4, 1]
    engine = Engine(SnapKV(top_k=top_k, window=window))

    def run(ids: torch.Tensor) -> None:
        cache = model.new_cache(engine, room=answer)
        PromptBatch(model, ids, torch.ones_like(ids)).prefill(cache)
        for _ in range(answer):
            model(ids[:, :1], past_key_values=cache)

    prompts = [torch.randint(10, 500, (batch, length)) for batch in batches]
    took = {"": [_median(partial(run, ids), repeats) / len(ids) for ids in prompts]}
    if KVPRESS.exists():
        settings = {
            "config": config, "length": length, "top_k": top_k, "window": window,
            "answer": answer, "repeats": repeats, "batches": batches,
        }  # fmt: skip
        script = Path(__file__).with_name("kvpress_examples.py")
        command = [str(KVPRESS), str(script), json.dumps(settings)]
        found = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
        took["kvpress, "] = json.loads(found)
    name = f"Llama 135M T={length}, {top_k} kept, {answer} steps"
    for form, every in took.items():
        for batch, seconds in zip(batches, every, strict=True):
            row = Row(EXAMPLES, name, f"{form}B={batch}", seconds)
            row.note = f"{1 / seconds:.3g} examples/s"
            yield row


@dataclass
class _Case:
    machine: Machine
    model: Any
    name: str
    batch: int
    length: int
    block: int
    cut: int | None = None  # layers of the prefill, if not all

    @cached_property
    def shape(self) -> Shape:
        return Shape.of(self.model)

    @cached_property
    def ids(self) -> torch.Tensor:
        return torch.randint(10, 500, (self.batch, self.length))

    def ours(self) -> Iterator[Row]:
        sparse = {"block_size": self.block, "top_k": max(2, self.length // self.block // 16)}
        prompts = PromptBatch(self.model, self.ids, torch.ones_like(self.ids))
        methods: dict[str, Method] = {"dense": Dense(), "MoBA 1/16": MoBA(**sparse)}
        for name, method in methods.items():

            def run(method: Method = method) -> None:
                prompts.prefill(self.model.new_cache(Engine(method), room=STEPS))

            yield self._prefill(name, run, method)
        q, k, v = self._states()
        step = Step(torch.arange(self.length)[None])
        methods = {"dense": Dense(), "Quest 1/16": Quest(**sparse)}
        for name, method in methods.items():
            cache = self.model.new_cache(Engine(method), room=STEPS + 1)
            for layer in range(self.shape.layers):
                cache.store_prompt(layer, States(q, k, v, step))
                if self.shape.memory_state:
                    cache.layers[layer].memory_state = torch.stack((k, v))[:, :, :, -1]
            cache.advance(step, self.batch)
            yield self._decode(name, cache, method)

    def stock(self) -> Iterator[Row]:
        """transformers' own model."""
        run = partial(self.model, self.ids, use_cache=True, logits_to_keep=1)
        yield self._prefill(STOCK, run, Dense())
        _, k, v = self._states()
        cache = DynamicCache()
        for layer in range(self.shape.layers):
            cache.update(k, v, layer)
        yield self._decode(STOCK, cache, Dense())

    def _states(self) -> list[torch.Tensor]:
        heads = (self.shape.heads, self.shape.kv_heads, self.shape.kv_heads)
        return [torch.randn(self.batch, x, self.length, self.shape.head_dim) for x in heads]

    def _prefill(self, form: str, run: Callable[[], Any], method: Method) -> Row:
        every, shape, row = torch.arange(self.length), self.shape, Row(SUITES[0], self.name, form)
        if self.cut is not None and self.cut != shape.layers:
            per_layer = sum(x.numel() for x in self.model.model.layers[0].parameters())
            rest = shape.multiplied - (shape.layers - self.cut) * per_layer
            row.case += f", {self.cut} of {shape.layers} layers"
            shape = replace(shape, layers=self.cut, multiplied=rest)
        keys = method.attended(every) if method.phase == "prefill" else every + 1
        flops = self.length * shape.forward_flops(float(keys.double().mean()))
        flops -= 2 * (self.length - 1) * shape.vocabulary * shape.hidden  # one token's logits
        self.machine.set_floor(row, flops=flops)
        self.model.config.num_hidden_layers = shape.layers
        row.seconds = _median(run, 1 if self.machine.dry else 3) / self.batch
        self.model.config.num_hidden_layers = self.shape.layers
        row.note = f"{1 / row.seconds:.3g} prompts/s"
        return row

    def _decode(self, form: str, cache: Any, method: Method) -> Row:
        states, row = float(self.length), Row(SUITES[1], self.name, form)
        if method.phase == "decode":  # and two vectors of each block
            states = float(method.attended(torch.tensor(self.length))) + self.length / self.block
        moved = 4 * self.shape.multiplied + self.batch * self.shape.kv_bytes(1, 4) * states
        self.machine.set_floor(row, moved, self.batch * self.shape.forward_flops(states))
        run = partial(self.model, self.ids[:, :1], past_key_values=cache)
        run()
        row.seconds = _median(run, 1 if self.machine.dry else STEPS)
        row.note = f"{1 / row.seconds:.3g} steps/s"
        return row


def _median(run: Callable[[], Any], repeats: int) -> float:
    taken = []
    for _ in range(repeats):
        start = time.thread_time()
        run()
        taken.append(time.thread_time() - start)
    return median(taken)


def _rates(size: int) -> tuple[float, float]:
    """FLOP a second of a product, and bytes, read and written, of a copy larger than a cache."""
    a, b = torch.randn(2, size, size)
    source = torch.randn(16 * size**2)
    target = torch.empty_like(source)
    product = _median(lambda: a @ b, 15)
    return 2 * size**3 / product, 2 * source.nbytes / _median(lambda: target.copy_(source), 7)

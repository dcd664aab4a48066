"""Prefill and decoding of models on one CPU thread, beside transformers' own: `make bench-cpu`.

The pocket pair in batches of 50 as evaluation has them, and Llama's shape with 135M parameters
(random weights), cut by layers where a prefill would take minutes. Times are medians of processor
seconds, which other processes on the machine disturb less than the clock on the wall; so are the
rates of the floors here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ratplus_bench.timing import Machine, Row
from ratplus_exp.cost import Shape
from ratplus_exp.methods import Dense, Engine, Method, MoBA, Quest
from ratplus_exp.models.hf import carry
from ratplus_exp.models.loading import load_model
from ratplus_exp.models.prefill import Prefilled, PromptBatch
from ratplus_exp.provenance import REPOSITORY

POCKET = REPOSITORY / "outputs/reference/pocket/models"
LAYERS, LENGTHS = 30, {1024: 30, 4096: 8, 16_384: 2}  # tokens, and of how many layers
STEPS, SUITES = 9, ("prefill on a CPU", "decoding step on a CPU")


@torch.inference_mode()
def rows(machine: Machine) -> Iterator[Row]:
    """Prefill and decoding step of every model and length: dense, the methods, transformers."""
    for name in ("attention", "ratplus"):
        model, batch = load_model(POCKET / name, machine.device), 2 if machine.dry else 50
        case = f"pocket {name} B={batch} T=496"
        yield from _Case(machine, case, model, batch, 496, block=8).rows()
    for length, layers in {64: 1}.items() if machine.dry else LENGTHS.items():
        model = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=576, intermediate_size=1536, num_hidden_layers=layers,
                num_attention_heads=9, num_key_value_heads=3, head_dim=64, vocab_size=49_152,
                tie_word_embeddings=True, attn_implementation="sdpa",
            )
        ).eval()  # fmt: skip
        cut = "" if layers == LAYERS else f", {layers} of {LAYERS} layers"
        case = f"Llama 135M{cut} B=1 T={length}"
        # transformers' own first: `carry` changes the model in place.
        run = _Case(machine, case, model, 1, length, block=4 if machine.dry else 64)
        stock = list(run.stock_rows())
        carry(model)
        yield from [*run.rows(), *stock]


@dataclass
class _Case:
    machine: Machine
    case: str
    model: Any
    batch: int
    length: int
    block: int

    def __post_init__(self) -> None:
        self.shape = Shape.of(self.model)
        self.ids = torch.randint(10, 500, (self.batch, self.length))
        self.matmul, self.bandwidth = _rates(256 if self.machine.dry else 1024)

    def rows(self) -> Iterator[Row]:
        """Ours, as evaluation runs them: caches with room for the steps."""
        top_k = max(2, self.length // self.block // 16)
        quest, moba = (kind(block_size=self.block, top_k=top_k) for kind in (Quest, MoBA))
        prompts = PromptBatch(self.model, self.ids, torch.ones_like(self.ids))
        dense: list[Prefilled] = []

        def prefill() -> None:
            dense[:] = [Prefilled(self.shape.layers, window=1, room=STEPS + 1)]
            prompts._run(dense[0])

        def sparse_prefill() -> None:
            prompts._run(self.model.new_cache(Engine(moba), room=STEPS + 1))

        yield self._prefill("dense", prefill, Dense())
        yield self._prefill("MoBA 1/16", sparse_prefill, moba)
        for name, method in (("dense", Dense()), ("Quest 1/16", quest)):
            cache = self.model.new_cache(Engine(method), room=STEPS + 1)
            dense[0].copy_to(cache)
            yield self._step(name, cache, method)

    def stock_rows(self) -> Iterator[Row]:
        """transformers' own."""
        cache: Any = None

        def prefill() -> None:
            nonlocal cache
            cache = self.model(self.ids, use_cache=True, logits_to_keep=1).past_key_values

        yield self._prefill("transformers, SDPA", prefill, Dense())
        yield self._step("transformers, SDPA", cache, Dense())

    def _prefill(self, form: str, run: Callable[[], None], method: Method) -> Row:
        """A prompt's seconds."""
        every = torch.arange(self.length)
        keys = method.attended(every) if method.phase == "prefill" else every + 1
        shape = self.shape
        flops = self.length * shape.forward_flops(float(keys.double().mean()))
        flops -= 2 * (self.length - 1) * shape.vocabulary * shape.hidden  # one token's logits
        seconds = _median(run, 1 if self.machine.dry else 3) / self.batch
        row = Row(SUITES[0], self.case, form, seconds, flops / self.matmul, flops=flops)
        row.note = f"{1 / seconds:.3g} prompts/s"
        return row

    def _step(self, form: str, cache: Any, method: Method) -> Row:
        """A step's seconds, of all rows of the batch."""
        states = float(self.length)
        if method.phase == "decode":  # and two vectors of each block
            attended = method.attended(torch.tensor(self.length))
            states = float(attended) + self.length / self.block
        size = self.machine.dtype.itemsize
        moved = size * self.shape.multiplied
        moved += self.batch * self.shape.kv_bytes(1, size) * states
        flops = self.batch * self.shape.forward_flops(states)
        floor = max(moved / self.bandwidth, flops / self.matmul)

        def run() -> None:
            self.model(self.ids[:, :1], past_key_values=cache)

        run()
        seconds = _median(run, 1 if self.machine.dry else STEPS)
        row = Row(SUITES[1], self.case, form, seconds, floor, bytes=moved, flops=flops)
        row.note = f"{1 / seconds:.3g} steps/s"
        return row


def _median(run: Callable[[], Any], repeats: int) -> float:
    taken = []
    while len(taken) < repeats:
        start = time.thread_time()
        run()
        taken.append(time.thread_time() - start)
        if taken[0] > 10:
            break
    return median(taken)


def _rates(size: int) -> tuple[float, float]:
    """FLOP a second of a product, and bytes, read and written, of a copy larger than a cache."""
    a, b = torch.randn(2, size, size)
    source = torch.randn(32 * size**2 // 2)
    target = torch.empty_like(source)
    product = _median(lambda: a @ b, 15)
    return 2 * size**3 / product, 2 * source.nbytes / _median(lambda: target.copy_(source), 7)

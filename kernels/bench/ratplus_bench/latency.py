"""Prefill and decoding of whole models with random weights: latency, throughput and peak memory.

P2's Figures 2 and 4 in our own measurements: its 1.5B and 7B shapes, for attention, RAT+, and RAT+
with each sparse method at budget 1/16. Times are wall time of the model's own forward, launches
included; the GPU time beside them is that of its kernels alone. Decoding uses no CUDA graph, so a
step at a small batch takes as long as its launches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from ratplus_bench.timing import Machine, Row, failure
from ratplus_exp.cost import Shape
from ratplus_exp.methods import Dense, Dilated, Engine, Method, MoBA, Quest, SnapKV
from ratplus_exp.models import RatPlusConfig, RatPlusForCausalLM
from ratplus_exp.models.cache import SparseCache

MODELS: dict[str, dict[str, int]] = {
    "1.5B": {"hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16},
    "7B": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32},
}
TINY = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 11}
LENGTHS = (4096, 16_384, 65_536)
SUITES = ("prefill latency", "decoding latency, one row", "decoding throughput, a row's token")


class Variant(NamedTuple):
    """A model with or without the memory, and a method."""

    name: str
    memory: bool
    method: Method

    def prefill_keys(self, length: int) -> float:
        """Keys that a prompt's query attends to, on average."""
        method = self.method
        every = torch.arange(length)
        sparse = method.phase == "prefill" or isinstance(method, Dilated)
        return float((method.attended(every) if sparse else every + 1).double().mean())

    def decode_states(self, length: int) -> float:
        """Cached tokens whose key and value a decoding step reads, after `length` of them; Quest
        reads two vectors of each block besides."""
        method = self.method
        if isinstance(method, SnapKV):
            return min(length, method.top_k)
        if method.phase == "decode" or isinstance(method, Dilated):
            blocks = length / method.block_size if method.phase == "decode" else 0
            return int(method.attended(torch.tensor(length - 1))) + blocks
        return length


def variants(length: int, block: int = 64) -> list[Variant]:
    """The six of P2's and P1's comparisons, for prompts of `length` tokens in blocks of `block`."""
    blocks = max(2, length // block // 16)
    return [
        Variant("attention, dense", False, Dense()),
        Variant("RAT+, dense", True, Dense()),
        Variant("RAT+, Quest", True, Quest(block_size=block, top_k=blocks)),
        Variant("RAT+, MoBA", True, MoBA(block_size=block, top_k=blocks)),
        Variant("RAT+, SnapKV", True, SnapKV(top_k=blocks * block, window=min(64, block))),
        Variant("RAT+, dilated", True, Dilated(dilation=block, local=block, initial=1)),
    ]


@torch.inference_mode()
def rows(machine: Machine, matches: Callable[[str], bool] = lambda _: True) -> Iterator[Row]:
    """Rows of every model and length that matches, and variant; what runs out of memory says so."""
    for name, sizes in ({"tiny": TINY} if machine.dry else MODELS).items():
        every = (16,) if machine.dry else LENGTHS
        lengths = [length for length in every if matches(f"{name} T={length}")]
        for memory in (False, True) if lengths else ():
            model = _model(sizes | {"memory": memory}, machine)
            for length in lengths:
                for variant in variants(length, 4 if machine.dry else 64):
                    if variant.memory == memory:
                        yield from _variant(model, f"{name} T={length}", length, variant, machine)
            del model


def _model(sizes: dict[str, Any], machine: Machine) -> RatPlusForCausalLM:
    before = torch.get_default_dtype()
    torch.set_default_dtype(machine.dtype)  # a 7B model in fp32 first would take 28 GB
    try:
        with machine.device:
            return RatPlusForCausalLM(RatPlusConfig(**sizes)).eval()
    finally:
        torch.set_default_dtype(before)


def _variant(
    model: RatPlusForCausalLM, case: str, length: int, variant: Variant, machine: Machine
) -> Iterator[Row]:
    prefill, decode, throughput = (Row(suite, case, variant.name) for suite in SUITES)
    config, shape, itemsize = model.config, Shape.of(model), machine.dtype.itemsize
    prefill.flops = length * shape.forward_flops(variant.prefill_keys(length))
    # Logits are asked for at the last token alone.
    prefill.flops -= 2 * (length - 1) * shape.vocabulary * shape.hidden
    prefill.floor = prefill.flops / machine.matmul
    cached = shape.kv_bytes(1, itemsize) * variant.decode_states(length)
    decode.bytes = shape.multiplied * itemsize + cached
    decode.floor = decode.bytes / machine.bandwidth
    ids = torch.randint(config.vocab_size, (1, length), device=machine.device)
    cache: SparseCache | None = None

    def run_prefill() -> None:
        nonlocal cache
        cache = model.new_cache(Engine(variant.method))
        model(ids, past_key_values=cache, logits_to_keep=1)

    def run_step(token: Tensor) -> None:
        model(token, past_key_values=cache)

    with _memory_watched(prefill, machine):
        run_prefill()  # compiles what needs compiling
        prefill.seconds = _median(run_prefill, 1 if machine.dry else 3, machine)
        prefill.gpu_seconds = _gpu_seconds(run_prefill, machine)
    yield prefill
    if prefill.seconds is None or cache is None:
        return
    steps = 1 if machine.dry else 20
    with _memory_watched(decode, machine):
        run_step(ids[:, :1])
        decode.seconds = _median(lambda: run_step(ids[:, :1]), steps, machine)
        decode.gpu_seconds = _gpu_seconds(lambda: run_step(ids[:, :1]), machine)
    yield decode
    batch = 1
    with _memory_watched(throughput, machine):
        while decode.seconds and batch < (2 if machine.dry else 4096):
            batch *= 2
            cache.batch_repeat_interleave(2)
            token = ids[:, :1].expand(batch, 1)
            run_step(token)
            took = _median(lambda token=token: run_step(token), steps, machine) / batch  # type: ignore[misc]
            if throughput.seconds is None or took < throughput.seconds:
                throughput.seconds = took
                throughput.note = f"{1 / took:.0f} tokens/s at batch {batch}"
    if throughput.seconds is not None:
        throughput.bytes = cached
        throughput.floor = throughput.bytes / machine.bandwidth  # weights shared by very many rows
    yield throughput


@contextmanager
def _memory_watched(row: Row, machine: Machine) -> Iterator[None]:
    """Peak memory of the whole process into the row; what goes wrong ends the measurement."""
    cuda = machine.device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        yield
    except torch.OutOfMemoryError:
        row.note = row.note or "out of memory"
    except Exception as problem:
        row.note = failure(problem)
    if cuda:
        row.peak_memory = torch.cuda.max_memory_allocated()


def _median(run: Callable[[], None], repeats: int, machine: Machine) -> float:
    took = []
    for _ in range(repeats):
        _wait(machine)
        start = time.perf_counter()
        run()
        _wait(machine)
        took.append(time.perf_counter() - start)
    return median(took)


def _gpu_seconds(run: Callable[[], None], machine: Machine) -> float | None:
    """What the kernels, copies and fills of one run take together, without the gaps between."""
    if machine.device.type != "cuda":
        return None
    with profile(activities=[ProfilerActivity.CUDA]) as watched:
        run()
        _wait(machine)
    found = [x for x in watched.events() or [] if x.device_type == torch.autograd.DeviceType.CUDA]
    return sum(x.time_range.elapsed_us() for x in found) / 1e6 or None


def _wait(machine: Machine) -> None:
    if machine.device.type == "cuda":
        torch.cuda.synchronize()

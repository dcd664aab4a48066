"""Prefill and decoding of whole models with random weights: latency, throughput and peak memory.

P2's Figures 2 and 4 in our own measurements: its 1.5B and 7B shapes, for attention, RAT+, and RAT+
with each sparse method at budget 1/16. Models run as in `generate`, without CUDA graphs, so a step
at a small batch takes as long as its launches; the GPU time beside it is that of the kernels alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM

from ratplus_bench.timing import Machine, Row, noted
from ratplus_exp.cost import Shape
from ratplus_exp.methods import Dense, Dilated, Engine, Method, MoBA, Quest, SnapKV
from ratplus_exp.models import RatPlusConfig, RatPlusForCausalLM

# Hidden size, layers, heads.
MODELS, TINY = {"1.5B": (2048, 24, 16), "7B": (4096, 32, 32)}, {"tiny": (8, 1, 2)}
LENGTHS = (4096, 16_384, 65_536)
SUITES = ("prefill latency", "decoding latency, one row", "decoding throughput, a row's token")
BACKBONES = {False: "attention", True: "RAT+"}


def methods(memory: bool, length: int, block: int) -> dict[str, Method]:
    """What a backbone is measured with, for prompts of `length` tokens in blocks of `block`."""
    if not memory:
        return {"dense": Dense()}
    blocks = max(2, length // block // 16)
    return {
        "dense": Dense(),
        "Quest": Quest(block_size=block, top_k=blocks),
        "MoBA": MoBA(block_size=block, top_k=blocks),
        "SnapKV": SnapKV(top_k=blocks * block, window=min(64, block)),
        "dilated": Dilated(dilation=block, local=block, initial=1),
    }


@torch.inference_mode()
def rows(machine: Machine, matches: Callable[[str], bool] = lambda _: True) -> Iterator[Row]:
    """Rows of every model and length that matches, backbone and method."""
    for size, (hidden, layers, heads) in (TINY if machine.dry else MODELS).items():
        every, block = ((16,), 4) if machine.dry else (LENGTHS, 64)
        cases = {n: f"{size} T={n}" for n in every if matches(f"{size} T={n}")}
        for memory, backbone in BACKBONES.items() if cases else ():
            config = RatPlusConfig(
                hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
                memory=memory,
            )  # fmt: skip
            with machine.device:  # in its dtype at once: in fp32 a 7B model takes 28 GB
                model = AutoModelForCausalLM.from_config(config, dtype=machine.dtype).eval()
            for length, case in cases.items():
                for name, method in methods(memory, length, block).items():
                    yield from _rows(model, method, length, case, f"{backbone}, {name}", machine)
            del model


def _rows(
    model: RatPlusForCausalLM, method: Method, length: int, case: str, form: str, machine: Machine
) -> Iterator[Row]:
    shape, itemsize = Shape.of(model), machine.dtype.itemsize
    prefill, decode, throughput = (Row(suite, case, form) for suite in SUITES)
    ids = torch.randint(model.config.vocab_size, (1, length), device=machine.device)
    engine = Engine(method)
    cache = model.new_cache(engine)

    def run_prefill() -> None:
        nonlocal cache
        cache = model.new_cache(engine)
        model(ids, past_key_values=cache, logits_to_keep=1)

    def run_step(batch: int = 1) -> None:
        model(ids[:, :1].expand(batch, 1), past_key_values=cache)

    def attended(run: Callable[[], None]) -> float | None:
        """Tokens that a query attends to, as the engine counts them; None where all are."""
        engine.usage.counts.clear()
        run()
        counts = [count[0] for count in engine.usage.counts]
        return float(torch.cat(counts, 1).double().mean()) if counts else None

    with noted(prefill, machine):
        keys = attended(run_prefill) or (length + 1) / 2
        logits = 2 * (length - 1) * shape.vocabulary * shape.hidden  # of the last token alone
        machine.set_floor(prefill, flops=length * shape.forward_flops(keys) - logits)
        _time(prefill, run_prefill, machine)
    yield prefill
    if prefill.seconds is None:
        return
    with noted(decode, machine):
        states = attended(run_step) or cache.get_seq_length()
        if method.phase == "decode":  # and of each block the two bounds
            states += length / method.block_size
        cached = shape.kv_bytes(1, itemsize) * states
        machine.set_floor(decode, bytes=shape.multiplied * itemsize + cached)
        machine.set_floor(throughput, bytes=cached)  # very many rows share the weights
        _time(decode, run_step, machine)
    yield decode
    batch = 1
    with noted(throughput, machine):
        while decode.seconds and batch < (2 if machine.dry else 4096):
            batch *= 2
            cache.batch_repeat_interleave(2)
            run_step(batch)
            took = machine.wall_seconds(partial(run_step, batch)) / batch
            if throughput.seconds is None or took < throughput.seconds:
                throughput.seconds = took
                throughput.note = f"{1 / took:.0f} tokens/s at batch {batch}"
    yield throughput


def _time(row: Row, run: Callable[[], None], machine: Machine) -> None:
    row.seconds = machine.wall_seconds(run)
    if machine.cuda:  # kernels, copies and fills, without the gaps between
        with profile(activities=[ProfilerActivity.CUDA]) as watched:
            run()
            torch.cuda.synchronize()
        on_gpu = torch.autograd.DeviceType.CUDA
        events = [x for x in watched.events() or [] if x.device_type == on_gpu]
        row.gpu_seconds = sum(x.time_range.elapsed_us() for x in events) / 1e6 or None

"""Prefill and decoding of whole models: latency, throughput and peak memory.

On a GPU, P2's Figures 2 and 4 in our own measurements: its 1.5B and 7B shapes with random weights,
for attention, RAT+, and RAT+ with each sparse method at budget 1/16. Models run as in `generate`,
without CUDA graphs, so a step at a small batch takes as long as its launches; GPU time is reported
too, and is that of the kernels alone.

On a CPU, the pocket pair in batches of 25, and Llama's shape with 135M parameters (random weights),
with fewer layers for longer prompts, so that none takes minutes; for comparison, transformers' own
attention, and kvpress's SnapKV where `make kvpress` has installed it.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM

from ratplus_bench.timing import Machine, Row, noted
from ratplus_exp.cost import Shape
from ratplus_exp.methods import Dense, Dilated, Engine, Method, MoBA, Quest, SnapKV
from ratplus_exp.models import RatPlusConfig
from ratplus_exp.models.hf import attach_engine
from ratplus_exp.models.loading import load_model
from ratplus_exp.models.prefill import PromptBatch
from ratplus_exp.provenance import REPOSITORY

# Hidden size, layers, heads.
MODELS, TINY = {"1.5B": (2048, 24, 16), "7B": (4096, 32, 32)}, {"tiny": (8, 1, 2)}
LENGTHS = (4096, 16_384, 65_536)
SUITES = ("prefill latency", "decoding latency", "decoding throughput, a row's token")
BACKBONES = {False: "attention", True: "RAT+"}
POCKET = REPOSITORY / "outputs/reference/pocket/models"
LLAMA = {
    "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9,
    "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49_152, "tie_word_embeddings": True,
}  # fmt: skip
LLAMA_LAYERS = {(1, 1024): 30, (4, 1024): 30, (1, 4096): 10, (1, 16_384): 2}  # by rows and tokens
KVPRESS = Path(os.environ.get("KVPRESS_PYTHON", REPOSITORY / ".venv-kvpress/bin/python"))


def methods(memory: bool, length: int, block: int) -> dict[str, Method]:
    """The methods of a backbone, for prompts of `length` tokens in blocks of `block`."""
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
        lengths, block = ((16,), 4) if machine.dry else (LENGTHS, 64)
        cases = {n: f"{size} T={n}" for n in lengths if matches(f"{size} T={n}")}
        for memory, backbone in BACKBONES.items() if cases else ():
            config = RatPlusConfig(
                hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
                memory=memory,
            )  # fmt: skip
            with machine.device:  # in its dtype at once: in fp32 a 7B model takes 28 GB
                model = AutoModelForCausalLM.from_config(config, dtype=machine.dtype).eval()
            for length, case in cases.items():
                for name, method in methods(memory, length, block).items():
                    form = f"{backbone}, {name}"
                    yield from measure(model, method, (1, length), case, form, machine)
            del model


@torch.inference_mode()
def cpu_rows(machine: Machine) -> Iterator[Row]:
    """Rows of the pocket pair and of Llama's shape at every length."""
    prompts = (2 if machine.dry else 25, 992)
    for memory, backbone in BACKBONES.items():
        model = load_model(POCKET / ("ratplus" if memory else "attention") / "0", machine.device)
        for name, method in methods(memory, 992, block=16).items():
            case, form = "pocket B={} T={}".format(*prompts), f"{backbone}, {name}"
            yield from measure(model, method, prompts, case, form, machine)
    for prompts, layers in ({(1, 64): 1} if machine.dry else LLAMA_LAYERS).items():
        batch, length = prompts
        config = LLAMA | {"num_hidden_layers": layers}
        case = f"Llama B={batch} T={length} layers={layers}"
        model = LlamaForCausalLM(LlamaConfig(**config, attn_implementation="sdpa")).eval()
        others = [*measure(model, None, prompts, case, "transformers, SDPA", machine)]
        attach_engine(model)
        for name, method in methods(True, length, block=16 if machine.dry else 64).items():
            if batch == 1 or isinstance(method, SnapKV):
                yield from measure(model, method, prompts, case, name, machine)
            if isinstance(method, SnapKV) and length <= 1024 and KVPRESS.exists():
                others += _kvpress(config, prompts, method, case)
        yield from others


def _kvpress(
    config: dict[str, Any], prompts: tuple[int, int], method: SnapKV, case: str
) -> Iterator[Row]:
    """SnapKV's prefill and step by kvpress, which needs an older transformers, in its own
    environment."""
    settings = {
        "config": config, "prompts": prompts, "top_k": method.top_k, "window": method.window
    }  # fmt: skip
    script = Path(__file__).with_name("kvpress_snapkv.py")
    command = [str(KVPRESS), str(script), json.dumps(settings)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    for suite, seconds in zip(SUITES, json.loads(done.stdout), strict=False):
        yield Row(suite, case, "SnapKV, kvpress", seconds)


def measure(
    model: Any,
    method: Method | None,
    prompts: tuple[int, int],
    case: str,
    form: str,
    machine: Machine,
) -> Iterator[Row]:
    """Rows of SUITES for a batch and length of prompts; throughput on a GPU alone.

    method: what the model's engine runs; None: transformers' own attention and cache.
    """
    batch, length = prompts
    shape, itemsize = Shape.of(model), machine.dtype.itemsize
    prefill, decode, throughput = (Row(suite, case, form) for suite in SUITES)
    ids = torch.randint(model.config.vocab_size, prompts, device=machine.device)
    prompt = PromptBatch(model, ids, torch.ones_like(ids))
    engine = Engine(method or Dense())
    cache: Any = None

    def run_prefill() -> None:
        nonlocal cache
        if method:
            cache = model.new_cache(engine)
            prompt.prefill(cache)
        else:
            cache = DynamicCache()
            model(ids, past_key_values=cache, logits_to_keep=1)

    def run_step(rows: int) -> None:
        model(ids[:1, :1].expand(rows, 1), past_key_values=cache)

    def attended(run: Callable[[], None]) -> float | None:
        """Tokens that a query attends to, as the engine counts them; None where all are."""
        engine.usage.counts.clear()
        run()
        counts = [count[0] for count in engine.usage.counts]
        return float(torch.cat(counts, 1).double().mean()) if counts else None

    with noted(prefill, machine):
        keys = attended(run_prefill) or (length + 1) / 2
        logits = 2 * (length - 1) * shape.vocabulary * shape.hidden  # of the last token alone
        flops = length * shape.forward_flops(keys) - logits
        machine.set_floor(prefill, flops=batch * flops)
        _time(prefill, run_prefill, machine)
    yield prefill
    if prefill.seconds is None:
        return
    with noted(decode, machine):
        step = partial(run_step, batch)
        states = attended(step) or cache.get_seq_length()
        flops = batch * shape.forward_flops(states)
        if engine.method.phase == "decode":  # and of each block the two bounds
            states += length / engine.method.block_size
        cached = shape.kv_bytes(1, itemsize) * states
        machine.set_floor(decode, shape.multiplied * itemsize + batch * cached, flops)
        machine.set_floor(throughput, cached)  # very many rows share the weights
        _time(decode, step, machine)
    yield decode
    largest = 2 if machine.dry else 4096 if machine.cuda else batch
    if batch == largest:
        return
    with noted(throughput, machine):
        while decode.seconds and batch < largest:
            batch *= 2
            cache.batch_repeat_interleave(2)
            run_step(batch)
            took = machine.call_seconds(partial(run_step, batch)) / batch
            if throughput.seconds is None or took < throughput.seconds:
                throughput.seconds = took
                throughput.note = f"{1 / took:.0f} tokens/s at batch {batch}"
    yield throughput


def _time(row: Row, run: Callable[[], None], machine: Machine) -> None:
    row.seconds = machine.call_seconds(run)
    if machine.cuda:  # kernels, copies and fills, without the gaps between
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            run()
            torch.cuda.synchronize()
        on_gpu = torch.autograd.DeviceType.CUDA
        events = [x for x in profiler.events() or [] if x.device_type == on_gpu]
        row.gpu_seconds = sum(x.time_range.elapsed_us() for x in events) / 1e6 or None

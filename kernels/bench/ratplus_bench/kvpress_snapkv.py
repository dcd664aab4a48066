"""Processor seconds of a prefill and of a decoding step by kvpress's SnapKV: run by `models` in
kvpress's environment. Its argument is JSON with the fields of `measure`; it prints the seconds.
"""

import json
import sys
import time
from statistics import median
from typing import Any

import torch
from kvpress import SnapKVPress
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM


@torch.inference_mode()
def measure(
    config: dict[str, Any], prompts: tuple[int, int], top_k: int, window: int
) -> tuple[float, float]:
    """Medians of three prefills of a batch of prompts, whose top_k tokens stay, and of 30 steps."""
    length = prompts[1]
    torch.set_num_threads(1)
    model = LlamaForCausalLM(LlamaConfig(**config, attn_implementation="sdpa")).eval()
    press = SnapKVPress(compression_ratio=1 - top_k / length, window_size=window)
    ids, prefills, steps = torch.randint(10, 500, tuple(prompts)), [], []
    for _ in range(3):
        cache = DynamicCache()
        start = time.thread_time()
        with press(model):
            model(ids, past_key_values=cache, logits_to_keep=1)
        prefills.append(time.thread_time() - start)
        assert cache.get_seq_length() == top_k
        for position in range(length, length + 10):
            start = time.thread_time()
            at = torch.tensor([[position]])
            model(ids[:, :1], past_key_values=cache, position_ids=at)
            steps.append(time.thread_time() - start)
    return median(prefills), median(steps)


if __name__ == "__main__":
    print(json.dumps(measure(**json.loads(sys.argv[1]))))

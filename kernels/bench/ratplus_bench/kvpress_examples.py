"""Processor seconds an example of kvpress's SnapKV: run by cpu_models in kvpress's environment.

Its argument is JSON with the fields of `measure`; it prints the list of seconds.
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
    config: dict[str, Any], length: int, top_k: int, window: int, answer: int, repeats: int,
    batches: list[int],
) -> list[float]:  # fmt: skip
    """By batch size: a prefill of `length` tokens, of which top_k stay, and `answer` steps."""
    torch.set_num_threads(1)
    model = LlamaForCausalLM(LlamaConfig(**config, attn_implementation="sdpa")).eval()
    press = SnapKVPress(compression_ratio=1 - top_k / length, window_size=window)

    def run(batch: int) -> float:
        ids, cache = torch.randint(10, 500, (batch, length)), DynamicCache()
        start = time.thread_time()
        with press(model):
            model(ids, past_key_values=cache, logits_to_keep=1)
        assert cache.get_seq_length() == top_k
        for i in range(answer):
            position = torch.tensor([[length + i]])
            model(ids[:, :1], past_key_values=cache, position_ids=position)
        return (time.thread_time() - start) / batch

    return [median(run(batch) for _ in range(repeats)) for batch in batches]


if __name__ == "__main__":
    print(json.dumps(measure(**json.loads(sys.argv[1]))))

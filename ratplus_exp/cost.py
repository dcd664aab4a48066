"""Estimates of a run's cost: parameters, FLOPs, memory, disk and hours.

Models are on the meta device, so that a 7B model needs no memory. FLOPs count a multiplication and
an addition as two, and exclude the recomputation of activation checkpointing, as MFU does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ratplus_exp.memory import Memory
from ratplus_exp.methods import Dense, Method

# Dense bf16 TFLOP/s from data sheets, for the first key that is part of the device's name.
PEAK_TFLOPS = {
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H200 NVL": 835.0,
    "GH200": 989.0,
    "H200": 989.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
}


def peak_tflops(device: torch.device) -> float | None:
    """Peak bf16 TFLOP/s of a GPU; None if unknown."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)


@dataclass(frozen=True)
class Shape:
    """The sizes of a model.

    parameters: all, tied weights once; memory_parameters: those of the memory.
    memory_state: numbers in the memories' states of one sequence.
    multiplied: parameters that every token is multiplied by: all but an untied input embedding.
    """

    parameters: int
    memory_parameters: int
    memory_state: int
    multiplied: int
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocabulary: int

    @classmethod
    def of(cls, model: nn.Module) -> Shape:
        """The sizes of a Hugging Face causal model, on any device."""
        net: Any = model
        config = net.config
        embedding, head = net.get_input_embeddings().weight, net.get_output_embeddings().weight
        memories = [module for module in model.modules() if isinstance(module, Memory)]
        total = sum(p.numel() for p in model.parameters())
        heads = config.num_attention_heads
        return cls(
            parameters=total,
            memory_parameters=sum(p.numel() for m in memories for p in m.parameters()),
            memory_state=sum(memory.state_size for memory in memories),
            multiplied=total - (0 if embedding is head else embedding.numel()),
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            ffn=config.intermediate_size,
            vocabulary=config.vocab_size,
        )

    def forward_flops(self, attended: float) -> float:
        """FLOPs of one token's forward pass that attends to `attended` keys on average: a
        multiply-add per parameter, and two per channel of each key (q·k and p·v). The memory's
        scan, a few operations per channel, is left out."""
        return 2 * self.multiplied + 4 * self.layers * self.heads * self.head_dim * attended

    def training_flops(self, attended: float) -> float:
        """FLOPs of one token's forward and backward pass."""
        return 3 * self.forward_flops(attended)

    def kv_bytes(self, tokens: int, itemsize: int = 2) -> int:
        """Keys and values of one sequence."""
        return 2 * self.layers * self.kv_heads * self.head_dim * tokens * itemsize


def attended_keys(method: Method | None, length: int) -> float:
    """Keys that a query of a training context attends to, on average; None: dense attention."""
    return float((method or Dense()).attended(torch.arange(length)).double().mean())


def training_memory(
    shape: Shape,
    *,
    shards: int,
    rows: int,
    length: int,
    passes: int = 1,
    checkpointing: bool = False,
    bf16: bool = True,
) -> dict[str, float]:
    """Bytes on one GPU by purpose, with FSDP over `shards` GPUs (1: one GPU or DDP).

    rows: of one pass on this GPU; passes: of a batch. States are exact: fp32 weights, gradients and
    Adam's two moments. Activations are an estimate: with flash-like attention a layer stores about
    10 · hidden + 3 · ffn + 4 · kv values per token (inputs and outputs of its products and norms);
    with checkpointing its input alone, and everything for one layer at a time. Logits are the fp32
    logits, their gradient and log-probabilities, and with bf16 the product's logits and their
    gradient.
    """
    size = 2 if bf16 else 4
    tokens = rows * length
    kv_width = shape.kv_heads * shape.head_dim
    layer = tokens * size * (10 * shape.hidden + 3 * shape.ffn + 4 * kv_width)
    inputs = tokens * size * shape.hidden
    activations = shape.layers * inputs + layer if checkpointing else shape.layers * layer
    gathered = 2 * size * shape.parameters / shape.layers if shards > 1 else 0
    # Between passes FSDP keeps unsharded gradients, to reduce them once.
    unsharded = 4 * shape.parameters if shards > 1 and passes > 1 else 0
    return {
        "weights, gradients, Adam (fp32)": 16 * shape.parameters / shards,
        "gathered layers": gathered,
        "gradients between passes": unsharded,
        "activations": activations,
        "logits": (3 * 4 + (2 * 2 if bf16 else 0)) * tokens * shape.vocabulary,
    }


def hours(flops: float, gpus: int, peak: float, mfu: float) -> float:
    """Hours for so many FLOPs on `gpus` GPUs of `peak` TFLOP/s with a utilisation of `mfu`."""
    return flops / (gpus * peak * 1e12 * mfu) / 3600


def decode_hours(
    shape: Shape, *, examples: int, batch: int, new_tokens: int, read: float, bandwidth: float
) -> float:
    """Hours of decoding on one GPU, which reads all weights and the attended cache at every step;
    read: cache bytes per sequence and step; bandwidth: TB/s of the GPU's memory."""
    steps = -(-examples // batch) * new_tokens
    return steps * (2 * shape.multiplied + batch * read) / (bandwidth * 1e12) / 3600

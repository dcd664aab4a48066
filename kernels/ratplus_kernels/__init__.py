"""Tensors in, tensors out: the operations that the paper's methods are made of.

Each name here is defined by its torch form, which is tested against a float64 loop. On a GPU with
Triton a kernel runs instead (`ratplus_kernels.dispatch`).
"""

from ratplus_kernels.memory_scan import Blocks, memory_prefill, memory_scan, memory_step
from ratplus_kernels.moba_prefill import moba_prefill
from ratplus_kernels.quest_decode import quest_decode
from ratplus_kernels.snapkv_select import snapkv_select

__all__ = [
    "Blocks",
    "memory_prefill",
    "memory_scan",
    "memory_step",
    "moba_prefill",
    "quest_decode",
    "snapkv_select",
]

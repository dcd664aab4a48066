"""The operations of the paper's methods.

On a GPU with Triton a kernel runs (`ratplus_kernels.dispatch`), elsewhere the torch form. The torch
form is the definition, except for the attention of Quest and MoBA: there it gathers the selected
blocks, and the masks of ratplus_exp's engine are the definition. All are tested against float64
loops.
"""

from ratplus_kernels.memory_scan import Blocks, memory_prefill, memory_scan, memory_step
from ratplus_kernels.moba_prefill import moba_prefill
from ratplus_kernels.quest_decode import quest_decode
from ratplus_kernels.snapkv import attention_mass, gather_tokens

__all__ = [
    "Blocks",
    "attention_mass",
    "gather_tokens",
    "memory_prefill",
    "memory_scan",
    "memory_step",
    "moba_prefill",
    "quest_decode",
]

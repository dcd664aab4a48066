"""The operations that the paper's methods are made of.

On a GPU with Triton a kernel runs (`ratplus_kernels.dispatch`), elsewhere the torch form. It is the
definition, but for Quest's and MoBA's attention: there it gathers the selected blocks, and the
definition is the engine of ratplus_exp. All are tested against float64 loops.
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

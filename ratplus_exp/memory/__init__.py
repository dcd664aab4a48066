"""The memory of Eq. 1, and the controls that stand in its place."""

from ratplus_exp.memory.base import Memory, gate_statistics, of_each_memory
from ratplus_exp.memory.gate import Gate, effective_length
from ratplus_exp.memory.kinds import KINDS, check_memory, memory_of

__all__ = [
    "KINDS",
    "Gate",
    "Memory",
    "check_memory",
    "effective_length",
    "gate_statistics",
    "memory_of",
    "of_each_memory",
]

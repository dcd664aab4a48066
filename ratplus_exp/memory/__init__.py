"""The memory of Eq. 1, and the controls that can replace it, by their names in a config."""

from typing import Any

from ratplus_exp.memory.base import Memory, gate_statistics, of_each_memory
from ratplus_exp.memory.gate import Ema, FixedEma, Gate
from ratplus_exp.memory.taps import Convolution, Shift

__all__ = [
    "KINDS",
    "Gate",
    "Memory",
    "check_memory",
    "gate_statistics",
    "memory_of",
    "of_each_memory",
]

KINDS: dict[str, type[Memory]] = {
    "gate": Gate,
    "ema": Ema,
    "ema_fixed": FixedEma,
    "conv": Convolution,
    "shift": Shift,
}
"""Values of `memory_kind`: the papers' gate, and controls."""


def memory_of(config: Any, head_dim: int) -> Memory | None:
    """The memory of a model's config."""
    if not config.memory:
        return None
    settings = {"memory_on": config.memory_on, "shared_gate": config.shared_gate}
    kind = KINDS[config.memory_kind]
    return kind(config.hidden_size, config.num_key_value_heads, head_dim, **settings)


def check_memory(config: Any) -> None:
    """ValueError for settings of a config's memory that are unknown or exclude each other."""
    kind, on = config.memory_kind, config.memory_on
    if kind not in KINDS:
        raise ValueError(f"memory_kind={kind} is unknown: use one of {', '.join(KINDS)}")
    if on not in ("kv", "k", "v", "select"):
        raise ValueError(f"memory_on={on} is unknown: use kv, k, v or select")
    if not config.shared_gate and not issubclass(KINDS[kind], Gate):
        raise ValueError(f"memory_kind={kind} has no gate: leave shared_gate=true")
    if not config.shared_gate and on != "kv":
        raise ValueError(f"memory_on={on} has one gate only: leave shared_gate=true")
    if on == "select" and KINDS[kind].learned:
        raise ValueError(
            f"memory_on=select gives memory_kind={kind} no gradient to learn from: use ema_fixed"
        )

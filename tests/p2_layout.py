"""Checkpoints in P2's layout, from models of this project."""

from ratplus_exp.models.p2_checkpoint import _in_p2_layout, p2_shapes


def to_p2(state, config):
    """P2's state dict, for the key `task`, from that of RatPlusForCausalLM(config)."""
    assert not any(x.any() for name, x in state.items() if name.endswith("memory.bias"))
    result = _in_p2_layout(state, config)
    assert {name: tuple(x.shape) for name, x in result.items()} == p2_shapes(config)
    return result

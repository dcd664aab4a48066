"""Conversion from published checkpoints of the RAT+ paper, P2 (wimh966/rat-plus, weights
barpitf/ratplus).

A `.pth` contains the model's state dict under the key `task`, and the state of the training.
Names may have `_orig_mod.` of torch.compile. Each layer's `seq_layer.in_proj` stacks the rows o, q,
k, v and, with the memory, g; older files have g in `seq_layer.fgate_proj`.
"""

import pickle
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ratplus_exp.models.configuration import RatPlusConfig
from ratplus_exp.models.modeling import RatPlusForCausalLM

OUTSIDE = {  # P2's name: ours
    "embedding.wte.weight": "model.embed_tokens.weight",
    "backbone.ln.weight": "model.norm.weight",
    "head.lm_head.weight": "lm_head.weight",
}
LAYER = {  # under backbone.layers.I. and model.layers.I.
    "seq_layer.input_norm.weight": "attention_norm.weight",
    "seq_layer.in_proj.weight": "attention.in_proj.weight",
    "seq_layer.out_proj.weight": "attention.out_proj.weight",
    "hidden_layer.ln.weight": "ffn_norm.weight",
    "hidden_layer.fc1.weight": "ffn.fc1.weight",
    "hidden_layer.fc2.weight": "ffn.fc2.weight",
}
IN_PROJ, GATE = "seq_layer.in_proj.weight", "seq_layer.fgate_proj.weight"


class _EasyDict:
    """Replaces easydict's class, in which P2 saves a run's settings, by OrderedDict, which torch's
    safe unpickler supports."""

    def __new__(cls) -> OrderedDict[str, Any]:  # type: ignore[misc]
        return OrderedDict()


def read_p2(path: Path) -> dict[str, Tensor]:
    """The state dict in a `.pth`, with P2's names, memory-mapped, without running code in it.

    ValueError if the file is missing, damaged or not such a checkpoint.
    """
    if not path.is_file():
        raise ValueError(f"there is no {path}: set checkpoint to a .pth file of the RAT+ paper")
    try:
        with torch.serialization.safe_globals([(_EasyDict, "easydict.EasyDict")]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        reason = str(error).split("WeightsUnpickler error:")[-1].strip().split(". ")[0]
        raise ValueError(
            f"{path} holds more than tensors and settings ({reason}): if you trust it, save its "
            "'task' alone"
        ) from None
    except (RuntimeError, EOFError, OSError) as error:
        reason = str(error).strip().split("\n")[0][:160]
        raise ValueError(f"{path} is damaged ({reason}): download it again") from None
    state = content.get("task") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(x, Tensor) for x in state.values()):
        raise ValueError(
            f"{path} has no state dict under 'task': is it one of the RAT+ paper's checkpoints?"
        )
    return dict(state)


def p2_shapes(config: RatPlusConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in a checkpoint of this architecture; ValueError if P2's
    layout does not support it."""
    if (config.memory_kind, config.memory_on, config.shared_gate) != ("gate", "kv", True):
        raise ValueError(
            "the RAT+ paper's memory is on keys and values, by one gate: see memory_kind, "
            "memory_on and shared_gate"
        )
    if config.num_key_value_heads * config.head_dim != config.hidden_size:
        raise ValueError(
            "the RAT+ paper's layout has no grouped-query attention: every head has its own K, V"
        )
    with torch.device("meta"):
        state = RatPlusForCausalLM(config).state_dict()
    return {name: tuple(x.shape) for name, x in _in_p2_layout(state, config).items()}


def from_p2(state: Mapping[str, Tensor], config: RatPlusConfig) -> dict[str, Tensor]:
    """The state dict of RatPlusForCausalLM(config) from P2's, with its dtypes.

    ValueError that names every tensor which is missing, unexpected or of another shape.
    """
    state = _stacked({name.replace("_orig_mod.", ""): x for name, x in state.items()})
    _check(state, config)
    if config.tie_word_embeddings and not torch.equal(
        state["head.lm_head.weight"], state["embedding.wte.weight"]
    ):
        raise ValueError(
            "head.lm_head.weight and embedding.wte.weight differ, but this model ties them: set "
            "model.architecture.tie_word_embeddings=false"
        )
    result = {name: state[p2_name] for p2_name, name in _names(config).items()}
    rows = 4 * config.hidden_size
    for i in range(config.num_hidden_layers):
        attention = f"model.layers.{i}.attention"
        stacked = result[f"{attention}.in_proj.weight"]
        result[f"{attention}.in_proj.weight"] = stacked[:rows].clone()
        if config.memory:
            result[f"{attention}.memory.weight"] = stacked[rows:].clone()
            result[f"{attention}.memory.bias"] = stacked.new_zeros(config.hidden_size)
    return result


def _in_p2_layout(state: Mapping[str, Tensor], config: RatPlusConfig) -> dict[str, Tensor]:
    """P2's state dict, but for the gates' biases."""
    result = {p2_name: state[name] for p2_name, name in _names(config).items()}
    for i in range(config.num_hidden_layers if config.memory else 0):
        gate = state[f"model.layers.{i}.attention.memory.weight"]
        in_proj = f"backbone.layers.{i}.{IN_PROJ}"
        result[in_proj] = torch.cat((result[in_proj], gate))
    return result


def _names(config: RatPlusConfig) -> dict[str, str]:
    """This project's name of each tensor of P2's."""
    names = dict(OUTSIDE)
    for i in range(config.num_hidden_layers):
        names |= {f"backbone.layers.{i}.{p2}": f"model.layers.{i}.{x}" for p2, x in LAYER.items()}
    return names


def _stacked(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Move the gate rows of older files to in_proj, as in newer ones."""
    for gate in [name for name in state if name.endswith(GATE)]:
        in_proj = gate.replace(GATE, IN_PROJ)
        if in_proj in state:
            state[in_proj] = torch.cat((state[in_proj], state.pop(gate)))
    return state


def _check(state: Mapping[str, Tensor], config: RatPlusConfig) -> None:
    shapes = p2_shapes(config)
    first = state.get(f"backbone.layers.0.{IN_PROJ}")
    if first is not None and len(first) == (4 if config.memory else 5) * config.hidden_size:
        kind, backbone = ("no ", "attention") if config.memory else ("", "ratplus")
        raise ValueError(
            f"the checkpoint has {kind}gate rows: choose a model with backbone={backbone}"
        )
    problems = [f"{name} is missing" for name in shapes if name not in state]
    problems += [f"{name} is unexpected" for name in state if name not in shapes]
    problems += [
        f"{name} has shape {tuple(state[name].shape)}, not {shape}"
        for name, shape in shapes.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    if problems:
        raise ValueError(
            "the checkpoint doesn't fit the model's architecture: "
            + "; ".join(problems)
            + ". Choose the model of its size, or download it again"
        )

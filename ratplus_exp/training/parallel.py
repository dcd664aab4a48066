"""How a training is spread over processes: the loss as one module, FSDP or DDP, whole weights."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from ratplus_exp.distributed import rank, replicate, world_size
from ratplus_exp.methods import Engine
from ratplus_exp.training.settings import Kind


class Objective(nn.Module):
    """The loss of a causal model as one module: DDP and FSDP act where the root is called.

    Args:
        model: a causal model with `.model` and `.lm_head`; sparse steps pass it an `engine`.
        bf16: matmuls in bfloat16, parameters and the memory's scan in fp32.
    """

    def __init__(self, model: nn.Module, bf16: bool) -> None:
        super().__init__()
        self.model: Any = model
        self.bf16 = bf16

    def forward(
        self, ids: Tensor, labels: Tensor | None = None, engine: Engine | None = None
    ) -> tuple[Tensor, Tensor]:
        """Summed cross-entropy of the labelled tokens, and how many of them the argmax predicts.

        ids and labels are (B, T); labels below 0 do not count. Without labels it returns the last
        hidden states, twice, which is enough to observe the layers through hooks.
        """
        options = {} if engine is None else {"engine": engine}
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=self.bf16):
            hidden = self.model.model(ids, use_cache=False, **options).last_hidden_state
            if labels is None:
                return hidden, hidden
            labelled = labels >= 0
            logits = self.model.lm_head(hidden[labelled]).float()
        labels = labels[labelled]
        correct = (logits.detach().argmax(-1) == labels).sum()
        return F.cross_entropy(logits, labels, reduction="sum"), correct


def prepare_layers(model: Any, compile: bool, checkpointing: bool) -> None:
    """Compile each decoder layer of a causal model, and store only its input for the backward pass.

    Both wrap `forward` in place, inside FSDP's hooks, so that no parameter changes its name.
    """
    if compile:
        # All layers share the compiled code: one entry for each kind of pass and length. Beyond
        # torch's limit of 8, further ones would silently run uncompiled.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    for layer in model.model.layers:
        if compile:
            layer.forward = torch.compile(layer.forward, dynamic=False)
        if checkpointing:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def distribute(objective: Objective, kind: Kind, device: torch.device) -> nn.Module:
    """Move the objective to its device: whole in a single process, else a replica or a shard."""
    if world_size() == 1:
        return objective.to(device)
    if kind == "ddp":
        return replicate(objective.to(device))
    return shard(objective, init_device_mesh(device.type, (world_size(),)))


def shard(objective: Objective, mesh: DeviceMesh) -> nn.Module:
    """FSDP: each decoder layer is sharded, and gathered in bf16 if objective.bf16.

    Gradients are reduced in fp32. Inputs of a layer are not cast: the residual stream is bf16
    already, since the gathered embedding is, and RoPE's tables stay in the model's precision, as in
    evaluation. A model on the CPU moves to the GPU layer by layer.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if objective.bf16 else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    for layer in objective.model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(objective, mesh=mesh, mp_policy=policy)
    return objective


def reduce_gradients(module: nn.Module, now: bool) -> None:
    """Whether the next backward pass sums gradients over ranks, or only accumulates them."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(now)
    elif isinstance(module, DistributedDataParallel):
        module.require_backward_grad_sync = now


def whole_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """All weights of a model that may be sharded: whole and on the CPU on rank 0, empty elsewhere.

    Every rank must call it. Tied weights stay one tensor.
    """
    tensors: dict[int, Tensor] = {}
    state = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in tensors:
            whole = tensor.detach()
            whole = whole.full_tensor() if isinstance(whole, DTensor) else whole
            tensors[id(tensor)] = whole.cpu() if rank() == 0 else whole.new_empty(0)
        state[name] = tensors[id(tensor)]
    return state


def sharded_like(saved: Any, current: Any) -> Any:
    """A whole saved state, sharded as the current one; both are nested dicts of tensors."""
    if isinstance(current, dict):
        return {k: sharded_like(x, current[k]) for k, x in saved.items() if k in current}
    if isinstance(current, DTensor) and not isinstance(saved, DTensor):
        return distribute_tensor(
            saved.to(current.device), current.device_mesh, current.placements, src_data_rank=None
        )
    return saved

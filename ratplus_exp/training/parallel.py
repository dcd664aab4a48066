"""Many processes, one loop: who this process is, and how a model is spread over all of them.

Processes are started by torchrun, or by anything that sets RANK, WORLD_SIZE, LOCAL_RANK,
MASTER_ADDR and MASTER_PORT. Without these variables there is one process, and nothing here does
anything.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from ratplus_exp.methods import Engine
from ratplus_exp.training.settings import Kind

T = TypeVar("T")


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """Which of its machine's processes, and so which GPU, this is."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """How many processes share this machine, as torchrun says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def cores() -> int:
    """CPU cores that this process may use, which on a shared node are fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# DDP's reducer must not be the last to hold the process group: it would take it down with Python's
# lock in hand, and wait forever for a thread of gloo's that needs this lock to let go of a tensor.
_replicas: list[DistributedDataParallel] = []


@contextmanager
def processes(device: torch.device, timeout: timedelta = timedelta(minutes=30)) -> Iterator[None]:
    """The process group, for as long as the context lasts. `timeout`: how long ranks wait."""
    if world_size() == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl", timeout=timeout, device_id=device)
    else:
        dist.init_process_group("gloo", timeout=timeout)
    try:
        yield
        dist.barrier()  # nobody takes its group down while another still talks to it
    finally:
        while _replicas:
            replica = _replicas.pop()
            del replica.reducer, replica.logger
        dist.destroy_process_group()


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def from_first(make: Callable[[], T]) -> T:
    """What rank 0 makes, on every process."""
    made = [make()] if rank() == 0 else [None]
    if world_size() > 1:
        dist.broadcast_object_list(made)
    return made[0]  # type: ignore[return-value]


def total(values: list[float], device: torch.device) -> list[float]:
    """Each value summed over all processes, in float64."""
    if world_size() == 1:
        return values
    sums = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    return sums.tolist()


class Objective(nn.Module):
    """The loss of a causal model as one module, since DDP and FSDP act where a root is called.

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
        """Summed cross-entropy of the labelled tokens, and how many of them are argmax-right.

        ids and labels are (B, T); labels below 0 do not count. Without labels: the last hidden
        states, twice, for whoever watches what happens inside.
        """
        how = {} if engine is None else {"engine": engine}
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=self.bf16):
            hidden = self.model.model(ids, use_cache=False, **how).last_hidden_state
            if labels is None:
                return hidden, hidden
            wanted = labels >= 0
            logits = self.model.lm_head(hidden[wanted]).float()
        labels = labels[wanted]
        hits = (logits.detach().argmax(-1) == labels).sum()
        return F.cross_entropy(logits, labels, reduction="sum"), hits


def prepare_layers(model: Any, compile: bool, checkpointing: bool) -> None:
    """Compile each decoder layer of a causal model, and keep of its activations only its input.

    Both wrap `forward` in place, inside the hooks of FSDP, so that no parameter changes its name.
    """
    if compile:
        # The layers share what is compiled: once for each kind of pass and length. Behind torch's
        # limit of 8 the rest would silently run uncompiled.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    for layer in model.model.layers:
        if compile:
            layer.forward = torch.compile(layer.forward, dynamic=False)
        if checkpointing:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def spread(objective: Objective, kind: Kind, device: torch.device) -> nn.Module:
    """The objective on its device: whole in a single process, else a replica or a shard of it."""
    if world_size() == 1:
        return objective.to(device)
    if kind == "ddp":
        _replicas.append(DistributedDataParallel(objective.to(device), broadcast_buffers=False))
        return _replicas[-1]
    return shard(objective, init_device_mesh(device.type, (world_size(),)))


def shard(objective: Objective, mesh: DeviceMesh) -> nn.Module:
    """FSDP: each decoder layer is sharded, and gathered in bf16 where the objective says so.

    Gradients are reduced in fp32. Inputs of a layer are left as they come: the residual stream is
    bf16 from the embedding on, whose gathered weights are, and RoPE's tables stay in the precision
    in which the model makes them, as in evaluation. A model on the CPU goes to the GPU layer by
    layer.
    """
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    if objective.bf16:
        policy = replace(policy, param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in objective.model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(objective, mesh=mesh, mp_policy=policy)
    return objective


def reduce_gradients(module: nn.Module, now: bool) -> None:
    """Whether the next backward pass sums gradients over processes, or just adds them up here."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(now)
    elif isinstance(module, DistributedDataParallel):
        module.require_backward_grad_sync = now


def whole_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """All weights of a model that may be sharded: on rank 0 whole and on the CPU, elsewhere empty.

    Every process must call it. Tied weights stay one tensor.
    """
    found: dict[int, Tensor] = {}
    state = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in found:
            whole = tensor.detach()
            whole = whole.full_tensor() if isinstance(whole, DTensor) else whole
            found[id(tensor)] = whole.cpu() if rank() == 0 else whole.new_empty(0)
        state[name] = found[id(tensor)]
    return state


def like(saved: Any, current: Any) -> Any:
    """A whole saved state, cut up as the current one is; both are nested dicts of tensors."""
    if isinstance(current, dict):
        return {key: like(value, current[key]) for key, value in saved.items() if key in current}
    if isinstance(current, DTensor) and not isinstance(saved, DTensor):
        return distribute_tensor(
            saved.to(current.device), current.device_mesh, current.placements, src_data_rank=None
        )
    return saved

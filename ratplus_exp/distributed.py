"""Ranks and process groups. torchrun, or any launcher that sets RANK, WORLD_SIZE, LOCAL_RANK,
MASTER_ADDR and MASTER_PORT, starts the processes; without these variables there is one process.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """The rank among the processes of this machine, which is the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def cores() -> int:
    """CPU cores for this process, at least 1: its share of those that the machine allows."""
    affinity = hasattr(os, "sched_getaffinity")  # not on macOS
    allowed = len(os.sched_getaffinity(0)) if affinity else os.cpu_count() or 1
    return max(1, allowed // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


# DDP's reducer must not be the last reference to the process group: it would destroy the group
# while it holds Python's lock, and wait forever for a gloo thread that needs this lock.
_replicas: list[DistributedDataParallel] = []


def replicate(module: nn.Module) -> DistributedDataParallel:
    """DDP, released before `process_group` ends."""
    _replicas.append(DistributedDataParallel(module, broadcast_buffers=False))
    return _replicas[-1]


@contextmanager
def process_group(
    device: torch.device, timeout: timedelta = timedelta(minutes=30)
) -> Iterator[None]:
    """The group of all processes, within the context. timeout: how long a rank waits for others."""
    if world_size() == 1:
        yield
        return
    if device.type == "cuda":
        dist.init_process_group("cpu:gloo,cuda:nccl", timeout=timeout, device_id=device)
    else:
        dist.init_process_group("gloo", timeout=timeout)
    try:
        yield
        dist.barrier()  # the group must outlive every rank's last collective
    finally:
        while _replicas:
            replica = _replicas.pop()
            del replica.reducer, replica.logger
        dist.destroy_process_group()


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def from_rank_0(make: Callable[[], T]) -> T:
    """The value that rank 0 makes, on every rank."""
    made = [make()] if rank() == 0 else [None]
    if world_size() > 1:
        dist.broadcast_object_list(made)
    return made[0]  # type: ignore[return-value]


def sum_over_ranks(values: list[float], device: torch.device) -> list[float]:
    """Each value summed over all ranks, in float64."""
    if world_size() == 1:
        return values
    sums = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    return sums.tolist()

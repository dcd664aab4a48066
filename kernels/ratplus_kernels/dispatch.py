"""Which form of an operation runs: its Triton kernel on a GPU, its torch definition elsewhere.

`<name>.py` holds the public `<name>(...)`, which is its torch form where `use_triton` is false;
`<name>_triton.py` holds the kernel, and is imported only where it is true.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import torch
from torch import Tensor

_forced: bool | None = None
_have_triton = importlib.util.find_spec("triton") is not None


def use_triton(*tensors: Tensor) -> bool:
    """Whether an operation on these tensors runs its Triton kernel: CUDA tensors where triton is
    installed. float64 is for checks and always runs in torch."""
    if any(tensor.dtype == torch.float64 for tensor in tensors):
        return False
    if _forced is not None:
        return _forced
    return _have_triton and all(tensor.is_cuda for tensor in tensors)


def interpreted() -> AbstractContextManager[None]:
    """Inside, Triton kernels run on CPU tensors too, under Triton's interpreter: slow, for tests.

    fp32 only: the interpreter truncates to bf16 and has no bf16 dot product.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError("set TRITON_INTERPRET=1 before the first import of triton")
    return _forced_to(True)


@contextmanager
def _forced_to(kernels: bool) -> Iterator[None]:
    global _forced
    before, _forced = _forced, kernels
    try:
        yield
    finally:
        _forced = before


definitions = partial(_forced_to, False)
"""Inside, no kernel runs: tests and benchmark compare kernels with these forms."""

"""Which form of an operation runs: its Triton kernel on a GPU, its torch definition elsewhere.

`<name>.py` holds the public `<name>(...)` and its torch definition `<name>_torch(...)`;
`<name>_triton.py` holds the kernel, and is imported only once `use_triton` has said yes.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_interpret = False
_have_triton = importlib.util.find_spec("triton") is not None


def use_triton(*tensors: Tensor) -> bool:
    """Whether an operation on these tensors runs its Triton kernel.

    It does for CUDA tensors where triton is installed, and inside `interpreted()`. float64 is for
    checks and always goes to torch.
    """
    if any(tensor.dtype == torch.float64 for tensor in tensors):
        return False
    return _interpret or (_have_triton and all(tensor.is_cuda for tensor in tensors))


@contextmanager
def interpreted() -> Iterator[None]:
    """Inside, Triton kernels run on CPU tensors too, under Triton's interpreter: slow, for tests.

    Only fp32 is right there (the interpreter truncates to bf16 and has no bf16 dot product).
    """
    global _interpret
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError("set TRITON_INTERPRET=1 before the first import of triton")
    before, _interpret = _interpret, True
    try:
        yield
    finally:
        _interpret = before

"""Where Triton kernels are tested: on the GPU where there is one, else under the interpreter."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest
import torch

from kernels.dispatch import interpreted


@pytest.fixture
def triton_device() -> Iterator[torch.device]:
    """A device on which `kernels.<name>` runs its Triton kernel while the test lasts.

    On the CPU that is the interpreter, which is right in fp32 only and slow: use tiny shapes there.
    """
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    if torch.cuda.is_available():
        yield torch.device("cuda")
    else:
        with interpreted():
            yield torch.device("cpu")

"""Kernels compile for a GPU that isn't there: the interpreter forgives what the compiler doesn't."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

# Types that change in a branch, shapes that aren't constants and the like show up here alone.
CALLS = {
    "quest_decode, scored while selecting": """
        q, k = zeros(1, 4, 1, 128), zeros(1, 2, 4096, 128)
        bounds, positions = zeros(1, 2, 64, 256), torch.tensor([[4095]])
        kernels.quest_decode(q, k, k, bounds, positions, block_size=64, top_k=4)
    """,
    "quest_decode, scored apart": """
        q, k = zeros(1, 4, 1, 128), zeros(1, 2, 16384, 128)
        bounds, positions = zeros(1, 2, 256, 256), torch.tensor([[16383]])
        kernels.quest_decode(q, k, k, bounds, positions, block_size=64, top_k=1024)
    """,
    "moba_prefill": """
        q, k = zeros(1, 4, 4096, 128), zeros(1, 2, 4096, 128)
        kernels.moba_prefill(q, k, k, block_size=64, top_k=4, means=zeros(1, 2, 64, 128))
    """,
}
SETUP = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

import kernels
from kernels import dispatch, moba_prefill, quest_decode

class Hopper:
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device=None): return 0

def compile_only(self, *args, grid, warmup, **options):
    print(self.fn.__name__, run(self, *args, grid=grid, warmup=True, **options).metadata.shared)

def zeros(*shape): return torch.zeros(shape, dtype=torch.bfloat16)

driver.set_active(Hopper())
run, jit.JITFunction.run = jit.JITFunction.run, compile_only
dispatch._interpret = True  # Triton kernels on CPU tensors; without TRITON_INTERPRET they compile
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to run them on")
@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="triton is not installed")
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_compiles_for_hopper(call, tmp_path):
    script = tmp_path / "compile.py"
    script.write_text(SETUP + "\n".join(line.strip() for line in call.splitlines()))
    environment = os.environ | {
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    result = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("\n") >= 2
    assert max(int(line.split()[-1]) for line in result.stdout.splitlines()) <= 227 * 1024

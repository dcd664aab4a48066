"""Compile Triton kernels for an NVIDIA GPU on a machine that has none: `python compile_only.py`.

Catches what the interpreter lets pass: types that don't fit, layouts and sizes that the compiler
refuses. Every launch below goes through the package's own launch code, with tensors that have a
shape but no memory, and is compiled instead of run. Prints one line a kernel.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TARGET = GPUTarget("cuda", 90, 32)
SHARED = 227 << 10  # bytes of shared memory that a program of such a GPU has at most
TYPES = {
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.bool: "*i1",
    torch.uint8: "*u8",
}


def compile_launch(function: JITFunction, *args, grid, warmup=False, **kwargs):
    """What JITFunction.run would do first: specialize on the arguments, and compile."""
    names = [p.name for p in function.params]
    values = dict(zip(names, args, strict=False)) | {n: v for n, v in kwargs.items() if n in names}
    options = {n: v for n, v in kwargs.items() if n not in names}
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(function.params):
        value = values.get(parameter.name, parameter.default)
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = TYPES[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        elif value == 1:
            signature[parameter.name], constants[(i,)] = "constexpr", 1
        else:
            signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(function, signature, constants, attributes)
    kernel = triton.compile(source, target=TARGET, options=options)
    report(function.__name__, kernel)


def report(name: str, kernel) -> None:
    """Registers, spills and shared memory of a compiled kernel, from the assembler's own words."""
    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(kernel.asm["ptx"])
        file.flush()
        command = [ptxas, "-v", "-arch=sm_90a", file.name, "-o", os.devnull]
        words = subprocess.run(command, capture_output=True, text=True).stderr
    registers = re.search(r"Used (\d+) registers", words)
    spills = re.search(r"(\d+) bytes spill stores", words)
    ptx = kernel.asm["ptx"]
    assert kernel.metadata.shared <= SHARED, f"{name}: {kernel.metadata.shared} bytes shared"
    print(
        f"{name}: {registers and registers[1]} registers, {spills and spills[1]} bytes spilled, "
        f"{kernel.metadata.shared} bytes shared, cp.async {ptx.count('cp.async.c')}, "
        f"wgmma {ptx.count('wgmma.mma_async')}, mma {ptx.count('mma.sync')}",
        flush=True,
    )


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def memory_scan() -> None:
    from ratplus_kernels import memory_scan_triton as scan

    rope = (meta(1, 4096, 1, 128, dtype=torch.float32),) * 2
    state = meta(2, 1, 32, 128, dtype=torch.float32)
    for dtype in (torch.bfloat16, torch.float32):
        fused = meta(1, 4096, 32, 640, dtype=dtype)
        z, k, v = (fused[..., i * 128 : (i + 1) * 128] for i in range(3))
        for chunks in (1, 4):  # as default_plan has them on a GPU
            wide, narrow = scan.Plan(64, 32, 8, chunks), scan.Plan(64, 16, 16, chunks)
            k_out, v_out, final, _ = scan.forward(z, k, v, state, plan=wide)
            for block in (64, 128) if chunks == 1 else (16,):
                scan.forward(z, k, v, None, rope, block, plan=narrow)
            scan.backward(narrow, z, k, v, state, k_out, v_out, k_out, v_out, final)
        scan.step(z[:, 0], k[:, 0], v[:, 0], state)


def snapkv() -> None:
    from ratplus_kernels import snapkv_triton as snapkv

    q, k = meta(2, 32, 64, 128), meta(2, 8, 4096, 128)
    snapkv.attention_mass(q, k)
    snapkv.gather(k, k, meta(2, 8, 256, dtype=torch.int64))


def quest_decode() -> None:
    from ratplus_kernels.quest_decode_triton import quest_decode_triton

    for length, top_k in ((4096, 4), (4096, 16), (32_768, 32), (131_072, 128)):
        q, k = meta(1, 32, 1, 128), meta(1, 8, length, 128)
        positions = meta(1, 1, dtype=torch.int64)
        quest_decode_triton(q, k, k, meta(1, 8, length // 64, 256), positions, 64, top_k)


def moba_prefill() -> None:
    from ratplus_kernels.moba_prefill_triton import moba_prefill_triton

    q = meta(1, 2, 131_072, 128)
    moba_prefill_triton(q, q, q, None, 64, 16)


if __name__ == "__main__":
    assert not triton.knobs.runtime.interpret, "the interpreter compiles nothing"
    JITFunction.run = compile_launch
    cases = ["memory_scan", "snapkv", "quest_decode", "moba_prefill"]
    for case in sys.argv[1:] or cases:
        globals()[case]()

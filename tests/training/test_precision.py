"""precision=auto follows a measurement, and is fp32 where bf16 has to be emulated."""

import os
import subprocess
import sys

import pytest
import torch

from ratplus_exp.training import precision
from ratplus_exp.training.precision import fastest

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("fp32", "bf16", "chosen"), [(2.0, 1.0, "bf16"), (1.05, 1.0, "fp32"), (1.0, 12.0, "fp32")]
)
def test_the_choice_follows_the_measurement(monkeypatch, fp32, bf16, chosen):
    asked = []

    def seconds(kind, *sizes):
        asked.append(sizes)
        return {"fp32": fp32, "bf16": bf16}[kind]

    monkeypatch.setattr(precision, "_seconds", seconds)
    assert fastest(CPU, 128, 512) == chosen
    assert asked == [(128, 512)] * 2


@pytest.mark.parametrize("has", [True, False])
def test_a_gpu_takes_bf16_where_it_has_it(monkeypatch, has):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has)
    assert fastest(torch.device("cuda"), 128, 512) == ("bf16" if has else "fp32")


def test_a_cpu_without_bf16_instructions_takes_fp32_in_time():
    """oneDNN is limited to AVX2."""
    code = (
        "import time, torch\n"
        "from ratplus_exp.training.precision import fastest\n"
        "for sizes in ((16, 64), (128, 512), (4096, 16384)):\n"
        "    started = time.process_time()\n"
        "    print(fastest(torch.device('cpu'), *sizes), time.process_time() - started)"
    )
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    chosen, seconds = zip(*map(str.split, done.stdout.splitlines()), strict=True)
    assert chosen == ("fp32",) * 3 and max(map(float, seconds)) < 2

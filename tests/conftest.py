"""What all tests share: one torch thread, tiny backbones, and where Triton kernels are tested."""

from __future__ import annotations

import importlib.util
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is first imported
if not torch.cuda.is_available():
    # Triton reads this once, when it is first imported; dispatch.py alone doesn't heed it.
    os.environ["TRITON_INTERPRET"] = "1"

from ratplus_exp.models import RatPlusConfig, RatPlusForCausalLM
from ratplus_exp.store import Store
from ratplus_exp.tasks import prompts
from ratplus_kernels.dispatch import interpreted

torch.set_num_threads(1)

VOCABULARY = 29


def pytest_configure(config: pytest.Config) -> None:
    """Processes that tests start import this checkout, as the tests do (see pyproject.toml)."""
    os.environ["PYTHONPATH"] = os.pathsep.join(map(str, config.getini("pythonpath")))
    # A shell's background jobs ignore SIGINT, and so would all that they start.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def triton_device() -> Iterator[torch.device]:
    """A device on which `ratplus_kernels.<name>` runs its Triton kernel while the test lasts.

    On the CPU that is the interpreter, which is right in fp32 only and slow: use tiny shapes there.
    """
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    if torch.cuda.is_available():
        yield torch.device("cuda")
    else:
        with interpreted():
            yield torch.device("cpu")


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "outputs")


@pytest.fixture(scope="session")
def make_model():
    """make_model(**config): a tiny float64 model in eval mode, the same for the same arguments.

    float64, because two ways to compute one logit then agree to 1e-9 or are different things.
    """

    def make(seed: int = 0, dtype: torch.dtype = torch.float64, **config) -> RatPlusForCausalLM:
        torch.manual_seed(seed)
        sizes = {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "initializer_range": 0.3,  # attention far from uniform, logits far from equal
            "gate_bias": (1.5, 8.0),
            "bos_token_id": 1,
            "eos_token_id": None,
            "pad_token_id": 0,
        }
        return RatPlusForCausalLM(RatPlusConfig(**sizes | config)).to(dtype).eval()

    return make


@pytest.fixture(scope="session")
def make_ids():
    """make_ids(rows, length): random token ids without the pad token."""

    def make(rows: int, length: int, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(1, VOCABULARY, (rows, length), generator=generator)

    return make


@pytest.fixture(scope="session")
def left_pad():
    """left_pad(rows of ids): one batch with its attention mask; pads carry a non-zero token."""

    def pad(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        width = max(len(row) for row in rows)
        ids = torch.full((len(rows), width), 7)
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, width - len(row) :], mask[i, width - len(row) :] = row, 1
        return ids, mask

    return pad


@pytest.fixture
def makers_are_threads(monkeypatch):
    """Prompts are made ahead without the seconds that processes take to start."""

    class Threads(ThreadPoolExecutor):
        def __init__(self, count, *state):
            super().__init__(count)
            self.state = state

        def call(self, function, *args):
            return self.submit(function, *self.state, *args)

        def stop(self):
            self.shutdown(wait=False, cancel_futures=True)

    monkeypatch.setattr(prompts, "Workers", Threads)
    monkeypatch.setattr(prompts, "_kept", {})

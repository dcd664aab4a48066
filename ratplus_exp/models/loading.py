"""Saved models: find, check, load."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils.logging import disable_progress_bar

from ratplus_exp.models.configuration import RatPlusConfig
from ratplus_exp.models.modeling import RatPlusForCausalLM
from ratplus_exp.provenance import sha256

WEIGHTS = "model.safetensors"


def check_model(path: Path, expected_sha256: str | None, backbone: str) -> str:
    """The digest of a model's weights, after the checks that need no loading.

    Raises ValueError, with the remedy, for a missing folder or file, a digest other than expected,
    or a model of the other backbone.
    """
    for name in (WEIGHTS, "config.json", "tokenizer.json"):
        if not (path / name).is_file():
            raise ValueError(
                f"there is no {name} in {path}: train the model (make weights) or set model.path"
            )
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except ValueError:
        raise ValueError(f"{path / 'config.json'} is not JSON: restore the file") from None
    memory = config.get("memory")
    if memory is not None and memory != (backbone == "ratplus"):
        raise ValueError(
            f"the model in {path} has memory={memory}, so it is no {backbone} backbone: set "
            "model.path or model.backbone"
        )
    digest = sha256(path / WEIGHTS)
    if expected_sha256 and digest != expected_sha256:
        raise ValueError(
            f"{path / WEIGHTS} is corrupt or another version: its sha256 is {digest}, "
            f"expected {expected_sha256}. Restore the file, or set model.sha256=null to use it"
        )
    return digest


def interface_digest(path: Path) -> str:
    """One digest of what turns text into the model's input and weights into the model."""
    files = [file for file in (path / "config.json", path / "tokenizer.json") if file.exists()]
    return hashlib.sha256("".join(map(sha256, files)).encode()).hexdigest()


def dtype_on(device: torch.device) -> torch.dtype:
    """What models compute in: fp32 on a CPU, bf16 on a GPU."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a model's folder; ValueError where it is broken or doesn't fit the model."""
    if not (path / "config.json").is_file():
        raise ValueError(f"there is no model in {path}: train it first, or name another folder")
    vocab_size = json.loads((path / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        text = " ".join(str(error).split())[:120]
        raise ValueError(f"the tokenizer in {path} is broken ({text}): restore its files") from None
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"the tokenizer in {path} has {len(tokenizer)} entries, the model only {vocab_size} "
            "embeddings: use the tokenizer that the model was trained with"
        )
    if tokenizer.eos_token_id is None or len(tokenizer) < 16:
        raise ValueError(
            f"the tokenizer in {path} has {len(tokenizer)} entries and eos {tokenizer.eos_token}: "
            "restore its files"
        )
    tokenizer.padding_side = "left"
    return tokenizer


def load_model(path: Path, device: torch.device) -> PreTrainedModel:
    """The model of a folder, in evaluation mode."""
    disable_progress_bar()  # a file of a few seconds; the stages show their own
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype_on(device), local_files_only=True
        )
    except SafetensorError as error:
        raise ValueError(f"{path / WEIGHTS} is damaged ({error}): restore the file") from None
    return model.to(device).eval()


def with_memory(
    attention: RatPlusForCausalLM, gate_bias: float | tuple[float, float], seed: int
) -> RatPlusForCausalLM:
    """A RAT+ model that starts from a trained attention model: the same weights and fresh gates."""
    settings = attention.config.to_dict() | {"memory": True, "gate_bias": gate_bias}
    with seeded(seed):
        model = RatPlusForCausalLM(RatPlusConfig.from_dict(settings))
    missing, unexpected = model.load_state_dict(attention.state_dict(), strict=False)
    assert not unexpected and all(".memory." in name for name in missing)
    return model


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Initial weights from a seed: transformers draws them from the global generator, which is put
    back afterwards."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield

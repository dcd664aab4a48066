"""Saved models: find, check, load."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
)
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils.logging import disable_progress_bar

from ratplus_exp.models.hf import carry
from ratplus_exp.provenance import sha256

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"  # of large models, whose weights are several files
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def weight_files(path: Path) -> list[Path]:
    """The files of a model's weights: one, or those that its index names."""
    if not (path / INDEX).is_file():
        return [path / WEIGHTS]
    try:
        names = json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"].values()
    except (ValueError, KeyError):
        raise ValueError(f"{path / INDEX} is no index of weights: restore the file") from None
    return [path / name for name in sorted(set(names))]


def weights_digest(path: Path) -> str:
    """The sha256 of a model's weights. Of several files it is that of their list, as
    `sha256sum *.safetensors | sha256sum` prints it in the model's folder."""
    files = weight_files(path)
    if len(files) == 1:
        return sha256(files[0])
    lines = "".join(f"{sha256(file)}  {file.name}\n" for file in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def check_model(path: Path, expected_sha256: str | None, backbone: str) -> str:
    """The digest of a model's weights, after the checks that need no loading.

    Raises ValueError, with the remedy, for a missing folder or file, a digest other than expected,
    or a model of the other backbone.
    """
    for file in (*weight_files(path), path / "config.json", path / "tokenizer.json"):
        if not file.is_file():
            raise ValueError(
                f"there is no {file.name} in {path}: set model.path, or train the model first "
                "(docs/models.md); the pocket models are in a clone of the repository"
            )
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except ValueError:
        raise ValueError(f"{path / 'config.json'} is not JSON: restore the file") from None
    memory = bool(config.get("memory"))  # a stock config says nothing of it
    if memory != (backbone == "ratplus"):
        raise ValueError(
            f"the model in {path} has memory={memory}, so it is no {backbone} backbone: set "
            "model.path or model.backbone"
        )
    digest = weights_digest(path)
    if expected_sha256 and digest != expected_sha256:
        raise ValueError(
            f"{weight_files(path)[0]} is corrupt or another version: its sha256 is {digest}, "
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
    return read_tokenizer(path, vocab_size)


def read_tokenizer(path: Path, vocab_size: int | None = None) -> Tokenizer:
    """The tokenizer in a folder, for a model with vocab_size embeddings; it pads on the left."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        text = " ".join(str(error).split())[:120]
        raise ValueError(f"the tokenizer in {path} is broken ({text}): restore its files") from None
    if vocab_size is not None and len(tokenizer) > vocab_size:
        raise ValueError(
            f"the tokenizer in {path} has {len(tokenizer)} entries, the model only {vocab_size} "
            "embeddings: use the tokenizer that the model was trained with"
        )
    if tokenizer.eos_token_id is None or len(tokenizer) < 16:
        raise ValueError(
            f"the tokenizer in {path} has {len(tokenizer)} entries and eos {tokenizer.eos_token}: "
            "restore its files"
        )
    if tokenizer.pad_token_id is None:  # Llama's; what stands in the padding is never seen
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return tokenizer


def load_model(path: Path, device: torch.device) -> PreTrainedModel:
    """The model of a folder, in evaluation mode.

    It decodes greedily: penalties and temperatures that its folder suggests are left out.
    """
    disable_progress_bar()  # a file of a few seconds; the stages show their own
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype_on(device), local_files_only=True, output_loading_info=True
        )
    except SafetensorError as error:
        raise ValueError(
            f"{weight_files(path)[0]} is damaged ({error}): restore the file"
        ) from None
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"the weights in {path} lack {', '.join(missing)}: restore its files")
    suggested = model.generation_config
    model.generation_config = GenerationConfig(
        **{name: getattr(suggested, name) for name in SPECIAL_TOKENS}
    )
    return carry(model).to(device).eval()

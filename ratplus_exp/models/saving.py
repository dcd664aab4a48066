"""A model as a folder in Hugging Face's format, whole or not at all."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer


def cast(weights: dict[str, torch.Tensor], dtype: str | None) -> dict[str, torch.Tensor]:
    """The weights in a dtype, or unchanged without one; tied weights stay one tensor."""
    if dtype is None:
        return weights
    tensors = {id(tensor): tensor.to(getattr(torch, dtype)) for tensor in weights.values()}
    return {name: tensors[id(tensor)] for name, tensor in weights.items()}


def save_model(
    model: PreTrainedModel,
    tokenizer: Tokenizer | None,
    target: Path,
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """All of a model's files, or none. weights: the whole ones of a sharded model."""
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        model.save_pretrained(partial, state_dict=weights)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        os.replace(partial, target)
    except (OSError, SafetensorError) as error:
        raise OSError(f"cannot write {target} ({error}): make room, then run it again") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def refuse_target(target: Path) -> None:
    """ValueError, before any work, for a folder that `save_model` can't replace."""
    if target.exists() and any(target.iterdir()):
        raise ValueError(f"{target} already exists: delete the folder or choose another one")

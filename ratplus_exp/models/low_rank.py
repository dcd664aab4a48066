"""Training of the memory and of low-rank updates alone (LoRA, by peft). A small file holds the
trained tensors; with the initial model they give the trained one."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ratplus_exp.memory import Memory
from ratplus_exp.models.families import OutputGate

FILE = "trained.safetensors"
DTYPE = torch.bfloat16  # of the file


def add_low_rank(model: nn.Module, rank: int, seed: int) -> Any:
    """Add updates of a rank to the linear layers of the decoder, in place, and freeze all other
    weights but the memory and output gates. The updates are zero at first. Returns peft's wrapper
    of the model.

    ValueError if peft is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ModuleNotFoundError:
        raise ValueError("stage.low_rank needs peft: pip install 'ratplus_exp[lora]'") from None
    whole = [name for name, x in model.named_modules() if isinstance(x, Memory | OutputGate)]
    config = LoraConfig(
        r=rank, lora_alpha=rank, target_modules="all-linear", exclude_modules=whole or None
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        wrapper: Any = get_peft_model(model, config)
    for name in whole:
        model.get_submodule(name).requires_grad_(True)
    return wrapper


def save_trained(model: nn.Module, weights: Mapping[str, Tensor], file: Path, origin: str) -> None:
    """Write those of a model's weights that are trained. origin: digest of the training's
    configuration and initial weights."""
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    trained = {name: weights[name].to(DTYPE).contiguous() for name in names}
    partial = file.with_suffix(".partial")
    try:
        save_file(trained, partial, {"origin": origin})
    except SafetensorError as error:  # not an OSError, even of a full disk
        partial.unlink(missing_ok=True)
        raise OSError(f"cannot write {file} ({error}): make room") from None
    partial.replace(file)


def origin_of(file: Path) -> str | None:
    """The origin of a file of `save_trained`; ValueError if it is damaged."""
    try:
        with safe_open(file, framework="pt") as opened:
            return (opened.metadata() or {}).get("origin")
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged ({error}): copy it again, or delete it") from None


def merge_trained(wrapper: Any, file: Path) -> nn.Module:
    """The plain model with the weights of a file of `save_trained`; wrapper: of `add_low_rank`."""
    trained = load_file(file)
    with torch.no_grad():
        for name, parameter in wrapper.get_base_model().named_parameters():
            if parameter.requires_grad:
                parameter.copy_(trained[name])
    return wrapper.merge_and_unload()

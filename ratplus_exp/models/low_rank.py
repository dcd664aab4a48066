"""Training of the memory and of low-rank updates alone (LoRA, by peft), whose tensors fit a small
file that makes the trained model from the one that the training began with."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ratplus_exp.memory import Memory

FILE = "trained.safetensors"
DTYPE = torch.bfloat16  # of the file


def add_low_rank(model: nn.Module, rank: int) -> Any:
    """Add updates of a rank to the linear layers of the decoder, in place, and freeze all other
    weights but the memory. The updates are zero at first. Returns peft's wrapper of the model.

    ValueError if peft is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ModuleNotFoundError:
        raise ValueError("stage.low_rank needs peft: pip install 'ratplus_exp[lora]'") from None
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear")
    wrapper: Any = get_peft_model(model, config)
    for module in model.modules():
        if isinstance(module, Memory):
            module.requires_grad_(True)
    return wrapper


def save_trained(model: nn.Module, weights: Mapping[str, Tensor], file: Path, origin: str) -> None:
    """Write the weights that are trained, of all of a model's. origin: digest of the weights that
    the training began with."""
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    trained = {name: weights[name].to(DTYPE).contiguous() for name in names}
    partial = file.with_suffix(".partial")
    save_file(trained, partial, {"origin": origin})
    partial.replace(file)


def merge_trained(wrapper: Any, file: Path, origin: str) -> nn.Module:
    """The plain model with the weights of a file of `save_trained`; wrapper: of `add_low_rank`.

    ValueError for a file of another rank, or of other weights than `origin`.
    """
    model = wrapper.get_base_model()
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    trained = load_file(file)
    with safe_open(file, framework="pt") as opened:
        same = (opened.metadata() or {}).get("origin") == origin
    if not same or {n: x.shape for n, x in trained.items()} != {n: p.shape for n, p in own.items()}:
        raise ValueError(
            f"{file} was trained from other weights or with another stage.low_rank: set "
            "stage.init and stage.low_rank as there, or remove it"
        )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(trained[name])
    return wrapper.merge_and_unload()

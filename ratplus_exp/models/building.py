"""Models that no folder holds: with fresh weights, or trained attention with fresh gates."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from ratplus_exp.memory import Memory
from ratplus_exp.models.configuration import RatPlusConfig
from ratplus_exp.models.families import FAMILIES
from ratplus_exp.models.hf import carry
from ratplus_exp.models.modeling import RatPlusForCausalLM

MEMORY_SETTINGS = (
    "memory_kind",
    "gate_bias",
    "memory_on",
    "shared_gate",
    "memory_position",
    "output_gate",
)
"""The settings of an architecture that adding the memory takes."""


def config_for(architecture: dict[str, Any], memory: bool) -> PretrainedConfig:
    """The Hugging Face config of a `model.architecture`.

    Its `model_type` is a family of docs/models.md, or left out for P2's own backbone; the rest are
    that config's fields. ValueError where the family can't have what is asked for.
    """
    settings = dict(architecture)
    family = settings.pop("model_type", "ratplus")
    if family == "ratplus":
        return RatPlusConfig(memory=memory, **settings)
    if not memory and not settings.get("output_gate"):
        stock = {k: v for k, v in settings.items() if k not in MEMORY_SETTINGS}
        try:
            return AutoConfig.for_model(family, **stock)
        except ValueError:
            raise ValueError(
                f"model.architecture.model_type={family} is unknown: use {_families()}"
            ) from None
    if family not in FAMILIES:
        raise ValueError(f"there is no memory for {family} models: use {_families()}")
    config_class: Any = FAMILIES[family].config_class
    return config_class(memory=memory, **settings)


def new_model(config: PretrainedConfig, seed: int) -> PreTrainedModel:
    """A model with fresh weights, ready for any method. Under `torch.device("meta")` it has its
    shapes alone."""
    with _seeded(seed):
        return carry(AutoModelForCausalLM.from_config(config))


def add_memory(model: PreTrainedModel, seed: int = 0, **settings: Any) -> PreTrainedModel:
    """A RAT+ model that starts from a trained attention model: the same weights and fresh gates,
    which see nothing of x at first (W_g = 0): their bias says where they start.

    Takes P2's backbone and the families of docs/models.md; the dtype stays. settings are fields of
    the new config, above all those of MEMORY_SETTINGS.
    """
    config = memory_config(model.config, **settings)
    causal: Any = FAMILIES.get(config.model_type.removesuffix("_ratplus"), RatPlusForCausalLM)
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # that gates are missing is no news here
    with _seeded(seed):
        ratplus, report = causal.from_pretrained(
            None,
            config=config,
            state_dict=model.state_dict(),
            dtype=model.dtype,
            output_loading_info=True,
        )
    logging.set_verbosity(level)
    new = (".memory.", ".output_gate.")
    assert all(any(part in name for part in new) for name in report["missing_keys"])
    for module in ratplus.modules():
        if isinstance(module, Memory):
            module.initialize(0.0, config.gate_bias)
    return ratplus


def memory_config(config: PretrainedConfig, **settings: Any) -> PretrainedConfig:
    """The config of a model like this one, with the memory."""
    fields = config.to_dict() | settings
    for name in ("architectures", "auto_map", "transformers_version", "memory"):
        fields.pop(name, None)
    fields["model_type"] = fields["model_type"].removesuffix("_ratplus")
    return config_for(fields, memory=True)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Initial weights from a seed: transformers draws them from the CPU's global generator, which
    is put back afterwards; those of GPUs are left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def _families() -> str:
    return ", ".join(("ratplus", *FAMILIES))

"""New models: with random weights, or trained attention with new gates."""

from copy import deepcopy
from dataclasses import fields
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from ratplus_exp.memory import Memory
from ratplus_exp.models.configuration import RatPlusConfig
from ratplus_exp.models.families import FAMILIES, FamilyFields
from ratplus_exp.models.hf import attach_engine
from ratplus_exp.models.loading import SPECIAL_TOKENS
from ratplus_exp.models.modeling import RatPlusForCausalLM

MEMORY_SETTINGS = tuple(x.name for x in fields(FamilyFields) if x.name != "memory")
"""The settings of an architecture that the memory adds."""


def config_for(architecture: dict[str, Any], memory: bool) -> PretrainedConfig:
    """The Hugging Face config of a `model.architecture`: its `model_type` is a family of
    docs/models.md (default: P2's backbone), the rest are that config's fields. ValueError for an
    unknown family, or for one without the memory."""
    settings = dict(architecture)
    family = settings.pop("model_type", "ratplus")
    if family == "ratplus":
        if unknown := settings.keys() - RatPlusConfig().to_dict().keys() - {*SPECIAL_TOKENS}:
            raise ValueError(
                f"model.architecture.{min(unknown)} is not a field of the RAT+ paper's backbone: "
                "leave it out"
            )
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
    """A model with random weights, for any method; under `torch.device("meta")` without storage.
    The global generator's state does not change."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return attach_engine(AutoModelForCausalLM.from_config(config))


def add_memory(model: PreTrainedModel, **settings: Any) -> PreTrainedModel:
    """A RAT+ model with the weights and dtype of a trained attention model, and with new gates that
    depend on their bias alone (W_g = 0).

    model: P2's backbone or a family of docs/models.md; settings: fields of the new config, such as
    MEMORY_SETTINGS.
    """
    config = memory_config(model.config, **settings)
    causal: Any = FAMILIES.get(config.model_type.removesuffix("_ratplus"), RatPlusForCausalLM)
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # the gates are missing as intended
    with torch.random.fork_rng(devices=[]):  # transformers draws weights that are not kept
        ratplus, report = causal.from_pretrained(
            None,
            config=config,
            state_dict=model.state_dict(),
            dtype=model.dtype,
            output_loading_info=True,
        )
    logging.set_verbosity(level)
    assert all(".memory." in x or ".output_gate." in x for x in report["missing_keys"])
    for module in ratplus.modules():
        if isinstance(module, Memory):
            module.initialize(0.0, config.gate_bias)
    ratplus.generation_config = deepcopy(model.generation_config)  # its end-of-text tokens
    return ratplus


def memory_config(config: PretrainedConfig, **settings: Any) -> PretrainedConfig:
    """The config with the memory added."""
    architecture = config.to_dict() | settings
    for name in ("architectures", "auto_map", "transformers_version", "memory"):
        architecture.pop(name, None)
    architecture["model_type"] = architecture["model_type"].removesuffix("_ratplus")
    return config_for(architecture, memory=True)


def _families() -> str:
    return ", ".join(("ratplus", *FAMILIES))

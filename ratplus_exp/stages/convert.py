"""stage=convert: one of P2's published checkpoints as a folder in Hugging Face's format."""

from __future__ import annotations

import torch
from omegaconf import DictConfig

from ratplus_exp.config import plain
from ratplus_exp.models import RatPlusConfig, RatPlusForCausalLM, config_for
from ratplus_exp.models.loading import (
    SPECIAL_TOKENS,
    read_tokenizer,
    weights_digest,
)
from ratplus_exp.models.p2_checkpoint import from_p2, read_p2
from ratplus_exp.stages.common import resolve
from ratplus_exp.stages.train import refuse_target, save_model


def run(cfg: DictConfig) -> None:
    """Read `checkpoint`, write model.path: weights, config, and stage.tokenizer where it is set."""
    if not cfg.checkpoint:
        raise ValueError("stage=convert reads one of P2's .pth files: set checkpoint=FILE")
    config = config_for(plain(cfg.model.architecture), cfg.model.backbone == "ratplus")
    if not isinstance(config, RatPlusConfig):
        raise ValueError(
            f"model={cfg.model.name} is not of P2's architecture: use model=ratplus_7b or another "
            "of docs/models.md"
        )
    target = resolve(cfg.model.path)
    refuse_target(target)
    tokenizer = None
    if cfg.stage.tokenizer:
        tokenizer = read_tokenizer(resolve(cfg.stage.tokenizer), config.vocab_size)
        for name in SPECIAL_TOKENS:
            setattr(config, name, getattr(tokenizer, name))
    state = from_p2(read_p2(resolve(cfg.checkpoint)), config)
    if cfg.stage.dtype:
        state = {name: tensor.to(getattr(torch, cfg.stage.dtype)) for name, tensor in state.items()}
    with torch.device("meta"):
        model = RatPlusForCausalLM(config)
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    target.parent.mkdir(parents=True, exist_ok=True)
    save_model(model.eval(), tokenizer, target)
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"Saved {target}: {count:,} parameters, sha256 {weights_digest(target)}")
    if tokenizer is None:
        print(
            f"It has no tokenizer yet: copy the files of the model's own (Llama-2's, for P2's "
            f"models) into {target}."
        )

"""stage=convert: the RAT+ paper's (P2's) checkpoints and GGUF files to Hugging Face folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils.logging import disable_progress_bar

from ratplus_exp.config import plain
from ratplus_exp.models import RatPlusConfig, config_for
from ratplus_exp.models.loading import LOCAL, SPECIAL_TOKENS, read_tokenizer, weights_digest
from ratplus_exp.models.p2_checkpoint import from_p2, read_p2
from ratplus_exp.models.saving import cast, refuse_target, save_model
from ratplus_exp.stages.common import resolve

Parts = tuple[PretrainedConfig, dict[str, torch.Tensor], Tokenizer | None]


def run(cfg: DictConfig) -> None:
    """Read `checkpoint`; write weights, config and tokenizer to model.path."""
    if not cfg.checkpoint:
        raise ValueError(
            "stage=convert reads one of the RAT+ paper's .pth files or a .gguf file: set "
            "checkpoint=FILE"
        )
    target, file = resolve(cfg.model.path), resolve(cfg.checkpoint)
    refuse_target(target)
    config, state, tokenizer = (_read_gguf if file.suffix == ".gguf" else _read_p2)(cfg, file)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(cast(state, cfg.stage.dtype), assign=True)
    model.tie_weights()
    target.parent.mkdir(parents=True, exist_ok=True)
    save_model(model.eval(), tokenizer, target)
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"Saved {target}: {count:,} parameters, sha256 {weights_digest(target)}")
    if tokenizer is None:
        print(
            f"It has no tokenizer yet: copy the model's tokenizer files (Llama-2's, for the RAT+ "
            f"paper's models) into {target}."
        )


def _read_p2(cfg: DictConfig, file: Path) -> Parts:
    """One of P2's files with model.architecture, and stage.tokenizer if set."""
    config = config_for(plain(cfg.model.architecture), cfg.model.backbone == "ratplus")
    if not isinstance(config, RatPlusConfig):
        raise ValueError(
            f"model={cfg.model.name} is not of the RAT+ paper's architecture: use "
            "model=ratplus_7b or another of docs/models.md"
        )
    tokenizer = None
    if cfg.stage.tokenizer:
        tokenizer = read_tokenizer(resolve(cfg.stage.tokenizer), config.vocab_size)
        for name in SPECIAL_TOKENS:
            setattr(config, name, getattr(tokenizer, name))
    return config, from_p2(read_p2(file), config), tokenizer


def _read_gguf(cfg: DictConfig, file: Path) -> Parts:
    """A GGUF file, dequantised; transformers can read such a model but not save it."""
    disable_progress_bar()
    source: dict[str, Any] = {"gguf_file": file.name, **LOCAL}
    try:
        model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **source)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **source)
    except Exception as error:  # a damaged file fails in many ways
        text = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{file} cannot be read ({text}): pip install 'ratplus_exp[gguf]' reads "
            "the models of docs/real-model.md"
        ) from None
    del model.config.quantization_config
    tokenizer.clean_up_tokenization_spaces = False  # it would change text of byte-level BPE
    return model.config, model.state_dict(), tokenizer

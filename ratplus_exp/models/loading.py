"""Saved models: checks and loading."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils.logging import disable_progress_bar

from ratplus_exp.models.hf import attach_engine
from ratplus_exp.provenance import sha256

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"  # of large models, whose weights are several files
INTERFACE = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
LOCAL: Any = {"local_files_only": True, "trust_remote_code": False}  # never run a folder's code
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def weight_files(path: Path) -> list[Path]:
    """The files of a model's weights: one, or those in its index."""
    if (path / WEIGHTS).is_file() or not (path / INDEX).is_file():
        return [path / WEIGHTS]
    try:
        names = json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"].values()
        return [path / Path(name).name for name in sorted(set(names))]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path / INDEX} is not an index of weights: restore the file") from None


def weights_digest(path: Path) -> str:
    """The sha256 of a model's weights; of several files, that which
    `sha256sum *.safetensors | sha256sum` prints in the model's folder."""
    files = weight_files(path)
    if len(files) == 1:
        return sha256(files[0])
    lines = "".join(f"{sha256(file)}  {file.name}\n" for file in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def check_model(path: Path, expected_sha256: str | None, backbone: str) -> str:
    """The digest of a model's weights, after all checks that need no loading.

    ValueError for a missing file, an unexpected digest, or a model of the other backbone.
    """
    for file in (*weight_files(path), path / "config.json", path / "tokenizer.json"):
        if not file.is_file():
            raise ValueError(
                f"there is no {file.name} in {path}: set model.path, or train the model first "
                "(docs/models.md); the pocket models are in a clone of the repository"
            )
    config = read_config(path)
    if "quantization_config" in config:
        raise ValueError(f"the model in {path} is quantised: use its weights in fp32, fp16 or bf16")
    memory = bool(config.get("memory"))  # stock configs have no such field
    if memory != (backbone == "ratplus"):
        raise ValueError(
            f"the model in {path} has memory={memory}, so its backbone is not {backbone}: set "
            "model.path or model.backbone"
        )
    digest = weights_digest(path)
    if expected_sha256 and digest != expected_sha256:
        raise ValueError(
            f"{weight_files(path)[0]} is corrupt or another version: its sha256 is {digest}, "
            f"expected {expected_sha256}. Restore the file, or set model.sha256=null to use it"
        )
    return digest


def read_config(path: Path, name: str = "config.json") -> dict[str, Any]:
    """A model's config.json, or another file in JSON; ValueError if it is damaged."""
    file = path / name
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise ValueError(f"{file} is not a configuration in JSON: restore the file")
    return config


def load_config(path: Path, rope: dict[str, Any] | None = None) -> PretrainedConfig:
    """The configuration of the model in a folder; rope: changes of its rope_parameters.

    ValueError if transformers refuses it, or for changes to a model without such parameters."""
    try:
        config = AutoConfig.from_pretrained(path, **LOCAL)
    except (ValueError, KeyError, TypeError) as error:
        text = " ".join(str(error).split())[:120]
        raise ValueError(f"{path / 'config.json'} is broken ({text}): restore it") from None
    if not rope:
        return config
    saved = getattr(config, "rope_parameters", None) or {}
    if "rope_theta" not in saved:  # P2's backbone, or parameters by layer type
        raise ValueError(
            f"the model in {path} has no rope_parameters for all layers: leave rope out, or set "
            "positions=N for longer contexts without it"
        )
    try:
        return type(config).from_dict(config.to_dict() | {"rope_parameters": saved | rope})
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"rope={rope} is incomplete: add the fields that transformers needs ({error})"
        ) from None


def check_length(
    path: Path, length: int, rope: dict[str, Any] | None = None, positions: int | None = None
) -> None:
    """ValueError for contexts longer than `positions`, by default those of the model in a folder;
    with rope, those before scaling times its factor."""
    config: Any = read_config(path)
    limit = positions or config.get("max_position_embeddings")
    if rope:
        config = load_config(path, rope)
        scaled = {"original_max_position_embeddings": config.max_position_embeddings, "factor": 1}
        if config.rope_parameters["rope_type"] != "default":
            scaled |= config.rope_parameters
        limit = positions or int(scaled["original_max_position_embeddings"] * scaled["factor"])
    if isinstance(limit, int) and length > limit:
        raise ValueError(
            f"data.length={length} is more than the {limit} positions of the model in {path}: "
            "lower it, choose data of the model's tier, or set rope, or positions=N"
        )


def end_tokens(path: Path, name: str = "generation_config.json") -> list[int]:
    """The tokens that end an answer: eos_token_id of the named file, or where a model's folder has
    none there, of config.json."""
    for file in (name, "config.json"):
        ends = read_config(path, file).get("eos_token_id") if (path / file).exists() else None
        if ends is not None:
            return [ends] if isinstance(ends, int) else list(ends)
    return []


def interface_digest(path: Path) -> str:
    """One digest of configuration, tokenizer and end tokens. Of generation_config.json it includes
    EOS alone, where that differs from config.json's."""
    files = [path / name for name in INTERFACE if (path / name).exists()]
    lines = "".join(f"{sha256(file)}  {file.name}\n" for file in files)
    if (ends := end_tokens(path)) != end_tokens(path, "config.json"):
        lines += f"{ends}\n"
    return hashlib.sha256(lines.encode()).hexdigest()


def dtype_on(device: torch.device, name: str | None = None) -> torch.dtype:
    """The dtype of computation: the named one, or fp32 on a CPU and bf16 on a GPU."""
    if name:
        return getattr(torch, name)
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a model's folder; ValueError if it is broken or does not fit the model.

    An EOS that is not one of the model's end tokens is replaced by the first of those."""
    if not (path / "config.json").is_file():
        raise ValueError(f"there is no model in {path}: train it first, or name another folder")
    tokenizer = read_tokenizer(path, read_config(path).get("vocab_size"))
    if (ends := end_tokens(path)) and tokenizer.eos_token_id not in ends:
        if ends[0] >= len(tokenizer):
            raise ValueError(
                f"the model in {path} ends with token {ends[0]}, but its tokenizer has "
                f"{len(tokenizer)} entries: correct eos_token_id in its generation_config.json"
            )
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ends[0])
    return tokenizer


def read_tokenizer(path: Path, vocab_size: int | None = None) -> Tokenizer:
    """The tokenizer in a folder, for a model with vocab_size embeddings; it pads on the left."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **LOCAL)
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
    if tokenizer.pad_token_id is None:  # as in Llama
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return tokenizer


def load_model(
    path: Path, device: torch.device, dtype: str | None = None, rope: dict[str, Any] | None = None
) -> PreTrainedModel:
    """The model of a folder, in evaluation mode; dtype as in `dtype_on`, rope as in `load_config`.
    It decodes greedily: penalties and temperatures of its generation config are ignored."""
    disable_progress_bar()
    for file in weight_files(path):
        _check_dtypes(file)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            path,
            config=load_config(path, rope),
            dtype=dtype_on(device, dtype),
            use_safetensors=True,
            output_loading_info=True,
            **LOCAL,
        )
    except (ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
        text = " ".join(str(error).split())[:200]
        raise ValueError(f"the model in {path} cannot be loaded ({text}): restore it") from None
    for kind, verb in (("missing_keys", "lack"), ("unexpected_keys", "have unexpected")):
        if names := ", ".join(sorted(report[kind])[:4]):
            raise ValueError(f"the weights in {path} {verb} {names}: restore its files")
    special = {name: getattr(model.generation_config, name) for name in SPECIAL_TOKENS}
    model.generation_config = GenerationConfig(**special)
    model = attach_engine(model).to(device).eval()
    for name, weight in model.named_parameters():
        if not weight.detach().sum(dtype=torch.float32).isfinite():
            raise ValueError(f"{name} in {path} is not finite: restore the weights")
    return model


def _check_dtypes(file: Path) -> None:
    try:
        with safe_open(file, "pt") as weights:
            kinds = {weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged ({error}): restore the file") from None
    if unfit := kinds - {"F64", "F32", "F16", "BF16"}:
        raise ValueError(f"{file} has weights in {min(unfit)}: use them in fp32, fp16 or bf16")

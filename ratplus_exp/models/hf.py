"""Any decoder of transformers under any method, with its stock classes and weights.

A stock decoder computes attention by a registered function (transformers' attention interface) and
passes it unknown keyword arguments, here `forward_pass`, which has the engine and the cache.
"""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from ratplus_exp.methods import Engine, Step
from ratplus_exp.models.cache import SparseCache
from ratplus_exp.models.forward_pass import ForwardPass

ATTENTION = "ratplus"  # the name in transformers' attention interface
HUB_CODE = "ratplus_hub"


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    forward_pass: ForwardPass | None = None,
    scaling: float,
    sliding_window: int | None = None,
    select_by: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Eq. 2 in a stock attention layer: query (B, H, T, D), key, value and select_by (B, K, T, D)
    -> (B, T, H, D), without masks and dropout; see `ForwardPass.attend`.

    Raises ValueError for kinds of attention that the methods are not defined for.
    """
    layer: Any = module.layer_idx
    if forward_pass is None or attention_mask is not None or key.shape[-1] != value.shape[-1]:
        raise ValueError(
            f"{type(module).__name__} is not supported: it adds a bias to its logits, has keys and "
            "values of different sizes, or passes no arguments on to its attention"
        )
    if not torch.is_grad_enabled():  # a checkpointed layer runs again in the backward pass
        if layer in forward_pass.attended:
            raise ValueError(f"{type(module).__name__} is not supported: it attends twice a layer")
        forward_pass.attended.add(layer)
    if others.get("softcap") is not None or others.get("s_aux") is not None:
        raise ValueError(
            f"{type(module).__name__} caps its logits or has sinks: use a model with plain "
            "softmax attention"
        )
    if sliding_window is not None and forward_pass.length > sliding_window:
        raise ValueError(
            f"{type(module).__name__} attends to a window of {sliding_window} tokens only, and the "
            f"context has {forward_pass.length}: lower data.length to the window"
        )
    factor = scaling * query.shape[-1] ** 0.5  # the engine divides by √D
    if abs(factor - 1) > 1e-6:
        query = query * factor
    out = forward_pass.attend(layer, query, key, value, select_by)
    return out.transpose(1, 2), None


AttentionInterface.register(ATTENTION, attention)


UNSUPPORTED = ("output_hidden_states", "output_attentions", "inputs_embeds")


class EngineDecoder:
    """Mixin for decoders (causal models without their heads), whose layers attend by a ForwardPass.

    The layers see right padding instead of left padding, so that each row starts at its first
    token: the memory starts from zero, block 0 is the row's first block, and a batch gives the same
    answers as its rows alone.
    """

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: SparseCache | None = None,
        use_cache: bool | None = None,
        engine: Engine | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Last hidden states (B, T, C) of ids (B, T).

        attention_mask (B, tokens so far) may be zero at the left of a prompt. `engine`: for a pass
        without a cache, or for a new cache. Positions count from each row's first token;
        position_ids, which `generate` passes, are ignored. ValueError for UNSUPPORTED arguments.
        """
        if asked := [x for x in UNSUPPORTED if not (kwargs.get(x) is None or kwargs[x] is False)]:
            raise ValueError(f"this model has last hidden states and logits alone: drop {asked[0]}")
        model: Any = self
        cache, length = past_key_values, input_ids.shape[1]
        if cache is not None and not isinstance(cache, SparseCache):
            raise TypeError(
                f"this model decodes with a SparseCache, not {type(cache).__name__}; pass "
                "past_key_values=SparseCache(num_layers, engine) or leave it out"
            )
        if use_cache is None:
            use_cache = model.config.use_cache and not model.training
        if cache is None and use_cache:
            cache = SparseCache(model.config.num_hidden_layers, engine)
        pads = _left_padding(attention_mask, length) if cache is None or cache.is_empty else None
        index, lengths = torch.arange(length, device=input_ids.device), None
        if pads is not None:
            input_ids = input_ids.gather(1, (index + pads[:, None]) % length)
            lengths = length - pads
        start = 0 if cache is None or cache.processed is None else cache.processed[:, None]
        step = Step((start + index).view(-1, length), lengths)
        out = self.run_layers(input_ids, ForwardPass(step, engine or Engine(), cache), **kwargs)
        if cache is not None:
            cache.advance(step, len(input_ids))
        if pads is not None:
            x = out.last_hidden_state
            index = ((index - pads[:, None]) % length)[..., None].expand_as(x)
            out.last_hidden_state = x.gather(1, index)
        return out

    def run_layers(self, input_ids: Tensor, forward_pass: ForwardPass, **kwargs: Any) -> Any:
        """The output of the decoder for ids (B, T) whose rows start at their first token."""
        return super().forward(  # type: ignore[misc]
            input_ids=input_ids,
            position_ids=forward_pass.step.positions,
            past_key_values=forward_pass.cache,
            use_cache=False,  # else it would create a DynamicCache
            forward_pass=forward_pass,
            **kwargs,
        )


class SparseGeneration:
    """Mixin for causal models: `generate` decodes with a SparseCache."""

    def new_cache(self, engine: Engine | None = None, room: int | None = None) -> SparseCache:
        """An empty cache that decodes with `engine`: `generate(past_key_values=new_cache(e))`."""
        config: Any = self.config  # type: ignore[attr-defined]
        return SparseCache(config.num_hidden_layers, engine, room)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        if generation_config.prefill_chunk_size is not None:
            raise ValueError("prefill_chunk_size is not supported: a method takes a prompt whole")
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache:
            model_kwargs["past_key_values"] = self.new_cache()
        return super()._prepare_cache_for_generation(  # type: ignore[misc]
            generation_config, model_kwargs, *args, **kwargs
        )


class SavedWithCode(SparseGeneration):
    """Mixin for this project's model types: saves a file that imports their classes, so that other
    tools load them by `trust_remote_code=True` where this package is installed."""

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        model: Any = self
        parts = {"Config": model.config, "ModelForCausalLM": model, "Model": model.model}
        names = {x: type(part).__name__ for x, part in parts.items()}
        model.config.auto_map = {f"Auto{x}": f"{HUB_CODE}.{name}" for x, name in names.items()}
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        classes = ", ".join(names.values())
        code = f'"""Needs the package ratplus_exp."""\n\nfrom ratplus_exp.models import {classes}\n'
        (Path(save_directory) / f"{HUB_CODE}.py").write_text(code, encoding="utf-8")


def attach_engine(model: PreTrainedModel) -> PreTrainedModel:
    """The same model, modified in place: an engine computes attention, and it has `new_cache`.

    Weights, config and saved form stay those of the stock class; models of this project are
    returned unchanged. ValueError if some layers are not plain softmax attention.
    """
    if isinstance(model, SparseGeneration):
        return model
    kinds = set(getattr(model.config, "layer_types", None) or ())
    plain = kinds <= {"full_attention", "sliding_attention"}
    if not (plain and hasattr(model, "model") and model._supports_attention_backend):
        raise ValueError(
            f"{type(model).__name__} is not supported: model=hf takes decoders like Llama, "
            "Mistral, Qwen or OLMo2, all of whose layers are softmax attention"
        )
    for part, mixin in ((model.model, EngineDecoder), (model, SparseGeneration)):
        stock: Any = type(part)
        part.__class__ = _with(mixin, stock)
    model.config._attn_implementation = ATTENTION
    return model


@cache
def _with(mixin: type, stock: type) -> type:
    return type(stock.__name__, (mixin, stock), {"__module__": __name__})


def _left_padding(attention_mask: Tensor | None, length: int) -> Tensor | None:
    """How many pads each row starts with, (B,); None without any."""
    if attention_mask is None or bool(attention_mask.all()):
        return None
    pads = (attention_mask == 0).sum(1)
    left = torch.arange(length, device=pads.device) < pads[:, None]
    if not torch.equal(attention_mask == 0, left):
        raise ValueError("padding must be on the left: set tokenizer.padding_side = 'left'")
    return pads

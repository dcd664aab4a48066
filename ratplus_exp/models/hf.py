"""Any decoder of transformers under any method: its classes and weights stay what they are.

A stock decoder computes its attention through a named function (transformers' attention interface)
and hands unknown keyword arguments down to it. So the method's engine and cache travel as one
argument, `forward_pass`, and nothing else of the model changes.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from ratplus_exp.methods import Engine
from ratplus_exp.models.cache import SparseCache
from ratplus_exp.models.forward_pass import ForwardPass
from ratplus_exp.models.generation import SparseGeneration

ATTENTION = "ratplus"  # the name in transformers' attention interface


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    forward_pass: ForwardPass,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    select_by: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Eq. 2 in a stock attention layer: query (B, H, T, D), key and value (B, K, T, D) of the
    pass's tokens; returns (B, T, H, D). Masks and attention dropout are not used. select_by as in
    `ForwardPass.attend`.

    Raises ValueError for kinds of attention that the methods aren't defined for.
    """
    if softcap is not None or s_aux is not None:
        raise ValueError(
            f"{type(module).__name__} caps its logits or has sinks: use a model with plain "
            "softmax attention"
        )
    if sliding_window is not None:
        length = forward_pass.length
        if length > sliding_window:
            raise ValueError(
                f"{type(module).__name__} attends to a window of {sliding_window} tokens only, and "
                f"the context has {length}: lower data.length to the window"
            )
    # The engine divides by the root of D, as nearly every model does.
    factor = scaling * query.shape[-1] ** 0.5
    if abs(factor - 1) > 1e-6:
        query = query * factor
    out = forward_pass.attend(module.layer_idx, query, key, value, select_by)  # type: ignore[arg-type]
    return out.transpose(1, 2), None


AttentionInterface.register(ATTENTION, attention)


class CarriedDecoder:
    """Mixin before a stock decoder, the part of a causal model without its head."""

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
        """As RatPlusModel.forward. Positions count from each row's first token, so position_ids,
        which `generate` derives from the mask, are not needed."""
        input_ids, forward_pass = ForwardPass.open(
            self, input_ids, attention_mask, past_key_values, use_cache, engine
        )
        out = super().forward(  # type: ignore[misc]
            input_ids=input_ids,
            position_ids=forward_pass.step.positions,
            past_key_values=forward_pass.cache,
            use_cache=False,  # which would make a cache of its own kind
            forward_pass=forward_pass,
            **kwargs,
        )
        out.last_hidden_state = forward_pass.close(out.last_hidden_state)
        return out


def carry(model: PreTrainedModel) -> PreTrainedModel:
    """The same model, in place, with attention by an engine and `new_cache`.

    Its weights, config and saved form stay those of the stock class. A model of this project is
    returned as it is. ValueError for a model whose layers aren't all plain softmax attention.
    """
    if isinstance(model, SparseGeneration):
        return model
    kinds = set(getattr(model.config, "layer_types", None) or ())
    plain = kinds <= {"full_attention", "sliding_attention"}
    if not (plain and hasattr(model, "model") and model._supports_attention_backend):
        raise ValueError(
            f"{type(model).__name__} can't be carried: model=hf takes decoders like Llama, "
            "Mistral, Qwen or OLMo2, all of whose layers are softmax attention"
        )
    for part, mixin in ((model.model, CarriedDecoder), (model, SparseGeneration)):
        stock: Any = type(part)
        part.__class__ = _with(mixin, stock)
    model.config._attn_implementation = ATTENTION
    return model


@cache
def _with(mixin: type, stock: type) -> type:
    return type(stock.__name__, (mixin, stock), {"__module__": __name__})

"""Any decoder of transformers under any method, with its stock classes and weights.

A stock decoder computes attention by a registered function (transformers' attention interface) and
passes it unknown keyword arguments, here `forward_pass`, which has the engine and the cache.
"""

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
    """Eq. 2 in a stock attention layer: query (B, H, T, D), key, value and select_by (B, K, T, D)
    -> (B, T, H, D), without masks and dropout; see `ForwardPass.attend`.

    Raises ValueError for kinds of attention that the methods are not defined for.
    """
    if softcap is not None or s_aux is not None:
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
    out = forward_pass.attend(module.layer_idx, query, key, value, select_by)  # type: ignore[arg-type]
    return out.transpose(1, 2), None


AttentionInterface.register(ATTENTION, attention)


class EngineDecoder:
    """Mixin for stock decoders (causal models without their heads)."""

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
        """As RatPlusModel.forward. Positions count from each row's first token; position_ids, which
        `generate` passes, are ignored."""
        input_ids, forward_pass = ForwardPass.open(
            self, input_ids, attention_mask, past_key_values, use_cache, engine
        )
        out = super().forward(  # type: ignore[misc]
            input_ids=input_ids,
            position_ids=forward_pass.step.positions,
            past_key_values=forward_pass.cache,
            use_cache=False,  # else it would create a DynamicCache
            forward_pass=forward_pass,
            **kwargs,
        )
        out.last_hidden_state = forward_pass.close(out.last_hidden_state)
        return out


def attach_engine(model: PreTrainedModel) -> PreTrainedModel:
    """The same model, modified in place: an engine computes attention, and it has `new_cache`.

    Weights, config and saved form stay those of the stock class; models of this project are
    returned unchanged. ValueError if some layers are no plain softmax attention.
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

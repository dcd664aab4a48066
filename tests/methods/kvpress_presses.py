"""What kvpress's presses keep of given queries, keys and values: test_kvpress.py runs this in
kvpress's environment, as `python kvpress_presses.py IN.pt OUT.pt`."""

import sys
from importlib.metadata import version
from types import SimpleNamespace

import kvpress
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv


def compress(press, top_k, layer, layers, q, k, v, cos, sin):
    """Kept tokens (B, K, T) bool, and scores, of an attention layer whose hidden states are the
    queries q (B, H, T, D) before RoPE; k has it. cos and sin (≥ T, D)."""
    (_, heads, length, dim), kv_heads = q.shape, k.shape[1]
    module = SimpleNamespace(
        q_proj=lambda hidden: hidden,
        head_dim=dim,
        layer_idx=layer,
        rotary_emb=lambda _, positions: (cos[positions], sin[positions]),
        config=SimpleNamespace(
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            num_hidden_layers=layers,
            _attn_implementation="sdpa",
        ),
    )
    press = eval(press, vars(kvpress))
    press.compression_ratio = 1 - top_k / length
    rope, attention = (cos[None, :length], sin[None, :length]), None
    if isinstance(press, kvpress.ObservedAttentionPress):  # it reads an eager layer's attention
        logits = apply_rotary_pos_emb(q, q, *rope)[0] @ repeat_kv(k, heads // kv_heads).mT
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        attention = (logits / dim**0.5).masked_fill(later, -torch.inf).softmax(-1)
    hidden, further = q.transpose(1, 2).flatten(2), {"position_embeddings": rope}
    _, values = press.compress(module, hidden, k, v, attention, further)
    kept = (v.unsqueeze(3) == values.unsqueeze(2)).all(-1).any(3)
    if hasattr(module, "masked_key_indices"):  # AdaKV masks tokens and leaves them in the cache
        kept[module.masked_key_indices] = False
    scored = isinstance(press, kvpress.ScorerPress)
    return kept, press.score(module, hidden, k, v, attention, further) if scored else None


if __name__ == "__main__":
    given, found = sys.argv[1:]
    results = [compress(**arguments) for arguments in torch.load(given)]
    torch.save({"version": version("kvpress"), "results": results}, found)

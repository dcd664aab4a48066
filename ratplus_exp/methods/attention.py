"""Softmax attention: the one PyTorch call that all methods use."""

import torch
import torch.nn.functional as F
from torch import Tensor

# On Hopper PyTorch prefers cuDNN, which compiles a plan for every key length: tens of milliseconds
# at each decoding step. A process-wide switch has no cost per call and works with torch.compile.
torch.backends.cuda.enable_cudnn_sdp(False)


def attend(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None, causal: bool = False
) -> Tensor:
    """Attention (B, H, Q, D) of q (B, H, Q, D) to k and v (B, K, T, D) with K dividing H.

    seen: bool, broadcasts to (B, H, Q, T); None: all keys, or those up to the query where causal.
    """
    heads, kv_heads = q.shape[1], k.shape[1]
    if q.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        # PyTorch's bf16 backward on a CPU takes up to ten times as long as fp32's.
        with torch.autocast("cpu", enabled=False):
            return attend(q.float(), k.float(), v.float(), seen, causal)
    if causal or heads == kv_heads:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=seen, is_causal=causal, enable_gqa=heads != kv_heads
        )
    # A group's heads become further queries: with a mask, CUDA's fused kernels don't support GQA,
    # and a CPU would read keys and values once for each head.
    queries = q.unflatten(1, (kv_heads, -1)).flatten(2, 3)
    if seen is not None:
        seen = seen.expand(-1, heads, -1, -1).unflatten(1, (kv_heads, -1)).flatten(2, 3)
    out = F.scaled_dot_product_attention(queries, k, v, attn_mask=seen)
    return out.unflatten(2, (-1, q.shape[2])).flatten(1, 2)

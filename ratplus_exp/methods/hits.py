"""Hits of H1: whether a head's selection contains the gold answer position at every step."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ratplus_exp.methods.base import Method
from ratplus_exp.methods.selectors import any_in_block


class HitCounter:
    """An `Engine.recorder` of whether the candidates selected for each answer token, layer and
    head contain one of the token's gold positions.

    Args:
        method: of phase "decode", "once" or "step".
        golden: (B, A, T) bool, true where token t of the prompt is a gold position of answer
            token a; a token without any does not count.
        lengths: (B,) tokens of each prompt: the query at position lengths + a − 1 predicts answer
            token a.
        layers: of the model.
    """

    def __init__(self, method: Method, golden: Tensor, lengths: Tensor, layers: int) -> None:
        self.method, self.golden, self.lengths, self.layers = method, golden, lengths, layers
        self.hits: Tensor | None = None  # (B, A, layers, heads) bool

    def __call__(self, layer: int, rows: Tensor, positions: Tensor, selected: Tensor) -> None:
        """See `Engine.recorder`. Under GQA an evicting method has one selection per KV head."""
        selected = selected.flatten(1, 2)  # (R, H, Q, N)
        size = self.method.block_size
        golden = any_in_block(self.golden, size, selected.shape[-1])[rows]  # (R, A, N)
        answers = golden.shape[1]
        if self.hits is None:
            shape = (len(self.golden), answers, self.layers, selected.shape[1])
            self.hits = torch.zeros(shape, dtype=torch.bool)
        hit = torch.einsum("rhqn,ran->raqh", selected.float(), golden.float()) > 0
        if self.method.phase in ("decode", "step"):  # each query selects for one answer token
            token = torch.arange(answers, device=hit.device)
            predicting = self.lengths.to(hit.device)[rows.to(hit.device)][:, None] + token - 1
            hit = hit & (positions[:, None] == predicting[..., None])[..., None]  # (R, A, Q, 1)
        self.hits[rows.cpu(), :, layer] |= hit.any(2).cpu()

    def values(self, owners: Sequence[Sequence[int]]) -> tuple[list[int], list[list[list[int]]]]:
        """Counts (B) of the gold values of each sample, and the number of them that each head hits
        at every step, (B, layers, heads), as nested lists.

        owners: for each sample and answer token the gold value that it is part of, or −1.
        """
        assert self.hits is not None, "nothing was selected"
        counts, hits = [], []
        for hit, tokens in zip(self.hits, owners, strict=True):
            owner = torch.tensor(tokens)
            steps = [
                hit[: len(owner)][owner == value].all(0) for value in sorted(set(tokens) - {-1})
            ]
            counts.append(len(steps))
            hits.append(sum(steps, torch.zeros(hit.shape[1:], dtype=torch.long)).tolist())
        return counts, hits

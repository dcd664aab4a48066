"""The interface of sparse methods (Eq. 3): when they select, what, and by which scores.

Shapes: B batch, H query heads, G query heads per KV head, K = H / G KV heads, Q queries, T tokens,
N candidates (blocks or tokens), D head size.
"""

from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from ratplus_exp.budget import Budget
from ratplus_exp.methods.states import States
from ratplus_exp.settings import Positive, Settings, Whole
from ratplus_kernels import Blocks

Unit = Literal["block", "token"]
Phase = Literal["decode", "prefill", "once", "step"]
EVERY = 10**9  # for `observed`: all queries of the prompt
EVICTING = ("once", "step")  # phases in which tokens that are not selected leave the cache
FAST_PATHS = {"represent_blocks", "attend_prefill", "attend_decode"}


@dataclass(frozen=True)
class Method(Settings):
    """A way to attend; the base class is dense attention. The engine branches on class attributes.

    unit: a candidate is a block of `block_size` tokens or one token (then block_size is 1).
    phase: when the method selects: "decode", at every decoding step; "prefill", for every prompt
        token; "once", after the prompt, and other tokens leave the cache; "step", after the prompt
        and again at every decoding step; None, never.
    paper, reads: for the table of methods: the source, and what scoring reads.
    by_query_block: whether the prompt's queries of one block share a selection.
    reads_values: whether `represent` gets each token's value concatenated to its key.
    pooled: whether the heads of a layer share one budget; each selects at least `floor` candidates.
    mean_value: whether the mean value replaces the tokens left out, by their share of the softmax
        of the scores.
    """

    unit: ClassVar[Unit] = "token"
    phase: ClassVar[Phase | None] = None
    paper: ClassVar[str] = ""
    reads: ClassVar[str] = "–"
    by_query_block: ClassVar[bool] = False
    reads_values: ClassVar[bool] = False
    pooled: ClassVar[bool] = False
    mean_value = False
    not_set = frozenset({"block_size"})

    block_size: Positive = 1
    top_k: Whole = 0

    def represent(self, keys: Tensor) -> Tensor:
        """Representatives r_i of Eq. 3, (B, K, N, *): of tokens, by default their keys.

        keys are (B, K, N, block_size, D) for block methods, (B, K, N, D) for token methods, and
        (B, K, N, 2 D) if `reads_values`.
        """
        return keys

    def score(self, queries: Tensor, representatives: Tensor) -> Tensor:
        """s(q, r_i) of Eq. 3: queries (B, K, G, Q, D), result (B, K, G, Q, N); higher is better."""
        raise NotImplementedError

    def rank(
        self, scores: Tensor, queries: Tensor, representatives: Tensor, allowed: Tensor
    ) -> Tensor:
        """Scores to rank by where they depend on the candidates that a query may see: allowed,
        bool, broadcasts to scores."""
        return scores

    def observe(self, mass: Tensor, new: Tensor) -> Tensor:
        """Phase "step": new scores of the stored tokens (B, K, N) from their scores so far and the
        attention of the newest query, summed over a group's heads."""
        raise NotImplementedError

    def k(self, layer: int, layers: int) -> int:
        """How many candidates a head of a layer selects; if `pooled`, the mean over its heads."""
        return self.top_k

    def anchor(self, layer: int) -> int:
        """The layer, this one or an earlier one, whose selection this layer uses."""
        return layer

    def for_layer(self, layer: int) -> "Method":
        """The method of a layer."""
        return self

    @property
    def parts(self) -> "tuple[Method, ...]":
        """The methods of layers; of a method for all layers itself."""
        return (self,)

    def check_layers(self, count: int) -> None:
        """ValueError if a model of `count` layers can't have the method."""

    # Fast paths compute the engine's result without its masks, or return None.

    def __init_subclass__(cls) -> None:
        """Fast paths are not inherited, since a subclass may select differently."""
        super().__init_subclass__()
        for name in FAST_PATHS - vars(cls).keys():
            setattr(cls, name, vars(Method)[name])

    def represent_blocks(self, blocks: Blocks) -> Tensor | None:
        """`represent` of all blocks (B, K, N, *), from a kernel's statistics of them."""
        return None

    def attend_prefill(self, states: States) -> Tensor | None:
        """Causal attention of a whole prompt, (B, H, T, D)."""
        return None

    def attend_decode(self, states: States) -> Tensor | None:
        """Attention of new tokens, (B, H, Q, D)."""
        return None

    def attended(self, positions: Tensor) -> Tensor:
        """How many tokens a query at each position attends to in a fast path."""
        return positions + 1

    def pattern(self, query: Tensor, key: Tensor) -> Tensor | None:
        """A fixed pattern: which key positions a query position may see; None: no pattern.

        Both are integer tensors that broadcast. In its phase, a method that also selects attends to
        the union of both.
        """
        return None

    @property
    def sparse_in(self) -> frozenset[str]:
        """In which of "prefill" and "decode" the method is sparse: whose queries are counted."""
        if self.phase is None:
            patterned = type(self).pattern is not Method.pattern
            return frozenset(("prefill", "decode") if patterned else ())
        return frozenset({"prefill" if self.phase == "prefill" else "decode"})

    @property
    def dense_prefill(self) -> bool:
        """Whether the prompt is processed by dense attention."""
        fast = type(self).attend_prefill is not Method.attend_prefill
        return not fast and "prefill" not in self.sparse_in

    @property
    def forced(self) -> int:
        """Candidates that are always selected and count within top_k; the last ones if evicting."""
        return 0

    @property
    def floor(self) -> int:
        """If `pooled`, how many of its best candidates each head always selects."""
        return self.forced

    @property
    def observed(self) -> int:
        """How many of a prompt's last queries `score` gets in the phases "once" and "step"."""
        return self.forced

    def fraction(self, length: int) -> Fraction:
        """The nominal budget in a context of `length` tokens; 1 for dense attention."""
        return Fraction(self.top_k * self.block_size, length) if self.phase else Fraction(1)

    def with_budget(self, budget: Budget, length: int) -> Self:
        """The method with the sizes of a budget in a context of `length` tokens."""
        if not self.phase:
            return self
        if self.unit == "token":
            return replace(self, top_k=budget.tokens(length))
        return replace(self, top_k=budget.blocks(length, self.block_size))

    def numbers(self, dim: int, layer: int = 0) -> float:
        """How many numbers of a candidate scoring reads; dim: D."""
        return _size_of_representative(self, dim)

    def choosing(self, positions: Tensor, dim: int, layer: int = 0) -> Tensor | None:
        """What a selection reads at each query position, in key-value pairs (2 D numbers).

        The representatives of all candidates, once per group of heads, and for each selected one an
        index of four bytes, where a number has two. None: nothing, as when evicting.
        """
        if self.phase not in ("decode", "prefill"):
            return None
        candidates = positions // self.block_size + 1
        read = candidates * self.numbers(dim, layer) + 2 * candidates.clamp(max=self.top_k)
        return read / (2 * dim)

    def validate(self) -> None:
        """ValueError for sizes that cannot work."""
        if self.phase and self.top_k < max(self.forced, 1):
            raise ValueError(
                f"{type(self).__name__} always keeps {self.forced} {self.unit}s, but its budget "
                f"gives only {self.top_k}: raise the budget or the context length"
            )


@cache
def _size_of_representative(method: Method, dim: int) -> int:
    block = (method.block_size,) if method.unit == "block" else ()
    key = torch.zeros(1, 1, 1, *block, dim * (1 + method.reads_values))
    return method.represent(key).shape[-1]


@dataclass(frozen=True)
class Dense(Method):
    """Attention over all states: the upper end of every table."""

    paper: ClassVar[str] = "Vaswani et al., 2017, arXiv 1706.03762"
    not_set = frozenset({"block_size", "top_k"})


@dataclass(frozen=True)
class BlockMethod(Method):
    """Selects blocks. P1: "Quest and MoBA always include the first block and the local (current)
    block". Both count within top_k, as in the original code of both methods."""

    unit: ClassVar[Unit] = "block"
    forced = 2
    not_set = frozenset()
    block_size: Positive = 64

    def attended(self, positions: Tensor) -> Tensor:
        """Whole blocks, and the local block up to the query."""
        local, offset = positions // self.block_size, positions % self.block_size
        return local.clamp(max=self.top_k - 1) * self.block_size + offset + 1

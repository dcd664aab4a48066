"""What a sparse method is (Eq. 3): when it selects, what it selects, and how it scores.

Shapes: B batch, H query heads, G query heads a KV head, K = H / G KV heads, Q queries, T tokens,
N candidates (blocks or tokens), D head size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from ratplus_exp.budget import Budget
from ratplus_exp.settings import BlockSettings, Positive, Settings, Whole
from ratplus_kernels import Blocks

Unit = Literal["block", "token"]
Phase = Literal["decode", "prefill", "once", "step"]
EVERY = 10**9  # more queries than any prompt has
EVICTING = ("once", "step")  # what these phases do not select leaves the cache
FAST_PATHS = {"represent_blocks", "attend_prefill", "attend_decode"}


@dataclass(frozen=True)
class Method(Settings):
    """A way to attend. The base class is dense attention: it selects nothing.

    Class attributes say what a method is; the engine branches on them alone.

    unit: what a candidate is, a block of `block_size` tokens or one token.
    phase: when the selection is made: "decode", at every decoding step; "prefill", for every
        prompt token; "once", after the prompt, and what is not selected leaves the cache; "step",
        after the prompt and again at every decoding step; None, never.
    paper, reads: for the table of methods: the source, and what choosing reads.
    by_query_block: whether the prompt's queries of one block choose together.
    reads_values: whether `represent` gets each token's value behind its key.
    pooled: whether the heads of a layer share their candidates, so that a head may have more than
        another; each has at least its forced ones, or `floor` of them.
    """

    unit: ClassVar[Unit] = "token"
    phase: ClassVar[Phase | None] = None
    paper: ClassVar[str] = ""
    reads: ClassVar[str] = "–"
    by_query_block: ClassVar[bool] = False
    reads_values: ClassVar[bool] = False
    pooled: ClassVar[bool] = False

    block_size: Positive = 1
    top_k: Whole = 0

    def represent(self, keys: Tensor) -> Tensor:
        """Candidates' representations r_i of Eq. 3.

        Block methods get keys (B, K, N, block_size, D) of complete blocks, token methods
        (B, K, N, D), or (B, K, N, 2 D) with the values behind them; the result is (B, K, N, *) and
        goes to `score` as it is.
        """
        raise TypeError(f"{type(self).__name__} selects nothing, so it represents nothing")

    def score(self, queries: Tensor, representatives: Tensor) -> Tensor:
        """s(q, r_i) of Eq. 3: queries (B, K, G, Q, D), result (B, K, G, Q, N); higher is better."""
        raise TypeError(f"{type(self).__name__} selects nothing, so it scores nothing")

    def rank(
        self, scores: Tensor, queries: Tensor, representatives: Tensor, allowed: Tensor
    ) -> Tensor:
        """What is ranked in the place of `score`'s result, where that depends on the candidates
        that a query may see: allowed, bool, broadcasts to scores."""
        return scores

    def observe(self, mass: Tensor, new: Tensor) -> Tensor:
        """Of phase "step": the score of each stored token (B, K, N) of its score so far and of the
        attention that the newest query gives it, summed over a group's heads."""
        raise TypeError(f"{type(self).__name__} does not select at every step")

    def k(self, layer: int, layers: int) -> int:
        """How many candidates a head of a layer selects, on average over the heads if `pooled`."""
        return self.top_k

    def anchor(self, layer: int) -> int:
        """The layer whose selection this layer takes, not a later one."""
        return layer

    # Fast paths: the engine's result without its masks; None where there is none for these tensors.

    def __init_subclass__(cls) -> None:
        """A fast path belongs to the class that defines it: a subclass may select otherwise."""
        super().__init_subclass__()
        for name in FAST_PATHS - vars(cls).keys():
            setattr(cls, name, vars(Method)[name])

    def represent_blocks(self, blocks: Blocks) -> Tensor | None:
        """`represent` of all blocks (B, K, N, *), of statistics that a kernel has taken."""
        return None

    def attend_prefill(
        self, q: Tensor, k: Tensor, v: Tensor, representatives: Tensor | None = None
    ) -> Tensor | None:
        """Attention of a whole prompt to itself: q, result (B, H, T, D), k and v (B, K, T, D).

        Rows start at their first token, and what follows a query has no influence on it.
        representatives (B, K, N, *) of the blocks, where something has them already.
        """
        return None

    def attend_decode(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        representatives: Tensor | None,
        positions: Tensor,
        all_seen: bool,
    ) -> Tensor | None:
        """Attention of new tokens q (B, H, Q, D) at positions (B, Q) to k and v (B, K, T, D),
        which hold them already.

        representatives (B, K, N, *) of the blocks, for methods that select while decoding;
        all_seen, whether Q is 1 and every row's new token is the last of T.
        """
        return None

    def attended(self, positions: Tensor) -> Tensor:
        """How many tokens a query at each position attends to, for the fast paths."""
        return positions + 1

    def pattern(self, query: Tensor, key: Tensor) -> Tensor | None:
        """A fixed pattern: which key positions a query position may see, or None for none such.

        Both are integer tensors that broadcast against each other. A method that selects as well
        sees what either allows, in its phase.
        """
        return None

    @property
    def dense_prefill(self) -> bool:
        """Whether a prompt goes through dense attention, as under any other such method."""
        own = type(self).attend_prefill is not Method.attend_prefill
        patterned = not self.phase and type(self).pattern is not Method.pattern
        return self.phase != "prefill" and not own and not patterned

    @property
    def forced(self) -> int:
        """Candidates that are always selected and count within top_k; in phases "once" and "step"
        the last ones."""
        return 0

    @property
    def floor(self) -> int:
        """If `pooled`: each head's best candidates that are always selected."""
        return self.forced

    @property
    def adds_mean(self) -> bool:
        """Whether the mean value stands for what a step leaves out, by its share of the scores."""
        return False

    @property
    def observed(self) -> int:
        """How many of a prompt's last queries `score` gets in the phases "once" and "step"."""
        return self.forced

    def fraction(self, length: int) -> Fraction:
        """The nominal budget at a context of `length` tokens; 1 for dense attention."""
        tokens = self.top_k * (self.block_size if self.unit == "block" else 1)
        return Fraction(tokens, length) if self.phase else Fraction(1)

    def within(self, budget: Budget, length: int) -> Self:
        """The method with the sizes that a budget gives it at a context of `length` tokens."""
        if not self.phase:
            return self
        blocks = self.unit == "block"
        top_k = budget.blocks(length, self.block_size) if blocks else budget.tokens(length)
        return replace(self, top_k=top_k)

    def numbers(self, dim: int, layer: int = 0) -> float:
        """Numbers that choosing reads of a candidate; dim: D."""
        return _size_of_representative(self, dim)

    def choosing(self, positions: Tensor, dim: int, layer: int = 0) -> Tensor | None:
        """What choosing reads at each query's position, in keys with their values (2 D numbers).

        The representatives of all candidates, once for the heads of a group, and an index for each
        selected one, four bytes where a number has two. None: nothing, as evictions do not.
        """
        if self.phase not in ("decode", "prefill"):
            return None
        there = positions // self.block_size + 1
        return (there * self.numbers(dim, layer) + 2 * there.clamp(max=self.top_k)) / (2 * dim)

    def validate(self) -> None:
        """Refuse sizes that cannot work, with a ValueError that names the remedy."""
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


@dataclass(frozen=True)
class BlockMethod(BlockSettings, Method):
    """Selects blocks of the context; the first and the query's own block are always among them.

    P1: "Quest and MoBA always include the first block and the local (current) block". They count
    within top_k, as in both methods' own code.
    """

    unit: ClassVar[Unit] = "block"

    @property
    def forced(self) -> int:
        return 2

    def attended(self, positions: Tensor) -> Tensor:
        """Whole blocks, but of the query's own only what is not behind it."""
        own, last = positions // self.block_size, positions % self.block_size
        return own.clamp(max=self.top_k - 1) * self.block_size + last + 1

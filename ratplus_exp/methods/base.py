"""What a sparse method is (Eq. 3): when it selects, what it selects, and how it scores.

Shapes: B batch, H query heads, G query heads a KV head, K = H / G KV heads, Q queries, T tokens,
N candidates (blocks or tokens), D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, Literal

from torch import Tensor

from ratplus_exp.settings import BlockSettings, Positive, Settings, Whole
from ratplus_kernels import Blocks

Unit = Literal["block", "token"]
Phase = Literal["decode", "prefill", "once"]
FAST_PATHS = {"represent_blocks", "attend_prefill", "attend_decode"}
PREFILL = ("attend_prefill", "pattern")  # what makes a prefill a method's own


@dataclass(frozen=True)
class Method(Settings):
    """A way to attend. The base class is dense attention: it selects nothing.

    Class attributes say what a method is; the engine branches on them alone.

    unit: what a candidate is, a block of `block_size` tokens or one token.
    phase: when the selection is made: "decode", at every decoding step; "prefill", for every
        prompt token; "once", after the prompt, and what is not selected leaves the cache; None,
        never.
    """

    unit: ClassVar[Unit] = "token"
    phase: ClassVar[Phase | None] = None

    block_size: Positive = 1
    top_k: Whole = 0

    def represent(self, keys: Tensor) -> Tensor:
        """Candidates' representations r_i of Eq. 3.

        Block methods get keys (B, K, N, block_size, D) of complete blocks, token methods
        (B, K, N, D); the result is (B, K, N, *) and goes to `score` as it is.
        """
        raise TypeError(f"{type(self).__name__} selects nothing, so it represents nothing")

    def score(self, queries: Tensor, representatives: Tensor) -> Tensor:
        """s(q, r_i) of Eq. 3: queries (B, K, G, Q, D), result (B, K, G, Q, N); higher is better."""
        raise TypeError(f"{type(self).__name__} selects nothing, so it scores nothing")

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
        """A fixed pattern: which key positions a query position may see, or None for all.

        Both are integer tensors that broadcast against each other.
        """
        return None

    @property
    def dense_prefill(self) -> bool:
        """Whether a prompt goes through dense attention, as under any other such method."""
        own = (getattr(type(self), name) is not getattr(Method, name) for name in PREFILL)
        return self.phase != "prefill" and not any(own)

    @property
    def forced(self) -> int:
        """Candidates that are always selected and count within top_k."""
        return 0

    def fraction(self, length: int) -> Fraction:
        """The nominal budget at a context of `length` tokens; 1 for dense attention."""
        tokens = self.top_k * (self.block_size if self.unit == "block" else 1)
        return Fraction(tokens, length) if self.phase else Fraction(1)

    def validate(self) -> None:
        """Refuse sizes that cannot work, with a ValueError that names the remedy."""
        if self.phase and self.top_k < max(self.forced, 1):
            raise ValueError(
                f"{type(self).__name__} always keeps {self.forced} {self.unit}s, but its budget "
                f"gives only {self.top_k}: raise the budget or the context length"
            )


@dataclass(frozen=True)
class Dense(Method):
    """Attention over all states: the upper end of every table."""


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

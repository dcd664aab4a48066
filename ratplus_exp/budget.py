"""Budgets: the fraction of the context that a method may attend to or keep."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class Budget:
    """A fraction in (0, 1], as the papers write it: Budget.parse("1/16")."""

    fraction: Fraction

    @classmethod
    def parse(cls, text: str) -> Budget:
        try:
            fraction = Fraction(str(text))
        except (ValueError, ZeroDivisionError):
            raise ValueError(f"budget {text!r} is not a fraction: write it as 1/16") from None
        if not 0 < fraction <= 1:
            raise ValueError(f"budget {text} is not in (0, 1]: write it as 1/16")
        return cls(fraction)

    def __str__(self) -> str:
        return str(self.fraction)

    def blocks(self, context_length: int, block_size: int) -> int:
        """Blocks of a context; 1/16 of 4096 tokens in blocks of 64 are 4."""
        if context_length % block_size:
            raise ValueError(
                f"a context of {context_length} tokens is not a whole number of blocks of "
                f"{block_size}: change data.length or method.block_size"
            )
        return self._of(context_length // block_size, f"blocks of {block_size}")

    def tokens(self, context_length: int) -> int:
        """Tokens of a context; 1/16 of 4096 are 256."""
        return self._of(context_length, "tokens")

    def _of(self, whole: int, unit: str) -> int:
        part = self.fraction * whole
        if part.denominator != 1:
            fitting = ", ".join(f"1/{d}" for d in (1, 2, 4, 8, 16, 32, 64) if whole % d == 0)
            raise ValueError(
                f"budget {self} of {whole} {unit} is not a whole number: take one of {fitting}, "
                "or change data.length"
            )
        return int(part)

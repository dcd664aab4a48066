"""Names and remarks that every table, figure and page has alike."""

from __future__ import annotations

METHODS = {"quest": "Quest", "moba": "MoBA", "snapkv": "SnapKV"}
"""The papers' names of the methods, in the paper's order."""
SELECTORS = {"random": "random", "topk": "top-k", "oracle": "oracle", "dense": "dense"}


def measured_at(tier: str, first_token: str = "prefill") -> str:
    """For titles: "tier pocket", and what sets a report apart that decodes first tokens."""
    return f"tier {tier}" + (", first token decoded" if first_token == "decode" else "")


def scale_note(tier: str) -> str:
    """For captions, after what was said of a number."""
    return "" if tier == "paper" else " (not the paper's scale: compare signs, not levels)"


def first_token_note(first_token: str) -> str:
    """For captions: where an answer's first token comes from, in one sentence."""
    if first_token == "decode":
        return (
            "An answer's first token comes from a decoding step over what the method selected "
            "(first_token=decode)."
        )
    return (
        "An answer's first token comes from the prefill, which is dense for Quest and before "
        "eviction for SnapKV (first_token=prefill)."
    )

"""The two scores of an answer, which differ: record both.

`exact`, the RAT+ paper's, compares the values between commas and allows nothing else. `substring`,
RULER's, finds a value anywhere in the prediction. one_of: any one of the values is a full answer
(qa), RULER's string_match_part; else each counts, its string_match_all.
"""

from collections.abc import Sequence


def exact(prediction: str, answers: Sequence[str], one_of: bool = False) -> float:
    """The share of gold values among the prediction's comma-separated parts; with one_of, whether
    the whole prediction is one of them."""
    gold = set(answers)
    if one_of:
        return float(prediction.strip() in gold)
    return len(gold & {part.strip() for part in prediction.split(",")}) / len(gold)


def substring(prediction: str, answers: Sequence[str], one_of: bool = False) -> float:
    """The share of gold values that are substrings, case ignored; with one_of, whether any is."""
    hits = [answer.lower() in prediction.lower() for answer in answers]
    return float(any(hits)) if one_of else sum(hits) / len(answers)

"""The two scores of an answer, which differ: record both.

`exact`, the RAT+ paper's, wants the answer as it was trained: values between commas and nothing
else. `substring`, RULER's, finds a value anywhere in what the model wrote. one_of: any one of the
values will do (qa), RULER's string_match_part; else each counts, its string_match_all.
"""

from collections.abc import Sequence


def exact(prediction: str, answers: Sequence[str], one_of: bool = False) -> float:
    """The gold values among the prediction's comma-separated parts, in [0, 1]; of several that will
    do, one must be the whole prediction."""
    gold = set(answers)
    if one_of:
        return float(prediction.strip() in gold)
    return len(gold & {part.strip() for part in prediction.split(",")}) / len(gold)


def substring(prediction: str, answers: Sequence[str], one_of: bool = False) -> float:
    """The gold values that are substrings, case ignored, in [0, 1]."""
    text = prediction.lower()
    found = [answer.lower() in text for answer in answers]
    return float(any(found)) if one_of else sum(found) / len(answers)

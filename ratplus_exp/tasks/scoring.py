"""The two scores of a NIAH answer, which differ: record both.

P2's wants the answer as it was trained, values between commas and nothing else. RULER's
(string_match_all) finds a value anywhere in whatever the model wrote.
"""

from collections.abc import Sequence


def score_p2(prediction: str, answers: Sequence[str]) -> float:
    """P2's score: the gold values among the prediction's comma-separated parts, in [0, 1]."""
    gold = set(answers)
    return len(gold & {part.strip() for part in prediction.split(",")}) / len(gold)


def score_ruler(prediction: str, answers: Sequence[str]) -> float:
    """RULER's score: the gold values that are substrings, case ignored, in [0, 1]."""
    text = prediction.lower()
    return sum(answer.lower() in text for answer in answers) / len(answers)

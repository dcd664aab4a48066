"""The two scores of a NIAH answer, which differ: record both.

`exact`, the RAT+ paper's, wants the answer as it was trained: values between commas and nothing
else. `substring`, RULER's (string_match_all), finds a value anywhere in what the model wrote.
"""

from collections.abc import Sequence


def exact(prediction: str, answers: Sequence[str]) -> float:
    """The gold values among the prediction's comma-separated parts, in [0, 1]."""
    gold = set(answers)
    return len(gold & {part.strip() for part in prediction.split(",")}) / len(gold)


def substring(prediction: str, answers: Sequence[str]) -> float:
    """The gold values that are substrings, case ignored, in [0, 1]."""
    text = prediction.lower()
    return sum(answer.lower() in text for answer in answers) / len(answers)

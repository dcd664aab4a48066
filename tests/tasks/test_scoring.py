"""The two scores agree on clean answers and differ where their definitions do."""

import pytest

from ratplus_exp.tasks import exact, substring

GOLD = ("4815", "2231")


@pytest.mark.parametrize(
    ("prediction", "p2", "ruler"),
    [
        (" 4815, 2231", 1.0, 1.0),
        ("2231,4815", 1.0, 1.0),  # order does not matter
        (" 4815", 0.5, 0.5),
        (" 4815, 4815", 0.5, 0.5),  # a repetition counts once
        ("", 0.0, 0.0),
        (" 4815, 2231, 9999", 1.0, 1.0),  # neither punishes a wrong one
        (" 4815 and 2231.", 0.0, 1.0),  # P2 wants bare values between commas
        (" 48152231", 0.0, 1.0),
        (" 4815, 2231.", 0.5, 1.0),
    ],
)
def test_scores(prediction, p2, ruler):
    assert exact(prediction, GOLD) == p2
    assert substring(prediction, GOLD) == ruler


def test_only_ruler_ignores_case():
    assert substring("AB-CD", ["ab-cd"]) == 1.0
    assert exact("AB-CD", ["ab-cd"]) == 0.0

import pytest

from vlmtune.evaluation.metrics.base import Answered
from vlmtune.evaluation.metrics.text import relaxed_accuracy


@pytest.mark.parametrize(
    ("given", "reference", "is_right"),
    [
        ("100", "100", True),
        ("104.9", "100", True),
        ("95", "100", True),  # 5 % of the reference
        ("94.9", "100", False),
        ("100", "94.9", False),  # 5.4 % of the reference, 5.1 % of the prediction
        ("100", "95.2", False),  # 5.04 % of the reference, 4.8 % of the prediction
        ("-104", "-100", True),
        ("104", "-100", False),
        ("5%", "5.2%", True),
        ("5 %", "5%", True),
        ("5", "5%", False),  # 5 against 0.05
        ("0.05", "5%", True),
        ("0", "0", True),
        ("0.0", "0", False),  # nothing is within 5 % of 0: compared as texts
        ("0.01", "0", False),
        ("Yes", "yes", True),
        (" yes ", "yes", True),
        ("yes.", "yes", False),
        ("1,000", "1000", False),  # a text for the script
        ("1,000", "1,000", True),
        ("nan", "nan", True),
        ("1_000", "1000", False),
        ("%", "%", True),
        ("2009", "2010", True),  # years are numbers
    ],
)
def test_numbers_may_be_five_percent_off_and_texts_must_match(
    given: str, reference: str, is_right: bool
) -> None:
    assert relaxed_accuracy(Answered(given, reference)) == float(is_right)


def test_any_reference_will_do() -> None:
    assert relaxed_accuracy(Answered("3", None, ("2", "3.1"))) == 1.0
    assert relaxed_accuracy(Answered("3", None, ("2", "4"))) == 0.0

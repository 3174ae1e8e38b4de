from fractions import Fraction

import pytest

from pt_jax.rewards import answers


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("4", "4"),
        ("2 + 2 = 4.", "4"),
        ("first 3, then 5", "5"),
        ("-7", "-7"),
        ("x=-7.25!", "-7.25"),
        ("1,024", "1024"),
        ("1,234,567.890", "1234567.890"),
        ("1,2", "2"),  # a list, not a number
        ("it is 3, 4", "4"),
        ("007", "7"),
        ("0.35", "0.35"),
        ("12345678901234567890.1", "12345678901234567890.1"),
        ("v1.2.3", "3"),
        ("$5.00", "5.00"),
        ("50%", "50"),
        (r"\boxed{42}", "42"),
        ("42\n\n", "42"),
        (".5", "0.5"),
        ("-.5", "-0.5"),
        ("10-3", "3"),  # a difference
        ("f(2)-3", "3"),
        ("x = -3", "-3"),
        ("covid-19", "19"),
        ("\u22123", "-3"),
        ("10\u22123", "3"),
        ("1e-05", "0.00001"),
        ("1.5E+3", "1500"),
        ("1e20", "100000000000000000000"),
        ("1,2345", "2345"),
        ("it is 3/4", "3/4"),
        ("-3/4.", "-3/4"),
        ("8/3/2024", "2024"),
        ("7, not 3/0", "7"),
        ("2e99999", "99999"),  # nobody means it, and it would take for ever to compare
    ],
)
def test_the_last_number_of_a_text(text, number):
    assert answers.last_number(text) == Fraction(number)


@pytest.mark.parametrize("text", ["", "none", "-", "."])
def test_a_text_without_a_number(text):
    assert answers.last_number(text) is None


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        ("The answer is 4.", "4", 1.0),
        ("4.0", 4, 1.0),
        ("4", 4.0, 1.0),
        ("0.1", 0.1, 1.0),  # in floats 0.1 is not 1/10
        ("0.30000000000000004", "0.3", 0.0),
        ("1,000", "1000", 1.0),
        ("so 4, not 5", "4", 0.0),  # the last number is the answer
        ("44", "4", 0.0),
        ("-4", "4", 0.0),
        ("", "0", 0.0),
        ("no idea", "0", 0.0),
        ("72", "48 / 2 + 48 = #### 72", 1.0),
        ("10000000000000000000000001", "10000000000000000000000000", 0.0),
        ("20", 1e20, 0.0),
        ("100000000000000000000", 1e20, 1.0),
        ("0.00001", 1e-05, 1.0),
        ("05", 1e-05, 0.0),
        ("-0.5", -0.5, 1.0),
        ("3/4", "5/4", 0.0),
        ("4", "3/4", 0.0),
        ("3/4", 4, 0.0),
        ("0.75", "3/4", 1.0),
        (".5", "0.5", 1.0),
        ("10-3", "-3", 0.0),
        ("\u22123", "-3", 1.0),
        ("3", "\u22123", 0.0),
        ("$1,000", "1,000 dollars", 1.0),
    ],
)
def test_the_number_is_the_answer(completion, answer, reward):
    got = answers.number(completion, {"answer": answer})
    assert got == reward
    assert type(got) is float


def test_an_answer_that_is_no_number_is_an_error_and_no_zero():
    """A reward of 0 for every completion would look like a model that learns nothing."""
    with pytest.raises(
        ValueError, match=r"questions.jsonl:3: the answer must name one number, got 'four'; --reward exact"
    ):
        answers.number("4", {"answer": "four", "source": "questions.jsonl:3"})


@pytest.mark.parametrize(
    "answer", ["", "10-3", "1,2", "3 or 4", "2 + 2 = 4", "8/3/2024", "3/0", "#### ", "1 #### 2, 3"]
)
def test_an_answer_that_names_several_numbers_is_refused(answer):
    with pytest.raises(ValueError, match=r"row: the answer must name one number"):
        answers.number("4", {"answer": answer})


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        ("yes", "yes", 1.0),
        (" yes\n", "yes", 1.0),
        ("yes", "\tyes ", 1.0),
        ("Yes", "yes", 0.0),
        ("yes!", "yes", 0.0),
        ("yes yes", "yes", 0.0),
        ("", "yes", 0.0),
        ("4", 4, 1.0),
        ("4.0", 4, 0.0),
        ("世界", "世界", 1.0),
    ],
)
def test_the_text_is_the_answer(completion, answer, reward):
    got = answers.exact(completion, {"answer": answer})
    assert got == reward
    assert type(got) is float

"""The five accuracies against answers judged by hand."""

import re

import pytest

from moram.continual.scorers import (
    SCORERS,
    exact_accuracy,
    first_letter_accuracy,
    letter_accuracy,
    numeric_accuracy,
    prefix_accuracy,
    scorer_for,
)


def is_right(function, prediction, gold, **settings):
    return function([prediction], [gold], **settings) == 100.0


@pytest.mark.parametrize(
    ("prediction", "gold", "right"),
    [
        ("A", "A", True),
        ("  \nA because", "A", True),
        ("60", "6", True),
        ("6", "60", False),
        ("a", "A", False),
        ("The answer is A", "A", False),
        ("A", "A ", False),
        ("支持", "支", True),
    ],
)
def test_prefix_accuracy_asks_for_the_whole_gold_answer_first(prediction, gold, right):
    assert is_right(prefix_accuracy, prediction, gold) == right


@pytest.mark.parametrize(
    ("prediction", "right"), [("A", True), ("A ", False), ("a", False), ("AB", False)]
)
def test_exact_accuracy_compares_every_character(prediction, right):
    assert is_right(exact_accuracy, prediction, "A") == right


@pytest.mark.parametrize(
    ("prediction", "gold", "right"),
    [
        ("B", "B", True),
        ("b.", "B", True),
        ("The answer is (C), not B", "C", True),
        ("A. dovish", "A", True),
        # The article stands alone, and comes before the letter.
        ("It is a B", "A", True),
        ("It is a B", "B", False),
        # No word of one letter: the first character that is a label, here in "Dovish".
        ("HAWKISH", "A", True),
        # Chinese characters are letters, so B has no word of its own here.
        ("选B", "B", True),
        ("xyz", "B", False),
        ("D", "D", True),
    ],
)
def test_letter_accuracy_takes_the_first_label_alone_then_any_label(prediction, gold, right):
    assert is_right(letter_accuracy, prediction, gold) == right


def test_letter_accuracy_looks_for_the_labels_it_is_given():
    assert is_right(letter_accuracy, "A or D", "D", labels="DE")
    assert not is_right(letter_accuracy, "A or D", "D", labels="AD")


@pytest.mark.parametrize("labels", ["", "AA", "ab", ["AB"], "A-"])
def test_labels_that_are_no_different_upper_case_letters_are_refused(labels):
    message = f"labels must be one or more different upper-case letters, got {labels!r}"
    with pytest.raises(ValueError, match=re.escape(message)):
        letter_accuracy(["A"], ["A"], labels)


@pytest.mark.parametrize(
    ("prediction", "gold", "right"),
    [
        ("B\nBecause it is", "B\nSomething else", True),
        ("  B", "B", True),
        ("Because", "B", True),
        ("b", "B", False),
        ("Answer: B", "B", False),
        ("   ", "B", False),
    ],
)
def test_first_letter_accuracy_compares_one_character(prediction, gold, right):
    assert is_right(first_letter_accuracy, prediction, gold) == right


@pytest.mark.parametrize("variant", ["values", "published"])
@pytest.mark.parametrize(
    ("prediction", "gold", "right"),
    [
        ("12", "12", True),
        ("3 + 4 = 7", "7", True),
        ("7 is the answer, as 3 + 4 = 8", "7", False),
        ("7.", "7", True),
        ("7.0", "7", True),
        ("12.50 dollars", "12.5", True),
        ("-3", "-3", True),
        ("-3", "3", False),
        ("It fell to -3.5 degrees", "-3.5", True),
        # A hyphen before a digit is a minus.
        ("10-5", "5", False),
        ("1,234", "1234", True),
        ("about 1,234,567.5 in all", "1234567.5", True),
        ("1234", "1,234", True),
        ("-1,234", "-1234", True),
        # Not groups of three: two numbers.
        ("1,23", "23", True),
        ("1,2345", "2345", True),
        ("12345,678", "678", True),
        # A percentage and its fraction.
        ("50%", "0.5", True),
        ("0.5", "50", True),
        ("50", "5", False),
        ("10000.9", "10000", True),
        ("10001.1", "10000", False),
        ("0.00001", "0", False),
        ("0.0", "0", True),
        (r"2 apples, so \boxed{14} and not 15", "14", True),
        (r"\boxed{1} then \boxed{2}", "2", True),
        (r"\boxed{1} then \boxed{2}", "1", False),
        (r"\boxed{\$1,200}", "1200", True),
        (r"\boxed{x = 5\text{ km}}", "5", True),
        (r"\boxed{50\%}", "50", True),
        (r"\boxed{7", "7", True),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}", True),
        # No sympy here: formulas but fractions are text.
        (r"\boxed{\sqrt{4}}", "2", False),
        (r"\boxed{} is 9", "9", True),
        ("12", "12 ", True),
        ("12", "$12.00", True),
        ("August", "August", True),
        (" august\n", "August", True),
        ("In August", "August", False),
        ("August 5", "August", False),
        (r"\boxed{August}", "August", True),
        ("none", "7", False),
        ("7", "August", False),
        ("12\nQuestion: 5", "12", False),
        ("inf", "7", False),
        ("nan", "7", False),
        (" ", "7", False),
        ("7", " ", False),
    ],
)
def test_numeric_accuracy_reads_the_box_then_the_last_number_then_the_text(
    prediction, gold, right, variant
):
    assert is_right(numeric_accuracy, prediction, gold, variant=variant) == right


DIFFERENT = [
    # prediction, gold, right by value, right as published
    ("1/2", "0.5", True, False),
    ("1/2", "2", False, True),
    ("so it is 3 / 4 of it", "0.75", True, False),
    ("-1/4", "-0.25", True, False),
    # The published rule reads 4, which is a hundred times 0.04.
    ("-1/4", "0.04", False, True),
    ("2 1/2 hours", "2.5", True, False),
    ("1,000/3", "333.3333", True, False),
    (r"It is $\frac{1}{2}$.", "0.5", True, False),
    (r"It is $\frac{1}{2}$.", "2", False, True),
    (r"$-\dfrac{3}{8}$", "-0.375", True, False),
    (r"\tfrac12", "0.5", True, False),
    (r"1\frac{1}{2}", "1.5", True, False),
    (r"\boxed{\frac{1}{2}}", "0.5", True, False),
    (r"\boxed{1/2}", r"\frac{1}{2}", True, False),
    (r"\boxed{2 \frac{1}{4}}", "2.25", True, False),
    ("0.5", "1/2", True, False),
    (".5", "0.5", True, False),
    (".5", "5", False, True),
    ("it weighs -.25 kg", "-0.25", True, False),
    (r"\boxed{.5}", "0.5", True, False),
    # A minus sign as printed, and a power of ten.
    ("\N{MINUS SIGN}5", "-5", True, False),
    ("1.5e3", "1500", True, False),
    ("1.5e3", "3", False, True),
    (r"\boxed{+7}", "7", True, False),
    ("August 5", "August 5", True, False),
    # No fraction of two numbers: the last number stays.
    ("on 1/2/2024", "2024", True, True),
    ("on 11/22/2024", "2024", True, True),
    ("1/0", "1", False, False),
    ("version 3.5.1", "1", True, True),
]


@pytest.mark.parametrize(("prediction", "gold", "value", "published"), DIFFERENT)
def test_numbers_are_read_by_value_or_as_published(prediction, gold, value, published):
    assert is_right(numeric_accuracy, prediction, gold) == value
    assert is_right(numeric_accuracy, prediction, gold, variant="published") == published


@pytest.mark.parametrize("task", ["NumGLUE-cm", "NumGLUE-ds"])
def test_the_tasks_of_the_benchmark_are_scored_by_the_published_rule(task):
    scorer = scorer_for(task)
    assert scorer.function([""], ["1/2"], ["2"]) == 100.0
    # Earlier tables call it so.
    assert scorer.variant == "accuracy (last number, no sympy)"
    own = SCORERS["numeric_accuracy"]
    assert own.function([""], ["1/2"], ["2"]) == 0.0 and own.variant != scorer.variant


def test_a_variant_of_numbers_that_does_not_exist_is_refused():
    message = "variant must be one of values, published, got 'sympy'"
    with pytest.raises(ValueError, match=re.escape(message)):
        numeric_accuracy(["1"], ["1"], variant="sympy")

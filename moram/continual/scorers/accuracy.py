r"""Accuracies: how many predictions are right, by five rules of what "right" means.

All divide by the number of examples, and score 0 where the prediction or the gold answer is empty.
"""

import math
import re

from .common import mean_percent

# A comma between groups of three digits separates thousands; elsewhere it ends the number.
_NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?")


def prefix_accuracy(predictions, references):
    """Percent of predictions that begin with their gold answer, after leading white space.

    "60" is right for the gold answer "6": nothing is asked of what follows. Case counts.

    Args:
        predictions, references: equally many texts, at least one.
    Returns:
        float in [0, 100].
    Raises:
        ValueError: not equally many, or none.
    Source: accuracy of Artificer-AI-Lab/MoRAM TRACE/metrics.py, which compares the first
        min(len(gold), len(prediction)) characters of the stripped prediction with the gold answer.
    """
    return mean_percent(lambda p, r: p.strip().startswith(r), predictions, references)


def exact_accuracy(predictions, references):
    """Percent of predictions that are their gold answer, character for character.

    Args:
        predictions, references: equally many texts, at least one.
    Returns:
        float in [0, 100].
    Raises:
        ValueError: not equally many, or none.
    Source: accuracy of BeyonderXX/TRACE metrics.py.
    """
    return mean_percent(lambda p, r: p == r, predictions, references)


def letter_accuracy(predictions, references, labels="ABC"):
    """Percent of predictions whose letter is the gold answer.

    The letter is the first label that stands alone as a word, in upper or lower case (so the
    English article "a" is one); else the first character that is a label; else the whole text
    stays. What was found is compared as in `prefix_accuracy`.

    Args:
        predictions, references: equally many texts, at least one.
        labels: the letters of the answers, upper case.
    Returns:
        float in [0, 100].
    Raises:
        ValueError: not equally many, or none; labels that are not different upper-case letters.
    Source: TRACE/inference/infer_multi_command.py of Artificer-AI-Lab/MoRAM (C-STANCE, FOMC).
    """
    letters = list(labels)
    if (
        not letters
        or len(set(letters)) < len(letters)
        or not all(len(c) == 1 and c.isalpha() and c.isupper() for c in letters)
    ):
        raise ValueError(f"labels must be one or more different upper-case letters, got {labels!r}")
    alone = re.compile(rf"\b[{''.join(letters)}]\b", re.IGNORECASE)
    letters_of = [_letter(prediction, letters, alone) for prediction in predictions]
    return prefix_accuracy(letters_of, references)


def _letter(prediction, letters, alone):
    """The letter a prediction chooses, or the stripped prediction."""
    text = prediction.strip()
    if match := alone.search(text):
        return match[0].upper()
    return next((c.upper() for c in text if c.upper() in letters), text)


def first_letter_accuracy(predictions, references):
    """Percent of predictions whose first character, white space aside, is that of the gold answer.

    For answers that are a letter and then an explanation. No letter is searched for: "Answer: B"
    is wrong for "B". Case counts.

    Args:
        predictions, references: equally many texts, at least one.
    Returns:
        float in [0, 100].
    Raises:
        ValueError: not equally many, or none.
    Source: ScienceQA in TRACE (Artificer-AI-Lab/MoRAM TRACE/evaluations).
    """
    return mean_percent(lambda p, r: p.strip()[:1] == r.strip()[:1] != "", predictions, references)


def numeric_accuracy(predictions, references):
    r"""Percent of predictions whose number is the gold one; words are compared in lower case.

    The answer of a prediction is what stands in its last \boxed{}; without one, its last number;
    without one, its whole text. It is right if it is the same text as the gold answer, or if both
    are numbers and it is within a relative 1e-4 of gold, gold / 100 or gold * 100 (percentages).
    A hyphen before a digit is a minus sign. The gold answer and what is boxed are freed of units,
    $, %, spaces, "x =", a trailing point and ".0".

    Two differences from the source: 1,234 is one number wherever it stands (there, outside of a
    box, only 234 is read), and formulas are compared as text, without sympy: \frac{1}{2} is right
    for the same text only, not for 0.5.

    Args:
        predictions, references: equally many texts, at least one.
    Returns:
        float in [0, 100].
    Raises:
        ValueError: not equally many, or none.
    Source: TRACE/evaluations/qwen_math_parser.py of Artificer-AI-Lab/MoRAM (NumGLUE), which
        follows the evaluation of Qwen2.5-Math.
    """
    return mean_percent(_same_number, predictions, references)


def _same_number(prediction, reference):
    """Whether the answer of a prediction is the gold one."""
    answer, gold = _answer(prediction), _plain(reference)
    if not answer or not gold:
        return False
    if answer.lower() == gold.lower():
        return True
    value, target = _value(answer), _value(gold)
    if value is None or target is None:
        return False
    return any(math.isclose(value, t, rel_tol=1e-4) for t in (target, target / 100, target * 100))


def _answer(prediction):
    """What a prediction answers: its last box, else its last number, else all of it."""
    if boxed := _last_box(prediction):
        return _plain(boxed)
    numbers = _NUMBER.findall(prediction)
    return numbers[-1] if numbers else prediction.strip()


def _last_box(text):
    r"""What stands in the last \boxed{}, with the braces in it balanced, or "" without one."""
    _, found, rest = text.rpartition("\\boxed{")
    if not found:
        return ""
    depth = 1
    for end, character in enumerate(rest):
        depth += (character == "{") - (character == "}")
        if not depth:
            return rest[:end]
    return rest


def _plain(text):
    """An answer without what does not change its value."""
    text = re.sub(r"\\text\s*\{[^{}]*\}$", "", text.strip()) or text
    text = re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\?[$%]|\\[!,()]|\s", "", text).rstrip(".")
    text = re.sub(r"^[A-Za-z]=", "", text)
    return re.sub(r"(\d)\.0+$", r"\1", text)


def _value(text):
    """A number as float, or None for any other text."""
    return float(text.replace(",", "")) if _NUMBER.fullmatch(text) else None

"""Accuracies: how many predictions are right, by four rules of what "right" means.

That of numbers is in numeric.py.

All divide by the number of examples, and score 0 where the prediction or the gold answer is empty.
"""

import re

from .common import Texts, mean_percent


def prefix_accuracy(predictions: Texts, references: Texts) -> float:
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


def exact_accuracy(predictions: Texts, references: Texts) -> float:
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


def letter_accuracy(predictions: Texts, references: Texts, labels: str = "ABC") -> float:
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


def _letter(prediction: str, letters: list[str], alone: re.Pattern[str]) -> str:
    """The letter a prediction chooses, or the stripped prediction."""
    text = prediction.strip()
    if match := alone.search(text):
        return match[0].upper()
    return next((c.upper() for c in text if c.upper() in letters), text)


def first_letter_accuracy(predictions: Texts, references: Texts) -> float:
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

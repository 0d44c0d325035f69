"""Scores of written answers, in percent, and which task takes which.

Plain Python: no torch, no network, no package. Each scorer names the variant it computes, for
tables to print, because published numbers differ by it.
"""

from collections.abc import Callable
from dataclasses import dataclass

from .accuracy import (
    exact_accuracy,
    first_letter_accuracy,
    letter_accuracy,
    prefix_accuracy,
)
from .common import Texts
from .numeric import numeric_accuracy
from .rouge import rouge_l
from .sari import sari
from .similarity import edit_similarity

__all__ = [
    "SCORERS",
    "Scorer",
    "edit_similarity",
    "exact_accuracy",
    "first_letter_accuracy",
    "letter_accuracy",
    "numeric_accuracy",
    "prefix_accuracy",
    "rouge_l",
    "sari",
    "scorer_for",
]

# From prompts, predictions and references, equally many, to a score in [0, 100].
Score = Callable[[Texts, Texts, Texts], float]


@dataclass(frozen=True)
class Scorer:
    """A score and its variant.

    Args:
        name: key in `SCORERS`.
        variant: what tables print.
    """

    name: str
    function: Score
    variant: str


def _of_pairs(function: Callable[..., float], **settings: str) -> Score:
    """The uniform signature for a score that does not look at the prompts."""
    return lambda prompts, predictions, references: function(predictions, references, **settings)


SCORERS = {
    name: Scorer(name, function, variant)
    for name, function, variant in (
        ("prefix_accuracy", _of_pairs(prefix_accuracy), "accuracy (answer begins with the gold)"),
        ("exact_accuracy", _of_pairs(exact_accuracy), "accuracy (exact match)"),
        ("letter_accuracy", _of_pairs(letter_accuracy), "accuracy (first letter of ABC found)"),
        ("first_letter_accuracy", _of_pairs(first_letter_accuracy), "accuracy (first character)"),
        ("numeric_accuracy", _of_pairs(numeric_accuracy), "accuracy (last number, by value)"),
        (
            "numeric_accuracy_published",
            _of_pairs(numeric_accuracy, variant="published"),
            "accuracy (last number, no sympy)",
        ),
        ("rouge_l", _of_pairs(rouge_l), "ROUGE-L (rouge 1.0.1, summary level)"),
        (
            "rouge_l_rouge_score",
            _of_pairs(rouge_l, variant="rouge_score"),
            "ROUGE-L (rouge-score, no stemmer)",
        ),
        ("edit_similarity", _of_pairs(edit_similarity), "edit similarity (fuzz.ratio, difflib)"),
        (
            "edit_similarity_rapidfuzz",
            _of_pairs(edit_similarity, variant="rapidfuzz"),
            "edit similarity (fuzz.ratio, rapidfuzz)",
        ),
        ("sari", sari, "SARI (huggingface evaluate, 13a, source = whole prompt)"),
    )
}

_OF_TASK = {
    "C-STANCE": "letter_accuracy",
    "FOMC": "letter_accuracy",
    "MeetingBank": "rouge_l",
    "Py150": "edit_similarity",
    "ScienceQA": "first_letter_accuracy",
    "NumGLUE-cm": "numeric_accuracy_published",
    "NumGLUE-ds": "numeric_accuracy_published",
    "20Minuten": "sari",
}
_VARIANTS = {
    "rouge": {"rouge": "rouge_l", "rouge_score": "rouge_l_rouge_score"},
    "similarity": {"difflib": "edit_similarity", "rapidfuzz": "edit_similarity_rapidfuzz"},
}


def scorer_for(task_name: str, *, rouge: str = "rouge", similarity: str = "difflib") -> Scorer:
    """The score of a task: its own for the eight of TRACE, else `prefix_accuracy`.

    Args:
        task_name: spelled as in TRACE, for example "C-STANCE".
        rouge: "rouge" or "rouge_score", see `rouge_l`.
        similarity: "difflib" or "rapidfuzz", see `edit_similarity`.
    Returns:
        `Scorer`.
    Raises:
        ValueError: a variant that does not exist, whether the task needs it or not.
    Source: task_metric in TRACE/inference/collect_results.py of Artificer-AI-Lab/MoRAM.
    """
    for argument, value in (("rouge", rouge), ("similarity", similarity)):
        if value not in _VARIANTS[argument]:
            known = ", ".join(_VARIANTS[argument])
            raise ValueError(f"{argument} must be one of {known}, got {value!r}")
    name = _OF_TASK.get(task_name, "prefix_accuracy")
    if name == "rouge_l":
        name = _VARIANTS["rouge"][rouge]
    elif name == "edit_similarity":
        name = _VARIANTS["similarity"][similarity]
    return SCORERS[name]

"""ROUGE-L, by the rules of two packages that disagree: `rouge` 1.0.1 and `rouge-score`."""

import re

from .common import Texts, lcs_length, lcs_rows, mean_percent

VARIANTS = ("rouge", "rouge_score")


def rouge_l(predictions: Texts, references: Texts, variant: str = "rouge") -> float:
    """Mean ROUGE-L F over pairs of texts, in percent.

    "rouge", what TRACE reports: a text is cut into sentences at every ".", and compared as sets of
    words. A reference word counts if it is in a longest common subsequence (LCS) of its sentence
    and any predicted sentence; of several LCS one is taken, by a fixed rule. Case and punctuation
    count. F = 2PR / (P + R + 1e-8).

    "rouge_score": one LCS of the two whole texts, of lower-case words of a-z and 0-9 alone, hence
    no use for Chinese, and umlauts split words. No stemming. F = 2PR / (P + R).

    Both score 0 where a text is empty or has no word. The official MoRAM code appends a line break
    to predictions without one, which adds an empty word, and so lowers P, after a final ".": it is
    not appended here.

    Args:
        predictions, references: equally many texts, at least one.
        variant: "rouge" or "rouge_score".
    Returns:
        float in [0, 100].
    Raises:
        ValueError: not equally many, or none; another variant.
    Source: pltrdy/rouge 1.0.1, rouge_l_summary_level with sets; google-research rouge_score 0.1.2,
        rougeL (both Apache-2.0; the rules, not the code).
    Cost: an LCS takes (words of one text) operations on integers of (words of the other) bits.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
    score = _summary_level if variant == "rouge" else _whole_text
    return mean_percent(score, predictions, references)


def _summary_level(prediction: str, reference: str) -> float:
    """F of sets of words, `rouge` 1.0.1."""
    predicted, expected = _sentences(prediction), _sentences(reference)
    if not predicted or not expected:
        return 0.0
    found = set()
    for sentence in expected:
        for other in predicted:
            found |= _lcs_words(sentence, other)
    precision = len(found) / len(set().union(*predicted))
    recall = len(found) / len(set().union(*expected))
    return 2 * precision * recall / (precision + recall + 1e-8)


def _sentences(text: str) -> list[list[str]]:
    """Lists of words. A piece of white space alone is kept, and has one word, the empty one."""
    return [" ".join(piece.split()).split(" ") for piece in text.split(".") if piece]


def _lcs_words(expected: list[str], predicted: list[str]) -> set[str]:
    """The set of words of one LCS, found backwards from the end of both.

    Of two ways, the table T decides: up (drop the expected word) if T[i-1][j] > T[i][j-1], else
    left. T[i][j] is the larger of the two and at most one more than either, so up is larger
    exactly where T[i][j-1] is less than T[i][j]: where bit j - 1 of row i is 0.
    """
    rows = lcs_rows(expected, predicted)
    i, j, words = len(expected), len(predicted), set()
    while i and j:
        if expected[i - 1] == predicted[j - 1]:
            i, j = i - 1, j - 1
            words.add(expected[i])
        elif rows[i] >> (j - 1) & 1:
            j -= 1
        else:
            i -= 1
    return words


def _whole_text(prediction: str, reference: str) -> float:
    """F of one LCS of the whole texts, `rouge-score`."""
    predicted, expected = (re.findall("[a-z0-9]+", t.lower()) for t in (prediction, reference))
    length = lcs_length(expected, predicted)
    # 2PR / (P + R) with P = length / len(predicted) and R = length / len(expected).
    return 2 * length / (len(predicted) + len(expected)) if length else 0.0

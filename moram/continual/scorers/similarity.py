"""Edit similarity of code, TRACE's score of Py150."""

import re
from difflib import SequenceMatcher

from .common import Texts, check_counts, lcs_length

VARIANTS = ("difflib", "rapidfuzz")
_WITH_VALUE = re.compile(r"<(?:NUM|STR|CHAR)_LIT:(.*?)>", re.DOTALL)


def edit_similarity(predictions: Texts, references: Texts, variant: str = "difflib") -> float:
    """Mean similarity of code, 0 to 100, each pair rounded to an integer as `fuzz.ratio` does.

    Before, Py150's placeholders are replaced on both sides: <NUM_LIT> by 0, <STR_LIT> and
    <CHAR_LIT> by nothing, and those with a value, as <NUM_LIT:7>, by the value. A pair of which
    one text is empty then scores 0.

    "difflib": 2 M / (n + m), M the characters in the blocks that Python's SequenceMatcher finds.
    This is fuzzywuzzy as it is without python-Levenshtein. It depends on which text comes first,
    and overlooks frequent characters in texts of 200 and more.

    "rapidfuzz": 2 LCS / (n + m), LCS the longest common subsequence. This is `fuzz.ratio` of
    rapidfuzz, rounded, and fuzzywuzzy with python-Levenshtein. Never less than difflib's. It is
    computed here; the package is not needed.

    Args:
        predictions, references: equally many texts, at least one.
        variant: "difflib" or "rapidfuzz".
    Returns:
        float in [0, 100].
    Raises:
        ValueError: not equally many, or none; another variant.
    Source: caculate_fuzz of BeyonderXX/TRACE metrics.py; placeholders as in CodeXGLUE's
        line-level code completion; fuzzywuzzy 0.18.0 and rapidfuzz 3.14 (rules, not code).
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
    check_counts(predictions=predictions, references=references)
    ratio = _difflib_ratio if variant == "difflib" else _subsequence_ratio
    total = 0
    for prediction, reference in zip(predictions, references, strict=True):
        first, second = _clean(prediction), _clean(reference)
        if first and second:
            # Python rounds halves to the even neighbour, and so do the packages.
            total += round(100 * ratio(first, second))
    return total / len(references)


def _clean(code: str) -> str:
    """Code without Py150's placeholders."""
    for placeholder, value in (("<NUM_LIT>", "0"), ("<STR_LIT>", ""), ("<CHAR_LIT>", "")):
        code = code.replace(placeholder, value)
    return _WITH_VALUE.sub(r"\1", code)


def _difflib_ratio(first: str, second: str) -> float:
    """Ratcliff and Obershelp's similarity, in [0, 1]."""
    return SequenceMatcher(None, first, second).ratio()


def _subsequence_ratio(first: str, second: str) -> float:
    """Similarity by insertions and deletions, in [0, 1]."""
    both = len(first) + len(second)
    # In rapidfuzz's order of operations, so that halves round as they do there.
    return 1 - (both - 2 * lcs_length(first, second)) / both

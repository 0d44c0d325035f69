"""Accuracy of answers that are numbers, by two rules of how a number is written."""

import math
import re

from .common import Texts, mean_percent

# A comma between groups of three digits separates thousands; elsewhere it ends the number.
_WHOLE = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
_PUBLISHED = re.compile(rf"-?{_WHOLE}(?:\.\d+)?")
_DECIMAL = rf"(?:(?:{_WHOLE}(?:\.\d+)?|(?<![\d.])\.\d+)(?:[eE][-+]?\d+)?)"
_SIGN = "[-+\N{MINUS SIGN}]"
# Sign; then whole, above and below of "2 1/2" or "1/2", which is no part of 1/2/2024; or a number.
_VALUE = re.compile(
    rf"({_SIGN}?)(?:(?<!/)(?:(\d+) )?({_DECIMAL})\s*/\s*({_DECIMAL})(?!\.?\d|\s*/)|({_DECIMAL}))"
)
_PART = rf"\s*(?:\{{\s*({_SIGN}?{_DECIMAL})\s*\}}|(\d))"
_LATEX = re.compile(rf"(\d*) ?\\[dt]?frac{_PART}{_PART}")


def numeric_accuracy(predictions: Texts, references: Texts, variant: str = "values") -> float:
    r"""Percent of predictions whose number is the gold one; words are compared in lower case.

    The answer of a prediction is what stands in its last \boxed{}; without one, its last number;
    without one, its whole text. It is right if it is the same text as the gold answer, or if both
    are numbers and it is within a relative 1e-4 of gold, gold / 100 or gold * 100 (percentages).
    A hyphen before a digit is a minus sign. The gold answer and what is boxed are freed of units,
    $, %, spaces, "x =", a trailing point and ".0".

    "values", this library's own: a number may also be a fraction (1/2, \frac{1}{2}, 2 1/2), begin
    with a point (.5), have a power of ten (1.5e3) or the minus sign of print. A prediction that is
    the gold answer as a whole is right, whatever its last number is. All other formulas are text.

    "published", by which NumGLUE of TRACE is scored: outside of a box 1/2 and \frac{1}{2} are read
    as 2, and .5 as 5. Two differences from the source: 1,234 is one number wherever it stands
    (there, outside of a box, only 234 is read), and boxed formulas are compared as text, without
    sympy: \frac{1}{2} is right for the same text only, not for 0.5.

    Args:
        predictions, references: equally many texts, at least one.
        variant: "values" or "published".
    Returns:
        float in [0, 100].
    Raises:
        ValueError: not equally many, or none; another variant.
    Source: TRACE/evaluations/qwen_math_parser.py of Artificer-AI-Lab/MoRAM (NumGLUE), which
        follows the evaluation of Qwen2.5-Math.
    """
    if variant not in _RULES:
        raise ValueError(f"variant must be one of {', '.join(_RULES)}, got {variant!r}")
    answer_of, value_of = _RULES[variant]

    def is_right(prediction: str, reference: str) -> bool:
        answer, number = answer_of(prediction)
        if not answer or not _plain(reference):
            return False
        if answer.lower() == _plain(reference).lower():
            return True
        value, gold = value_of(number), value_of(_bare(reference))
        if value is None or gold is None:
            return False
        return any(math.isclose(value, t, rel_tol=1e-4) for t in (gold, gold / 100, gold * 100))

    return mean_percent(is_right, predictions, references)


def _answer(prediction: str) -> tuple[str, str]:
    """What a prediction answers: as text, and the part of it that may be a number."""
    boxed = _last_box(prediction)
    if boxed:
        return _plain(boxed), _bare(boxed)
    numbers = [match[0] for match in _VALUE.finditer(_without_latex(prediction))]
    return _plain(prediction), numbers[-1] if numbers else ""


def _value(text: str) -> float | None:
    """A number or a fraction as float, or None for any other text."""
    match = _VALUE.fullmatch(_without_latex(text))
    if match is None:
        return None
    sign, whole, above, below, number = match.groups()
    if number is None:
        if not _float(below):
            return None
        value = _float(whole or "0") + _float(above) / _float(below)
    else:
        value = _float(number)
    return value if sign in ("", "+") else -value


def _without_latex(text: str) -> str:
    r"""The text with 1/2 for \frac{1}{2}, and 2 1/2 for 2\frac{1}{2}."""

    def slashed(match: re.Match[str]) -> str:
        whole, *parts = match.groups()
        above, below = (part for part in parts if part)
        return f"{whole} {above}/{below}".lstrip()

    return _LATEX.sub(slashed, text)


def _published_answer(prediction: str) -> tuple[str, str]:
    """`_answer` by the published rule: the text is that of the number."""
    boxed = _last_box(prediction)
    if boxed:
        return _plain(boxed), _plain(boxed)
    numbers = _PUBLISHED.findall(prediction)
    answer = numbers[-1] if numbers else prediction.strip()
    return answer, answer


def _published_value(text: str) -> float | None:
    """A number as float, or None for any other text."""
    text = _plain(text)
    return _float(text) if _PUBLISHED.fullmatch(text) else None


_RULES = {"values": (_answer, _value), "published": (_published_answer, _published_value)}


def _float(text: str) -> float:
    return float(text.replace(",", ""))


def _last_box(text: str) -> str:
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


def _bare(text: str) -> str:
    """An answer without units, signs and names around it."""
    text = re.sub(r"\\text\s*\{[^{}]*\}$", "", text.strip()) or text
    text = re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\?[$%]|\\[!,()]", "", text)
    text = re.sub(r"^\s+|[.\s]+$", "", text)
    return re.sub(r"^[A-Za-z]\s*=\s*", "", text)


def _plain(text: str) -> str:
    """An answer without what does not change its value, as text to compare."""
    return re.sub(r"(\d)\.0+$", r"\1", re.sub(r"\s", "", _bare(text)))

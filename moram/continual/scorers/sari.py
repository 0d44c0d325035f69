"""SARI, the score of text simplification, with the tokenisation it is defined on."""

import re
import string
from collections import Counter
from collections.abc import Sequence

from .common import Texts, check_counts

# Every ASCII sign but these stands alone; ' stays in its word, and the others depend on digits.
_ALONE = re.compile("([ " + re.escape("".join(set(string.punctuation) - set("',-."))) + "])")
_ENTITIES = (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">"))

# How often each n-gram occurs.
Grams = Counter[tuple[str, ...]]


def sari(sources: Texts, predictions: Texts, references: Sequence[str | Texts]) -> float:
    """Mean SARI over the examples, 0 to 100.

    For n = 1 to 4, the n-grams of lower-case tokens that a prediction keeps (F), adds (F) and
    deletes (precision only) are compared with those that the references keep, add and delete;
    SARI is the mean of the twelve numbers. 0 / 0 is 1. An empty prediction is scored as well: it
    deletes everything.

    Args:
        sources: texts to simplify.
        predictions: equally many texts.
        references: for each source one text, or a list of one or more texts.
    Returns:
        float in [0, 100].
    Raises:
        ValueError: not equally many, or none; a source without a reference.
    Source: Xu et al., TACL 2016; `sari` of huggingface/evaluate (0/0 is 1; the recall of what is
        kept divides by counts), tokenised by 13a of sacrebleu (the rules, not the code).
    """
    check_counts(sources=sources, predictions=predictions, references=references)
    total = 0
    for i, example in enumerate(zip(sources, predictions, references, strict=True)):
        source, prediction, expected = example
        expected = [expected] if isinstance(expected, str) else list(expected)
        if not expected:
            raise ValueError(f"references must hold one or more texts each, got none at {i}")
        total += _example(tokens(source), tokens(prediction), [tokens(text) for text in expected])
    return 100 * total / len(predictions)


def tokens(text: str) -> list[str]:
    """Lower-case tokens by mteval's 13a: ASCII signs apart, points and commas not in numbers.

    Args:
        text: any text. Scripts without spaces are not cut.
    Returns:
        list of texts, [""] for an empty text.
    """
    text = text.lower().replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for entity, character in _ENTITIES:
        text = text.replace(entity, character)
    text = _ALONE.sub(r" \1 ", f" {text} ")
    text = re.sub(r"([^0-9])([.,])", r"\1 \2 ", text)
    text = re.sub(r"([.,])([^0-9])", r" \1 \2", text)
    text = re.sub(r"([0-9])-", r"\1 - ", text)
    return text.split() or [""]


def _example(source: list[str], prediction: list[str], references: list[list[str]]) -> float:
    """Mean of keep, delete and add over the lengths of n-grams, in [0, 1]."""
    total = 0
    for n in range(1, 5):
        expected: Grams = Counter()
        for reference in references:
            expected += _ngrams(reference, n)
        before, after = _ngrams(source, n), _ngrams(prediction, n)
        # Counts of the references add up; those of the two texts are made comparable.
        many = Counter({g: c * len(references) for g, c in before.items()})
        written = Counter({g: c * len(references) for g, c in after.items()})
        total += _keep(many, written, expected) + _delete(many, written, expected)
        total += _add(before, after, expected)
    return total / 12


def _ngrams(words: list[str], n: int) -> Grams:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def _keep(source: Grams, prediction: Grams, expected: Grams) -> float:
    """F of the n-grams kept."""
    kept, should = source & prediction, source & expected
    good = kept & expected
    precision = _ratio(sum(count / kept[gram] for gram, count in good.items()), len(kept))
    recall = _ratio(good.total(), should.total())
    return _harmonic(precision, recall)


def _delete(source: Grams, prediction: Grams, expected: Grams) -> float:
    """Precision of the n-grams deleted."""
    deleted = source - prediction
    good = deleted - expected
    return _ratio(sum(count / deleted[gram] for gram, count in good.items()), len(deleted))


def _add(source: Grams, prediction: Grams, expected: Grams) -> float:
    """F of the n-grams added; how often does not matter."""
    added, should = set(prediction) - set(source), set(expected) - set(source)
    good = len(added & should)
    return _harmonic(_ratio(good, len(added)), _ratio(good, len(should)))


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 1


def _harmonic(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision or recall else 0

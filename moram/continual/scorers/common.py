"""What the scorers share: checking their arguments, averaging, and the longest common subsequence.

Nothing here knows a task or a metric.
"""

from collections.abc import Callable, Hashable, Sequence, Sized

Texts = Sequence[str]


def check_counts(**texts: Sized) -> None:
    """Refuse lists of texts that are empty or not equally long.

    Raises:
        ValueError: their lengths differ, or are 0.
    """
    counts = [len(values) for values in texts.values()]
    if min(counts) == 0 or len(set(counts)) > 1:
        names, got = ", ".join(texts), ", ".join(map(str, counts))
        raise ValueError(f"{names} must be equally many, at least one, got {got}")


def mean_percent(
    score: Callable[[str, str], float], predictions: Texts, references: Texts
) -> float:
    """Mean of score(prediction, reference) over all pairs, in percent.

    As in TRACE, a pair of which one text is empty scores 0 and still counts.

    Args:
        score: (prediction, reference) -> number in [0, 1], or bool.
        predictions, references: equally many texts, at least one.
    Returns:
        float in [0, 100].
    Raises:
        ValueError: not equally many, or none.
    """
    check_counts(predictions=predictions, references=references)
    pairs = zip(predictions, references, strict=True)
    return 100 * sum(score(p, r) for p, r in pairs if p and r) / len(references)


def lcs_rows(first: Sequence[Hashable], second: Sequence[Hashable]) -> list[int]:
    """Rows of the table T of longest common subsequences, as differences.

    T[i][j] is the length for the first i items of `first` and the first j of `second`. Neighbours
    differ by 0 or 1, so a row is one integer: bit j - 1 is 1 where T[i][j] = T[i][j-1], and 0
    where it is one more.

    Args:
        first, second: sequences of hashable items.
    Returns:
        list of len(first) + 1 integers of len(second) bits.
    Source: Hyyrö, "Bit-parallel LCS-length computation revisited", AWOCA 2004.
    Cost: len(first) operations on integers of len(second) bits.
    """
    places: dict[Hashable, int] = {}
    for j, item in enumerate(second):
        places[item] = places.get(item, 0) | 1 << j
    full = (1 << len(second)) - 1
    rows = [full]
    for item in first:
        row = rows[-1]
        matches = row & places.get(item, 0)
        rows.append((row + matches | row - matches) & full)
    return rows


def lcs_length(first: Sequence[Hashable], second: Sequence[Hashable]) -> int:
    """Length of a longest common subsequence.

    Args:
        first, second: sequences of hashable items.
    Returns:
        int.
    """
    return len(second) - lcs_rows(first, second)[-1].bit_count()

"""Scores of a run from its accuracy matrix R[t][i]: task i after training task t, in percent."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import cast

from .data import Example

# R, and R with cells that are not known.
Matrix = Sequence[Sequence[float]]
PartialMatrix = Sequence[Sequence[float | None]]


def overall_performance(matrix: Matrix) -> float:
    """OP: mean of the last row."""
    return sum(matrix[-1]) / len(matrix[-1])


def plasticity(matrix: Matrix) -> float:
    """Mean of the diagonal: how well tasks are learned in the first place."""
    return sum(matrix[t][t] for t in range(len(matrix))) / len(matrix)


def backward_transfer(matrix: Matrix) -> float:
    """BWT: mean change of the earlier tasks since each was learned; negative = forgetting.

    Unclipped, over the T - 1 earlier tasks (Lopez-Paz and Ranzato, 2017). 0 for one task.
    """
    earlier = range(len(matrix) - 1)
    return sum(matrix[-1][i] - matrix[i][i] for i in earlier) / max(1, len(earlier))


def forgetting(matrix: Matrix) -> float:
    """Mean drop of the earlier tasks from their best to their last score, >= 0.

    The best is taken over the rows from when the task was learned (Chaudhry et al., 2018).
    """
    earlier = range(len(matrix) - 1)
    drops = [max(row[i] for row in matrix[i:]) - matrix[-1][i] for i in earlier]
    return sum(drops) / max(1, len(drops))


def trace_backward_transfer(matrix: PartialMatrix) -> float:
    """BWT over all T tasks, the last of which adds 0; percentage points, negative = forgetting.

    (1/T) sum_i (R[T, i] - R[i, i]): (T - 1) / T of `backward_transfer`.

    Args:
        matrix: R, T rows of T scores in percent. Cells above the diagonal may be None or NaN.
    Returns:
        float.
    Raises:
        ValueError: no square matrix, or a cell of the diagonal or last row is missing.
    Source: Wang et al., TRACE, 2023 (as the source of ZinYY/TreeLoRA keeps it in a comment).
    """
    matrix = _check(matrix, lambda t, i, size: t in (i, size - 1))
    size = len(matrix)
    return sum(matrix[-1][i] - matrix[i][i] for i in range(size)) / size


def trace_forgetting(matrix: PartialMatrix) -> float:
    """What tables on TRACE print as BWT: tasks that got better count as 0, sign flipped; >= 0.

    -(1/T) sum_i min(R[T, i] - R[i, i], 0), in percentage points; lower is better.

    Args:
        matrix: R, T rows of T scores in percent. Cells above the diagonal may be None or NaN.
    Returns:
        float >= 0.
    Raises:
        ValueError: no square matrix, or a cell of the diagonal or last row is missing.
    Source: inference/collect_results.py of ZinYY/TreeLoRA and Artificer-AI-Lab/MoRAM, which skip
        missing cells instead.
    """
    matrix = _check(matrix, lambda t, i, size: t in (i, size - 1))
    size = len(matrix)
    return sum(max(matrix[i][i] - matrix[-1][i], 0.0) for i in range(size)) / size


def all_average(matrix: PartialMatrix) -> float:
    """Mean of the lower triangle with the diagonal: every task after each task since its own.

    Args:
        matrix: R, T rows of T scores in percent. Cells above the diagonal may be None or NaN.
    Returns:
        float in [0, 100].
    Raises:
        ValueError: no square matrix, or a cell of the lower triangle is missing.
    Source: "All Average" of inference/collect_results.py, Artificer-AI-Lab/MoRAM.
    """
    matrix = _check(matrix, lambda t, i, size: i <= t)
    size = len(matrix)
    return sum(sum(matrix[t][: t + 1]) for t in range(size)) / (size * (size + 1) / 2)


def transfer(matrix: PartialMatrix) -> float:
    """X-TAIL: how well tasks are solved before they are learned.

    Mean over the tasks after the first of the mean score on each over all times before it.

    Args:
        matrix: R, T >= 2 rows of T scores in percent. Only cells above the diagonal matter.
    Returns:
        float in [0, 100].
    Raises:
        ValueError: no square matrix, one task alone, or a cell above the diagonal is missing.
    Source: Xu et al., RAIL, NeurIPS 2024; XTAIL/main.py of Artificer-AI-Lab/MoRAM, which also
        leaves out scores of exactly 0.
    """
    matrix = _check(matrix, lambda t, i, size: t < i)
    size = len(matrix)
    if size < 2:
        raise ValueError("matrix must have at least 2 tasks, got 1: nothing precedes the first")
    columns = [sum(matrix[t][i] for t in range(i)) / i for i in range(1, size)]
    return sum(columns) / len(columns)


def average(matrix: PartialMatrix) -> float:
    """X-TAIL: mean score over all tasks and all times, of all cells.

    Args:
        matrix: R, T rows of T scores in percent.
    Returns:
        float in [0, 100].
    Raises:
        ValueError: no square matrix, or a cell is missing.
    Source: as `transfer`.
    """
    matrix = _check(matrix, lambda t, i, size: True)
    return sum(map(sum, matrix)) / len(matrix) ** 2


def last(matrix: PartialMatrix) -> float:
    """X-TAIL: mean score over all tasks after the last one; the same as `overall_performance`.

    Args:
        matrix: R, T rows of T scores in percent. Only the last row matters.
    Returns:
        float in [0, 100].
    Raises:
        ValueError: no square matrix, or a cell of the last row is missing.
    Source: as `transfer`.
    """
    return overall_performance(_check(matrix, lambda t, i, size: t == size - 1))


def _check(matrix: PartialMatrix, needs: Callable[[int, int, int], bool]) -> Matrix:
    """The matrix; ValueError unless it is square and has the cells it needs."""
    size, widths = len(matrix), [len(row) for row in matrix]
    if not size or widths != [size] * size:
        raise ValueError(
            "matrix must be square, a row after each task and a column for each, got "
            f"{size} rows of {', '.join(map(str, widths)) or 'no'} scores"
        )
    for t, row in enumerate(matrix):
        for i, score in enumerate(row):
            if needs(t, i, size) and (score is None or math.isnan(score)):
                raise ValueError(
                    f"matrix[{t}][{i}] must be a score, got {score}: evaluate task {i} after "
                    f"task {t} as well (counted from 0)"
                )
    # But for cells that are not needed.
    return cast(Matrix, matrix)


def majority_accuracy(examples: Sequence[Example]) -> float:
    """Percent that always answering the most frequent answer of the examples would score."""
    counts = Counter(example.answer for example in examples)
    return 100 * max(counts.values()) / len(examples)

"""Scores of a run from its accuracy matrix R[t][i]: task i after training task t, in percent."""

from collections import Counter


def overall_performance(matrix):
    """OP: mean of the last row."""
    return sum(matrix[-1]) / len(matrix[-1])


def plasticity(matrix):
    """Mean of the diagonal: how well tasks are learned in the first place."""
    return sum(matrix[t][t] for t in range(len(matrix))) / len(matrix)


def backward_transfer(matrix):
    """BWT: mean change of the earlier tasks since each was learned; negative = forgetting.

    Unclipped, over the T - 1 earlier tasks (Lopez-Paz and Ranzato, 2017). 0 for one task.
    """
    earlier = range(len(matrix) - 1)
    return sum(matrix[-1][i] - matrix[i][i] for i in earlier) / max(1, len(earlier))


def forgetting(matrix):
    """Mean drop of the earlier tasks from their best to their last score, >= 0.

    The best is taken over the rows from when the task was learned (Chaudhry et al., 2018).
    """
    earlier = range(len(matrix) - 1)
    drops = [max(row[i] for row in matrix[i:]) - matrix[-1][i] for i in earlier]
    return sum(drops) / max(1, len(drops))


def majority_accuracy(examples):
    """Percent that always answering the most frequent answer of the examples would score."""
    counts = Counter(example.answer for example in examples)
    return 100 * max(counts.values()) / len(examples)

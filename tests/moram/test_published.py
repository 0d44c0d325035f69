"""Published rows against the averages published beside them, by our own metrics where possible.

X-TAIL prints a row for each dataset and the average over datasets: two numbers from different
places, so agreement checks the transcription, the formulas and the page.

TRACE prints one OP and one BWT a method and none of the scores per task they were computed from.
No metric can be checked against them, and which method is best is no property of our code. What is
left, and all that is tested, is that the table is whole and its numbers are possible.
"""

import math
from itertools import product

import pytest

from moram.continual import average, last, transfer
from moram.continual.published import (
    TRACE,
    XTAIL,
    XTAIL_DATASETS,
    XTAIL_FINE_TUNED,
    XTAIL_FINE_TUNED_MEAN,
    XTAIL_FORGETTING,
    XTAIL_PER_DATASET,
    XTAIL_ZERO_SHOT,
    XTAIL_ZERO_SHOT_MEAN,
)

# Each row is rounded to 0.1, so its mean is off by at most 0.05, and so is the printed average.
ROUNDING = 0.1 + 1e-9
SIZE = len(XTAIL_DATASETS)


def matrix_of(method):
    """A matrix whose column j has the published transfer, average and last of dataset j.

    Above the diagonal each cell of column j is its transfer; the last row is `last`; the cells
    between share what the average over the column then leaves. For the last dataset nothing lies
    between: its average follows from the other two.
    """
    rows = XTAIL_PER_DATASET[method]
    matrix = [[math.nan] * SIZE for _ in range(SIZE)]
    for j in range(SIZE):
        before, free = rows.transfer[j] if j else 0.0, SIZE - 1 - j
        rest = SIZE * rows.average[j] - j * before - rows.last[j]
        for t in range(SIZE - 1):
            matrix[t][j] = before if t < j else rest / free
        matrix[-1][j] = rows.last[j]
    return matrix


@pytest.mark.parametrize("method", XTAIL_PER_DATASET)
def test_metrics_of_the_dataset_rows_are_the_published_averages(method):
    matrix, published = matrix_of(method), XTAIL[method]
    assert transfer(matrix) == pytest.approx(published.transfer, abs=ROUNDING)
    assert average(matrix) == pytest.approx(published.average, abs=ROUNDING)
    assert last(matrix) == pytest.approx(published.last, abs=ROUNDING)


@pytest.mark.parametrize("method", XTAIL_PER_DATASET)
def test_means_over_datasets_are_the_published_averages(method):
    rows, published = XTAIL_PER_DATASET[method], XTAIL[method]
    assert rows.transfer[0] is None
    assert sum(rows.transfer[1:]) / 9 == pytest.approx(published.transfer, abs=ROUNDING)
    assert sum(rows.average) / 10 == pytest.approx(published.average, abs=ROUNDING)
    assert sum(rows.last) / 10 == pytest.approx(published.last, abs=ROUNDING)


@pytest.mark.parametrize("method", XTAIL_PER_DATASET)
def test_average_of_the_last_dataset_follows_from_its_transfer_and_last(method):
    # Nine times before it is learned, and once after.
    rows = XTAIL_PER_DATASET[method]
    expected = (9 * rows.transfer[-1] + rows.last[-1]) / 10
    assert rows.average[-1] == pytest.approx(expected, abs=ROUNDING)


@pytest.mark.parametrize("method", XTAIL_PER_DATASET)
def test_a_matrix_of_possible_scores_has_the_published_rows(method):
    cells = [cell for row in matrix_of(method) for cell in row]
    assert all(0 <= cell <= 100 for cell in cells)


def test_zero_shot_and_fine_tuned_rows_have_the_published_means():
    assert sum(XTAIL_ZERO_SHOT) / 10 == pytest.approx(XTAIL_ZERO_SHOT_MEAN, abs=ROUNDING)
    assert sum(XTAIL_FINE_TUNED) / 10 == pytest.approx(XTAIL_FINE_TUNED_MEAN, abs=ROUNDING)


def test_a_model_that_never_changes_transfers_its_zero_shot_scores():
    matrix = [list(XTAIL_ZERO_SHOT)] * SIZE
    assert transfer(matrix) == pytest.approx(XTAIL["Zero-shot"].transfer, abs=ROUNDING)
    assert average(matrix) == pytest.approx(XTAIL_ZERO_SHOT_MEAN, abs=ROUNDING)


def test_xtail_rows_have_ten_datasets_and_percentages():
    assert len(XTAIL_ZERO_SHOT) == len(XTAIL_FINE_TUNED) == SIZE == 10
    for rows in XTAIL_PER_DATASET.values():
        assert [len(row) for row in rows] == [10] * 3
    scores = [score for row in XTAIL.values() for score in row if score is not None]
    assert all(0 <= score <= 100 for score in [*scores, *XTAIL_FORGETTING.values()])


@pytest.mark.parametrize("backbone", TRACE)
def test_trace_table_is_whole_and_its_numbers_are_possible(backbone):
    rows = TRACE[backbone]
    assert len(TRACE) == 3 and len(rows) == 12
    assert {name for name, row in rows.items() if row.forgetting is None} == {"FIX(ICL)"}
    for (name, row), score in product(rows.items(), range(2)):
        if row[score] is None:
            continue
        assert 0 <= row[score].mean <= 100, name
        assert (row[score].spread is None) == (name == "CoDyRA"), name
        assert row[score].spread is None or row[score].spread > 0, name

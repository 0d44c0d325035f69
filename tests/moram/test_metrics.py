"""TRACE's and X-TAIL's metrics of a matrix, worked out by hand, and what they refuse."""

import math
import re

import pytest

from moram.continual import (
    all_average,
    average,
    backward_transfer,
    last,
    overall_performance,
    trace_backward_transfer,
    trace_forgetting,
    transfer,
)

# Task 0 gains 6 and loses 16, task 1 gains 5, task 2 is last.
MATRIX = [[80.0, 30.0, 20.0], [86.0, 50.0, 26.0], [64.0, 55.0, 84.0]]
TRIANGLE = [[80.0, None, math.nan], [86.0, 50.0, None], [64.0, 55.0, 84.0]]
LOWER = [trace_forgetting, trace_backward_transfer, all_average, last]
EVERY = [*LOWER, transfer, average]


def name_of(value):
    return value.__name__ if callable(value) else ""


@pytest.mark.parametrize("matrix", [MATRIX, TRIANGLE], ids=["whole", "triangle"])
def test_metrics_of_the_lower_triangle_worked_out_by_hand(matrix):
    # Changes since learned: -16, +5, 0.
    assert trace_forgetting(matrix) == pytest.approx(16 / 3)
    assert trace_backward_transfer(matrix) == pytest.approx(-11 / 3)
    assert all_average(matrix) == pytest.approx((80 + 86 + 50 + 64 + 55 + 84) / 6)
    assert last(matrix) == pytest.approx((64 + 55 + 84) / 3)


def test_xtail_metrics_worked_out_by_hand():
    # Before they are learned: task 1 30, task 2 (20 + 26) / 2.
    assert transfer(MATRIX) == pytest.approx((30 + 23) / 2)
    assert average(MATRIX) == pytest.approx((230 / 3 + 135 / 3 + 130 / 3) / 3)
    assert last(MATRIX) == overall_performance(MATRIX)


def test_trace_divides_by_all_tasks_and_lopez_paz_by_the_earlier_ones():
    assert trace_backward_transfer(MATRIX) == pytest.approx(backward_transfer(MATRIX) * 2 / 3)


def test_gains_do_not_make_up_for_losses_in_trace_forgetting():
    assert trace_forgetting([[50.0, 0.0], [75.0, 60.0]]) == 0.0
    assert trace_backward_transfer([[50.0, 0.0], [75.0, 60.0]]) == 12.5


def test_transfer_looks_only_above_the_diagonal():
    assert transfer([[None, 30.0, 20.0], [None, None, 26.0], [None] * 3]) == pytest.approx(26.5)


def test_a_score_of_zero_counts_in_transfer():
    assert transfer([[10.0, 0.0, 40.0], [10.0, 10.0, 0.0], [10.0, 10.0, 10.0]]) == 10.0


def test_metrics_of_one_task():
    for metric in (all_average, average, last):
        assert metric([[40.0]]) == 40.0
    assert trace_forgetting([[40.0]]) == trace_backward_transfer([[40.0]]) == 0.0
    message = "matrix must have at least 2 tasks, got 1: nothing precedes the first"
    with pytest.raises(ValueError, match=message):
        transfer([[40.0]])


@pytest.mark.parametrize(
    ("metric", "cell"),
    [(transfer, (0, 1)), (average, (0, 1))],
    ids=name_of,
)
def test_metrics_of_all_cells_name_the_missing_one(metric, cell):
    t, i = cell
    message = (
        f"matrix[{t}][{i}] must be a score, got None: evaluate task {i} after task {t} as well "
        "(counted from 0)"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        metric(TRIANGLE)


@pytest.mark.parametrize("hole", [None, math.nan])
@pytest.mark.parametrize(
    ("metric", "t", "i"),
    [
        (trace_forgetting, 1, 1),
        (trace_forgetting, 2, 0),
        (trace_backward_transfer, 1, 1),
        (trace_backward_transfer, 2, 0),
        (all_average, 1, 0),
        (last, 2, 2),
        (transfer, 1, 2),
        (average, 1, 0),
    ],
    ids=name_of,
)
def test_a_missing_cell_that_is_needed_is_named(metric, t, i, hole):
    matrix = [row[:] for row in MATRIX]
    matrix[t][i] = hole
    with pytest.raises(
        ValueError, match=re.escape(f"matrix[{t}][{i}] must be a score, got {hole}")
    ):
        metric(matrix)


@pytest.mark.parametrize(
    ("matrix", "got"),
    [
        ([], "0 rows of no scores"),
        ([[1.0, 2.0]], "1 rows of 2 scores"),
        ([[1.0], [1.0, 2.0]], "2 rows of 1, 2 scores"),
        ([[1.0, 2.0], [1.0, 2.0], [1.0, 2.0]], "3 rows of 2, 2, 2 scores"),
    ],
    ids=["none", "flat", "ragged", "tall"],
)
@pytest.mark.parametrize("metric", EVERY, ids=name_of)
def test_a_matrix_that_is_not_square_is_refused(metric, matrix, got):
    message = f"matrix must be square, a row after each task and a column for each, got {got}"
    with pytest.raises(ValueError, match=re.escape(message)):
        metric(matrix)


@pytest.mark.parametrize("metric", EVERY, ids=name_of)
def test_metrics_do_not_change_the_matrix(metric):
    matrix = [row[:] for row in MATRIX]
    metric(matrix)
    assert matrix == MATRIX

"""What an op keeps for its backward is copied only where it must be padded."""

import torch

from moram_kernels.ops import padded


def test_rows_and_columns_of_zeros_follow():
    found = padded(torch.ones(1, 2), 2, 3)
    assert found.tolist() == [[1, 1, 0], [0, 0, 0]] and found.is_contiguous()


def test_nothing_is_copied_where_nothing_follows():
    matrix = torch.ones(2, 3)
    assert padded(matrix, 2, 3) is matrix
    part = torch.ones(2, 4)[:, :3]
    assert padded(part, 2, 3).is_contiguous()

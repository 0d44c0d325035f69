"""Which choices of a model rounding could turn: equal answers are asked of all others. No tests.

Two ways to the same logits differ in their last bits, by the CPU and by the size of a batch. The
most likely token or class is then the same wherever the two largest numbers are not next to equal.
"""

import json

import torch
from torch.overrides import TorchFunctionMode

# Far above the rounding of float32 logits of size 1 to 10: of a model as it was drawn, and after
# some steps of training, in which Adam makes more of a rounding.
DRAWN, TRAINED = 2e-5, 1e-3


class Choices(TorchFunctionMode):
    """Counts the choices made in a block, and those whose two best were nearer than `near`."""

    def __init__(self, near):
        super().__init__()
        self.near = near
        self.made = self.unclear = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.argmax, torch.Tensor.argmax) and args[0].is_floating_point():
            best, second = args[0].topk(2).values.unbind(-1)
            self.made += best.numel()
            self.unclear += int((best - second < self.near).sum())
        return function(*args, **(kwargs or {}))


def answers_of(out):
    """All answers that a run wrote, by file."""
    files = sorted((out / "predictions").iterdir())
    return {path.name: json.loads(path.read_text())["results"] for path in files}


def assert_same_answers(actual, expected, choices):
    """Answers, by file, are equal but for as many as there were unclear choices.

    Returns whether all are equal, so that scores must be too.
    """
    assert actual.keys() == expected.keys() and choices.made
    pairs = [pair for name in expected for pair in zip(actual[name], expected[name], strict=True)]
    different = [pair for pair in pairs if pair[0] != pair[1]]
    assert len(different) <= choices.unclear, different
    return not different

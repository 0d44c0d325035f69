"""What a call costs on the host: microseconds of Python and dispatch, with nothing launched.

    OMP_NUM_THREADS=1 taskset -c 0 python benchmarks/speed/host_time.py

Needs no GPU. Triton binds, specialises and compiles for an H100; a recorder stands in for the
driver, so what is timed ends where the driver would begin. "plain" is `plain.py` on tensors so
small that what remains is the dispatch of its operations; their launches are not in it either.
Times are CPU time of the process: medians of repeats, each of which runs all calls in random order.
Only ratios within a run mean something: the machine and its other users are in every number.
"""

import argparse
import contextlib
import functools
import inspect
import random
import time
from statistics import median
from typing import NamedTuple
from unittest import mock

# First of all: it puts this checkout on the path.
import measure
import torch
from plain import plain_update
from recording_driver import RecordingDriver, recorded

from moram_kernels import SelfActivation, fused_ops, retrieve
from moram_kernels.calls import Course
from moram_kernels.triton_backend import backward, forward
from moram_kernels.triton_backend.launcher import Steps

ATOMS, CURRENT, TOP_K = 48, 8, 8
# Tokens and features of a call of ours, of decode, and of plain's. So small that the allocator does
# not ask the system for memory every time, as that of a GPU does not either.
SIZES = {"ours": (70, 64), "decode": (3, 512), "plain": (2, 16)}
INFERENCE = ("resident", "decode", "split-dense", "split-gather")
TRAINING = ("resident", "split-gather")
INNER = 20
RULE = SelfActivation(TOP_K, measure.TEMPERATURE, measure.THRESHOLD)


class Timed(NamedTuple):
    """A call that is timed: what it is measured against, and the path that is forced on it."""

    call: functools.partial
    plain: str | None = None
    path: str | None = None


def data_of(name):
    """Tensors of a call of one of the `SIZES`, bfloat16 but for plain's."""
    tokens, width = SIZES[name]
    dtype = torch.float32 if name == "plain" else torch.bfloat16
    case = measure.Case("training", width, tokens, ATOMS, TOP_K, CURRENT, dtype)
    return measure.make_data(case)


def ours(data, training):
    """The forward of the fused kernels."""
    return retrieve(
        data.x,
        data.keys,
        data.values,
        RULE,
        current_keys=data.current_keys,
        current_values=data.current_values,
        residual=data.residual,
        training=training,
        backend="triton",
    )


def plain(data, training):
    """The forward of `plain.plain_update`."""
    bank = (data.keys, data.values_t, data.current_keys, data.current_values_t)
    settings = {"temperature": measure.TEMPERATURE, "threshold": measure.THRESHOLD}
    return plain_update(data.x, *bank, data.residual, **settings, top_k=TOP_K, training=training)


def infer(forward_of, data):
    """A call at inference."""
    with torch.no_grad():
        forward_of(data, False)


def train(forward_of, data):
    """Forward and backward, with the gradients of everything that can have one."""
    output = forward_of(data, True)
    values = data.current_values_t if forward_of is plain else data.current_values
    leaves = (data.x, data.residual, data.current_keys, values)
    torch.autograd.grad(output, leaves, data.dy)


def calls():
    """{name: `Timed`} of all calls."""
    data = {name: data_of(name) for name in SIZES}
    kinds = {
        "inference": (infer, INFERENCE),
        "training forward": (lambda forward_of, data: forward_of(data, True), TRAINING),
        "forward and backward": (train, TRAINING),
    }
    found = {}
    for kind, (run, paths) in kinds.items():
        name = f"{kind}, plain"
        found[name] = Timed(functools.partial(run, plain, data["plain"]))
        for path in paths:
            size = data["decode" if path == "decode" else "ours"]
            found[f"{kind}, {path}"] = Timed(functools.partial(run, ours, size), name, path)
    return found


def launches(timed):
    """{launcher's name: `Timed`} of the launchers that calls go through, each on what it got."""
    found = {}

    def noting(name, launcher):
        def note(*args, **how):
            bound = inspect.signature(launcher).bind(*args, **how)
            found[f"one {name}"] = Timed(functools.partial(again, launcher, bound, Course(None)))
            return launcher(*args, **how)

        return note

    with contextlib.ExitStack() as stack:
        for module in (forward, backward):
            for name, launcher in vars(module).copy().items():
                if name.startswith("launch_"):
                    patch = mock.patch.object(module, name, noting(name, launcher))
                    stack.enter_context(patch)
        for one in timed.values():
            if one.path:
                with forced(one.path):
                    one.call()
    return found


def again(launcher, bound, course):
    """A launcher's launches as those of a call of their own."""
    steps = Steps(course)
    launcher(**{**bound.arguments, "steps": steps})
    steps.end()


@contextlib.contextmanager
def forced(path):
    """Within the block every call takes this path, or the one it likes if that is None."""
    plan = fused_ops.plan
    taken = (lambda *a, **k: plan(*a, **(k | {"path": path}))) if path else plan
    with mock.patch.object(fused_ops, "plan", taken):
        yield


def measure_calls(timed, repeats):
    """{name: microseconds a call, one a repeat}; the i-th numbers of all belong together."""
    samples = {name: [] for name in timed}
    names, shuffled = list(timed), random.Random(0)
    for repeat in range(repeats + 1):
        shuffled.shuffle(names)
        for name in names:
            with forced(timed[name].path):
                # The path is another function every time, and what was known of it is gone.
                for _ in range(2):
                    timed[name].call()
                start = time.process_time()
                for _ in range(INNER):
                    timed[name].call()
                took = time.process_time() - start
            if repeat:
                samples[name].append(took * 1e6 / INNER)
    return samples


def report(timed, samples):
    """Lines of a Markdown table."""
    yield "| call | us | to plain |"
    yield "|---|---|---|"
    for name, times in samples.items():
        ratio = ""
        if timed[name].plain:
            pairs = zip(times, samples[timed[name].plain], strict=True)
            ratio = f"{median(mine / theirs for mine, theirs in pairs):.2f}"
        yield f"| {name} | {median(times):.1f} | {ratio} |"


def main(argv=None):
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=50, help="default: %(default)s")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    with recorded(RecordingDriver(keep=False)):
        timed = calls()
        timed |= launches(timed)
        samples = measure_calls(timed, args.repeats)
        print("\n".join(report(timed, samples)))


if __name__ == "__main__":
    main()

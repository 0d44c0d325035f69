"""What `gpu.py` does in which order: checks and timings, the most telling first.

A run may be stopped at any time, so the verdict on the shipped paths comes first, then a first
table, then everything else by its worth. What no process can compile ahead, plain torch under
`torch.compile`, comes last.
"""

from typing import NamedTuple

import gpu_cases
import gpu_parity

# A training step of CLIP, a prefill and a token of LLaMA: what a first look should show.
FIRST_CASES = (
    gpu_cases.Case("training", 768, 12608, 160),
    gpu_cases.Case("prefill", 4096, 4096, 64),
    gpu_cases.Case("decode", 4096, 1, 64),
)
COMPILED = "plain-compiled"
FIRST_CONTENDERS = ("triton", "plain", COMPILED)
FIRST_DTYPES = ("bfloat16", "float32")


class Timing(NamedTuple):
    """A case, and which contenders are timed on it."""

    case: gpu_cases.Case
    contenders: tuple


class Agenda(NamedTuple):
    """`Check`s and `Timing`s, in the order in which a run takes them."""

    first_checks: list
    first_timings: list
    checks: list
    timings: list

    def items(self):
        """What needs kernels of ours, first needed first: `Check`s and (Case, contender)s."""
        return [
            *self.first_checks,
            *_ours(self.first_timings),
            *self.checks,
            *_ours(self.timings),
        ]


def _ours(timings):
    return [
        (timing.case, contender)
        for timing in timings
        for contender in timing.contenders
        if contender.startswith("triton")
    ]


def make_agenda(kind, device_name, quick=False, timed=True):
    """The agenda of a run.

    Args:
        kind: as for `gpu_parity.list_checks`.
        device_name: name of the GPU, or None where only plain and the torch backend run.
        timed: whether anything is timed.
    """
    checks = gpu_parity.list_checks(kind)
    first = [check for check in checks if _is_first(check)]
    rest = [check for check in checks if not _is_first(check)]
    if not timed:
        return Agenda(first, [], rest, [])
    # In a short run inductor would take most of the time.
    names = [name for name in FIRST_CONTENDERS if not (quick and name == COMPILED)]
    names = tuple(name for name in names if device_name or name != "triton")
    first_timings = [Timing(case, names) for case in FIRST_CASES]
    done = {timing.case: timing.contenders for timing in first_timings}
    timings, last = [], []
    for case in gpu_cases.list_cases(quick):
        names = gpu_cases.contenders_of(case, device_name, quick)
        names = [name for name in names if name not in done.get(case, ())]
        timings.append(Timing(case, tuple(name for name in names if name != COMPILED)))
        if COMPILED in names:
            last.append(Timing(case, (COMPILED,)))
    return Agenda(first, first_timings, rest, timings + last)


def _is_first(check):
    shape = (check.path, check.tokens, check.width, check.atoms)
    return check.dtype in FIRST_DTYPES and shape in gpu_parity.SHAPES

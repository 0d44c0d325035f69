"""How long plain torch, its compiled form and an ideal machine should take. Modelled, not measured.

Plain is not described here but recorded: `plain.py` runs on tensors without data, and every op that
torch dispatches, in the forward and in autograd's backward, is charged the bytes of its arguments
and results, a product also its FLOPs, and topk what was published for it. The rates and the model
of a product are those of `moram_kernels.triton_backend.rates`, the same for all contenders.
"""

import functools
from typing import NamedTuple

import torch
from plain import plain_update
from torch.utils._python_dispatch import TorchDispatchMode

from moram_kernels.triton_backend.rates import SHORTEST, flops, product, stream

# Seconds of Python and dispatch for one eager op of torch and one kernel of a compiled graph.
OP, COMPILED_KERNEL = 5e-6, 2e-6
# What `retrieve` does in Python around its launches, more of it while training, and around those of
# a backward; then a known launch of ours. On one core of an AMD EPYC host_time.py measured 0.32 of
# plain at inference with one launch, 0.46 while training, 0.67 with the backward, and 0.05 for a
# launch. These are those shares of plain's host time as it is modelled here.
CALL, TRAINING_CALL, BACKWARD_CALL, TRITON = 22e-6, 28e-6, 82e-6, 4e-6
# torch.topk with softmax on an H100, bfloat16, 16384 rows: 137, 251 and 458 us for rows of 128, 256
# and 512 (FreeToken PR #319): so much a row, and a score. Wider rows are an extrapolation.
TOPK_ROW, TOPK_SCORE, TOPK_SHORTEST = 1.4e-9, 0.05e-9, 8e-6
# What topk would take were it bound by its passes over memory alone; a second, lower estimate.
TOPK_PASSES = 6
VIEWS = ("t", "detach", "expand", "slice", "view", "transpose", "alias", "_unsafe_view")


class Op(NamedTuple):
    """One op of torch: its name, modelled seconds, and seconds were topk bound by memory."""

    name: str
    seconds: float
    streamed: float


class Cost(NamedTuple):
    """Seconds on the device, seconds of the Python that launches it, ops or kernels."""

    device: float
    host: float
    count: int

    @property
    def seconds(self):
        """What a caller waits who does not use CUDA graphs."""
        return max(self.device, self.host)


class _Recorder(TorchDispatchMode):
    def __init__(self, model=None, rate="half"):
        super().__init__()
        self.model, self.rate, self.ops = model, rate, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.__name__.split(".")[0]
        if name not in VIEWS:
            self.ops.append(name if self.model is None else self._cost(name, args, result))
        return result

    def _cost(self, name, args, result):
        tensors = [t for t in torch.utils._pytree.tree_leaves((args, result)) if torch.is_tensor(t)]
        size = sum(_bytes(t) for t in tensors)
        if name == "mm":
            left, right = tensors[:2]
            rows, columns = tensors[2].shape
            seconds = product(
                self.model, rows, columns, left.shape[1], right.itemsize, self.rate, library=True
            )
            return Op(name, seconds, seconds)
        if name == "topk":
            rows, columns = args[0].shape
            slower = self.model.units * self.model.clock / (132 * 1.7e9)
            seconds = max(TOPK_SHORTEST, rows * (TOPK_ROW + TOPK_SCORE * columns) / slower)
            return Op(name, seconds, max(TOPK_SHORTEST, stream(self.model, TOPK_PASSES * size)))
        if name == "scatter":
            # Copies its first argument, then writes the selected places.
            seconds = stream(self.model, 2 * _bytes(args[0]), True) + SHORTEST
            return Op(name, seconds, seconds)
        seconds = stream(self.model, size, True)
        return Op(name, seconds, seconds)


def _bytes(tensor):
    """Bytes of the distinct elements of a tensor, which may be expanded."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else 1
    return count * tensor.itemsize


def record_plain(shape, model=None, device="meta"):
    """(forward, backward) ops of plain.py for a `cost.Shape`: `Op`s, or names without a model.

    backward is empty at inference. device: "cpu" runs them, for a small shape.
    """
    dtype = torch.bfloat16 if shape.itemsize == 2 else torch.float32
    empty = functools.partial(torch.zeros, dtype=dtype, device=device)
    frozen = shape.atoms - shape.current
    bank = [(frozen, shape.width), (shape.out, frozen)]
    current = [(shape.current, shape.width), (shape.out, shape.current)]
    x, residual = empty(shape.tokens, shape.width), empty(shape.tokens, shape.out)
    leaves = [x, residual, *(empty(size) for size in current)]
    for leaf in leaves:
        leaf.requires_grad_(shape.training)
    recorder, back = _Recorder(model, shape.rate), _Recorder(model, shape.rate)
    with torch.set_grad_enabled(shape.training), recorder:
        output = plain_update(
            x,
            *(empty(size) for size in bank),
            *leaves[2:],
            residual,
            top_k=shape.top_k,
            temperature=0.03,
            threshold=0.2,
            training=shape.training,
        )
    # The zeros above were allocated while recording.
    made = [op for op in recorder.ops if (op if model is None else op.name) != "zeros"]
    if shape.training:
        gradient = torch.zeros_like(output)
        with back:
            torch.autograd.grad(output, leaves, gradient)
    return made, back.ops


def plain_cost(ops, streamed=False):
    """`Cost` of eager ops."""
    return Cost(sum(op.streamed if streamed else op.seconds for op in ops), OP * len(ops), len(ops))


def compiled_cost(shape, model, ops, backward=False):
    """`Cost` of the same ops as inductor runs them: products, topk and cat alone, the rest fused.

    Each fused kernel reads and writes the scores' matrix as often as its neighbours force it to.
    """
    # By kernel, how many matrices [M, N] it moves.
    fused = (5, 2, 5) if backward else (2, 1, 4)
    kept = [op.seconds for op in ops if op.name in ("mm", "topk", "cat", "gather")]
    matrix = shape.tokens * shape.atoms * shape.itemsize
    kernels = [*kept, *(stream(model, count * matrix, True) for count in fused)]
    # The scatter of the selected, and the sum with the residual or of the gradients.
    kernels.append(stream(model, shape.tokens * min(shape.top_k, shape.atoms) * 12, True))
    if not backward:
        kernels.append(stream(model, 3 * shape.tokens * shape.out * shape.itemsize))
    return Cost(sum(kernels), COMPILED_KERNEL * len(kernels), len(kernels))


def bound(shape, model):
    """Seconds below which no forward can be, at the device's peak rates.

    x and the residual read and the output written once, every key and every selected value once,
    the smaller of what a backward can be given; products of all keys and of selected values.
    """
    size, count = shape.itemsize, min(shape.top_k, shape.atoms)
    moved = shape.tokens * (shape.width + (1 + shape.residual) * shape.out) * size
    moved += shape.atoms * shape.width * size
    moved += min(shape.atoms, shape.tokens * count) * shape.out * size
    if shape.training:
        moved += shape.tokens * _kept(shape)
    work = 2 * shape.tokens * (shape.atoms * shape.width + count * shape.out)
    return max(moved / model.memory, work / flops(model, shape.rate))


def backward_bound(shape, model):
    """Seconds below which no backward can be: dx, dkeys and dvalues of the current atoms."""
    size, count = shape.itemsize, min(shape.top_k, shape.atoms)
    width = shape.width + shape.out
    moved = shape.tokens * ((2 * shape.width + shape.out) * size + _kept(shape))
    moved += (shape.atoms + shape.current) * width * size
    # The norm gives every atom a gradient: a sum of keys, or of rows of keys^T keys.
    work = count * shape.out + min(shape.atoms, shape.width) * shape.width
    work += shape.current * shape.width + min(shape.current, count) * shape.out
    return max(moved / model.memory, 2 * shape.tokens * work / flops(model, shape.rate))


def _kept(shape):
    """Bytes a token kept for a backward: all scores, or lists and the current atoms' scores."""
    count = min(shape.top_k, shape.atoms)
    return min(4 * shape.atoms + 16, 8 * count + 4 * shape.current + 4)


def added(shape, model):
    """Seconds that the base's product takes longer for adding to an output that is there."""
    sizes = (shape.tokens, shape.out, shape.width, shape.itemsize, shape.rate)
    plane = shape.tokens * shape.out * shape.itemsize
    alone = product(model, *sizes, library=True)
    return product(model, *sizes, library=True, extra=plane) - alone


def our_host(shape, path):
    """Seconds of Python of one `retrieve` on a path."""
    library = shape.joined and shape.met == 2
    launches = {
        "resident": TRITON,
        "decode": 2 * TRITON,
        "split-dense": TRITON + 2 * (OP if library else TRITON),
        "split-gather": 2 * TRITON + (OP if library else TRITON),
    }
    return (TRAINING_CALL if shape.training else CALL) + launches[path]


def our_backward_host():
    """Seconds of Python of one backward: five launches."""
    return BACKWARD_CALL + 5 * TRITON

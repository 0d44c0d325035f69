"""One benchmark case: its inputs, the backends bound to them, the parity check and the clock.

Command line, CSV and plot live in `throughput.py`. The checkout that holds this file is what is
measured, installed or not, because the CSV names that checkout's commit.

Inputs. A token is a mixture of top_k atoms with falling shares plus noise, so that some atoms fire
at inference as they do in a trained bank; of random tokens none would pass the threshold in a large
one. Frozen and current values are both non-zero: a task half trained.

Parity. Before it is timed, every backend's own full-size call is compared on the first 64 tokens
with the float64 reference on the same (already rounded) inputs: the output and, in training, every
gradient, whose dy is zero outside the compared tokens. Tokens are compared only where no rounding
can change which atoms are selected or fire, and the tokens with the clearest gaps are put first.
See `ROUNDINGS` and `GAPS` for the bounds.

Allocation is part of a call. glibc may return large outputs to the system, so page faults count.
"""

import functools
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from plain import plain_update  # noqa: E402

from moram_kernels import SelfActivation, retrieve  # noqa: E402
from moram_kernels.reference import retrieve_reference  # noqa: E402

TEMPERATURE = 0.03
THRESHOLD = 0.2
# A normalised score off by one rounding step eps changes a weight by eps / temperature of itself.
# Allowed: so many such steps, relative to the largest element of the tensor; for the gradients of
# the current atoms, of all atoms, as one token may select no current one. float32 also rounds in
# the sums over D, half precision accumulates those in float32.
ROUNDINGS = {torch.float32: 16, torch.bfloat16: 1, torch.float16: 1}
# A token is compared if its selection gap and its distance from the threshold are more than so
# many rounding steps of the score at the border.
GAPS = {torch.float32: 64, torch.bfloat16: 4, torch.float16: 4}
COMPARED_TOKENS = 64
CANDIDATES = 256
# Each atom of a token's mixture has this share of the one before it.
DECAY = 0.75
# A sample of the clock lasts at least this long, by repeating short calls within it.
SAMPLE_SECONDS = 2e-3
WARM_UP_SECONDS = 0.05
# Below this the percentiles say nothing; the time budget of a case does not go under it.
MIN_REPEATS = 5


class DisagreementError(RuntimeError):
    """A backend is not within the bound of the float64 reference; its times would mean nothing."""


@dataclass(frozen=True, slots=True)
class Case:
    """What one case measures; `atoms` counts frozen and current atoms together."""

    mode: str
    width: int
    tokens: int
    atoms: int
    top_k: int = 8
    atoms_per_task: int = 8
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    seed: int = 0

    @property
    def current_atoms(self):
        """Trainable atoms of the case."""
        return min(self.atoms_per_task, self.atoms)

    @property
    def training(self):
        """Whether forward and backward are timed."""
        return self.mode == "training"


class Data(NamedTuple):
    """Tensors of a case; the `_t` ones are the values in the layout of the plain adapter."""

    x: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    current_keys: torch.Tensor
    current_values: torch.Tensor
    values_t: torch.Tensor
    current_values_t: torch.Tensor
    residual: torch.Tensor
    weight: torch.Tensor
    dy: torch.Tensor
    gaps: torch.Tensor


class Result(NamedTuple):
    """What a backend did in a case: ms a call, one per paired repeat, and bytes saved a call."""

    samples_ms: list
    saved_bytes: int


def measure_case(case, backends, repeats, seconds):
    """Check and time the backends, and the base Linear, on one case.

    Args:
        case: `Case`.
        backends: names: "plain", "plain-compiled" or a backend of `moram_kernels.retrieve`.
        repeats: most paired repeats.
        seconds: no repeat starts after so long, once MIN_REPEATS are done.
    Returns:
        dict of `Result`, "base" first; the i-th samples of all belong together.
    Raises:
        DisagreementError: a backend disagrees with the float64 reference.
    """
    data = make_data(case)
    with torch.set_grad_enabled(case.training):
        calls = make_calls(case, data, backends)
        check_calls(case, data, calls)
        saved = {name: count_saved_bytes(call) for name, call in calls.items()}
        samples = time_calls(calls, repeats, seconds, case)
    return {name: Result(samples[name], saved[name]) for name in calls}


def make_data(case):
    """Draw the inputs of a case from its seed; see the module docstring for what is chosen."""
    generator = torch.Generator().manual_seed(case.seed)
    normal = functools.partial(torch.randn, generator=generator)
    width, num_frozen = case.width, case.atoms - case.current_atoms
    keys = normal(case.atoms, width) / width**0.5
    rows = max(case.tokens, CANDIDATES)
    x = normal(rows, width) * (0.5 / width**0.5)
    # Distinct atoms: consecutive rows of one shuffled bank, from a random start.
    order = torch.randperm(case.atoms, generator=generator)
    start = torch.randint(case.atoms, (rows,), generator=generator)
    for i in range(min(case.top_k, case.atoms)):
        x += DECAY**i * keys[order[(start + i) % case.atoms]]
    x, keys = x.to(case.dtype), keys.to(case.dtype)
    gaps = _relative_gaps(x[:CANDIDATES], keys, case)
    gaps, clearest = gaps.sort(descending=True)
    x = torch.cat([x[clearest], x[CANDIDATES:]])[: case.tokens]
    values = normal(case.atoms, width).to(case.dtype)

    def to_device(tensor, requires_grad=False):
        tensor = tensor.to(case.device, case.dtype).contiguous()
        return tensor.clone().requires_grad_(requires_grad)

    return Data(
        x=to_device(x, True),
        keys=to_device(keys[:num_frozen]),
        values=to_device(values[:num_frozen]),
        current_keys=to_device(keys[num_frozen:], True),
        current_values=to_device(values[num_frozen:], True),
        values_t=to_device(values[:num_frozen].T),
        current_values_t=to_device(values[num_frozen:].T, True),
        residual=to_device(normal(case.tokens, width), True),
        weight=to_device(normal(width, width) / width**0.5),
        dy=to_device(normal(case.tokens, width)),
        gaps=gaps[: min(COMPARED_TOKENS, case.tokens)].to(case.device),
    )


def _relative_gaps(x, keys, case):
    """How far each token is from selecting or firing other atoms, relative to the score there."""
    scores = x.double() @ keys.double().T
    ordered = F.normalize(scores, dim=-1).sort(dim=-1, descending=True).values
    gaps = torch.full(x.shape[:1], float("inf"), dtype=torch.float64)
    if case.atoms > case.top_k:
        last, next_ = ordered[:, case.top_k - 1], ordered[:, case.top_k]
        gaps = (last - next_) / last.abs().clamp_min(1e-9)
    if not case.training:
        gaps = gaps.minimum((ordered / THRESHOLD - 1).abs().amin(dim=-1))
    return gaps


def make_calls(case, data, backends):
    """Bind each backend, and "base", to the data: a function of dy that does one timed call.

    It returns (output,) or, in training, (output, dx, dresidual, dcurrent_keys, dcurrent_values),
    the last one as [O, C] for the plain adapter; (output, dx) for the base, whose weight is frozen.
    """
    if "plain-compiled" in backends:
        # Dynamo counts recompilations over the life of a function and then falls back silently.
        torch._dynamo.reset()
    leaves = (data.x, data.residual, data.current_keys, data.current_values)
    leaves_t = (*leaves[:3], data.current_values_t)
    base = functools.partial(F.linear, data.x, data.weight)
    calls = {"base": _bind(base, (data.x,), case.training)}
    settings = {"temperature": TEMPERATURE, "threshold": THRESHOLD, "top_k": case.top_k}
    for name in backends:
        if name.startswith("plain"):
            update = plain_update
            if name == "plain-compiled":
                update = torch.compile(plain_update, dynamic=False, fullgraph=True)
            bank = (data.keys, data.values_t, data.current_keys, data.current_values_t)
            forward = functools.partial(
                update, data.x, *bank, data.residual, **settings, training=case.training
            )
            calls[name] = _bind(forward, leaves_t, case.training)
        else:
            forward = functools.partial(
                retrieve,
                data.x,
                data.keys,
                data.values,
                SelfActivation(**settings),
                current_keys=data.current_keys,
                current_values=data.current_values,
                residual=data.residual,
                training=case.training,
                backend=name,
            )
            calls[name] = _bind(forward, leaves, case.training)
    return {name: functools.partial(call, data.dy) for name, call in calls.items()}


def _bind(forward, leaves, training):
    """One call as a function of dy."""

    def infer(dy):
        return (forward(),)

    def train(dy):
        output = forward()
        return (output, *torch.autograd.grad(output, leaves, dy))

    return train if training else infer


def check_calls(case, data, calls):
    """Compare every call but the base's with the float64 reference; see the module docstring.

    Raises:
        DisagreementError: a backend is out of bounds; the message names it, tensor and error.
        RuntimeError: no token of the case can be compared.
    """
    eps = torch.finfo(case.dtype).eps
    clear = data.gaps > GAPS[case.dtype] * eps
    if not clear.any():
        raise RuntimeError(f"no token of {case} has a clear selection; try another --seed")
    rows = clear.nonzero().squeeze(-1)
    dy = torch.zeros_like(data.dy)
    dy[rows] = data.dy[rows]
    expected = _reference(case, data, dy, rows)
    bound = ROUNDINGS[case.dtype] * eps / TEMPERATURE
    for name, call in calls.items():
        if name == "base":
            continue
        # The call is a partial over the timed dy; here it runs with the masked one.
        output, *grads = call.func(dy)
        actual = {"output": output[rows]}
        if case.training:
            dx, dresidual, dkeys, dvalues = grads
            actual |= {"dx": dx[rows], "dresidual": dresidual[rows], "dcurrent_keys": dkeys}
            actual["dcurrent_values"] = dvalues.T if name.startswith("plain") else dvalues
        for label, high in expected.items():
            # Of a gradient for all atoms, the current ones are last.
            error = actual[label].double() - high[-len(actual[label]) :]
            error = error.abs().max() / high.abs().max()
            # Not `error > bound`, which is false for nan.
            if not error <= bound:
                raise DisagreementError(
                    f'backend "{name}" disagrees with the float64 reference: {label} is off by '
                    f"{error:.2e} of its largest element, allowed {bound:.2e}, in {case}"
                )


def _reference(case, data, dy, rows):
    """Output and, in training, gradients of the compared tokens and of all atoms, in float64."""
    leaves = (
        data.x[rows],
        data.residual[rows],
        torch.cat([data.keys, data.current_keys]),
        torch.cat([data.values, data.current_values]),
    )
    leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
    x, residual, keys, values = leaves
    activation = SelfActivation(case.top_k, TEMPERATURE, THRESHOLD)
    output = retrieve_reference(x, keys, values, activation, residual, case.training)
    if not case.training:
        return {"output": output}
    grads = torch.autograd.grad(output, leaves, dy[rows].double())
    names = ("output", "dx", "dresidual", "dcurrent_keys", "dcurrent_values")
    return dict(zip(names, (output, *grads), strict=True))


def count_saved_bytes(call):
    """Bytes of the distinct storages that autograd keeps for the backward of one call."""
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        # The storage itself is kept, so that its address cannot be used again during the call.
        storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return sum(storage.nbytes() for storage in storages.values())


def time_calls(calls, repeats, seconds, case):
    """Milliseconds a call, as lists of equal length; each repeat runs all calls in random order."""
    inner = {name: _warm_up(call, case.device) for name, call in calls.items()}
    samples = {name: [] for name in calls}
    shuffled = random.Random(case.seed)
    names = list(calls)
    start = time.perf_counter()
    for repeat in range(repeats):
        if repeat >= MIN_REPEATS and time.perf_counter() - start > seconds:
            break
        shuffled.shuffle(names)
        for name in names:
            samples[name].append(_clock_ms(calls[name], inner[name], case.device))
    return samples


def _warm_up(call, device):
    """Run the call for a while; how often it fits into one sample of the clock."""
    start = time.perf_counter()
    best = _clock_ms(call, 1, device)
    while time.perf_counter() - start < WARM_UP_SECONDS:
        best = min(best, _clock_ms(call, 1, device))
    return max(1, round(SAMPLE_SECONDS * 1e3 / best))


def _clock_ms(call, inner, device):
    """Mean time of `inner` calls; on CUDA by events, so queued work counts and launches overlap."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(inner):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / inner
    begin = time.perf_counter()
    for _ in range(inner):
        call()
    return (time.perf_counter() - begin) * 1e3 / inner

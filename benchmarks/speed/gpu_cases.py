"""What `gpu.py` times: the list of cases, their inputs, and the calls of every contender.

Contenders: "plain" (`plain.py`), "plain-compiled", "torch" and "triton" (through `retrieve`, as
users call it) and "triton/PATH" (the kernels of one path, called directly, for the crossovers).
Nothing here reads a clock or needs a GPU.
"""

import functools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from plain import plain_update  # noqa: E402

from moram_kernels import SelfActivation, retrieve  # noqa: E402
from moram_kernels.triton_backend import available, plan  # noqa: E402

TEMPERATURE, THRESHOLD, TOP_K, CURRENT = 0.03, 0.2, 8, 8
# Each atom of a token's mixture has this share of the one before it; see `measure.py`.
DECAY = 0.75
ATOMS = (8, 64, 160, 512, 2048, 8192, 16384, 65536)
QUICK_ATOMS = (64, 160, 8192)
# CLIP ViT-B/16 (a batch of 64 images) and LLaMA-7B.
LAYERS = ((768, 12608), (4096, 4096))
DECODE_TOKENS = (1, 32)
# Compiling plain takes many seconds a shape, so only some are.
COMPILED_ATOMS = (160, 8192)
# Matrices [M, N] that plain and its backward keep at a time.
PLAIN_MATRICES, PLAIN_TRAINING_MATRICES = 6, 16


@dataclass(frozen=True)
class Case:
    """One shape to time; mode: "prefill", "training" or "decode". D = O, atoms of both kinds."""

    mode: str
    width: int
    tokens: int
    atoms: int
    dtype: str = "bfloat16"
    top_k: int = TOP_K

    @property
    def training(self):
        """Whether forward and backward are timed."""
        return self.mode == "training"

    @property
    def current(self):
        """Trainable atoms of the case; none at inference, where the bank is one piece."""
        return min(CURRENT, self.atoms) if self.training else 0

    @property
    def torch_dtype(self):
        """The dtype of every tensor."""
        return getattr(torch, self.dtype)

    def plan(self, device_name, path=None):
        """The plan of the case on a device, or on one path."""
        return plan.plan(
            self.tokens, self.width, self.width, self.atoms, self.top_k, self.dtype,
            self.training, device_name, current=self.current,
            joined=self.current in (0, self.atoms), path=path,
        )  # fmt: skip


class Data(NamedTuple):
    """Tensors of a case, all on its device; `_t` ones in the layout of the plain adapter."""

    x: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    current_keys: torch.Tensor
    current_values: torch.Tensor
    residual: torch.Tensor
    grad: torch.Tensor


def list_cases(quick=False):
    """Cases in the order of their worth, because a time budget may cut the list short."""
    chosen = QUICK_ATOMS if quick else ATOMS
    order = sorted(chosen, key=lambda atoms: (atoms not in (64, 160, 8192), atoms))
    cases = []
    for atoms in order:
        for width, tokens in LAYERS:
            cases.append(Case("prefill", width, tokens, atoms))
            cases.append(Case("training", width, tokens, atoms))
            # The keys of a wide layer's token are what decoding reads; CLIP does not decode.
            if width == 4096:
                cases += [Case("decode", width, count, atoms) for count in DECODE_TOKENS]
    return cases


def paths_of(case, device_name):
    """Paths that cover a case, the plan's own choice first."""
    chosen = case.plan(device_name)
    if chosen.path == "torch":
        return []
    return [chosen.path, *(path for path in chosen.seconds if path != chosen.path)]


def contenders_of(case, device_name, quick=False):
    """Names of what is timed on a case; the Triton ones only where there is a GPU's name."""
    names = ["plain", "torch"]
    if case.atoms in COMPILED_ATOMS and not (quick and case.mode == "training"):
        names.append("plain-compiled")
    if device_name:
        names += ["triton", *(f"triton/{path}" for path in paths_of(case, device_name))]
    return names


def plain_bytes(case):
    """Bytes that plain needs at a time, roughly: its matrices, the indices and a copied bank."""
    itemsize = case.torch_dtype.itemsize
    matrices = PLAIN_TRAINING_MATRICES if case.training else PLAIN_MATRICES
    scores = case.tokens * case.atoms * itemsize * matrices
    bank = 2 * case.atoms * case.width * itemsize * (2 if case.training else 1)
    return scores + bank + case.tokens * case.width * itemsize * 6


def blank_data(case, dtype=None, bank_dtype=None):
    """`Data` that nobody draws, in memory that nobody touches; sizes and alignment are real.

    Args:
        dtype, bank_dtype: of the tokens and of the bank; the case's, if None.
    """
    dtype = dtype or case.torch_dtype
    bank_dtype, frozen = bank_dtype or dtype, case.atoms - case.current
    tokens, *bank, residual, grad = (
        torch.empty(count, case.width, dtype=kind)
        for count, kind in (
            (case.tokens, dtype),
            *((count, bank_dtype) for count in (frozen, frozen, case.current, case.current)),
            *((case.tokens, dtype),) * 2,
        )
    )
    return _with_leaves(case, Data(tokens, *bank, residual, grad))


def make_data(case, device, seed=0):
    """Draw the inputs on the device: a token mixes top_k atoms with falling shares, and noise."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape, scale=1.0):
        drawn = torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
        return (drawn * scale).to(case.torch_dtype)

    keys = normal(case.atoms, case.width, scale=case.width**-0.5)
    x = normal(case.tokens, case.width, scale=0.5 * case.width**-0.5)
    start = torch.randint(case.atoms, (case.tokens,), generator=generator, device=device)
    for i in range(min(case.top_k, case.atoms)):
        # A stride without small factors, so that neighbours in a mixture lie apart.
        x += (DECAY**i * keys[(start + 7919 * i) % case.atoms]).to(x.dtype)
    values = normal(case.atoms, case.width)
    frozen = case.atoms - case.current
    data = Data(
        x,
        keys[:frozen].clone(),
        values[:frozen].clone(),
        keys[frozen:].clone(),
        values[frozen:].clone(),
        normal(case.tokens, case.width),
        normal(case.tokens, case.width),
    )
    return _with_leaves(case, data)


def _with_leaves(case, data):
    for name in ("x", "current_keys", "current_values", "residual"):
        getattr(data, name).requires_grad_(case.training)
    return data


def make_call(case, data, name, device_name=None):
    """The function without arguments that does one call of a contender."""
    settings = {"top_k": case.top_k, "temperature": TEMPERATURE, "threshold": THRESHOLD}
    if name.startswith("triton/"):
        path = name.partition("/")[2]
        return functools.partial(run_path, case, data, path, device_name, tuple(settings.values()))
    if name.startswith("plain"):
        values_t = data.values.T.contiguous()
        current_t = data.current_values.detach().T.contiguous().requires_grad_(case.training)
        update = plain_update
        if name == "plain-compiled":
            # Dynamo counts recompilations of a function and falls back silently after some.
            torch._dynamo.reset()
            update = torch.compile(plain_update, dynamic=False, fullgraph=True)
        leaves = (data.x, data.residual, data.current_keys, current_t)
        forward = functools.partial(
            update, data.x, data.keys, values_t, data.current_keys, current_t, data.residual,
            **settings, training=case.training,
        )  # fmt: skip
    else:
        leaves = (data.x, data.residual, data.current_keys, data.current_values)
        current = {}
        if case.current:
            current = {"current_keys": leaves[2], "current_values": leaves[3]}
        forward = functools.partial(
            retrieve, data.x, data.keys, data.values, SelfActivation(**settings),
            residual=data.residual, training=case.training, backend=name, **current,
        )  # fmt: skip
    if not case.training:
        return torch.no_grad()(forward)

    def step():
        output = forward()
        return output, *torch.autograd.grad(output, leaves, data.grad)

    return step


@torch.no_grad()
def run_path(case, data, path, device_name, settings, eps=1e-12):
    """(output,) or (output, dx, dkeys, dvalues) of the kernels of one path, without autograd."""
    # Imported here, because Triton may be missing where there is no GPU.
    from moram_kernels.triton_backend import backward, forward
    from moram_kernels.triton_backend.segments import Table

    chosen = case.plan(device_name, path)
    settings = (*settings, eps)
    keys = Table.of(data.keys, data.current_keys.detach())
    values = Table.of(data.values, data.current_values.detach())
    output, saved = torch.empty_like(data.residual), None
    if case.training:
        saved = forward.new_saved(
            data.x, case.tokens, case.atoms, case.current, case.top_k, chosen.backward
        )
    forward.forward(
        data.x, keys, values, data.residual, output, settings, case.training, saved, chosen
    )
    if not case.training:
        return (output,)
    grads = backward.backward(
        data.grad, data.x, keys, values, saved, settings, True, chosen, (True, True)
    )
    return output, *grads


def gpu_name(device):
    """The device as the plan knows it, or None where kernels cannot run."""
    device = torch.device(device)
    return None if available.why_not(device) else available.device_of(device)

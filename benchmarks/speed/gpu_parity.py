"""Whether every path of the kernels agrees with the float64 reference, on the device at hand.

Each path runs forward and, in training, backward, in every dtype, twice. Compared are the output
and all gradients: the error against the reference on the same (already rounded) inputs must be at
most twice that of the torch backend plus rounding (`over_budget`), for the largest element and for
the root mean square; the two runs must give the same bits. Tokens are drawn so that no rounding can
change which atoms are selected or fire: see `MARGIN`.
"""

from typing import NamedTuple

import gpu_cases
import torch

from moram_kernels import SelfActivation, retrieve
from moram_kernels.reference import retrieve_reference

# Normalised scores at the border of the selection, and from the threshold, are at least this far
# apart; scores are summed in float32 from the same inputs, which moves them by 1e-6 at most.
MARGIN = 1e-4
CANDIDATES = 12
NAMES = ("output", "dx", "dcurrent_keys", "dcurrent_values")
DTYPES = ("float32", "bfloat16", "float16", "mixed")


class Check(NamedTuple):
    """One path to check. mixed: a bank in float32 under x in bfloat16 (float16 on a CPU)."""

    path: str
    tokens: int
    width: int
    atoms: int
    dtype: str
    training: bool
    top_k: int = 8

    def __str__(self):
        mode = "training" if self.training else "inference"
        sizes = f"M{self.tokens}-N{self.atoms}-D{self.width}-k{self.top_k}"
        return f"{self.path} {mode} {sizes} {self.dtype}"


# Of each path, the shape that every dtype is checked at, then more for bfloat16: the last ones
# have a score tile in two parts (96), a wide one, rows of several warps, and rows in chunks.
SHAPES = (
    ("resident", 300, 768, 24),
    ("split-dense", 300, 768, 160),
    ("split-gather", 300, 768, 512),
    ("decode", 17, 2048, 512),
)
MORE_SHAPES = (
    ("resident", 300, 768, 64),
    ("resident", 257, 768, 96),
    ("resident", 300, 768, 128),
    ("split-dense", 131, 2048, 4096),
    ("split-gather", 131, 1024, 9000),
    ("decode", 1, 4096, 64),
    ("decode", 64, 768, 8192),
)
INTERPRETED_SHAPES = (
    ("resident", 17, 64, 24),
    ("split-dense", 9, 64, 40),
    ("split-gather", 9, 64, 40),
    ("decode", 3, 64, 40),
)


def list_checks(kind="all"):
    """Every path and mode, as `Check`s, at several shapes and dtypes.

    Compiling the kernels takes most of the time. kind: "all"; "default", where only bfloat16 sees
    all shapes; "quick", the first shapes in bfloat16; "interpreter", tiny ones.
    """
    shapes = dict.fromkeys(DTYPES, SHAPES)
    if kind == "interpreter":
        shapes = dict.fromkeys(("float32", "mixed"), INTERPRETED_SHAPES)
    elif kind == "quick":
        shapes = {"bfloat16": SHAPES}
    elif kind == "default":
        shapes["bfloat16"] = SHAPES + MORE_SHAPES
    else:
        shapes = dict.fromkeys(DTYPES, SHAPES + MORE_SHAPES)
    checks = []
    for dtype, listed in shapes.items():
        for path, tokens, width, atoms in listed:
            # A resident tile of float32 holds 64 atoms at most.
            if path == "resident" and atoms > 64 and dtype in ("float32", "mixed"):
                continue
            modes = (False,) if path == "decode" else (False, True)
            checks += [Check(path, tokens, width, atoms, dtype, mode) for mode in modes]
    return checks


def check_parity(check, device, seed=0):
    """Sentences about what is wrong with a path, none if it agrees.

    Args:
        device: "cuda", or "cpu" under Triton's interpreter.
    """
    case, data = draw(check, device, seed)
    name = gpu_cases.gpu_name(device)
    args = (case, data, check.path, name, settings_of(check))
    first, second = (gpu_cases.run_path(*args) for _ in range(2))
    low, high = _torch_backend(case, data), _reference(case, data)
    problems = []
    for label, actual, again, plain, exact in zip(NAMES, first, second, low, high, strict=False):
        if not torch.equal(actual, again):
            problems.append(f"{check}: {label} differs between two runs")
        problem = over_budget(actual, plain, exact)
        if problem:
            problems.append(f"{check}: {label} {problem}")
    return problems


def case_of(check):
    """The `gpu_cases.Case` of a check; where tokens and bank differ, products are in float32."""
    mode = "training" if check.training else "prefill"
    dtype = "float32" if check.dtype == "mixed" else check.dtype
    return gpu_cases.Case(mode, check.width, check.tokens, check.atoms, dtype, check.top_k)


def dtypes_of(check, low=torch.bfloat16):
    """(dtype of the tokens, of the bank) of a check; low: that of tokens beside a float32 bank."""
    if check.dtype == "mixed":
        return low, torch.float32
    return (getattr(torch, check.dtype),) * 2


def settings_of(check):
    """(top_k, temperature, threshold) of a check."""
    return check.top_k, gpu_cases.TEMPERATURE, gpu_cases.THRESHOLD


def over_budget(actual, plain, exact):
    """How an error exceeds twice the plain one plus rounding, or None.

    Rounding is one step of the result, and what one step of a float32 score makes of its weight:
    eps / temperature of itself.
    """
    eps = torch.finfo(actual.dtype).eps
    eps += torch.finfo(torch.float32).eps / gpu_cases.TEMPERATURE
    for name, size in (("max", _largest), ("rms", _root_mean_square)):
        error, base = size(actual.double() - exact), size(plain.double() - exact)
        budget = 2 * base + eps * size(exact)
        # Not `error > budget`, which is false for nan.
        if not error <= budget:
            return f"{name} error {error:.3e}, allowed {budget:.3e} (torch backend {base:.3e})"
    return None


def _largest(tensor):
    return tensor.abs().max().item()


def _root_mean_square(tensor):
    return tensor.square().mean().sqrt().item()


def draw(check, device, seed=0):
    """(Case, Data) of a check: only tokens whose selection no rounding can change."""
    generator = torch.Generator().manual_seed(seed)
    dtype, bank_dtype = dtypes_of(check, torch.float16 if device == "cpu" else torch.bfloat16)
    case = case_of(check)
    width, rows = check.width, CANDIDATES * check.tokens

    def normal(*shape, scale=1.0):
        return torch.randn(shape, generator=generator, dtype=torch.float64) * scale

    keys = normal(check.atoms, width, scale=width**-0.5).to(bank_dtype)
    x = normal(rows, width, scale=0.3 * width**-0.5)
    order = torch.randperm(check.atoms, generator=generator)
    start = torch.randint(check.atoms, (rows,), generator=generator)
    for i in range(check.top_k):
        x += gpu_cases.DECAY**i * keys[order[(start + i) % check.atoms]].double()
    x = x.to(dtype)
    x = x[clear_tokens(x.to(device), keys.to(device), check).cpu()][: check.tokens]
    if len(x) < check.tokens:
        raise RuntimeError(f"{check}: only {len(x)} tokens have a clear selection; change the seed")
    values = normal(check.atoms, width).to(bank_dtype)
    frozen = check.atoms - case.current
    residual, grad = (normal(check.tokens, width).to(dtype) for _ in range(2))
    pieces = (x, keys[:frozen], values[:frozen], keys[frozen:], values[frozen:], residual, grad)
    # Each in memory of its own on every device, so that the bank is in two pieces.
    return case, gpu_cases.Data(*(piece.to(device, copy=True) for piece in pieces))


def clear_tokens(x, keys, check):
    """Mask of the tokens whose selection and firing no rounding can change."""
    scores = x.double() @ keys.double().T
    norm_scores = scores / scores.norm(dim=-1, keepdim=True)
    clear = torch.ones(len(x), dtype=torch.bool, device=x.device)
    if check.atoms > check.top_k:
        ordered = norm_scores.topk(check.top_k + 1, dim=-1).values
        clear &= ordered[:, -2] - ordered[:, -1] > MARGIN
    if not check.training:
        clear &= ((norm_scores - gpu_cases.THRESHOLD).abs() > MARGIN).all(-1)
    return clear


def _activation(case):
    return SelfActivation(case.top_k, gpu_cases.TEMPERATURE, gpu_cases.THRESHOLD)


def _torch_backend(case, data):
    leaves = [data.x, data.current_keys, data.current_values]
    leaves = [leaf.detach().clone().requires_grad_(case.training) for leaf in leaves]
    output = retrieve(
        leaves[0], data.keys, data.values, _activation(case), current_keys=leaves[1],
        current_values=leaves[2], residual=data.residual, training=case.training, backend="torch",
    )  # fmt: skip
    if not case.training:
        return (output,)
    return output.detach(), *torch.autograd.grad(output, leaves, data.grad)


def _reference(case, data):
    x, current_keys, current_values = (
        tensor.detach().double().requires_grad_(case.training)
        for tensor in (data.x, data.current_keys, data.current_values)
    )
    keys = torch.cat([data.keys.double(), current_keys])
    values = torch.cat([data.values.double(), current_values])
    residual = data.residual.double()
    output = retrieve_reference(x, keys, values, _activation(case), residual, case.training)
    if not case.training:
        return (output,)
    leaves = (x, current_keys, current_values)
    return output.detach(), *torch.autograd.grad(output, leaves, data.grad.double())

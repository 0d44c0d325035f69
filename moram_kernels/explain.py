"""Says in words which backend, path and tiles a call takes, and why. Runs nothing."""

import copy

import torch

from .activation import SelfActivation
from .triton_backend import available
from .triton_backend.devices import device_model
from .triton_backend.plan import Plan, dtype_name, plan


def explain(
    tokens: int,
    in_features: int,
    out_features: int,
    num_atoms: int,
    activation: SelfActivation | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    atoms_dtype: torch.dtype | None = None,
    training: bool = False,
    device: torch.device | str | None = None,
    num_current: int = 0,
    precision: str = "ieee",
) -> Plan:
    """Print how `retrieve` would run a call on a GPU, and why.

    Args:
        tokens: rows of x. in_features: D. out_features: O. num_atoms: live atoms of the bank.
        activation: `SelfActivation`; of it only top_k matters.
        dtype: of x and the output. atoms_dtype: of the bank; None is that of x.
        training: whether a backward follows.
        device: a torch device, a GPU's name ("H100", "A100", "L40S", "RTX 4090", "MI300", ...) or
            a capability ("sm_86", "gfx90a"); None is this machine's GPU, or an H100 where there is
            none.
        num_current: trainable atoms among num_atoms.
        precision: as for `retrieve`.
    Returns:
        The `Plan` that was printed: path, backward, modelled seconds, tiles.
    Raises:
        ValueError: a size is not positive, or the device is not known.
    """
    sizes = {"tokens": tokens, "in_features": in_features, "out_features": out_features}
    for name, size in (sizes | {"num_atoms": num_atoms}).items():
        if size < 1:
            raise ValueError(f"{name} must be >= 1, got {size}")
    if not 0 <= num_current <= num_atoms:
        raise ValueError(f"num_current must be in [0, {num_atoms}], got {num_current}")
    activation = SelfActivation() if activation is None else activation
    if device is None:
        device = torch.device("cuda") if torch.cuda.is_available() else "H100"
    if isinstance(device, str) and device.split(":")[0] in ("cpu", "cuda"):
        device = torch.device(device)
    model = device_model(device if isinstance(device, str) else available.device_of(device))
    atoms_dtype = atoms_dtype or dtype
    kinds = str(dtype) if atoms_dtype == dtype else f"{dtype} with atoms of {atoms_dtype}"
    chosen = plan(
        tokens,
        in_features,
        out_features,
        num_atoms,
        activation.top_k,
        dtype_name(dtype, atoms_dtype),
        training,
        model,
        current=num_current,
        joined=num_current in (0, num_atoms),
        precision=precision,
    )
    here = available.why_not()
    lines = [
        f"{tokens} tokens, {in_features} -> {out_features}, {num_atoms} atoms, "
        f"top_k {activation.top_k}, {kinds}, {'training' if training else 'inference'}, "
        f"{model.name}",
        f"path: {chosen.path}" + (f", backward from {chosen.backward}" if chosen.backward else ""),
        f"why: {chosen.reason}",
        f"here: {here}" if here else "here: the kernels can run",
    ]
    for kernel in ("resident",) if chosen.path == "resident" else ("scores", "aggregate"):
        if kernel in chosen.tiles:
            lines.append(f"tiles of {kernel}: {chosen.tiles[kernel]}")
    print("\n".join(lines))
    # Plans are shared by all calls of a shape; what is given away is a copy.
    return copy.deepcopy(chosen)

"""What a checkpoint keeps of protection: sketches of earlier inputs, and guards of an open task."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .layers import MoRAMLinear
from .sketch import InputSketch, pack_sketches
from .wrappers import unwrapped


def tensor_name(path: str, part: str) -> str:
    """The name in the file of a part of a layer's bank."""
    return f"base_model.model.{path}.moram_{part}"


def write_protection(
    found: Mapping[str, MoRAMLinear], dtype: torch.dtype, tensors: dict[str, Tensor]
) -> dict[str, dict[str, Any]]:
    """What is known of earlier inputs and the guards of an open task; adds to the tensors.

    Layers that read one input share a sketch and a guard's directions, which are written once: `of`
    and `guard_of` name the layer that has them.
    """
    sketches = {p: a.bank.sketch for p, a in found.items() if a.bank.sketch is not None}
    packed, about = pack_sketches(sketches), {}
    for path, owner in packed["owners"].items():
        sketch = sketches[path]
        assert sketch.total is not None
        about[path] = {"of": owner, "size": sketch.size, "total": float(sketch.total)}
    for path, (rows, _) in packed["sketches"].items():
        tensors[tensor_name(path, "sketch")] = rows.to(dtype).cpu().contiguous()
    owners: dict[int, str] = {}
    for path, adapter in found.items():
        guard = adapter.bank.guard
        if guard is None:
            continue
        owner = owners.setdefault(id(guard.basis), path)
        about.setdefault(path, {}).update({"gain": guard.gain, "guard_of": owner})
        if owner == path:
            tensors[tensor_name(path, "guard")] = guard.basis.cpu().contiguous()
    return about


def restore_protection(
    model: nn.Module,
    about: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    actual: Mapping[str, str],
) -> None:
    """Inverse of `write_protection`.

    Args:
        model: holds the adapters. tensors: those of the file, by name.
        about: what the file says of its layers and, by path, of their protection.
        actual: by path in the file, the adapter's path in the model.
    """
    sketches = {}
    for path in about["layers"]:
        known = about.get("protection", {}).get(path, {})
        adapter = unwrapped(model.get_submodule(actual[path]))
        assert isinstance(adapter, MoRAMLinear)
        bank = adapter.bank
        bank.sketch = None
        if "of" in known:
            owner = known["of"]
            if owner not in sketches:
                rows = tensors[tensor_name(owner, "sketch")].float()
                total = torch.tensor(known["total"])
                sketches[owner] = InputSketch(known["size"], rows, total)
            bank.sketch = sketches[owner]
        if "gain" in known:
            # Older files keep one for each layer.
            owner = known.get("guard_of", path)
            basis = tensors[tensor_name(owner, "guard")].to(bank.current_keys.device)
            bank.guard_keys(basis, known["gain"])


def protection_shapes(
    about: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> dict[str, tuple[int, int]]:
    """The shape that each tensor of protection must have, by its name in the file."""
    wanted = {}
    for path, known in about.get("protection", {}).items():
        has_guard = "gain" in known and known.get("guard_of", path) == path
        parts = (("sketch", known.get("of") == path), ("guard", has_guard))
        for name in (tensor_name(path, part) for part, is_there in parts if is_there):
            rows = len(tensors[name]) if name in tensors else 0
            wanted[name] = (rows, about["layers"][path]["in_features"])
    return wanted

"""What a checkpoint keeps of protection: sketches of earlier inputs, and guards of an open task."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .layers import MoRAMLinear
from .sketch import InputSketch, pack_sketches
from .wrappers import unwrapped


def tensor_name(path: str, part: str) -> str:
    """The name in the file of a part of a layer's bank: what PEFT calls it, too."""
    return f"base_model.model.{path}.moram_bank.{part}"


def write_protection(
    found: Mapping[str, MoRAMLinear], dtype: torch.dtype, tensors: dict[str, Tensor]
) -> dict[str, dict[str, Any]]:
    """What is known of earlier inputs and the guards of an open task; adds to the tensors.

    Layers that read one input share a sketch and a guard's directions, which are written once: `of`
    and `guard_of` name the layer that has them, `rows` and `guard_rows` say there how many.
    """
    sketches = {p: a.bank.sketch for p, a in found.items() if a.bank.sketch is not None}
    packed, about = pack_sketches(sketches), {}
    for path, owner in packed["owners"].items():
        sketch = sketches[path]
        assert sketch.total is not None
        about[path] = {"of": owner, "size": sketch.size}
    for path, (rows, total) in packed["sketches"].items():
        about[path]["rows"] = len(rows)
        tensors[tensor_name(path, "sketch_rows")] = rows.to(dtype).cpu().contiguous()
        tensors[tensor_name(path, "sketch_total")] = total.float().cpu()
    owners: dict[int, str] = {}
    for path, adapter in found.items():
        guard = adapter.bank.guard
        if guard is None:
            continue
        owner = owners.setdefault(id(guard.basis), path)
        about.setdefault(path, {})["guard_of"] = owner
        tensors[tensor_name(path, "guard_gain")] = torch.tensor(guard.gain)
        if owner == path:
            about[path]["guard_rows"] = len(guard.basis)
            tensors[tensor_name(path, "guard_basis")] = guard.basis.cpu().contiguous()
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
                rows = tensors[tensor_name(owner, "sketch_rows")].float()
                total = tensors[tensor_name(owner, "sketch_total")]
                sketches[owner] = InputSketch(known["size"], rows, total)
            bank.sketch = sketches[owner]
        if "guard_of" in known:
            basis = tensors[tensor_name(known["guard_of"], "guard_basis")]
            gain = float(tensors[tensor_name(path, "guard_gain")])
            bank.guard_keys(basis.to(bank.current_keys.device), gain)


def protection_shapes(
    about: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> dict[str, tuple[int, ...]]:
    """The shape that each tensor of protection must have, by its name in the file."""
    wanted: dict[str, tuple[int, ...]] = {}
    for path, known in about.get("protection", {}).items():
        tables = []
        if known.get("of") == path:
            tables.append("sketch_rows")
            wanted[tensor_name(path, "sketch_total")] = ()
        if "guard_of" in known:
            wanted[tensor_name(path, "guard_gain")] = ()
        if known.get("guard_of") == path:
            tables.append("guard_basis")
        for name in (tensor_name(path, table) for table in tables):
            rows = len(tensors[name]) if name in tensors else 0
            wanted[name] = (rows, about["layers"][path]["in_features"])
    return wanted


def from_first_format(about: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Bring what a file of format 1 holds to the names and numbers of today's, in place."""
    parts = ["frozen_keys", "frozen_values", "current_keys", "current_values", "sketch", "guard"]
    today = {"sketch": "sketch_rows", "guard": "guard_basis"}
    for path in about["layers"]:
        for part in parts:
            name = f"base_model.model.{path}.moram_{part}"
            if name in tensors:
                tensors[tensor_name(path, today.get(part, part))] = tensors.pop(name)
        if "learned" in about:
            learned = torch.tensor(path in about["learned"])
            tensors[tensor_name(path, "is_learned")] = learned
        known = about.get("protection", {}).get(path, {})
        if known.get("of") == path:
            tensors[tensor_name(path, "sketch_total")] = torch.tensor(known["total"])
        if "gain" in known:
            # The oldest ones keep a basis for each layer.
            known.setdefault("guard_of", path)
            tensors[tensor_name(path, "guard_gain")] = torch.tensor(known["gain"])

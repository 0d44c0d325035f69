"""The bank of a PEFT adapter: an `AtomBank` whose state is all that `moram.task` needs to go on.

What loads a PEFT adapter knows its config first and its tensors then, some of it without asking the
bank. So what protection knows are buffers here, and how many rows each has stands in the config.
"""

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..bank import AtomBank
from ..config import MoRAMConfig
from ..guard import Guard
from ..sketch import InputSketch

_NOTES = ("sketch_rows", "sketch_total", "guard_basis", "guard_gain")


class TunerBank(AtomBank):
    """An `AtomBank` that keeps the config of its adapter up to date.

    Args:
        in_features: D. out_features: O. settings: `MoRAMConfig`.
        path: of its layer, as the config names it.
        sizes: of the config: how many atoms are "frozen" and "current". Empty for a new bank.
        known: of the config: how many rows a sketch and a guard have, and which layer has them.
        device: of all tensors.
    """

    is_learned: Tensor
    sketch_rows: Tensor | None
    sketch_total: Tensor | None
    guard_basis: Tensor | None
    guard_gain: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        settings: MoRAMConfig,
        *,
        path: str,
        sizes: dict[str, int],
        known: dict[str, Any],
        device: torch.device | str | None = None,
    ) -> None:
        saved, rows = dict(sizes), dict(known)
        self.path, self.sizes, self.known = path, sizes, known
        self.protect_size: int = settings.protect_size
        # Which bank keeps the sketch, or the directions of a guard, that a file has once for both.
        self.lenders: dict[str, TunerBank] = {}
        # What the buffers stand for, with the buffer that it was made from or copied to. Layers
        # that read one input share one of these, but no buffer, which not every writer allows.
        self._sketch: tuple[Tensor | None, InputSketch | None] = (None, None)
        self._guard: tuple[Tensor | None, Guard | None] = (None, None)
        capacity = 8 * settings.atoms_per_task if settings.capacity is None else settings.capacity
        super().__init__(
            in_features,
            out_features,
            capacity=saved.get("frozen", capacity),
            value_scale=settings.value_scale,
            device=device,
            dtype=getattr(torch, settings.atom_dtype),
        )
        self._set_live(saved.get("frozen", 0))
        current = saved.get("current", settings.atoms_per_task)
        if current:
            self.append(current)
        sizes |= {"in_features": in_features, "out_features": out_features, "current": current}
        # What is loaded needs places of its size.
        known |= rows
        if rows.get("of") == path:
            self._put("sketch_rows", torch.zeros(rows["rows"], in_features, device=device))
            self._put("sketch_total", torch.zeros((), device=device))
        if "guard_of" in rows:
            self._put("guard_gain", torch.zeros((), device=device))
        if rows.get("guard_of") == path:
            self._put("guard_basis", torch.zeros(rows["guard_rows"], in_features, device=device))

    def _put(self, name: str, tensor: Tensor | None) -> None:
        self.register_buffer(name, None if tensor is None else tensor.detach().clone())

    @property
    def learned(self) -> bool:
        return bool(self.is_learned)

    @learned.setter
    def learned(self, value: bool) -> None:
        # A tensor of its own: one that was loaded may be shared.
        self._put("is_learned", torch.tensor(value, device=self.live.device))

    @property
    def sketch(self) -> InputSketch | None:
        if "sketch" in self.lenders:
            return self.lenders["sketch"].sketch
        rows, total = self.sketch_rows, self.sketch_total
        if rows is None or total is None:
            return None
        if self._sketch[0] is not rows:
            size = self.known.get("size", self.protect_size)
            self._sketch = (rows, InputSketch(size, rows, total))
        return self._sketch[1]

    @sketch.setter
    def sketch(self, sketch: InputSketch | None) -> None:
        self.lenders.pop("sketch", None)
        rows, total = (None, None) if sketch is None else (sketch.rows, sketch.total)
        self._put("sketch_rows", rows)
        self._put("sketch_total", total)
        self._sketch = (self.sketch_rows, sketch)
        for name in ("of", "size", "rows"):
            self.known.pop(name, None)
        if sketch is not None and rows is not None:
            self.known |= {"of": self.path, "size": sketch.size, "rows": len(rows)}

    @property
    def guard(self) -> Guard | None:
        gain = self.guard_gain
        if gain is None:
            return None
        lender = self.lenders.get("guard")
        basis = self.guard_basis if lender is None else lender.guard_basis
        if basis is None:
            return None
        if self._guard[0] is not basis:
            self._guard = (basis, Guard(basis, float(gain)))
        return self._guard[1]

    @guard.setter
    def guard(self, guard: Guard | None) -> None:
        self.lenders.pop("guard", None)
        self._put("guard_basis", None if guard is None else guard.basis)
        self._put("guard_gain", None if guard is None else guard.basis.new_tensor(guard.gain))
        self._guard = (self.guard_basis, guard)
        for name in ("guard_of", "guard_rows"):
            self.known.pop(name, None)
        if guard is not None:
            self.known |= {"guard_of": self.path, "guard_rows": len(guard.basis)}

    def train(self, mode: bool = True) -> Self:
        # What transformers loads are slices of a file, and products of tensors that do not begin
        # where torch would let them are rounded otherwise.
        for tensor in (*self.parameters(), *self.buffers()):
            if type(tensor) in (Tensor, nn.Parameter) and tensor.data_ptr() % 64:
                tensor.data = tensor.data.clone()
        if "sketch" in self.lenders:
            self.sketch = self.sketch
        if "guard" in self.lenders:
            self.guard = self.guard
        return super().train(mode)

    def _set_live(self, count: int) -> None:
        super()._set_live(count)
        self.sizes["frozen"] = count

    def _set_current(self, keys: Tensor, values: Tensor, trainable: bool | None = None) -> None:
        super()._set_current(keys, values, trainable)
        self.sizes["current"] = len(keys)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        lenders, known, before = dict(self.lenders), dict(self.known), len(error_msgs)
        super()._load_from_state_dict(
            state_dict,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )
        if prefix + "current_keys" not in state_dict or len(error_msgs) > before:
            return
        if prefix + "is_learned" in state_dict:
            self.learned = bool(state_dict[prefix + "is_learned"])
        device, found = self.live.device, {}
        for name in _NOTES:
            if prefix + name in state_dict:
                found[name] = state_dict[prefix + name].to(device, torch.float32, copy=True)
        if "sketch_rows" in found and "sketch_total" in found:
            size = known.get("size", self.protect_size)
            self.sketch = InputSketch(size, found["sketch_rows"], found["sketch_total"])
        elif "sketch" not in lenders:
            self.sketch = None
        if "guard_gain" in found and "guard_basis" in found:
            self.guard_keys(found["guard_basis"], float(found["guard_gain"]))
        elif "guard_gain" in found and "guard" in lenders:
            self._put("guard_gain", found["guard_gain"])
            self.lenders["guard"] = lenders["guard"]
            self.known["guard_of"] = known["guard_of"]

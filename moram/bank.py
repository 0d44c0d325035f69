"""The atoms of one projection: frozen ones in buffers, current ones as parameters."""

from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from moram_kernels.ops import version_of

from .bank_state import PARTS, check_state
from .config import check_count
from .draw import changes_parameters, draw_rows
from .guard import Guard
from .live import UNIT, count_of
from .sharded import copy_into, is_managed, remedy_for_shard, whole
from .sketch import InputSketch


class AtomBank(nn.Module):
    """Keys [N, D] and values [N, O] of one projection; row i of both is atom i.

    Frozen atoms are buffers with spare rows, so that neither parameters nor shapes change from task
    to task; the current atoms are the only parameters. `live`, the number of frozen atoms, is a
    buffer like them (in steps of `UNIT`), so that whatever moves or copies the tensors takes it
    along. `state_dict` holds copies of the live rows alone: writing to it changes nothing here. It
    loads into a bank of any size, and a part of it loads what it has.

    On an accelerator `live` is read once, and again after someone wrote to it, put another tensor
    in its place, or called `train` or `eval`. Writes that torch does not count (through `.data`, by
    collectives of torch.distributed) are seen after the latter alone. DistributedDataParallel
    writes to all buffers in every forward pass, and reading after that waits for the device: give
    it broadcast_buffers=False.

    Args:
        in_features: D. out_features: O.
        capacity: frozen atoms to reserve room for.
        value_scale: factor the current values act with; folded into them when they freeze.
        device, dtype: of all tensors.
    """

    frozen_keys: Tensor
    frozen_values: Tensor
    live: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        capacity: int = 0,
        value_scale: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_count("in_features", in_features, 1)
        check_count("out_features", out_features, 1)
        check_count("capacity", capacity, 0)
        self.in_features: int = in_features
        self.out_features: int = out_features
        self.value_scale: float = value_scale
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        self.register_buffer("frozen_keys", torch.zeros(capacity, in_features, **like))
        self.register_buffer("frozen_values", torch.zeros(capacity, out_features, **like))
        self.current_keys: nn.Parameter = nn.Parameter(torch.empty(0, in_features, **like))
        self.current_values: nn.Parameter = nn.Parameter(torch.empty(0, out_features, **like))
        self.register_buffer("live", torch.zeros((), dtype=torch.int64, device=device))
        # What `live` was when it was last read: the tensor, its version and its value. `noted`
        # holds the same for compiled calls, see `torch.ops.moram.live_count`.
        self._seen: tuple[Tensor | None, int | None, int] = (None, None, 0)
        self.noted: Tensor = torch.full((3,), -1, dtype=torch.int64, device="cpu")
        self._set_live(0)
        # See `guard_keys`.
        self.guard: Guard | None = None
        # For `moram.task`: whether the current atoms have learned a task, so that the next one
        # needs fresh ones; what the inputs so far look like.
        self.learned: bool = False
        self.sketch: InputSketch | None = None

    @property
    def num_frozen(self) -> int:
        """Live frozen atoms."""
        # Not self.live: a module's attributes are slow to find, and every call asks.
        live = self._buffers["live"]
        assert live is not None
        if live.is_cpu:
            return count_of(live)
        seen, version, count = self._seen
        if not live.is_meta and (seen is not live or version != version_of(live)):
            # Waits for the device.
            count = count_of(live)
            self._seen = (live, version_of(live), count)
        return count

    def _set_live(self, count: int) -> None:
        self.live.fill_(count * UNIT)
        self._seen = (self.live, version_of(self.live), count)

    def live_count(self) -> Tensor:
        """`num_frozen` as an int64 CPU tensor, which torch.compile does not specialise on."""
        if self.live.is_cpu:
            return torch.div(self.live + UNIT // 2, UNIT, rounding_mode="floor")
        return torch.ops.moram.live_count(self.live, self.noted, UNIT)

    def _forget(self) -> None:
        self._seen = (None, None, self._seen[2])
        self.noted.fill_(-1)

    def train(self, mode: bool = True) -> Self:
        self._forget()
        return super().train(mode)

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(function, recurse)
        self._forget()
        if not self.live.is_meta:
            # What moved is a tensor of its own, which a compiled call must tell from others.
            with torch.no_grad():
                self.live.add_(0)
        return self

    @property
    def num_current(self) -> int:
        """Trainable atoms."""
        return self.current_keys.shape[0]

    @property
    def num_atoms(self) -> int:
        """Frozen and current atoms together."""
        return self.num_frozen + self.num_current

    @property
    def capacity(self) -> int:
        """Frozen atoms that fit before the buffers must grow."""
        return self.frozen_keys.shape[0]

    def segments(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(keys, values, current_keys, current_values) as the operator takes them, live rows only.

        Current keys and values come as they act, see `acting_keys` and `scaled_values`.

        Raises:
            RuntimeError: `live` counts rows that the frozen atoms do not have.
        """
        live = self.num_frozen
        if "_hf_hook" in self.__dict__:
            self.check_whole()
        keys, values = self.frozen_keys[:live], self.frozen_values[:live]
        if keys.shape[0] != live:
            raise RuntimeError(
                f"live must count the live rows of frozen_keys, 0 to {self.capacity}, got {live}: "
                "load a state dict, or move live together with the other tensors"
            )
        return keys, values, self.acting_keys(), self.scaled_values()

    def scaled_values(self) -> Tensor:
        """The current values as they act, [C, O]."""
        scale, values = self.value_scale, self.current_values
        return values if scale == 1 else values * scale

    def guard_keys(self, basis: Tensor, gain: float = 1.0) -> None:
        """From now on the current keys K act as gain (K - K basis^T basis), and are trained so.

        Keeps them, whatever the optimiser does, out of the directions that basis spans. Neither is
        part of `state_dict`, and loading one ends it; `fold_keys` ends it and leaves keys that act
        as these do. `moram.task` does this, and `moram.save` keeps it.

        Args:
            basis: orthonormal rows [k, D], on the bank's device. gain: a number.
        """
        self.guard = Guard(basis, gain)

    def acting_keys(self) -> Tensor:
        """The current keys as they act, [C, D]."""
        return self._acted(self.current_keys)

    def _acted(self, keys: Tensor) -> Tensor:
        return keys if self.guard is None else self.guard.acting(keys)

    @changes_parameters
    def fold_keys(self) -> None:
        """End `guard_keys`; the output stays what it was."""
        copy_into(self.current_keys, self._acted(whole(self.current_keys)))
        self.guard = None

    @changes_parameters
    def append(self, n: int, generator: torch.Generator | None = None) -> None:
        """Add n current atoms: keys Kaiming-uniform with a = sqrt(5), values zero.

        They are trainable, even where the current ones no longer were.
        """
        keys, values = self._new_atoms(n, generator)
        self.learned = False
        if self.num_current:
            keys = torch.cat([whole(self.current_keys), keys])
            values = torch.cat([whole(self.current_values), values])
        self._set_current(keys, values, trainable=True)

    @changes_parameters
    def freeze(self) -> None:
        """Make all current atoms frozen; the output stays what it was."""
        if self.num_current:
            self._check_replaceable("the current atoms by none")
        self._store_current()
        self._set_current(self.current_keys[:0], self.current_values[:0])

    @changes_parameters
    def grow(self, n: int, generator: torch.Generator | None = None) -> None:
        """Freeze, then append n atoms: what happens at a task boundary. Ends `guard_keys`.

        Where n atoms were current before, the same parameters hold the new ones. Their optimiser
        state does not belong to the new task: build a fresh optimiser (`moram.grow` warns of one
        that is not). The new atoms are trainable, even where the current ones no longer were.
        """
        keys, values = self._new_atoms(n, generator)
        self.check_whole()
        if self.num_current != n:
            self._check_replaceable(f"{self.num_current} atoms by {n}")
        self._store_current()
        self.learned = False
        if self.num_current == n:
            for parameter, rows in ((self.current_keys, keys), (self.current_values, values)):
                copy_into(parameter, rows)
                parameter.requires_grad_(True).grad = None
        else:
            self._set_current(keys, values, trainable=True)

    @changes_parameters
    def reserve(self, capacity: int) -> None:
        """Make room for that many frozen atoms."""
        if capacity <= self.capacity:
            return
        for name in ("frozen_keys", "frozen_values"):
            old = getattr(self, name)
            new = old.new_zeros(capacity, old.shape[1])
            new[: old.shape[0]] = old
            setattr(self, name, new)

    def extra_repr(self) -> str:
        return (
            f"{self.in_features} -> {self.out_features}, frozen={self.num_frozen}, "
            f"current={self.num_current}, capacity={self.capacity}"
        )

    def _new_atoms(self, n: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        check_count("n", n, 1)
        keys = draw_rows((n, self.in_features), self.current_keys, generator)
        return keys, torch.zeros(n, self.out_features, device=keys.device, dtype=keys.dtype)

    def _store_current(self) -> None:
        live, total = self.num_frozen, self.num_atoms
        if total > self.capacity:
            self.reserve(max(total, 2 * self.capacity))
        self.frozen_keys[live:total] = self._acted(whole(self.current_keys))
        self.frozen_values[live:total] = whole(self.scaled_values())
        self._set_live(total)
        self.guard = None
        values = whole(self.current_values)
        if not self.learned and not values.is_meta and values.any():
            # They learned something outside of `moram.task`, from inputs that nobody noted.
            self.sketch = None

    def _set_current(self, keys: Tensor, values: Tensor, trainable: bool | None = None) -> None:
        self._check_replaceable("the current atoms by others")
        trainable = self.current_keys.requires_grad if trainable is None else trainable
        self.current_keys = nn.Parameter(keys.detach().clone(), requires_grad=trainable)
        self.current_values = nn.Parameter(values.detach().clone(), requires_grad=trainable)

    def check_whole(self) -> None:
        """Raise where the current atoms are offloaded, or flat shards."""
        if self.current_keys.is_meta and "_hf_hook" in self.__dict__:
            raise RuntimeError(
                "the atoms must stay where their layer computes, got offloaded ones; offload the "
                "base model first, then inject or load"
            )
        remedy = remedy_for_shard(self.current_keys)
        if remedy:
            raise RuntimeError(
                f"current_keys must be whole, [N, {self.in_features}], got a shard "
                f"{tuple(self.current_keys.shape)}; {remedy}"
            )

    def _check_replaceable(self, what: str) -> None:
        if is_managed(self.current_keys):
            raise RuntimeError(
                f"cannot replace {what}: fully_shard holds these parameters; grow by as many "
                "atoms, or keep the adapters out of it: "
                "fully_shard(model, ignored_params=set(moram.parameters(model)))"
            )

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in ("frozen_keys", "frozen_values"):
            # A copy: a view would take the spare rows along wherever its storage is written.
            rows = destination[prefix + name][: self.num_frozen]
            destination[prefix + name] = rows.clone()
        destination[prefix + "live"] = destination[prefix + "live"].clone()

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
        found = {name: state_dict.get(prefix + name) for name in (*PARTS, "live")}
        found = {name: tensor for name, tensor in found.items() if tensor is not None}
        widths = {"keys": self.in_features, "values": self.out_features}
        present = {"frozen": self.num_frozen, "current": self.num_current}
        live, problem = check_state(found, widths, present)
        missing_keys.extend(prefix + name for name in PARTS if name not in found)
        if problem:
            error_msgs.append(f"{prefix.rstrip('.')}: {problem}")
            return
        self._load(found, live, local_metadata.get("assign_to_params_buffers"))

    @changes_parameters
    def _load(self, found: Mapping[str, Tensor], live: int, assign: bool | None) -> None:
        for name in ("frozen_keys", "frozen_values"):
            if name in found and assign:
                setattr(self, name, found[name])
                self.live = torch.tensor(live * UNIT, device=found[name].device)
            elif name in found:
                self.reserve(live)
                # What is loaded may be this very buffer: copy first, clear the rest.
                buffer = getattr(self, name)
                buffer[:live] = found[name][:live]
                buffer[live:] = 0
        self._set_live(live)
        given = {name: found[name] for name in PARTS[2:] if name in found}
        if "current_keys" in given:
            self.guard = None
        if len(given) == 2 and (assign or len(given["current_keys"]) != self.num_current):
            like = {} if assign else {"device": self.live.device, "dtype": self.frozen_keys.dtype}
            keys, values = given["current_keys"], given["current_values"]
            self._set_current(keys.to(**like), values.to(**like))
        else:
            for name, tensor in given.items():
                copy_into(getattr(self, name), tensor)
        if "current_values" in given:
            # Fresh values are zero.
            self.learned = bool(given["current_values"].any())

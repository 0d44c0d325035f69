"""The atoms of one projection: frozen ones in buffers, current ones as parameters."""

import torch
from torch import nn

from moram_kernels.ops import version_of

from .config import check_count
from .draw import changes_parameters, draw_rows
from .guard import Guard
from .live import UNIT, count_of, filled_rows
from .sharded import copy_into, is_managed, whole

PARTS = ("frozen_keys", "frozen_values", "current_keys", "current_values")


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

    def __init__(
        self, in_features, out_features, *, capacity=0, value_scale=1.0, device=None, dtype=None
    ):
        super().__init__()
        check_count("in_features", in_features, 1)
        check_count("out_features", out_features, 1)
        check_count("capacity", capacity, 0)
        self.in_features, self.out_features = in_features, out_features
        self.value_scale = value_scale
        like = {"device": device, "dtype": dtype}
        self.register_buffer("frozen_keys", torch.zeros(capacity, in_features, **like))
        self.register_buffer("frozen_values", torch.zeros(capacity, out_features, **like))
        self.current_keys = nn.Parameter(torch.empty(0, in_features, **like))
        self.current_values = nn.Parameter(torch.empty(0, out_features, **like))
        self.register_buffer("live", torch.zeros((), dtype=torch.int64, device=device))
        # What `live` was when it was last read: the tensor, its version and its value. `noted`
        # holds the same for compiled calls, see `torch.ops.moram.live_count`.
        self._seen = (None, None, 0)
        self.noted = torch.full((3,), -1, dtype=torch.int64, device="cpu")
        self._set_live(0)
        # See `guard_keys`: a `Guard` or None.
        self.guard = None
        # For `moram.task`: whether the current atoms have learned a task, so that the next one
        # needs fresh ones; what the inputs so far look like, an `InputSketch` or None.
        self.learned = False
        self.sketch = None

    @property
    def num_frozen(self):
        """Live frozen atoms."""
        # Not self.live: a module's attributes are slow to find, and every call asks.
        live = self._buffers["live"]
        if live.is_cpu:
            return count_of(live)
        seen, version, count = self._seen
        if not live.is_meta and (seen is not live or version != version_of(live)):
            # Waits for the device.
            count = count_of(live)
            self._seen = (live, version_of(live), count)
        return count

    def _set_live(self, count):
        self.live.fill_(count * UNIT)
        self._seen = (self.live, version_of(self.live), count)

    def live_count(self):
        """`num_frozen` as an int64 CPU tensor, which torch.compile does not specialise on."""
        if self.live.is_cpu:
            return torch.div(self.live + UNIT // 2, UNIT, rounding_mode="floor")
        return torch.ops.moram.live_count(self.live, self.noted, UNIT)

    def _forget(self):
        self._seen = (None, None, self._seen[2])
        self.noted.fill_(-1)

    def train(self, mode=True):
        self._forget()
        return super().train(mode)

    def _apply(self, function, recurse=True):
        super()._apply(function, recurse)
        self._forget()
        if not self.live.is_meta:
            # What moved is a tensor of its own, which a compiled call must tell from others.
            with torch.no_grad():
                self.live.add_(0)
        return self

    @property
    def num_current(self):
        """Trainable atoms."""
        return self.current_keys.shape[0]

    @property
    def num_atoms(self):
        """Frozen and current atoms together."""
        return self.num_frozen + self.num_current

    @property
    def capacity(self):
        """Frozen atoms that fit before the buffers must grow."""
        return self.frozen_keys.shape[0]

    def segments(self):
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

    def scaled_values(self):
        """The current values as they act, [C, O]."""
        scale, values = self.value_scale, self.current_values
        return values if scale == 1 else values * scale

    def guard_keys(self, basis, gain=1.0):
        """From now on the current keys K act as gain (K - K basis^T basis), and are trained so.

        Keeps them, whatever the optimiser does, out of the directions that basis spans. Neither is
        part of `state_dict`, and loading one ends it; `fold_keys` ends it and leaves keys that act
        as these do. `moram.task` does this, and `moram.save` keeps it.

        Args:
            basis: orthonormal rows [k, D], on the bank's device. gain: a number.
        """
        self.guard = Guard(basis, gain)

    def acting_keys(self):
        """The current keys as they act, [C, D]."""
        return self._acted(self.current_keys)

    def _acted(self, keys):
        return keys if self.guard is None else self.guard.acting(keys)

    @changes_parameters
    def fold_keys(self):
        """End `guard_keys`; the output stays what it was."""
        copy_into(self.current_keys, self._acted(whole(self.current_keys)))
        self.guard = None

    @changes_parameters
    def append(self, n, generator=None):
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
    def freeze(self):
        """Make all current atoms frozen; the output stays what it was."""
        if self.num_current:
            self._check_replaceable("the current atoms by none")
        self._store_current()
        self._set_current(*(t[:0] for t in (self.current_keys, self.current_values)))

    @changes_parameters
    def grow(self, n, generator=None):
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
    def reserve(self, capacity):
        """Make room for that many frozen atoms."""
        if capacity <= self.capacity:
            return
        for name in ("frozen_keys", "frozen_values"):
            old = getattr(self, name)
            new = old.new_zeros(capacity, old.shape[1])
            new[: old.shape[0]] = old
            setattr(self, name, new)

    def extra_repr(self):
        return (
            f"{self.in_features} -> {self.out_features}, frozen={self.num_frozen}, "
            f"current={self.num_current}, capacity={self.capacity}"
        )

    def _new_atoms(self, n, generator):
        check_count("n", n, 1)
        keys = draw_rows((n, self.in_features), self.current_keys, generator)
        return keys, torch.zeros(n, self.out_features, device=keys.device, dtype=keys.dtype)

    def _store_current(self):
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

    def _set_current(self, keys, values, trainable=None):
        self._check_replaceable("the current atoms by others")
        trainable = self.current_keys.requires_grad if trainable is None else trainable
        self.current_keys = nn.Parameter(keys.detach().clone(), requires_grad=trainable)
        self.current_values = nn.Parameter(values.detach().clone(), requires_grad=trainable)

    def check_whole(self):
        """Raise where the current atoms are offloaded, or cut into flat shards by
        FullyShardedDataParallel."""
        if self.current_keys.is_meta and "_hf_hook" in self.__dict__:
            raise RuntimeError(
                "the atoms must stay where their layer computes, got offloaded ones; offload the "
                "base model first, then inject or load"
            )
        if self.current_keys.dim() != 2:
            raise RuntimeError(
                f"current_keys must be whole, [N, {self.in_features}], got a shard "
                f"{tuple(self.current_keys.shape)}; do this inside "
                "FullyShardedDataParallel.summon_full_params(model)"
            )

    def _check_replaceable(self, what):
        if is_managed(self.current_keys):
            raise RuntimeError(
                f"cannot replace {what}: fully_shard holds these parameters; grow by as many "
                "atoms, or keep the adapters out of it: "
                "fully_shard(model, ignored_params=set(moram.parameters(model)))"
            )

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in ("frozen_keys", "frozen_values"):
            # A copy: a view would take the spare rows along wherever its storage is written.
            rows = destination[prefix + name][: self.num_frozen]
            destination[prefix + name] = rows.clone()
        destination[prefix + "live"] = destination[prefix + "live"].clone()

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        found = {name: state_dict.get(prefix + name) for name in (*PARTS, "live")}
        live, problem = self._check_state(found)
        missing_keys.extend(prefix + name for name in PARTS if found[name] is None)
        if problem:
            error_msgs.append(f"{prefix.rstrip('.')}: {problem}")
            return
        self._load(found, live, local_metadata.get("assign_to_params_buffers"))

    @changes_parameters
    def _load(self, found, live, assign):
        for name in ("frozen_keys", "frozen_values"):
            if found[name] is not None and assign:
                setattr(self, name, found[name])
                self.live = torch.tensor(live * UNIT, device=found[name].device)
            elif found[name] is not None:
                self.reserve(live)
                # What is loaded may be this very buffer: copy first, clear the rest.
                buffer = getattr(self, name)
                buffer[:live] = found[name][:live]
                buffer[live:] = 0
        self._set_live(live)
        given = {name: found[name] for name in PARTS[2:] if found[name] is not None}
        if "current_keys" in given:
            self.guard = None
        if len(given) == 2 and (assign or len(given["current_keys"]) != self.num_current):
            like = {} if assign else {"device": self.live.device, "dtype": self.frozen_keys.dtype}
            self._set_current(*(tensor.to(**like) for tensor in given.values()))
        else:
            for name, tensor in given.items():
                copy_into(getattr(self, name), tensor)
        if "current_values" in given:
            # Fresh values are zero.
            self.learned = bool(given["current_values"].any())

    def _check_state(self, found):
        """(frozen atoms after loading, what is wrong with a state or None)."""
        widths = {"keys": self.in_features, "values": self.out_features}
        for name in PARTS:
            width, tensor = widths[name.split("_")[1]], found[name]
            if tensor is not None and (tensor.dim() != 2 or tensor.shape[1] != width):
                return 0, f"{name} must be [N, {width}], got {tuple(tensor.shape)}"
        present = {"frozen": self.num_frozen, "current": self.num_current}
        for kind, rows in present.items():
            names = (f"{kind}_keys", f"{kind}_values")
            counts = {n: len(found[n]) for n in names if found[n] is not None}
            if len(set(counts.values())) > 1:
                return 0, f"{names[0]} and {names[1]} must have as many rows, got " + (
                    f"{counts[names[0]]} and {counts[names[1]]}"
                )
            if len(counts) == 1 and rows not in counts.values():
                ((name, count),) = counts.items()
                other = names[name == names[0]]
                return 0, f"{name} must have {rows} rows as here, because {other} is absent, " + (
                    f"got {count}"
                )
        given = [found[n] for n in PARTS[:2] if found[n] is not None]
        if found["live"] is None:
            return (filled_rows(given) if given else present["frozen"]), None
        count = count_of(found["live"])
        rows = len(given[0]) if given else present["frozen"]
        if count > rows or (not given and count != rows):
            return 0, f"live must count the frozen atoms that come along, {rows}, got {count}"
        return count, None

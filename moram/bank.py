"""The atoms of one projection: frozen ones in buffers, current ones as parameters."""

import math

import torch
from torch import nn

from .config import check_count


class AtomBank(nn.Module):
    """Keys [N, D] and values [N, O] of one projection; row i of both is atom i.

    Frozen atoms are buffers with spare rows, so that neither parameters nor shapes change from task
    to task; the current atoms are the only parameters. `state_dict` holds the live rows alone and
    loads into a bank of any size.

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
        # A tensor that is no buffer: it stays on the CPU, where reading it does not wait for a
        # device, and torch.compile does not specialise on its value.
        self.live = torch.zeros((), dtype=torch.int64, device="cpu")
        # See `guard_keys`: (basis, gain) or None.
        self.guard = None

    @property
    def num_frozen(self):
        """Live frozen atoms."""
        return int(self.live)

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
        """
        live = self.num_frozen
        return (
            self.frozen_keys[:live],
            self.frozen_values[:live],
            self.acting_keys(),
            self.scaled_values(),
        )

    def scaled_values(self):
        """The current values as they act, [C, O]."""
        return (
            self.current_values
            if self.value_scale == 1
            else self.current_values * (self.value_scale)
        )

    def guard_keys(self, basis, gain=1.0):
        """From now on the current keys K act as gain (K - K basis^T basis), and are trained so.

        Keeps them, whatever the optimiser does, out of the directions that basis spans. Neither is
        part of `state_dict`, and loading one ends it; `fold_keys` ends it and leaves keys that act
        as these do.

        Args:
            basis: orthonormal rows [k, D], on the bank's device. gain: a number.
        """
        self.guard = (basis, gain)

    def acting_keys(self):
        """The current keys as they act, [C, D]."""
        if self.guard is None:
            return self.current_keys
        basis, gain = self.guard
        keys = self.current_keys.to(basis.dtype)
        return (gain * (keys - (keys @ basis.T) @ basis)).to(self.current_keys.dtype)

    @torch.no_grad()
    def fold_keys(self):
        """End `guard_keys`; the output stays what it was."""
        self.current_keys.copy_(self.acting_keys())
        self.guard = None

    def append(self, n, generator=None):
        """Add n current atoms: keys Kaiming-uniform with a = sqrt(5), values zero."""
        keys = self._new_keys(n, generator)
        values = self.current_values.new_zeros(n, self.out_features)
        if self.num_current:
            keys = torch.cat([self.current_keys.detach(), keys])
            values = torch.cat([self.current_values.detach(), values])
        self._set_current(keys, values)

    @torch.no_grad()
    def freeze(self):
        """Make all current atoms frozen; the output stays what it was."""
        self._store_current()
        self._set_current(self.current_keys[:0], self.current_values[:0])

    @torch.no_grad()
    def grow(self, n, generator=None):
        """Freeze, then append n atoms: what happens at a task boundary. Ends `guard_keys`.

        Where n atoms were current before, the same parameters hold the new ones. Their optimiser
        state does not belong to the new task: build a fresh optimiser.
        """
        keys = self._new_keys(n, generator)
        values = self.current_values.new_zeros(n, self.out_features)
        self._store_current()
        if self.num_current == n:
            self.current_keys.copy_(keys)
            self.current_values.copy_(values)
            self.current_keys.grad = self.current_values.grad = None
        else:
            self._set_current(keys, values)

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

    def _new_keys(self, n, generator):
        check_count("n", n, 1)
        return draw_rows((n, self.in_features), self.current_keys, generator)

    def _store_current(self):
        live, total = self.num_frozen, self.num_atoms
        if total > self.capacity:
            self.reserve(max(total, 2 * self.capacity))
        self.frozen_keys[live:total] = self.acting_keys().detach()
        self.frozen_values[live:total] = self.scaled_values().detach()
        self.live.fill_(total)
        self.guard = None

    def _set_current(self, keys, values):
        trainable = self.current_keys.requires_grad
        self.current_keys = nn.Parameter(keys.detach().clone(), requires_grad=trainable)
        self.current_values = nn.Parameter(values.detach().clone(), requires_grad=trainable)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in ("frozen_keys", "frozen_values"):
            destination[prefix + name] = destination[prefix + name][: self.num_frozen]

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        names = ("frozen_keys", "frozen_values", "current_keys", "current_values")
        found = {name: state_dict.get(prefix + name) for name in names}
        problem = self._check_state(found)
        if problem:
            error_msgs.append(f"{prefix.rstrip('.')}: {problem}")
            return
        missing_keys.extend(prefix + name for name in names if found[name] is None)
        if any(tensor is None for tensor in found.values()):
            return
        self.guard = None
        with torch.no_grad():
            live = found["frozen_keys"].shape[0]
            if local_metadata.get("assign_to_params_buffers"):
                self.frozen_keys, self.frozen_values = found["frozen_keys"], found["frozen_values"]
                self.live.fill_(live)
                self._set_current(found["current_keys"], found["current_values"])
                return
            self.reserve(live)
            self.live.fill_(live)
            for name in ("frozen_keys", "frozen_values"):
                # What is loaded may be a view of this very buffer: copy first, clear the rest.
                buffer = getattr(self, name)
                buffer[:live] = found[name]
                buffer[live:] = 0
            if found["current_keys"].shape != self.current_keys.shape:
                like = {"device": self.current_keys.device, "dtype": self.current_keys.dtype}
                self._set_current(
                    found["current_keys"].to(**like), found["current_values"].to(**like)
                )
            else:
                self.current_keys.copy_(found["current_keys"])
                self.current_values.copy_(found["current_values"])

    def _check_state(self, found):
        widths = {"keys": self.in_features, "values": self.out_features}
        for name, tensor in found.items():
            width = widths[name.split("_")[1]]
            if tensor is not None and (tensor.dim() != 2 or tensor.shape[1] != width):
                return f"{name} must be [N, {width}], got {tuple(tensor.shape)}"
        for kind in ("frozen", "current"):
            keys, values = found[f"{kind}_keys"], found[f"{kind}_values"]
            if keys is not None and values is not None and len(keys) != len(values):
                return f"{kind}_keys and {kind}_values must have as many rows, got " + (
                    f"{len(keys)} and {len(values)}"
                )
        return None


def draw_rows(shape, like, generator=None):
    """New rows [.., D], uniform in +-1/sqrt(D) (Kaiming with a = sqrt(5)).

    Args:
        shape: of the result; D is its last size. like: tensor whose dtype and device it gets.
        generator: drawn where it lives: a CPU generator gives the same rows on every device.
    """
    device = like.device if generator is None else generator.device
    bound = 1 / math.sqrt(shape[-1])
    rows = torch.empty(shape, dtype=like.dtype, device=device)
    return rows.uniform_(-bound, bound, generator=generator).to(like.device)

"""Keeps the keys of new atoms out of the directions that earlier tasks' inputs occupy."""

import torch

from ..config import check_count

# Above it, a layer's new inputs lie in the protected directions, and rounding would be amplified.
MAX_GAIN = 100.0


class InputSketch:
    """The uncentred second moment of a layer's inputs, as its leading directions.

    Args:
        size: directions kept at most.
    """

    def __init__(self, size):
        self.size = size
        # Row i is the square root of an eigenvalue times its eigenvector; total is the trace.
        self.rows = self.total = None

    def add(self, moment):
        """Add a second moment [D, D], such as the mean of x x^T over a task's inputs."""
        total = moment.trace()
        if self.rows is not None:
            # After a restart they may still lie on the CPU.
            rows = self.rows.to(moment)
            moment = moment + rows.T @ rows
            total = total + self.total.to(moment)
        values, vectors = torch.linalg.eigh(moment)
        values, vectors = values.flip(0)[: self.size], vectors.flip(1)[:, : self.size]
        self.rows, self.total = (vectors * values.clamp_min(0).sqrt()).T.contiguous(), total

    def basis(self, energy):
        """Orthonormal rows [k, D]: the fewest that hold that part of the trace, or all kept."""
        values = self.rows.square().sum(1)
        short = values.cumsum(0) / self.total.clamp_min(1e-30) < energy
        count = min(int(short.sum()) + 1, len(values))
        return self.rows[:count] / values[:count, None].sqrt().clamp_min(1e-30)


class KeyProtection:
    """What earlier tasks' inputs look like, and how the keys of new atoms avoid them.

    Before a task: with U [k, D] the leading directions of the inputs of all earlier tasks, the new
    keys K act as g (K - K U^T U), in training too. The gain g lets them compete: with it, the root
    mean square of their first scores on the new task's inputs is `strength` times that of the
    frozen atoms'. So new atoms are blind to what lies in the protected directions, whatever the
    optimiser does. Of what earlier inputs have outside them, new atoms see as much as new inputs
    have there: how much of the earlier outputs remains is an empirical matter, not a guarantee.

    No inputs are kept, and no task id is needed. Layers that read the same tensor share a sketch.

    Args:
        energy: the part of the inputs' second moment to protect, in (0, 1).
        size: directions kept per layer at most.
        examples: training examples per task that the moments are measured on.
        strength: of the new atoms' first scores, > 0. A full one (1) amplifies what earlier inputs
            have outside the protected directions, and was seen to destroy earlier tasks.
    """

    def __init__(self, energy=0.95, size=256, examples=80, strength=0.5):
        if not 0 < energy < 1:
            raise ValueError(f"energy must be in (0, 1), got {energy}")
        if not 0 < strength < float("inf"):
            raise ValueError(f"strength must be finite and > 0, got {strength}")
        check_count("size", size, 1)
        check_count("examples", examples, 1)
        self.energy, self.size, self.examples, self.strength = energy, size, examples, strength
        self.sketches, self.guards = {}, {}

    @torch.no_grad()
    def begin(self, found, stage):
        """Keep the new keys out of the protected directions from now on.

        Args:
            found: `MoRAMLinear`s by path. stage: `Stage` of the new task.
        """
        moments, leader = measure(stage, found, self.examples)
        bases = {path: sketch.basis(self.energy) for path, sketch in self.sketches.items()}
        self.guards = {}
        for path, adapter in found.items():
            moment, bank = moments[leader[path]], adapter.bank
            basis = bases[leader[path]].to(bank.current_keys.device)
            bank.guard_keys(basis)
            old = _rms_scores(bank.frozen_keys[: bank.num_frozen], moment).mean()
            new = _rms_scores(bank.acting_keys(), moment).mean().clamp_min(1e-12)
            self.guards[path] = (basis, min(MAX_GAIN, float(self.strength * old / new)))
        self.resume(found)

    def resume(self, found):
        """Guard the current keys, as `begin` did before the state was saved."""
        for path, (basis, gain) in self.guards.items():
            bank = found[path].bank
            bank.guard_keys(basis.to(bank.current_keys.device), gain)

    @torch.no_grad()
    def end(self, found, stage):
        """Remember the inputs of the task that was just learned, and let its keys be plain ones."""
        self.guards = {}
        for adapter in found.values():
            adapter.bank.fold_keys()
        moments, _ = measure(stage, found, self.examples)
        for path, moment in moments.items():
            self.sketches.setdefault(path, InputSketch(self.size)).add(moment)

    def state_dict(self):
        """Sketches and guards, by path."""
        return {
            "rows": {path: s.rows for path, s in self.sketches.items()},
            "total": {path: s.total for path, s in self.sketches.items()},
            "guards": {path: list(guard) for path, guard in self.guards.items()},
        }

    def load_state_dict(self, state):
        """Inverse of `state_dict`."""
        self.guards = {path: tuple(guard) for path, guard in state["guards"].items()}
        self.sketches = {path: InputSketch(self.size) for path in state["rows"]}
        for path, sketch in self.sketches.items():
            sketch.rows, sketch.total = state["rows"][path], state["total"][path]


def _rms_scores(keys, moment):
    """sqrt(k^T C k) for each key: the root mean square of its scores on inputs of moment C."""
    keys = keys.to(moment.dtype)
    return ((keys @ moment) * keys).sum(1).clamp_min(0).sqrt()


@torch.no_grad()
def measure(stage, found, examples=None):
    """Mean x x^T over the inputs of each adapter, in one pass over training examples.

    Padding does not count where the model is called with an attention_mask; CLIP's encoders have
    none, and every position of theirs counts.

    Args:
        stage: `Stage`. found: adapters by path. examples: at most; None = all.
    Returns:
        (moments, leader): float32 or wider [D, D] by path, and for every path the path of the
        first adapter that reads the same tensor, under which its moment is found.
    """
    sums, counts, leader = {}, {}, {}
    now = {"mask": None, "last": (None, None)}

    def note_mask(_, arguments, named):
        now.update(mask=named["attention_mask"].bool(), last=(None, None))

    def note_input(adapter, arguments):
        x, path = arguments[0], paths[adapter]
        seen, first = now["last"]
        if x is seen:
            leader[path] = first
            return
        now["last"] = (x, path)
        leader[path] = path
        rows = x.flatten(0, -2) if now["mask"] is None else x[now["mask"]]
        rows = rows.to(torch.promote_types(x.dtype, torch.float32))
        sums[path] = sums.get(path, 0) + rows.T @ rows
        counts[path] = counts.get(path, 0) + len(rows)

    paths = {adapter: path for path, adapter in found.items()}
    hooks = [adapter.register_forward_pre_hook(note_input) for adapter in paths]
    hooks.append(stage.model.register_forward_pre_hook(note_mask, with_kwargs=True))
    try:
        for _ in stage.losses(examples):
            pass
    finally:
        for hook in hooks:
            hook.remove()
    return {path: total / counts[path] for path, total in sums.items()}, leader

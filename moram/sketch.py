"""What a layer's inputs look like, without keeping any: their second moment and its sketch.

Measures the moments of many layers within a bounded memory. Knows no training and no task.
"""

from collections.abc import Mapping
from contextlib import ExitStack, contextmanager

import torch

from .processes import Processes
from .sharded import reshard
from .wrappers import inner_name, listed, unwrapped

# Moments that are measured in one pass take this many bytes at most, if more than one: with the
# workspace of one decomposition a gibibyte is enough.
PASS_BYTES = 2**29
# A full decomposition of a moment wider than this needs more than that: its leading directions are
# then found by subspace iteration.
MAX_FULL = 8192


class InputSketch:
    """The uncentred second moment of a layer's inputs, as its leading directions.

    `rows` [k, D]: row i is the square root of an eigenvalue times its eigenvector; `total`: the
    trace. Both are None before the first moment.

    Args:
        size: directions kept at most.
    """

    def __init__(self, size, rows=None, total=None):
        self.size, self.rows, self.total = size, rows, total

    def add(self, moment):
        """Add a second moment [D, D], such as the mean of x x^T over a task's inputs; it is
        overwritten."""
        total = moment.trace()
        if self.rows is not None:
            # After a restart they may still lie on the CPU.
            rows = self.rows.to(moment)
            moment.addmm_(rows.T, rows)
            total = total + self.total.to(moment)
        values, vectors = leading(moment, self.size)
        self.rows, self.total = (vectors * values.clamp_min(0).sqrt()).T.contiguous(), total

    def basis(self, energy):
        """Orthonormal rows [k, D]: the fewest that hold that part of the trace, or all kept."""
        values = self.rows.square().sum(1)
        short = values.cumsum(0) / self.total.clamp_min(1e-30) < energy
        count = min(int(short.sum()) + 1, len(values))
        return self.rows[:count] / values[:count, None].sqrt().clamp_min(1e-30)


def pack_sketches(sketches):
    """Sketches by path as plain data; layers that read one input share one, which is kept once.

    Returns:
        {"owners": the path that keeps a path's sketch, "sketches": its [rows, total] by that path}.
    """
    owners = {}
    owners = {path: owners.setdefault(id(sketch), path) for path, sketch in sketches.items()}
    kept = {path: [sketches[path].rows, sketches[path].total] for path in set(owners.values())}
    return {"owners": owners, "sketches": kept}


def unpack_sketches(state, size):
    """Inverse of `pack_sketches`, {} of a state without; size as for `InputSketch`."""
    kept = state.get("sketches", {})
    kept = {path: InputSketch(size, *parts) for path, parts in kept.items()}
    return {path: kept[owner] for path, owner in state.get("owners", {}).items()}


def remember(sketches, inputs, size):
    """The sketches of some layers with a task's inputs added.

    Args:
        sketches: by path, of earlier inputs; a path may be missing. inputs: `Inputs`.
        size: of a new sketch.
    Returns:
        New sketches by path; layers that read one input share one.
    """
    found = {}
    for first, moment in inputs.moments():
        old = sketches.get(first) or InputSketch(size)
        found[first] = InputSketch(old.size, old.rows, old.total)
        found[first].add(moment)
    return {path: found[first] for path, first in inputs.leader.items()}


def leading(moment, size, iterations=12):
    """The largest eigenvalues [k] of a symmetric matrix [D, D], in descending order, and their
    vectors [D, k], k = min(size, D)."""
    width = len(moment)
    if width <= MAX_FULL or 2 * size > width:
        values, vectors = torch.linalg.eigh(moment)
        return values.flip(0)[:size], vectors.flip(1)[:, :size]
    # Halko et al., SIAM Review 2011, arXiv 0909.4061: more columns than wanted, then the small one.
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(width, size + size // 4 + 8, generator=generator).to(moment)
    for _ in range(iterations):
        basis = torch.linalg.qr(moment @ basis).Q
    values, vectors = torch.linalg.eigh(basis.T @ moment @ basis)
    return values.flip(0)[:size], basis @ vectors.flip(1)[:, :size]


class Inputs:
    """The inputs of some adapters over a task's batches.

    Args:
        model: with the adapters in it.
        found: adapters by path.
        batches: what `moram.task` takes.
        mask: function from a batch to the places that count, bool [B, T]; None = the model's
            attention_mask where it is called with one of the inputs' leading shape, else all.
        examples: examples to pass over at most, in whole batches; None = all.
    Raises:
        TypeError: batches are missing, or one pass consumes them.
    """

    def __init__(self, model, found, batches, mask=None, examples=None):
        self.model, self.found, self.examples, self.mask_of = model, found, examples, mask
        self.batches = checked(batches)
        # For every path that of the first adapter that reads the same tensor.
        self.leader = {}
        self._mask = self._last = None

    def moments(self):
        """Yield (path, mean x x^T, float32 or wider [D, D]) for each leader.

        One pass over the batches takes as many moments as `PASS_BYTES` allows, at least one.

        Raises:
            ValueError: there is no batch, nothing in it counts, or it does not reach an adapter.
        """
        left = dict(self.found)
        while left:
            sums = self._sums(left)
            self._check(sums)
            left = {p: a for p, a in left.items() if self.leader[p] == p and p not in sums}
            for path in tuple(sums):
                moment = sums.pop(path)
                yield path, moment.total.div_(moment.count)

    def mean_squares(self, readers):
        """What some rows read from the inputs, in one pass.

        Args:
            readers: rows [n, D] by path, of some adapters or none.
        Returns:
            By path (mean (r x)^2 of each row r [n], mean x^2 summed over the features).
        Raises:
            ValueError: as for `moments`.
        """
        sums = {}

        def note(path, rows):
            if path not in sums:
                dtype = torch.promote_types(rows.dtype, torch.float32)
                sums[path] = _Squares(readers.get(path, rows[:0]).to(rows.device, dtype))
            sums[path].add(rows)

        self._pass(self.found, note)
        self._sum_up(sums)
        self._check(sums)
        return {p: (s.total[:-1] / s.count, s.total[-1] / s.count) for p, s in sums.items()}

    def _check(self, sums):
        missed = [path for path in self.found if path not in self.leader]
        if missed:
            raise ValueError(
                f"batches must reach every adapter, got none to {listed(missed)}; leave what they "
                "do not reach out with exclude"
            )
        empty = [path for path, found in sums.items() if not found.count]
        if empty:
            raise ValueError(f"batches must hold more than padding, got no place for {empty[0]}")

    def _sums(self, found):
        """`_Moment` of the leaders among `found`, as many as fit."""
        sums, size = {}, 0

        def note(path, rows):
            nonlocal size
            if self.leader[path] != path:
                return
            more = 4 * self.found[path].in_features ** 2
            if path not in sums:
                if sums and size + more > PASS_BYTES:
                    return
                size += more
                sums[path] = _Moment(rows)
            sums[path].add(rows)

        self._pass(found, note)
        for moment in sums.values():
            moment.flush()
        self._sum_up(sums)
        return sums

    @staticmethod
    def _sum_up(sums):
        """Add up what the processes saw."""
        processes = Processes()
        for found in sums.values():
            count = found.total.new_tensor([float(found.count)])
            processes.sum([found.total, count])
            found.count = float(count)

    @torch.no_grad()
    def _pass(self, found, note):
        """Run the batches through the model; note(path, rows that count) for every adapter's input,
        first for its leader's."""
        paths = {adapter: path for path, adapter in found.items()}
        self._last = (None, None, None)

        def see(adapter, arguments):
            x, path = arguments[0], paths[adapter]
            if x is not self._last[0]:
                mask = self._mask
                whole = mask is None or mask.shape != x.shape[:-1]
                rows = x.flatten(0, -2) if whole else x[mask.to(x.device)]
                self._last = (x, path, rows)
            self.leader[path] = self._last[1]
            note(path, self._last[2])

        def see_mask(_, arguments, named):
            given = named.get("attention_mask")
            if self.mask_of is None:
                self._mask = None if given is None or given.dim() != 2 else given.bool()
            self._last = (None, None, None)

        with ExitStack() as stack:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(in_eval_mode(self.model))
            stack.callback(self._forget)
            stack.callback(reshard, self.model)
            for adapter in paths:
                stack.callback(adapter.register_forward_pre_hook(see).remove)
            inner = unwrapped(self.model)
            stack.callback(inner.register_forward_pre_hook(see_mask, with_kwargs=True).remove)
            self._run()

    def _forget(self):
        self._mask = self._last = None

    def _run(self):
        if callable(self.batches) and not hasattr(self.batches, "__iter__"):
            self.batches()
            return
        model, done = _to_call(self.model), 0
        for batch in self.batches:
            if self.mask_of is not None:
                self._mask = self.mask_of(batch)
            done += _call(model, batch)
            if self.examples is not None and done >= self.examples:
                break
        if not done:
            raise ValueError("batches must hold at least one batch, got none")


class _Moment:
    """A sum of x x^T, taken of many rows at once: with few, the product is several times slower."""

    def __init__(self, rows):
        width, dtype = rows.shape[1], torch.promote_types(rows.dtype, torch.float32)
        self.total, self.count = rows.new_zeros(width, width, dtype=dtype), 0
        self.waiting = []

    def add(self, rows):
        self.waiting.append(rows)
        self.count += len(rows)
        if sum(map(len, self.waiting)) >= self.total.shape[0] / 2:
            self.flush()

    def flush(self):
        if self.waiting:
            rows = torch.cat(self.waiting).to(self.total.dtype)
            self.total.addmm_(rows.T, rows)
            self.waiting = []


class _Squares:
    """Sums of (r x)^2 for some rows r, and of x^2 over the features at the end."""

    def __init__(self, readers):
        self.readers, self.total, self.count = readers, readers.new_zeros(len(readers) + 1), 0

    def add(self, rows):
        rows = rows.to(self.readers.dtype)
        self.total[:-1] += (rows @ self.readers.T).square().sum(0)
        self.total[-1] += rows.square().sum()
        self.count += len(rows)


def checked(batches):
    """The batches, if they can be passed over more than once.

    Raises:
        TypeError: they cannot.
    """
    if batches is None:
        raise TypeError("batches must be given with protect, got None")
    if hasattr(batches, "__next__"):
        raise TypeError(
            f"batches must be passed over more than once, got a {type(batches).__name__}, which "
            "the first pass consumes; give a list, a DataLoader or a function that runs the model"
        )
    if not callable(batches) and not hasattr(batches, "__iter__"):
        raise TypeError(
            f"batches must be iterable or a function that runs the model, got "
            f"{type(batches).__name__}"
        )
    return batches


def _to_call(model):
    """The model without what compiles or replicates it: a pass of one process calls that alone."""
    while inner_name(model) in ("_orig_mod", "module"):
        model = getattr(model, inner_name(model))
    return model


def _call(model, batch):
    """Run the model on a batch; returns its number of examples."""
    if isinstance(batch, Mapping):
        model(**batch)
        tensors = batch.values()
    elif isinstance(batch, (tuple, list)):
        model(*batch)
        tensors = batch
    else:
        model(batch)
        tensors = (batch,)
    sizes = (t.shape[0] for t in tensors if isinstance(t, torch.Tensor) and t.dim())
    return next(sizes, 1)


@contextmanager
def in_eval_mode(model):
    """Every module in eval mode, and back in its own afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode

"""Reads the inputs of adapters while a task's batches pass through the model; keeps none.

Measures the moments of many layers within a bounded memory. Knows no training and no task.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .processes import Processes
from .sharded import reshard
from .wrappers import inner_name, listed, wrapping

# Moments that are measured in one pass take this many bytes at most, if more than one: with the
# workspace of one decomposition a gibibyte is enough.
PASS_BYTES = 2**29
# An iterable that can be passed over again, or a function that runs the model.
Batches = Iterable[Any] | Callable[[], object]
# From a batch to the places that count, bool [B, T].
Mask = Callable[[Any], Tensor]


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

    def __init__(
        self,
        model: nn.Module,
        found: Mapping[str, nn.Module],
        batches: Batches | None,
        mask: Mask | None = None,
        examples: int | None = None,
    ) -> None:
        self.model: nn.Module = model
        self.found: Mapping[str, nn.Module] = found
        self.examples: int | None = examples
        self.mask_of: Mask | None = mask
        self.batches: Batches = checked(batches)
        # For every path that of the first adapter that reads the same tensor.
        self.leader: dict[str, str] = {}
        self._mask: Tensor | None = None
        # The input that was read last, the path of its leader, and its rows that count.
        self._last: tuple[Tensor, str, Tensor] | None = None

    def moments(self) -> Iterator[tuple[str, Tensor]]:
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

    def mean_squares(self, readers: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """What some rows read from the inputs, in one pass.

        Args:
            readers: rows [n, D] by path, of some adapters or none.
        Returns:
            By path (mean (r x)^2 of each row r [n], mean x^2 summed over the features).
        Raises:
            ValueError: as for `moments`.
        """
        sums: dict[str, _Squares] = {}

        def note(path: str, rows: Tensor) -> None:
            if path not in sums:
                dtype = torch.promote_types(rows.dtype, torch.float32)
                sums[path] = _Squares(readers.get(path, rows[:0]).to(rows.device, dtype))
            sums[path].add(rows)

        self._pass(self.found, note)
        self._sum_up(sums)
        self._check(sums)
        return {p: (s.total[:-1] / s.count, s.total[-1] / s.count) for p, s in sums.items()}

    def _check(self, sums: Mapping[str, "_Moment | _Squares"]) -> None:
        missed = [path for path in self.found if path not in self.leader]
        if missed:
            raise ValueError(
                f"batches must reach every adapter, got none to {listed(missed)}; leave what they "
                "do not reach out with exclude"
            )
        empty = [path for path, found in sums.items() if not found.count]
        if empty:
            raise ValueError(f"batches must hold more than padding, got no place for {empty[0]}")

    def _sums(self, found: Mapping[str, nn.Module]) -> dict[str, "_Moment"]:
        """`_Moment` of the leaders among `found`, as many as fit."""
        sums: dict[str, _Moment] = {}
        size = 0

        def note(path: str, rows: Tensor) -> None:
            nonlocal size
            if self.leader[path] != path:
                return
            more = 4 * rows.shape[1] ** 2
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
    def _sum_up(sums: Mapping[str, "_Moment | _Squares"]) -> None:
        """Add up what the processes saw."""
        processes = Processes()
        for found in sums.values():
            count = found.total.new_tensor([float(found.count)])
            processes.sum([found.total, count])
            found.count = float(count)

    @torch.no_grad()
    def _pass(self, found: Mapping[str, nn.Module], note: Callable[[str, Tensor], None]) -> None:
        """Run the batches through the model; note(path, rows that count) for every adapter's input,
        first for its leader's."""
        paths = {adapter: path for path, adapter in found.items()}
        self._last = None

        def see(adapter: nn.Module, arguments: tuple[Any, ...]) -> None:
            x, path = arguments[0], paths[adapter]
            if self._last is None or x is not self._last[0]:
                mask = self._mask
                rows = x.flatten(0, -2)
                if mask is not None and mask.shape == x.shape[:-1]:
                    rows = x[mask.to(x.device)]
                self._last = (x, path, rows)
            _, self.leader[path], rows = self._last
            note(path, rows)

        def see_mask(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            given = named.get("attention_mask")
            if self.mask_of is None:
                self._mask = None if given is None or given.dim() != 2 else given.bool()
            self._last = None

        with ExitStack() as stack:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(in_eval_mode(self.model))
            stack.callback(self._forget)
            stack.callback(reshard, self.model)
            for adapter in paths:
                stack.callback(adapter.register_forward_pre_hook(see).remove)
            # PEFT 0.20 runs what it wraps without a call, which hooks there would see.
            for module in wrapping(self.model):
                handle = module.register_forward_pre_hook(see_mask, with_kwargs=True)
                stack.callback(handle.remove)
            self._run()

    def _forget(self) -> None:
        self._mask = self._last = None

    def _run(self) -> None:
        if not isinstance(self.batches, Iterable):
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

    def __init__(self, rows: Tensor) -> None:
        width, dtype = rows.shape[1], torch.promote_types(rows.dtype, torch.float32)
        self.total = rows.new_zeros(width, width, dtype=dtype)
        self.count: float = 0
        self.waiting: list[Tensor] = []

    def add(self, rows: Tensor) -> None:
        self.waiting.append(rows)
        self.count += len(rows)
        if sum(map(len, self.waiting)) >= self.total.shape[0] / 2:
            self.flush()

    def flush(self) -> None:
        if self.waiting:
            rows = torch.cat(self.waiting).to(self.total.dtype)
            self.total.addmm_(rows.T, rows)
            self.waiting = []


class _Squares:
    """Sums of (r x)^2 for some rows r, and of x^2 over the features at the end."""

    def __init__(self, readers: Tensor) -> None:
        self.readers, self.total = readers, readers.new_zeros(len(readers) + 1)
        self.count: float = 0

    def add(self, rows: Tensor) -> None:
        rows = rows.to(self.readers.dtype)
        self.total[:-1] += (rows @ self.readers.T).square().sum(0)
        self.total[-1] += rows.square().sum()
        self.count += len(rows)


def checked(batches: Batches | None) -> Batches:
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


def _to_call(model: nn.Module) -> nn.Module:
    """The model without what compiles or replicates it: a pass of one process calls that alone."""
    while (name := inner_name(model)) in ("_orig_mod", "module"):
        model = getattr(model, name)
    return model


def _call(model: nn.Module, batch: Any) -> int:
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
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode, and back in its own afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode

"""Hidden states of the layers that no method changes, computed once per example.

With `first_layer` = f, layers 0 .. f - 1 stay what they were. Their output for every example is
kept, in the model's dtype, and a step runs layers f .. alone, in training and in scoring with one
pass. The numbers are those of the whole model, up to the rounding that other padding brings.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..continual.scoring import answer_logits
from .encode import Batch, Places, Rows, by_length

FAMILIES = ("llama", "qwen2")


class CachedRows:
    """`Rows` whose batches hold hidden states [B, L, D] in the place of token ids.

    Args:
        states: one tensor [L_i, D] an example.
    """

    rows: Rows
    states: list[Tensor]

    def __init__(self, rows: Rows, states: list[Tensor]) -> None:
        self.rows, self.states = rows, states

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """The examples of several `CachedRows` as one."""
        states = [state for part in parts for state in part.states]
        return cls(Rows.join([part.rows for part in parts]), states)

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, rows: Places) -> Batch:
        """(hidden states, attention_mask, labels) of some examples."""
        _, mask, labels = self.rows.batch(rows)
        states = self.states[int(rows[0])]
        batch = states.new_zeros(*mask.shape, states.shape[1])
        for place, row in enumerate(rows):
            found = self.states[int(row)]
            batch[place, -len(found) :] = found
        return batch, mask, labels

    def length(self, row: int) -> int:
        """Tokens of an example."""
        return self.rows.length(row)

    def num_labels(self, rows: Places) -> int:
        """Answer tokens of some examples together."""
        return self.rows.num_labels(rows)


class Prefix:
    """The frozen first layers of a model, and the switch to run without them.

    Args:
        model: a Llama or Qwen2 causal language model. first_layer: the first layer that may change.
    Raises:
        ValueError: of another family, whose layers need to know their place; with dropout; or too
            few layers.
    """

    def __init__(self, model: nn.Module, first_layer: int) -> None:
        kind = getattr(model.config, "model_type", None)
        if kind not in FAMILIES or getattr(model.config, "use_sliding_window", False):
            raise ValueError(
                f"cache_prefix works for {', '.join(FAMILIES)} without sliding windows, got {kind}"
            )
        dropout = getattr(model.config, "attention_dropout", 0.0)
        if dropout:
            raise ValueError(f"cache_prefix needs a model without dropout, got {dropout}")
        check_layers(model, first_layer)
        # Of either family.
        self.model: Any = model
        self.first = first_layer

    @torch.no_grad()
    def cache(
        self,
        rows: Rows,
        batch_size: int,
        step: Callable[[int], object] = lambda count: None,
    ) -> list[Tensor]:
        """The states [L, D] of each example of `Rows`, for `CachedRows`; in eval mode."""
        inner = self.model.model
        found: dict[int, Tensor] = {}
        device = next(self.model.parameters()).device
        seen: list[Tensor] = []
        hook = inner.layers[self.first].register_forward_pre_hook(
            lambda _, inputs, kwargs: seen.append(inputs[0] if inputs else kwargs["hidden_states"]),
            with_kwargs=True,
        )
        whole = inner.layers
        inner.layers = nn.ModuleList(list(whole)[: self.first + 1])
        try:
            for part in torch.tensor(by_length(rows), dtype=torch.long).split(batch_size):
                ids, mask, _ = rows.batch(part)
                inner(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)
                for state, row in zip(seen.pop(), part.tolist(), strict=True):
                    found[row] = state[-len(rows.ids[row]) :].clone()
                step(len(part))
        finally:
            inner.layers = whole
            hook.remove()
        states = [found[row] for row in range(len(rows))]
        self._check(rows, CachedRows(rows, states))
        return states

    @contextmanager
    def upper(self) -> Iterator[None]:
        """Within it, the model runs layers first_layer .. alone, on hidden states."""
        inner = self.model.model
        whole = inner.layers
        inner.layers = nn.ModuleList(list(whole)[self.first :])
        try:
            yield
        finally:
            inner.layers = whole

    def _check(self, rows: Rows, cached: CachedRows) -> None:
        part = [0]
        device = next(self.model.parameters()).device
        ids, mask, _ = (t.to(device) for t in rows.batch(part))
        expected = answer_logits(self.model, ids, mask, 1).float()
        with self.upper():
            actual = answer_logits(self.model, cached.batch(part)[0], mask, 1).float()
        error = (actual - expected).abs().max().item()
        if error > 0.05 * expected.abs().max().item():
            raise RuntimeError(f"the cached prefix changes the model's output by {error}")


def check_layers(model: nn.Module, first_layer: int) -> None:
    """Raise unless the model has a decoder layer of that index."""
    count = len(getattr(getattr(model, "model", None), "layers", ()))
    if not first_layer < max(1, count):
        raise ValueError(f"first_layer must be below the model's {count} layers, got {first_layer}")

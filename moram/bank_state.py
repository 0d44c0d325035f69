"""Whether the tensors of a state dict make a bank. A leaf: knows no bank."""

from collections.abc import Mapping

from torch import Tensor

from .live import count_of, filled_rows

PARTS = ("frozen_keys", "frozen_values", "current_keys", "current_values")


def check_state(
    found: Mapping[str, Tensor], widths: Mapping[str, int], present: Mapping[str, int]
) -> tuple[int, str | None]:
    """How many atoms are frozen after loading, and what is wrong with a state or None.

    Args:
        found: those of `PARTS` and `live` that the state has. widths: of keys and of values.
        present: how many atoms the bank has, frozen and current.
    """
    for name in PARTS:
        width, tensor = widths[name.split("_")[1]], found.get(name)
        if tensor is not None and (tensor.dim() != 2 or tensor.shape[1] != width):
            return 0, f"{name} must be [N, {width}], got {tuple(tensor.shape)}"
    for kind, rows in present.items():
        names = (f"{kind}_keys", f"{kind}_values")
        counts = {name: len(found[name]) for name in names if name in found}
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
    given = [found[name] for name in PARTS[:2] if name in found]
    if "live" not in found:
        return (filled_rows(given) if given else present["frozen"]), None
    count = count_of(found["live"])
    rows = len(given[0]) if given else present["frozen"]
    if count > rows or (not given and count != rows):
        return 0, f"live must count the frozen atoms that come along, {rows}, got {count}"
    return count, None

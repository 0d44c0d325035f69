"""Which path and which tiles: one rule for every call, from the cost model or a tuned table.

Imports no Triton, so that `explain` works everywhere. Tiles come from what compiles without spills
(`tests/compile_gate`); a table measured on a device overrides both path and tiles.
"""

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..aliases import Tile, Tiles
from . import available, cost
from .cost import GROUP, ROW_ATOMS, SCORE_BYTES
from .devices import Device, device_model
from .tiles import resident_tile, tiles

DTYPES = ("float32", "bfloat16", "float16")
# Where dtypes differ among 16-bit inputs, atoms and results: the rate of their products. A float16
# number is two bfloat16 ones.
MIXED = {"bfloat16+float32": "three", "float16+float32": "six"}
PRECISIONS = ("ieee", "bf16x6")
NETWORK_TOP_K = (4, 8, 16)
LIST_TOP_K = 128
# Scores kept for a backward stay whole; above so many bytes of them, lists are kept instead where
# they can be.
KEPT_BYTES = 2**30


@dataclass(frozen=True)
class Plan:
    """How one call runs.

    path: "resident", "decode", "split-dense", "split-gather", or "torch" where no kernel covers it.
    backward: "dense" (from saved scores), "lists" (from saved lists), or None.
    reason: one sentence. seconds: the model's time of every path that was considered.
    tiles: of each kernel that runs, by name. chunk: tokens scored at a time.
    copy: whether the vendor's library multiplies with a copy of both segments in one.
    groups: of a path with lists, "fused" or "apart" where atoms are selected by groups whose maxima
    the kernel of the scores finds, or that of the selection; else None.
    precision: of products of float32 numbers, "ieee" or "bf16x6".
    """

    path: str
    backward: str | None
    reason: str
    seconds: dict[str, float] = field(default_factory=dict, hash=False)
    tiles: dict[str, Any] = field(default_factory=dict, hash=False)
    chunk: int = 0
    groups: str | None = None
    precision: str = "ieee"
    copy: bool = False


def why_not_covered(atoms: int, top_k: int, dtype: str, precision: str = "ieee") -> str | None:
    """Why no kernel covers a call, one sentence with the limits, or None.

    Args: as for `plan`.
    """
    if dtype not in DTYPES and dtype not in MIXED:
        return f"the kernels cover {', '.join(DTYPES)}, not {dtype}"
    if precision not in PRECISIONS:
        return f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}"
    if atoms > ROW_ATOMS and (top_k > LIST_TOP_K or atoms > GROUP * ROW_ATOMS):
        return (
            f"for more than {ROW_ATOMS} atoms the kernels cover top_k <= {LIST_TOP_K} and at most "
            f"{GROUP * ROW_ATOMS} atoms, got top_k {top_k} with {atoms} atoms"
        )
    return None


def dtype_name(inputs: torch.dtype, *others: torch.dtype) -> str:
    """The name, as `plan` takes it, of the dtypes of inputs, and of atoms and results.

    Float32 inputs mix with nothing: they may be smaller than 2^-110, below which bits are lost.
    """
    names = {str(dtype).removeprefix("torch.") for dtype in (inputs, *others)}
    if len(names) == 1 or inputs == torch.float32:
        return str(inputs).removeprefix("torch.")
    return "float16+float32" if "float16" in names else "bfloat16+float32"


def rate_of(dtype: str, precision: str) -> str:
    """The rate of products as in `cost.Shape`; dtype and precision as for `plan`."""
    if dtype != "float32":
        return MIXED.get(dtype, "half")
    return "single" if precision == "ieee" else "six"


def saved_shapes(
    tokens: int, atoms: int, current: int, top_k: int, backward: str | None
) -> tuple[tuple[int, int], ...]:
    """Shapes of (index, picked, scores, stats) that a backward needs; see `forward.Saved`.

    Args:
        backward: "dense" (from scores) or "lists". The rest as for `plan`.
    """
    count = min(top_k, atoms) if backward == "lists" else 0
    # Rows of a multiple of 16 numbers are stored in whole vectors.
    columns = current if backward == "lists" else (atoms + 15) // 16 * 16
    return (tokens, count), (tokens, count), (tokens, columns), (4, tokens)


def fixed_form(capacity: int, current: int, width: int, top_k: int) -> str:
    """What is kept where shapes must not depend on tokens or live atoms: "dense" or "lists".

    Args:
        capacity: frozen atoms that the bank has room for. The rest as for `plan`.
    """
    atoms = capacity + current
    large = atoms > ROW_ATOMS or atoms > max(160 * top_k, width // 2)
    return "lists" if large and top_k <= LIST_TOP_K else "dense"


def plan(
    tokens: int,
    width: int,
    out: int,
    atoms: int,
    top_k: int,
    dtype: str = "bfloat16",
    training: bool = False,
    device: Device | str = "H100",
    *,
    current: int = 0,
    joined: bool = False,
    residual: bool = True,
    precision: str = "ieee",
    path: str | None = None,
    keep: str | None = None,
    table: Mapping[str, Any] | None = None,
) -> Plan:
    """Choose path and tiles of one call.

    Args:
        tokens: M. width: D. out: O. atoms: N, live ones. top_k: atoms per token.
        dtype: of inputs, atoms and results, one of `DTYPES`, or of `MIXED` where they differ.
        training: whether something is kept for a backward.
        device: `Device`, or a name that `device_model` knows.
        current: trainable atoms among the atoms.
        joined: whether keys (and values) are one piece of memory.
        residual: whether the update goes onto a tensor [M, O].
        precision: of float32 products, "ieee" or "bf16x6"; of mixed dtypes always the latter.
        path: take this path instead of the fastest.
        keep: what must be kept for the backward, "dense" or "lists"; None chooses.
        table: {name of device: {"paths": .., "tiles": ..}}, overrides the shipped tuned.json.
    Returns:
        `Plan`.
    Raises:
        ValueError: path names one that does not cover the call, or device one that is not known.
    """
    model = device_model(device)
    problem = available.why_not_compiled(model) or why_not_covered(atoms, top_k, dtype, precision)
    if problem:
        return Plan("torch", None, problem)
    # Sizes of 0 need no kernel; the model divides by them.
    tokens, width, out, atoms = (max(1, size) for size in (tokens, width, out, atoms))
    rounded = _bucket(tokens)
    bank = (current, joined, residual)
    args = (rounded, width, out, atoms, top_k, dtype, training, model, *bank, precision)
    name = device if isinstance(device, str) else device.name
    entry = (shipped_table() if table is None else table).get(name)
    if not entry:
        return _plan(*args, path, keep)
    purpose = "training" if training else "inference"
    key = f"{rounded}x{width}x{out}x{atoms}x{top_k}x{dtype}x{purpose}"
    measured = entry.get("paths", {}).get(key)
    if path is None and keep is None and measured:
        best = replace(_plan(*args, measured, None), reason="measured on this device")
    else:
        best = _plan(*args, path, keep)
    return replace(best, tiles=_tuned_tiles(best.tiles, entry.get("tiles", {}), width, out))


@functools.cache
def shipped_table() -> dict[str, Any]:
    """The tuned table that ships with the package."""
    return json.loads(Path(__file__).with_name("tuned.json").read_text(encoding="utf-8"))


@functools.lru_cache(maxsize=4096)
def _plan(
    tokens: int,
    width: int,
    out: int,
    atoms: int,
    top_k: int,
    dtype: str,
    training: bool,
    device: Device,
    current: int,
    joined: bool,
    residual: bool,
    precision: str,
    path: str | None,
    keep: str | None,
) -> Plan:
    precision = "bf16x6" if dtype in MIXED else precision
    shape = cost.Shape(
        tokens, width, out, atoms, current, top_k, 4 if dtype == "float32" else 2,
        rate_of(dtype, precision), joined, training, residual,
    )  # fmt: skip
    pair = resident_tile(atoms, top_k, dtype, device)
    if width % 32 or out % 32 or not (top_k in NETWORK_TOP_K or top_k >= atoms):
        pair = None
    sizes = tiles(shape, pair, device, dtype)
    seconds = _seconds(device, shape, sum(pair) if pair else None, sizes)
    copied = {}
    if training and shape.met == 2 and not joined and 0 < current < atoms:
        copying = replace(shape, joined=True, copied=True)
        copied = _seconds(device, copying, None, sizes)
        seconds |= {name: min(time, seconds[name]) for name, time in copied.items()}
    if path == "resident" and pair:
        seconds.setdefault("resident", 0.0)
    if top_k > LIST_TOP_K or (top_k >= atoms and keep != "lists"):
        seconds.pop("split-gather", None)
    if keep is not None:
        seconds = {name: s for name, s in seconds.items() if _backward_of(name) == keep}
    heavy = training and tokens * atoms * 4 > KEPT_BYTES and path is None and keep is None
    if heavy and "split-gather" in seconds:
        seconds = {"split-gather": seconds["split-gather"]}
    if path is not None and path not in seconds:
        raise ValueError(f"path {path!r} does not cover this call; {', '.join(seconds)} do")
    chosen = path or min(seconds, key=seconds.__getitem__)
    others = [f"{n} {t * 1e6:.0f} us" for n, t in sorted(seconds.items(), key=lambda i: i[1])]
    reason = f"modelled on {device.name}: {', '.join(others)}" if path is None else "asked for"
    rows = max(64, SCORE_BYTES // (4 * atoms))
    copy = copied.get(chosen) == seconds[chosen]
    return Plan(
        chosen,
        _backward_of(chosen) if training else None,
        reason,
        seconds,
        sizes if chosen == "resident" else {k: v for k, v in sizes.items() if k != "resident"},
        rows // 64 * 64,
        cost.groups(device, copying if copy else shape, sizes)
        if chosen == "split-gather"
        else None,
        precision,
        copy,
    )


def _seconds(
    device: Device, shape: cost.Shape, columns: int | None, sizes: Tiles
) -> dict[str, float]:
    """Seconds of every path that covers a shape, with its backward while training."""
    seconds = cost.forward_times(device, shape, columns, sizes)
    if shape.training:
        backwards = cost.backward_times(device, shape, sizes)
        seconds = {
            name: time + backwards[_backward_of(name)]
            for name, time in seconds.items()
            if _backward_of(name) in backwards
        }
    return seconds


def _backward_of(path: str) -> str:
    return "lists" if path == "split-gather" else "dense"


def _bucket(tokens: int) -> int:
    """The number of tokens rounded up to an eighth of a power of two: few plans, same choice."""
    step = max(1, 1 << max(0, tokens.bit_length() - 4))
    return -(-tokens // step) * step


def _tuned_tiles(chosen: Tiles, tuned: Mapping[str, Tile], width: int, out: int) -> dict[str, Any]:
    """Tiles with the measured ones in place; a key is a kernel's name or name/BLOCK_N."""
    chosen = dict(chosen)
    for key, config in tuned.items():
        name, _, columns = key.partition("/")
        if name in chosen and (not columns or columns == str(chosen[name].get("BLOCK_N"))):
            config = {**chosen[name], **config}
            # The resident kernel has no masks along D and O.
            if name == "resident" and (width % config["BLOCK_D"] or out % config["BLOCK_O"]):
                continue
            chosen[name] = config
    return chosen

"""Which path and which tiles: one rule for every call, from the cost model or a tuned table.

Imports no Triton, so that `explain` works everywhere. Tiles come from what compiles without spills
(`tests/compile_gate`); a table measured on a device overrides both path and tiles.
"""

import functools
import json
from dataclasses import dataclass, field, replace
from pathlib import Path

from . import cost

DTYPES = ("float32", "bfloat16", "float16")
PRECISIONS = ("ieee", "bf16x6")
# GPUs by the compiler's target; tiles are chosen per target.
TARGETS = {
    "sm_90": ("H100", "H200", "H800", "H20"),
    "sm_100": ("B100", "B200", "B300"),
    "gfx942": ("MI300", "MI325", "AMD", "gfx"),
}
# Columns of the resident tile or tiles, and the most of them that compile without spills at
# (inference, training).
TILES = ((16, 0), (32, 0), (64, 0), (64, 32), (128, 0), (128, 32))
WIDEST = {"sm_80": (128, 128), "sm_90": (160, 128), "sm_100": (160, 128), "gfx942": (160, 160)}
NETWORK_TOP_K = (4, 8, 16)
# Rows of up to this many atoms are selected from in registers; wider ones in chunks.
ROW_ATOMS, CHUNK = 8192, 4096
LIST_TOP_K = 128
# Float32 scores of at most this many bytes exist at a time; tokens are taken in chunks.
SCORE_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Plan:
    """How one call runs.

    path: "resident", "decode", "split-dense", "split-gather", or "torch" where no kernel covers it.
    backward: "dense" (from saved scores), "lists" (from saved lists), or None.
    reason: one sentence. seconds: the model's time of every path that was considered.
    tiles: of each kernel that runs, by name. chunk: tokens scored at a time.
    """

    path: str
    backward: str | None
    reason: str
    seconds: dict = field(default_factory=dict, hash=False)
    tiles: dict = field(default_factory=dict, hash=False)
    chunk: int = 0


def target_of(device):
    """The compiler's target for a GPU's name; sm_80, whose tiles fit everywhere, if unknown."""
    names = ((part, target) for target, parts in TARGETS.items() for part in parts)
    return next((target for part, target in names if part in device), "sm_80")


def resident_tile(atoms, dtype, device, training=False):
    """(first, second) tile of the resident kernel that holds that many atoms, or None."""
    # What is wider spills: a float32 product takes registers of its own, a backward more scores.
    widest = 64 if dtype == "float32" else WIDEST[target_of(device)][training]
    return next((pair for pair in TILES if widest >= sum(pair) >= atoms), None)


def why_not_covered(atoms, top_k, dtype, precision="ieee"):
    """Why no kernel covers a call, one sentence with the limits, or None."""
    if dtype not in DTYPES:
        return f"the kernels cover {', '.join(DTYPES)}, not {dtype}"
    if precision not in PRECISIONS:
        return f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}"
    if atoms > ROW_ATOMS and (top_k > LIST_TOP_K or -(-atoms // CHUNK) * top_k > ROW_ATOMS):
        return (
            f"for more than {ROW_ATOMS} atoms the kernels cover top_k <= {LIST_TOP_K} and top_k x "
            f"chunks of {CHUNK} atoms <= {ROW_ATOMS}, got top_k {top_k} with {atoms} atoms"
        )
    return None


def saved_shapes(tokens, atoms, current, top_k, backward):
    """Shapes of (index, picked, scores, stats) that a backward needs; see `forward.Saved`."""
    count = min(top_k, atoms) if backward == "lists" else 0
    # Rows of a multiple of 16 numbers are stored in whole vectors.
    columns = current if backward == "lists" else (atoms + 15) // 16 * 16
    return (tokens, count), (tokens, count), (tokens, columns), (4, tokens)


def fixed_form(capacity, current, width, top_k):
    """What is kept where shapes must not depend on tokens or live atoms: "dense" or "lists"."""
    atoms = capacity + current
    large = atoms > ROW_ATOMS or atoms > max(160 * top_k, width // 2)
    return "lists" if large and top_k <= LIST_TOP_K else "dense"


def plan(
    tokens,
    width,
    out,
    atoms,
    top_k,
    dtype="bfloat16",
    training=False,
    device="H100",
    *,
    current=0,
    joined=False,
    precision="ieee",
    path=None,
    keep=None,
    table=None,
):
    """Choose path and tiles of one call.

    Args:
        tokens: M. width: D. out: O. atoms: N, live ones. top_k: atoms per token.
        dtype: of the products, "float32", "bfloat16" or "float16".
        training: whether something is kept for a backward.
        device: name of the GPU, or "interpreter".
        current: trainable atoms among the atoms.
        joined: whether keys (and values) are one piece of memory.
        precision: of float32 products, "ieee" or "bf16x6".
        path: take this path instead of the fastest.
        keep: what must be kept for the backward, "dense" or "lists"; None chooses.
        table: {device: {"paths": .., "tiles": ..}}, overrides the shipped tuned.json.
    Returns:
        `Plan`.
    Raises:
        ValueError: path names one that does not cover the call.
    """
    problem = why_not_covered(atoms, top_k, dtype, precision)
    if problem:
        return Plan("torch", None, problem)
    # Sizes of 0 need no kernel; the model divides by them.
    tokens, width, out, atoms = (max(1, size) for size in (tokens, width, out, atoms))
    rounded = _bucket(tokens)
    args = (rounded, width, out, atoms, top_k, dtype, training, device, current, joined, precision)
    entry = (shipped_table() if table is None else table).get(device)
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
def shipped_table():
    """The tuned table that ships with the package."""
    return json.loads(Path(__file__).with_name("tuned.json").read_text(encoding="utf-8"))


@functools.lru_cache(maxsize=4096)
def _plan(
    tokens,
    width,
    out,
    atoms,
    top_k,
    dtype,
    training,
    device,
    current,
    joined,
    precision,
    path,
    keep,
):
    rate = "half" if dtype != "float32" else "single" if precision == "ieee" else "six"
    shape = cost.Shape(
        tokens, width, out, atoms, current, top_k, 4 if dtype == "float32" else 2, rate, joined,
        training,
    )  # fmt: skip
    model = cost.device_model(device)
    pair = resident_tile(atoms, dtype, device, training)
    fits = pair and width % 32 == 0 and out % 32 == 0
    fits = fits and (top_k in NETWORK_TOP_K or top_k >= atoms)
    seconds = cost.forward_times(model, shape, sum(pair) if fits else None)
    if path == "resident" and fits:
        seconds.setdefault("resident", 0.0)
    if top_k > LIST_TOP_K or (top_k >= atoms and keep != "lists"):
        seconds.pop("split-gather", None)
    backwards = cost.backward_times(model, shape) if training else {}
    if training:
        seconds = {
            name: time + backwards[_backward_of(name)]
            for name, time in seconds.items()
            if _backward_of(name) in backwards and keep in (None, _backward_of(name))
        }
    if path is not None and path not in seconds:
        raise ValueError(f"path {path!r} does not cover this call; {', '.join(seconds)} do")
    chosen = path or min(seconds, key=seconds.get)
    others = [f"{n} {t * 1e6:.0f} us" for n, t in sorted(seconds.items(), key=lambda i: i[1])]
    reason = f"modelled on {model.name}: {', '.join(others)}" if path is None else "asked for"
    rows = max(64, SCORE_BYTES // (4 * atoms))
    return Plan(
        chosen,
        _backward_of(chosen) if training else None,
        reason,
        seconds,
        tiles(shape, pair if chosen == "resident" else None, device, model.units),
        rows // 64 * 64,
    )


def _backward_of(path):
    return "lists" if path == "split-gather" else "dense"


def _bucket(tokens):
    """The number of tokens rounded up to an eighth of a power of two: few plans, same choice."""
    step = max(1, 1 << max(0, tokens.bit_length() - 4))
    return -(-tokens // step) * step


def tiles(shape, pair, device, units):
    """Tiles of every kernel a shape can need, by the kernel's name."""
    small, target = shape.itemsize == 4, target_of(device)
    stages = 2 if target == "gfx942" else 3
    common = {"num_warps": 4, "num_stages": stages}
    block = 32 if small else 64
    # Six products of bfloat16 are wide where 64 rows meet, which one of float32 has no room for.
    rows = 64 if shape.rate == "six" and target in ("sm_90", "sm_100") else block
    score_n = min(64 if small else 128, max(16, 1 << (shape.atoms - 1).bit_length()))
    # Masked or unaligned rows are not copied to shared memory but held in registers.
    loose = shape.width % block or shape.out % block
    if loose:
        score_n = min(score_n, block)
    if target != "gfx942" and (shape.rate == "six" or (loose and not small)):
        # Left to itself, ptxas spills a little here to fit more programs on a unit.
        common["maxnreg"] = 255
    few = shape.tokens <= 64
    score_m = max(16, min(rows, 1 << (shape.tokens - 1).bit_length())) if few else rows
    programs = -(-shape.tokens // score_m) * -(-shape.atoms // score_n)
    chosen = {
        "scores": {
            "BLOCK_M": score_m, "BLOCK_N": 32 if few else score_n, "BLOCK_D": block, **common
        },
        "aggregate": {
            "BLOCK_M": rows,
            "BLOCK_N": 32,
            "BLOCK_O": 128 if not small else 32 if loose else 64,
            **common,
        },
        "bank": {"BLOCK_M": block, "BLOCK_A": 16, "BLOCK_B": 64, **common},
        "gram": {"BLOCK_N": 32, "BLOCK_A": 32 if small else 64, "BLOCK_B": 64, **common},
        # Splits fill the device twice over and leave each at least 256 features.
        "splits": max(1, min(2 * units // programs, shape.width // 256, 16)),
        "bank_splits": max(1, min(64, 2 * units // max(1, (shape.width + shape.out) // 64))),
    }  # fmt: skip
    if pair:
        first, second = pair
        tall = first + second > 64 and not small
        chosen["resident"] = {
            "BLOCK_M": 128 if tall else rows,
            "BLOCK_N": first,
            "BLOCK_N2": second,
            "BLOCK_D": 64 if shape.width % 64 == 0 and not small else 32,
            "BLOCK_O": 64 if shape.out % 64 == 0 and not small else 32,
            **common,
            "num_warps": 8 if tall else 4,
        }
        if tall:
            chosen["resident"].pop("maxnreg", None)
    return chosen


def _tuned_tiles(chosen, tuned, width, out):
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

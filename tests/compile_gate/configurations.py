"""Every configuration of every kernel that the library ships, per target, as recorded launches.

Nothing is listed by hand but the calls: the library plans and launches them on tensors without
memory, and a launch is recorded where it would go to the GPU. So tiles, flags, strides and their
divisibility are those of a real call.
"""

import contextlib
import random
from dataclasses import dataclass, field
from unittest import mock

import torch
import triton.language as tl
from machine_code import TARGETS

from moram_kernels.triton_backend import backward, forward, launcher, networks, plan, tiles
from moram_kernels.triton_backend.devices import REFERENCES
from moram_kernels.triton_backend.segments import Table

_SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "int32": "i32"}


@dataclass(frozen=True)
class Launch:
    """One kernel launch as the library would make it."""

    kernel: object = field(repr=False)
    args: tuple = field(repr=False)
    meta: dict = field(repr=False)
    ci: bool = False

    @property
    def kind(self):
        """The kernel's name."""
        return self.kernel.fn.__name__.removeprefix("_").removesuffix("_kernel")

    @property
    def dtypes(self):
        """Dtypes of the tensors that are read or written, each once."""
        names = [str(a.dtype).removeprefix("torch.") for a in self.args if torch.is_tensor(a)]
        return [short for name, short in _SHORT.items() if name in names and short != "i32"]

    @property
    def label(self):
        """Name of the configuration, from everything that the compiled code depends on."""
        odd = sum(1 for a in self.args if isinstance(a, int) and a % 16)
        return f"{self.form} odd{odd}" if odd else self.form

    @property
    def form(self):
        """Name of tile, flags and dtypes: the configuration without the divisibility of sizes."""
        low = [d for d in self.dtypes if d != "fp32"]
        parts = [self.kind, "+".join(low) or "fp32"]
        tile = [
            f"{name.removeprefix('BLOCK_').lower().replace('2', '+')}{value}"
            for name, value in self.meta.items()
            if name.startswith("BLOCK_") and value
        ]
        flags = [name.lower() for name, value in self.meta.items() if value is True]
        parts += [".".join(tile), *flags]
        if "TOP_K" in self.meta and "all" not in flags:
            parts.append(f"k{self.meta['TOP_K']}")
        for name in ("SPLITS",):
            parts += [f"{name.lower()}{self.meta[name]}"] if name in self.meta else []
        parts += [f"{name.lower()}.fp32" for name in self.wide_products]
        if self.wide_products:
            # Bytes a number of its tensors: which side of a product is narrow makes another kernel.
            tensors = [a for a in self.args if torch.is_tensor(a) and a.is_floating_point()]
            parts.append("".join(str(t.itemsize) for t in tensors))
        if self.meta.get("PRECISION", "ieee") != "ieee":
            parts.append(self.meta["PRECISION"])
        parts.append(f"w{self.meta['num_warps']}")
        for name, letter in (("num_stages", "s"), ("maxnreg", "r")):
            parts += [f"{letter}{self.meta[name]}"] if name in self.meta else []
        return " ".join(parts)

    @property
    def wide_products(self):
        """Which products of a kernel that reads 16-bit tensors are float32 all the same."""
        if self.dtypes[-1] == "fp32":
            return []
        return [name for name in ("DOT", "DOT_VALUES") if self.meta.get(name) is tl.float32]

    @property
    def dots(self):
        """How many tiles meet in products; 0 for a kernel without any."""
        two = bool(self.meta.get("BLOCK_N2"))
        tiles = {"score": 2, "aggregate": 2, "bank_gradient": 4, "gram": 2, "resident": 3 + 2 * two}
        return tiles.get(self.kind, 0)

    @property
    def is_wide(self):
        """Whether every product's result is at least 64 x 64, as the wide instructions want."""
        rows, columns = {
            "score": ("BLOCK_M", "BLOCK_N"),
            "aggregate": ("BLOCK_M", "BLOCK_O"),
            "resident": ("BLOCK_M", "BLOCK_N"),
        }.get(self.kind, ("BLOCK_A", "BLOCK_B"))
        return min(self.meta[rows], self.meta[columns]) >= 64

    @property
    def streams(self):
        """Whether every operand must come by asynchronous copies: 16 bit, aligned, no masks."""
        even = all(self.meta.get(name, True) for name in ("EVEN_D", "EVEN_O", "EVEN_A", "EVEN_B"))
        sizes = all(a % 16 == 0 for a in self.args if isinstance(a, int))
        aligned = self.meta.get("ALIGNED", True)
        low = self.dtypes[-1] != "fp32" and not self.wide_products
        return bool(self.dots and low and even and sizes and aligned)


@dataclass(frozen=True)
class Call:
    """One call of the library: sizes as in `plan.plan`, M tokens, D -> O, N atoms."""

    atoms: int
    top_k: int = 16
    dtype: str = "bfloat16"
    training: bool = True
    path: str = "split-dense"
    tokens: int = 4096
    width: int = 768
    out: int = 768
    current: int = 16
    precision: str = "ieee"
    # Dtypes of the residual, output and gradient, and of the bank, if they are not that of x.
    result: str | None = None
    bank: str | None = None
    # Whether training calls record their backward as well.
    backward: bool = True
    ci: bool = False


def calls():
    """Every kind of call that reaches another configuration of some kernel.

    What depends on the dtype only through a conversion is covered in bfloat16.
    """
    yield from _resident_calls()
    for how in _numbers():
        main = how == {"dtype": "bfloat16"}
        yield Call(512, **how, ci=main)
        # Sizes that are no multiples of a tile or of 16 bytes.
        yield Call(500, **how, width=1000, out=36, current=10, ci=main)
        yield Call(20480, **how, path="split-gather", ci=main)
        yield Call(20470, **how, path="split-gather", width=1000, out=36, current=10)
        for tokens in (1, 64):
            yield Call(512, **how, path="decode", training=False, tokens=tokens, ci=main)
        # Every width of the scores' tile.
        for atoms in (16, 32, 64):
            yield Call(atoms, **how, training=False)
    # Every tile that the model takes for some size.
    for tokens in (512, 2048, 8192, 65536):
        for atoms in (64, 128, 256, 4096):
            for width in (768, 4096):
                yield Call(atoms, tokens=tokens, width=width, out=width)
                yield Call(atoms, bank="float32", tokens=tokens, width=width, out=width)
                yield Call(atoms, 8, tokens=tokens, width=width, out=width, training=False)
    # 16-bit tensors onto a float32 residual.
    for atoms, path in ((64, "resident"), (512, "split-dense"), (20480, "split-gather")):
        yield Call(atoms, path=path, result="float32", ci=True)
    # Features that are multiples of 32 or 64, but not of every tile.
    for width in (96, 960, 1152, 1408):
        for dtype, bank in (("bfloat16", None), ("float32", None), ("bfloat16", "float32")):
            yield Call(512, 8, dtype=dtype, bank=bank, width=width, out=width)
    yield Call(96, 32, dtype="float32", width=4096, out=100, tokens=512, training=False)
    yield from _random_calls(60)
    for power in range(4, 14):
        atoms = 2**power
        for training in (True, False):
            ci = atoms in (128, 8192) and training
            yield Call(atoms, training=training, ci=ci)
            yield Call(atoms, top_k=atoms, training=training)
            yield Call(atoms, min(16, atoms // 4), training=training, path="split-gather", ci=ci)
        yield Call(atoms, path="decode", training=False, tokens=8)
    for top_k in (1, 32, plan.LIST_TOP_K):
        yield Call(4096, top_k=top_k, path="split-gather")
        yield Call(65536, top_k=top_k, path="split-gather", training=False)


def _random_calls(count):
    """What users may come up with, the same ones every time."""
    r = random.Random(0)
    for _ in range(count):
        yield Call(
            r.choice((8, 24, 72, 104, 136, 200, 328, 1000, 3000, 12000)),
            r.choice((2, 4, 8, 16, 32)),
            r.choice(("bfloat16", "float16", "float32")),
            r.random() < 0.5,
            r.choice(("resident", "split-dense", "split-gather", "decode")),
            r.choice((1, 16, 200, 1000, 5000, 40000)),
            r.choice((64, 640, 768, 1152, 2048, 4096)),
            r.choice((64, 256, 768, 1024, 3072, 11008)),
            r.choice((0, 8)),
        )


def _resident_calls():
    for atoms in map(sum, tiles.TILES):
        for numbers in _numbers():
            how = {**numbers, "path": "resident", "backward": False}
            if numbers != {"dtype": "bfloat16"}:
                for training in (True, False)[numbers["dtype"] == "float16" :]:
                    yield Call(atoms, min(16, atoms), **how, training=training)
                continue
            for top_k in sorted({*networks.TOP_K, atoms}):
                # In training the scores are stored too, which takes most registers.
                for training in (True, False) if top_k >= 16 or atoms > 128 else (True,):
                    if top_k <= atoms:
                        ci = training and top_k == 16 and atoms >= 64
                        yield Call(atoms, top_k, **how, training=training, ci=ci)
                    if top_k == 16:
                        # Columns in steps of 32; rows that are no multiple of 16.
                        narrow = {"width": 96, "out": 96, "tokens": 4099}
                        yield Call(atoms - 3, **how, training=training, **narrow)


def _numbers():
    """Dtypes of x and the bank, and the precision, as `Call` has them."""
    yield {"dtype": "bfloat16"}
    yield {"dtype": "float16"}
    yield from ({"dtype": "float32", "precision": precision} for precision in plan.PRECISIONS)
    yield {"dtype": "bfloat16", "bank": "float32"}
    yield {"dtype": "float16", "bank": "float32"}


def shipped(target, subset=None):
    """{label: `Launch`} of a target; subset "ci" keeps a cross-section of bfloat16."""
    found = {}
    for call in calls():
        for launch in record(call, target):
            wanted = found.setdefault(launch.label, launch)
            if launch.ci and not wanted.ci:
                found[launch.label] = launch
    return {label: one for label, one in found.items() if subset is None or one.ci}


def planned(call, target):
    """The `Plan` of a call on its path, None where that is not offered; without one the fastest."""
    met = (call.dtype, call.result or call.dtype, call.bank or call.dtype)
    met = plan.dtype_name(*(getattr(torch, name) for name in met))
    shape = (call.tokens, call.width, call.out, call.atoms, call.top_k, met, call.training)
    how = {"current": call.current, "precision": call.precision, "table": {}}
    device = REFERENCES[target][0]
    fastest = plan.plan(*shape, device, **how)
    if call.path is None:
        return fastest
    if call.path not in fastest.seconds:
        return None
    return plan.plan(*shape, device, **how, path=call.path)


def record(call, target, chosen=None):
    """The launches of a call's forward and, in training, of its backward.

    Args:
        chosen: a `Plan` to follow instead of the call's own.
    """
    chosen = chosen or planned(call, target)
    if chosen is None:
        return []
    launches = []

    def new(dtype, *shape):
        dtype = getattr(torch, dtype or call.dtype)
        return torch.empty(shape, dtype=dtype, device="meta")

    current = min(call.current, call.atoms)
    keys, values = (
        Table.of(new(call.bank, call.atoms - current, width), new(call.bank, current, width))
        for width in (call.width, call.out)
    )
    x, y = new(None, call.tokens, call.width), new(call.result, call.tokens, call.out)
    settings = (call.top_k, 0.1, 0.0 if call.training else 0.2, 1e-12)
    saved = None
    if call.training:
        sizes = (call.tokens, call.atoms, current, call.top_k, chosen.backward)
        saved = forward.new_saved(x, *sizes)
    with _recording(launches, call.ci, target):
        how = (settings, call.training)
        forward.forward(x, keys, values, y, y, *how, saved, chosen)
        if call.training and call.backward:
            backward.backward(y, x, keys, values, saved, *how, chosen, (True, True))
    return launches


@contextlib.contextmanager
def _recording(launches, ci, target):
    """Append launches to a list instead of making them, on a GPU that is pretended."""

    def keep(kernel, grid, *args, **meta):
        launches.append(Launch(kernel, args, meta, ci))

    arch = TARGETS[target].arch
    with (
        mock.patch.object(launcher, "start", keep),
        mock.patch.object(launcher, "target", lambda device: arch),
    ):
        yield

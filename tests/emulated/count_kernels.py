"""Counts what every kernel executes for shapes of real layers, in the compiled code.

    make counts ARGS="[--archs 80,90] [--only PATTERN] [--out counts.csv]"

A call is planned for all of its tokens, and some of them are emulated: enough to fill a tile, so
that counts are proportional to tokens. Where features or atoms are fewer than the layer's, the row
says so. Numbers are random, on which the steps of a search for the top-k depend a little.

Counted are instructions of PTX. "instructions in the file" compares its length with machine code's.
"""

import argparse
import csv
import re
from dataclasses import replace
from pathlib import Path

import configurations
import torch
from configurations import Call
from counts import Counts
from emulated_driver import EmulatingDriver
from machine_code import compile_launch, read
from paths import call, run_training
from ptx_text import parse
from test_emulated_operator import emulating
from test_emulated_tiles import case_of, planned

OUT = Path(__file__).with_name("counts.csv")
INFERENCE = {"training": False}
# (layer, call as planned, what is emulated instead of its sizes).
LAYERS = (
    (
        "CLIP attention, 10 tasks",
        Call(160, tokens=12608, **INFERENCE),
        {"tokens": 256},
    ),
    ("CLIP attention, first task", Call(16, tokens=12608), {"tokens": 256}),
    ("CLIP attention, tenth task", Call(160, tokens=12608), {"tokens": 256}),
    (
        "LLaMA-7B q_proj",
        Call(64, 8, tokens=4096, width=4096, out=4096, current=8),
        {"tokens": 128},
    ),
    (
        "Gemma-2B",
        Call(512, tokens=8192, width=2048, out=2048, current=64, **INFERENCE),
        {"tokens": 128},
    ),
    (
        "many atoms",
        Call(4096, tokens=8192, width=2048, out=2048, current=64),
        {"tokens": 64, "width": 512, "out": 512},
    ),
    (
        "many atoms",
        Call(16384, tokens=12608, current=64, **INFERENCE),
        {"tokens": 64, "width": 192, "out": 192},
    ),
    (
        "many atoms",
        Call(65536, tokens=8192, current=64, **INFERENCE),
        {"tokens": 8, "width": 192, "out": 192},
    ),
    (
        "decode",
        Call(64, 8, tokens=1, width=4096, out=4096, current=8, **INFERENCE),
        {},
    ),
    (
        "decode",
        Call(512, tokens=32, width=4096, out=4096, current=64, **INFERENCE),
        {"tokens": 8},
    ),
)
COLUMNS = (
    *("target", "layer", "kernel", "launches", "tokens", "D", "O", "atoms", "top_k", "mode"),
    *("what", "of", "value"),
)


class CountingDriver(EmulatingDriver):
    """Counts what the launches of each kernel execute."""

    def __init__(self, arch, kept=()):
        super().__init__(arch, kept)
        self.counts, self.launches = {}, {}

    def counts_of(self, program):
        name = program.kernel.name.removeprefix("_").removesuffix("_kernel")
        self.launches[name] = self.launches.get(name, 0) + 1
        return self.counts.setdefault(name, Counts())


def count(layer, planned_call, changes, arch):
    """Rows of `COLUMNS` of a layer's forward and, in training, its backward."""
    plan = configurations.planned(replace(planned_call, path=None), f"sm_{arch}")
    small = replace(planned_call, path=plan.path, **changes)
    case = case_of(small)
    with emulating(arch, case, kind=CountingDriver) as driver, planned(plan):
        if small.training:
            run_training(case, small.path)
        else:
            call(case, small.path)
    lengths = {}
    for launch in configurations.record(small, f"sm_{arch}", plan):
        lengths.setdefault(launch.kind, []).append(length_of(launch, f"sm_{arch}"))
    mode = "training" if small.training else "inference"
    sizes = (small.tokens, small.width, small.out, small.atoms, small.top_k, mode)
    for kernel, counts in driver.counts.items():
        start = (f"sm_{arch}", layer, kernel, driver.launches[kernel], *sizes)
        for name, number in sorted(counts.instructions.items()):
            yield *start, "warp instructions", name, number
        for name, index in (("ptx", 0), ("machine code", 1)):
            yield *start, "instructions in the file", name, sum(n[index] for n in lengths[kernel])
        for (tensor, way), totals in sorted(counts.tensors.items()):
            for what in ("asked", "moved"):
                yield *start, f"bytes {what} by {way}s", tensor, totals[what]
        if counts.ideal:
            yield *start, "passes over shared memory", "all", counts.wavefronts
            yield *start, "passes over shared memory", "without conflicts", counts.ideal


def length_of(launch, target):
    """(instructions of PTX, of machine code) of a recorded launch."""
    compiled = compile_launch(launch, target)
    blocks = parse(compiled.asm["ptx"]).blocks
    return sum(len(block.code) for block in blocks), read(compiled, target)["instructions"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--archs", default="80,90", help="compute capabilities")
    parser.add_argument("--only", default="", help="regular expression of layers")
    parser.add_argument("--out", type=Path, default=OUT, help="CSV to write")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with args.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for arch in map(int, args.archs.split(",")):
            for layer, planned_call, changes in LAYERS:
                if re.search(args.only, layer):
                    print(f"sm_{arch} {layer}: {planned_call}", flush=True)
                    writer.writerows(count(layer, planned_call, changes, arch))


if __name__ == "__main__":
    main()

"""Breaks compiled kernels one place at a time: does the emulator notice?

    make mutations ARGS="[--most 12] [--only PATTERN] [--archs 80,90] [--out mutations.csv]"

Every kernel is launched as the operator launches it, on sizes that fill no tile and rows with gaps
of NaN between them. Then one line of its PTX is changed, and it runs again on the same memory. A
change is noticed if it traps or if other bits come out. For one that is not:

- not run: no thread comes there, or only with its mask false;
- mask true: no thread has the mask false;
- covered: it is noticed once what is idle is changed too, so that another one does the same;
- idle: all idle places of a kernel and kind can be changed together, and nothing is noticed.
"""

import argparse
import csv
import random
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from emulated_driver import EmulatingDriver
from machine import Program
from paths import TRAINED, call, run_training
from test_emulated_operator import a_case, changed, emulating
from threads import Trap

OUT = Path(__file__).with_name("mutations.csv")
GUARD = r"\s*@(!?)(%p\d+) "
# Traps where a condition holds: the address is one of no tensor.
PROBE = (
    "{ .reg .b64 %far; .reg .pred %odd; .reg .b16 %bits; mov.b64 %far, 0x100000000000000; "
    "CONDITION ld.global.b8 %bits, [%far]; }"
)
# Kind of fault: (pattern of a line, what replaces the line).
KINDS = {
    "barrier removed": (r"\s*bar\.sync\s+0;", ""),
    "copy's wait removed": (r"\s*cp\.async\.wait_group.*", ""),
    "copy's wait one group short": (
        r"(\s*cp\.async\.wait_group\s+)(\d+);",
        lambda found: f"{found[1]}{int(found[2]) + 1};",
    ),
    "copy's commit removed": (r"\s*cp\.async\.commit_group;", ""),
    "copy's mask dropped": (r"(\s*cp\.async\..*), %r\d+;", r"\1;"),
    "copy from 16 bytes on": (r"(\s*cp\.async\..*\], \[ %rd\d+) \+ 0(.*)", r"\1 + 16\2"),
    "load's mask dropped": (GUARD + r"(ld\.global.*)", r"\3"),
    "store's mask dropped": (GUARD + r"(st\.global.*)", r"\3"),
    "load from 16 bytes on": (r"(.*ld\.global.*\[ %rd\d+) \+ 0(.*)", r"\1 + 16\2"),
    "store 16 bytes on": (r"(.*st\.global.*\[ %rd\d+) \+ 0(.*)", r"\1 + 16\2"),
    "shared access 16 bytes on": (
        r"(.*(?:ld|st)\.shared.*\[\s*%r\d+)(?: \+ 0)?( ?\].*)",
        r"\1 + 16\2",
    ),
    "shared store removed": (r".*st\.shared.*", ""),
    "ldmatrix 32 bytes on": (r"(\s*ldmatrix.*\[%r\d+)(\].*)", r"\1+32\2"),
    "proxy fence removed": (r"\s*fence\.proxy\.async.*", ""),
    "wgmma's wait removed": (r"\s*wgmma\.wait_group.*", ""),
    "wgmma's commit removed": (r"\s*wgmma\.commit_group.*", ""),
    "wgmma 32 bytes on": (
        r"(\s*wgmma\.mma_async.*\}, (%rd\d+), %rd\d+,.*)",
        r"add.s64 \2, \2, 2;\1",
    ),
}
UNNOTICED = ""
MASKS = {"copy's mask dropped", "load's mask dropped", "store's mask dropped"}


@dataclass
class Recorded:
    """A launch with the memory before and after it.

    arguments: as for `EmulatingDriver.run`. before, after: bytes of each storage, in order.
    """

    driver: EmulatingDriver
    program: Program
    grid: tuple
    arguments: list
    before: list = field(default_factory=list)
    after: list = field(default_factory=list)

    @property
    def storages(self):
        """Storages of the launch, each once."""
        tensors = [value for _, value, _ in self.arguments if isinstance(value, torch.Tensor)]
        return {one.data_ptr(): one for one in (t.untyped_storage() for t in tensors)}.values()

    def bytes(self):
        return [torch.tensor([], dtype=torch.uint8).set_(one).clone() for one in self.storages]

    def run(self, program):
        """The memory after a program ran in place of the launch's own."""
        for storage, bits in zip(self.storages, self.before, strict=True):
            torch.tensor([], dtype=torch.uint8).set_(storage).copy_(bits)
        EmulatingDriver.run(self.driver, program, self.grid, self.arguments)
        return self.bytes()

    def outcome(self, lines):
        """A trap's kind, "bits" where other ones came out, or `UNNOTICED`."""
        try:
            found = self.run(Program("\n".join(lines), self.program.shared))
        except Trap as trap:
            return trap.kind
        same = all(map(torch.equal, found, self.after))
        return UNNOTICED if same else "bits"


class RecordingDriver(EmulatingDriver):
    """Keeps the first launch of every kernel that it compiled."""

    def __init__(self, arch, kept=()):
        super().__init__(arch, kept)
        self.recorded = {}

    def run(self, program, grid, arguments):
        one = Recorded(self, program, grid, arguments)
        one.before = one.bytes()
        super().run(program, grid, arguments)
        one.after = one.bytes()
        self.recorded.setdefault(program.text, one)


def gapped(tensor):
    """The same numbers, aligned, in rows with 16 times NaN behind each."""
    rows, columns = tensor.shape
    buffer = tensor.new_full((rows, columns + 16), float("nan"))
    return buffer[:, :columns].copy_(tensor)


def cases():
    """(path, case): several tiles along every axis, none of them full."""
    sizes = {
        "resident": {"rows": 149, "frozen": 80, "current": 12, "width": 160, "out": 160},
        "split-dense": {"rows": 149, "frozen": 280, "width": 208, "out": 144, "top_k": 8},
        "split-gather": {"rows": 37, "frozen": 151, "width": 208, "out": 144},
        "decode": {},
    }
    # Features in whole tiles, which wgmma takes, and more atoms than one row of registers has.
    whole = {"rows": 149, "frozen": 280, "width": 192, "out": 192}
    wide = {"rows": 5, "frozen": 8300, "width": 80}
    for path, changes in (*sizes.items(), ("split-dense", whole), ("split-gather", wide)):
        yield path, changed(a_case(path, **changes), gapped)


def recorded(arch):
    """A `Recorded` launch of every kernel that the cases compile for a target."""
    found = {}
    for path, case in cases():
        with emulating(arch, case, kind=RecordingDriver) as driver:
            if path in TRAINED:
                run_training(case, path)
            call(case, path)
        found |= driver.recorded
    return list(found.values())


def broken(lines, numbers, kind):
    """Lines of PTX with some of them broken."""
    pattern, change = KINDS[kind]
    lines = lines.copy()
    for number in numbers:
        lines[number] = re.sub(pattern, change, lines[number], count=1)
    return lines


def probed(lines, number, wanted):
    """Lines that trap where the access of one of them has its mask true, or false.

    An instruction without a mask traps wherever it runs, or never.
    """
    line, condition = lines[number], "" if wanted else None
    if guard := re.match(GUARD, line):
        condition = f"@{guard[1] if wanted else '' if guard[1] else '!'}{guard[2]}"
    elif size := re.fullmatch(r"\s*cp\.async\..*, 0x\w+, (%r\d+);", line):
        # Copied bytes, 0 where the mask is false.
        condition = f"setp.{'ne' if wanted else 'eq'}.b32 %odd, {size[1]}, 0; @%odd"
    lines = lines.copy()
    if condition is not None:
        lines[number] = PROBE.replace("CONDITION", condition) + line
    return lines


def examine(one, kind, most, draw):
    """How many places of a kind of fault in a `Recorded` launch have which outcome."""
    lines = one.program.text.splitlines()
    places = [n for n, line in enumerate(lines) if re.fullmatch(KINDS[kind][0], line)]
    places = sorted(draw.sample(places, min(most, len(places))))
    outcomes = {n: one.outcome(broken(lines, [n], kind)) for n in places}
    idle = []
    for n in (n for n in places if outcomes[n] == UNNOTICED):
        if one.outcome(probed(lines, n, True)) == UNNOTICED:
            outcomes[n] = "not run"
        elif kind in MASKS and one.outcome(probed(lines, n, False)) == UNNOTICED:
            outcomes[n] = "mask true"
        elif one.outcome(broken(lines, [*idle, n], kind)) == UNNOTICED:
            outcomes[n] = "idle"
            idle.append(n)
        else:
            outcomes[n] = "covered"
    return Counter(outcomes.values()), [n + 1 for n in idle]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--archs", default="80,90", help="compute capabilities")
    parser.add_argument("--only", default="", help="regular expression of kernels")
    parser.add_argument("--most", type=int, default=12, help="places of a kernel and kind")
    parser.add_argument("--out", type=Path, default=OUT, help="CSV to write")
    args = parser.parse_args()
    torch.set_num_threads(1)
    draw, rows = random.Random(0), Counter()
    for arch in map(int, args.archs.split(",")):
        for one in recorded(arch):
            name = one.program.kernel.name
            if not re.search(args.only, name):
                continue
            for kind in KINDS:
                found, idle = examine(one, kind, args.most, draw)
                rows.update({(arch, name, kind, outcome): n for outcome, n in found.items()})
                if found:
                    note = f"; idle: lines {idle}" if idle else ""
                    print(f"sm_{arch} {name} {kind}: {dict(found)}{note}", flush=True)
    with args.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["target", "kernel", "broken", "outcome", "places"])
        writer.writerows((f"sm_{key[0]}", *key[1:], count) for key, count in sorted(rows.items()))


if __name__ == "__main__":
    main()

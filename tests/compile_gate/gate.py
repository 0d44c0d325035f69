"""Compiles every shipped configuration and fails where the machine code is not what it should be.

    python tests/compile_gate/gate.py [--targets 80,89,90,100,120,gfx942] [--subset ci] [--update]

The numbers of each Triton version are in a golden file of its own. Needs no GPU. What it cannot
see: bank conflicts, bandwidth, launch overhead, races.
"""

import argparse
import json
import re
import sys
import time
from pathlib import Path

import triton
from configurations import shipped
from machine_code import TARGETS, compile_launch, read

from moram_kernels.triton_backend import available, launcher
from moram_kernels.triton_backend.devices import REFERENCES

GOLDEN = Path(__file__).with_name("golden")
RECORDED = ("registers", "stack", "shared", "instructions", "mma")
# Bytes a thread that may live in local memory: what the ABI takes, but no spilled tile.
STACK = 16
# Growth of the number of instructions that is a regression.
GROWTH = 1.15


def golden_file():
    """The numbers of this Triton version."""
    return GOLDEN / f"{triton.__version__}.json"


def why_unknown():
    """Why nothing is known of this Triton version, one sentence with the remedy, or None."""
    if golden_file().exists():
        return None
    known = sorted(path.stem for path in GOLDEN.glob("*.json"))
    return (
        f"Triton must be {' or '.join(known)}, of which numbers are recorded, got "
        f"{triton.__version__}; run `make gate TRITON={known[-1]}`, or look at the numbers of this "
        "version and record them with --update"
    )


def _read():
    return json.loads(golden_file().read_text()) if golden_file().exists() else {}


def check(launch, target, facts, golden):
    """Everything that is wrong with a configuration, a list of sentences."""
    wrong = []
    if facts["stack"] > STACK:
        wrong.append(f"{facts['stack']} bytes of stack, at most {STACK}")
    if facts["local"]:
        wrong.append(f"{facts['local']} spills to local memory, none allowed")
    most = REFERENCES[target][0].shared
    if facts["shared"] > most:
        wrong.append(f"{facts['shared']} bytes of shared memory, at most {most}")
    if facts.get("serialised"):
        wrong.append("ptxas lets no products of warp groups overlap (C7515)")
    if facts["narrow_offsets"]:
        # Rows that lie far apart, as the last tokens of long sequences, would wrap around.
        wrong.append(f"{facts['narrow_offsets']} rows counted by their stride in 32 bits")
    wrong += _check_products(launch, target, facts)
    if golden is None:
        wrong.append(f"not in {golden_file().name}; look at the numbers, then run with --update")
    elif facts["instructions"] > GROWTH * golden["instructions"]:
        wrong.append(f"{facts['instructions']} instructions, {golden['instructions']} in golden")
    return wrong


def _check_products(launch, target, facts):
    if not launch.dots:
        return []
    narrow = launch.dtypes[-1] != "fp32" and not launch.wide_products
    wrong, low = [], narrow or launch.meta["PRECISION"] != "ieee"
    if low and not facts["mma"]:
        wrong.append("no tensor-core instruction")
    wide = {"sm_90": "hgmma", "sm_100": "tcgen05"}.get(target)
    if low and wide and launch.is_wide and not facts[wide]:
        wrong.append(f"no {wide} instruction in a product of 64 x 64 or more")
    if launch.streams and target in ("sm_80", "sm_90"):
        # Every operand is copied ahead for all stages but one, and once in the loop.
        needed = launch.dots * launch.meta["num_stages"]
        if facts["async_copies"] < needed:
            wrong.append(f"{facts['async_copies']} asynchronous tile copies, {needed} needed")
        if not facts["copies"]:
            wrong.append("no asynchronous copy instruction")
    return wrong


def run(targets, subset=None, update=False, only=None):
    """Check configurations, print a line each; {target/label: [what is wrong]}."""
    golden = _read()
    failures, summary = {}, {}
    for target in targets:
        recorded = golden.get(target, {})
        fresh = {}
        found = shipped(target, subset)
        reason = available.why_not_compiled(REFERENCES[target][0])
        if reason:
            print(f"{target} | nothing is compiled: {reason}")
        elif not found:
            failures[target] = ["no configuration"]
        for label, launch in sorted(found.items()):
            if only and not re.search(only, label):
                continue
            start = time.perf_counter()
            facts, wrong = _measure(launch, target, None if update else recorded.get(label), update)
            line = " ".join(f"{k}={v}" for k, v in facts.items() if v or k in RECORDED)
            took = f"{time.perf_counter() - start:.1f} s"
            print(f"{target} | {label} | {line} | {took} | {'; '.join(wrong) or 'ok'}", flush=True)
            if wrong:
                failures[f"{target} {label}"] = wrong
            if facts:
                fresh[label] = {name: facts[name] for name in RECORDED}
                summary.setdefault((target, launch.kind), []).append((facts, bool(wrong)))
        if update:
            _record(target, fresh, whole=not (subset or only))
    _print_summary(summary)
    return failures


def _record(target, fresh, whole):
    """Put a target's numbers in the golden file; whole: they replace all that it has of it."""
    # Read again, because another target may have been recorded meanwhile.
    golden = _read()
    golden[target] = fresh if whole else golden.get(target, {}) | fresh
    ordered = {name: golden[name] for name in TARGETS if name in golden}
    golden_file().write_text(_dump({"triton": triton.__version__, **ordered}))


def _measure(launch, target, golden, update):
    try:
        facts = read(compile_launch(launch, target), target)
    except Exception as error:  # Any failure to compile is a finding, not a crash of the gate.
        reason = " ".join(str(error).split())[-300:]
        return {}, [f"does not compile: {type(error).__name__}: {reason}"]
    if update:
        golden = facts
    return facts, check(launch, target, facts, golden)


def _print_summary(summary):
    print("\n| target | kernel | checked | failed | registers | stack | shared KB | instructions |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for (target, kind), rows in summary.items():
        failed = sum(wrong for _, wrong in rows)
        ranges = []
        for name, unit in (("registers", 1), ("stack", 1), ("shared", 1024), ("instructions", 1)):
            values = [-(-facts[name] // unit) for facts, _ in rows]
            ranges.append(f"{min(values)}-{max(values)}")
        print(f"| {target} | {kind} | {len(rows)} | {failed} | {' | '.join(ranges)} |")


def _dump(golden):
    """JSON with one configuration a line."""
    parts = [f'  "triton": "{golden["triton"]}"']
    for target, entries in golden.items():
        if target != "triton":
            lines = ",\n".join(
                f"    {json.dumps(label)}: {json.dumps(entry)}"
                for label, entry in sorted(entries.items())
            )
            parts.append(f'  "{target}": {{\n{lines}\n  }}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", default=",".join(TARGETS), help="80,89,90,100,120,gfx942")
    parser.add_argument("--subset", choices=("ci",), help="ci: a cross-section")
    parser.add_argument("--only", help="configurations whose label this regular expression finds")
    parser.add_argument("--update", action="store_true", help="record the golden file anew")
    args = parser.parse_args()
    if launcher.interpreting():
        parser.error("TRITON_INTERPRET is set, but kernels are to be compiled; unset it")
    if not args.update and why_unknown():
        parser.error(why_unknown())
    targets = [f"sm_{t}" if t.isdigit() else t for t in args.targets.split(",")]
    failures = run(targets, args.subset, args.update, args.only)
    print(f"\n{len(failures)} configurations failed")
    for label, wrong in failures.items():
        print(f"  {label}: {'; '.join(wrong)}")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()

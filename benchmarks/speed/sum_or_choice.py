"""What T tasks cost at inference: a stack of LoRAs, all summed, against a bank of atoms.

    python benchmarks/speed/sum_or_choice.py --out out/sum_or_choice.csv

One adapted Linear of --width features in and out, with rank (atoms a task) 8, after T tasks, in
float32 on the CPU. Values are random, so that each update does something. A stack can also be added
to the weight once and for all, where that is not shared or quantised: then it costs what "base"
costs. Ratios are medians of paired repeats, of a layer to the base. `bytes` are the adapter's own.
"""

import argparse
import csv
import shlex
import sys
from pathlib import Path
from statistics import median
from types import SimpleNamespace

# First of all: it puts this checkout on the path.
import measure
import torch
from torch import nn

from moram import MoRAMConfig, MoRAMLinear
from moram.layers import StackedLoRALinear

RANK = 8
COLUMNS = ("tasks", "tokens", "width", "layer", "us_per_token", "ratio_to_base", "bytes")
COLUMNS += ("threads", "repeats", "command")


def layers(width, tasks, seed=0):
    """The layers that are compared, by name, each after that many tasks."""
    generator = torch.Generator().manual_seed(seed)
    base = nn.Linear(width, width, bias=False)
    stack = StackedLoRALinear(base, RANK, generator=generator)
    config = MoRAMConfig(atoms_per_task=RANK, top_k=RANK, backend="torch")
    bank = MoRAMLinear.from_linear(base, config, generator=generator)
    for task in range(tasks):
        if task:
            stack.grow(generator)
            bank.bank.grow(RANK, generator)
        with torch.no_grad():
            stack.lora_B.normal_(std=0.1, generator=generator)
            bank.bank.current_values.normal_(std=0.1, generator=generator)
    return {"base": base, "stack": stack.eval(), "moram": bank.eval()}


def measure_case(width, tasks, tokens, repeats, seconds):
    """One row a layer."""
    found = layers(width, tasks)
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(1))

    def bind(layer):
        @torch.inference_mode()
        def call():
            return layer(x)

        return call

    calls = {name: bind(layer) for name, layer in found.items()}
    case = SimpleNamespace(device="cpu", seed=0)
    samples = measure.time_calls(calls, repeats, seconds, case)
    for name, layer in found.items():
        pairs = zip(samples[name], samples["base"], strict=True)
        state = {} if name == "base" else layer.adapter_state()
        yield {
            "tasks": tasks,
            "tokens": tokens,
            "width": width,
            "layer": name,
            "us_per_token": f"{1e3 * median(samples[name]) / tokens:.4g}",
            "ratio_to_base": f"{median(mine / base for mine, base in pairs):.3g}",
            "bytes": sum(t.numel() * t.element_size() for t in state.values()),
            "threads": torch.get_num_threads(),
            "repeats": len(samples[name]),
        }


def numbers(text):
    """Whole numbers from a text with commas."""
    return [int(part) for part in text.split(",")]


def main(arguments=None):
    """Measure all cases and write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tasks", type=numbers, default=[1, 8, 32, 128])
    parser.add_argument("--tokens", type=numbers, default=[1, 512])
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=10.0, help="at most, for a case")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    command = shlex.join(
        ["python", "benchmarks/speed/sum_or_choice.py", *(arguments or sys.argv[1:])]
    )
    with open(given.out, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for tasks in given.tasks:
            for tokens in given.tokens:
                for row in measure_case(given.width, tasks, tokens, given.repeats, given.seconds):
                    writer.writerow(row | {"command": command})
                    file.flush()
                    print(", ".join(f"{key} {row[key]}" for key in COLUMNS[:7]), flush=True)


if __name__ == "__main__":
    main()

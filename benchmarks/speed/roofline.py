"""What the adapter should take on a GPU, by a model, beside plain torch and a lower bound.

    python benchmarks/speed/roofline.py [--device H100] [--csv FILE]

A MODEL: NOTHING IN THIS TABLE WAS MEASURED. Ours is what `moram_kernels` would do: its plan chooses
path and tiles, its cost model (`triton_backend/cost.py`) gives the time. Plain, compiled plain and
the bound are in `baseline_model.py`. An error of 30 to 50 percent is likely, rankings within 1.2
mean nothing; `gpu.py` measures. bfloat16; while training the bank is in two pieces, frozen and
current, which rules out the vendor's products; at inference it is one. The output takes the
residual's memory, as in an adapted Linear.

Times are of one forward and of its backward. "plain", "compiled" and "ours" are what a caller from
Python waits: the longer of the device's time and the host's. "graphs" compares the device's times.
"""

import argparse
import csv
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import baseline_model as baseline  # noqa: E402

from moram_kernels.triton_backend import cost  # noqa: E402
from moram_kernels.triton_backend.plan import plan, rate_of  # noqa: E402


class Setting(NamedTuple):
    """A layer in use: M tokens, D -> O, N atoms of which C are current while training, top_k.

    dtype: as for `plan`.
    """

    name: str
    tokens: int
    width: int
    out: int
    atoms: int
    current: int
    top_k: int
    training: bool = False
    dtype: str = "bfloat16"


MIXED = "bfloat16+float32"
SETTINGS = (
    Setting("CLIP attention, 10 tasks", 12608, 768, 768, 160, 16, 16),
    Setting("CLIP c_fc, 10 tasks", 12608, 768, 3072, 160, 16, 16),
    Setting("CLIP attention, first task", 12608, 768, 768, 16, 16, 16, True),
    Setting("CLIP attention, tenth task", 12608, 768, 768, 160, 16, 16, True),
    Setting("CLIP tenth task, float32 atoms", 12608, 768, 768, 160, 16, 16, True, MIXED),
    Setting("LLaMA-7B q_proj", 4096, 4096, 4096, 64, 8, 8, True),
    Setting("LLaMA-7B q_proj, float32 atoms", 4096, 4096, 4096, 64, 8, 8, True, MIXED),
    Setting("LLaMA-7B q_proj prefill", 4096, 4096, 4096, 64, 8, 8),
    Setting("LLaMA-7B down_proj prefill", 4096, 11008, 4096, 64, 8, 8),
    Setting("Gemma-2B", 8192, 2048, 2048, 512, 64, 16),
    Setting("LLaMA-7B q_proj, short", 512, 4096, 4096, 64, 8, 8),
    Setting("many atoms", 8192, 2048, 2048, 4096, 64, 16, True),
    Setting("many atoms", 12608, 768, 768, 16384, 64, 16),
    Setting("many atoms", 8192, 2048, 2048, 16384, 64, 16),
    Setting("many atoms", 8192, 4096, 4096, 65536, 64, 16),
    Setting("decode", 1, 4096, 4096, 64, 8, 8),
    Setting("decode", 32, 4096, 4096, 512, 64, 16),
    Setting("decode", 64, 4096, 4096, 16384, 64, 16),
)
COLUMNS = (
    *("device", "pass", "name", "tokens", "D", "O", "atoms", "current_atoms", "top_k", "mode"),
    *("path", "plain_ops", "plain_us", "plain_device_us", "plain_topk_us"),
    *("plain_streamed_topk_us", "compiled_us", "compiled_device_us", "ours_us", "ours_device_us"),
    *("bound_us", "plain_over_ours", "compiled_over_ours", "plain_over_ours_graphs"),
    *("compiled_over_ours_graphs", "ours_over_bound"),
)


def main(argv=None):
    """Run the program on the arguments (of the shell, if None) and return its exit status."""
    names = [device.name for device in cost.DEVICES]
    parser = argparse.ArgumentParser(description="Print the modelled times of the adapter.")
    parser.add_argument("--device", choices=names, default="H100", help="whose rates")
    parser.add_argument("--csv", type=Path, help="also write the rows to this file, replaced")
    args = parser.parse_args(argv)
    rows = [row for setting in SETTINGS for row in model_rows(setting, args.device)]
    print(f"MODELLED for {args.device}, bfloat16, microseconds; nothing here was measured.")
    for name in ("forward", "backward"):
        print(f"\n{name}\n{to_markdown([row for row in rows if row['pass'] == name])}")
    if args.csv:
        args.csv.parent.mkdir(parents=True, exist_ok=True)
        with args.csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
    return 0


def to_shape(setting):
    """The setting as the cost model's `Shape`."""
    _, tokens, width, out, atoms, current, top_k, training, dtype = setting
    current = current if training else 0
    size, rate = 4 if dtype == "float32" else 2, rate_of(dtype, "ieee")
    joined = current in (0, atoms)
    return cost.Shape(tokens, width, out, atoms, current, top_k, size, rate, joined, training)


def plan_of(shape, device, dtype="bfloat16", path=None):
    """The plan of a shape, on its fastest path or the one named."""
    return plan(
        shape.tokens, shape.width, shape.out, shape.atoms, shape.top_k, dtype, shape.training,
        device, current=shape.current, joined=shape.joined, residual=False, path=path,
    )  # fmt: skip


def our_seconds(shape, chosen, model):
    """(forward, backward or None) device seconds of a plan, from the tiles that it chose."""
    if chosen.copy:
        shape = replace(shape, joined=True, copied=True)
    resident = chosen.tiles.get("resident", {})
    columns = resident.get("BLOCK_N", 0) + resident.get("BLOCK_N2", 0)
    forward = cost.forward_times(model, shape, columns or None, chosen.tiles)[chosen.path]
    if chosen.backward is None:
        return forward, None
    return forward, cost.backward_times(model, shape, chosen.tiles)[chosen.backward]


def model_rows(setting, device="H100"):
    """Rows of the table for a setting: its forward and, while training, its backward.

    The layer is an adapted Linear, whose base's product comes second: there is no residual, but
    what that product takes longer for adding to what is there.
    """
    model, shape = cost.device_model(device), to_shape(setting)
    alone = replace(shape, residual=False)
    chosen = plan_of(shape, device, setting.dtype)
    # Plain torch multiplies in float32 what is mixed.
    met = replace(shape, itemsize=shape.met, rate="half" if shape.met == 2 else "single")
    forward, backward = our_seconds(alone, chosen, model)
    passes = zip(
        ("forward", "backward"),
        baseline.record_plain(met, model),
        (forward + baseline.added(shape, model), backward),
        (baseline.our_host(shape, chosen.path), baseline.our_backward_host()),
        (baseline.bound(alone, model), baseline.backward_bound(shape, model)),
        (chosen.path, chosen.backward),
        strict=True,
    )
    for name, ops, device_time, host, bound, path in passes:
        if device_time is None:
            continue
        plain = baseline.plain_cost(ops)
        compiled = baseline.compiled_cost(met, model, ops, name == "backward")
        ours = baseline.Cost(device_time, host, 0)
        numbers = {
            "plain_us": plain.seconds,
            "plain_device_us": plain.device,
            "plain_topk_us": sum(op.seconds for op in ops if op.name == "topk"),
            "plain_streamed_topk_us": baseline.plain_cost(ops, streamed=True).seconds,
            "compiled_us": compiled.seconds,
            "compiled_device_us": compiled.device,
            "ours_us": ours.seconds,
            "ours_device_us": ours.device,
            "bound_us": bound,
        }
        yield {
            "device": model.name,
            "pass": name,
            "name": setting.name,
            "tokens": shape.tokens,
            "D": shape.width,
            "O": shape.out,
            "atoms": shape.atoms,
            "current_atoms": shape.current,
            "top_k": shape.top_k,
            "mode": "training" if shape.training else "inference",
            "path": path,
            "plain_ops": plain.count,
            **{key: round(seconds * 1e6, 3) for key, seconds in numbers.items()},
            "plain_over_ours": round(plain.seconds / ours.seconds, 3),
            "compiled_over_ours": round(compiled.seconds / ours.seconds, 3),
            "plain_over_ours_graphs": round(plain.device / ours.device, 3),
            "compiled_over_ours_graphs": round(compiled.device / ours.device, 3),
            "ours_over_bound": round(ours.device / bound, 3),
        }


def to_markdown(rows):
    """The rows as a Markdown table; microseconds."""
    lines = [
        "| layer | tokens, D->O, atoms, top_k | plain (ops) | compiled | ours (path) |"
        " ours, device | bound | plain / ours | compiled / ours |"
        " graphs: plain / ours, compiled / ours | ours / bound |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        sizes = f"{row['tokens']}, {row['D']}->{row['O']}, {row['atoms']}, {row['top_k']}"
        cells = (
            f"{row['name']}, {row['mode']}",
            sizes,
            f"{row['plain_us']:.0f} ({row['plain_ops']})",
            f"{row['compiled_us']:.0f}",
            f"{row['ours_us']:.0f} ({row['path']})",
            f"{row['ours_device_us']:.0f}",
            f"{row['bound_us']:.1f}",
            f"{row['plain_over_ours']:.1f}x",
            f"{row['compiled_over_ours']:.1f}x",
            f"{row['plain_over_ours_graphs']:.1f}x, {row['compiled_over_ours_graphs']:.1f}x",
            f"{row['ours_over_bound']:.2f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

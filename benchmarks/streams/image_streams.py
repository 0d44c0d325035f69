"""Runs every method over streams of image domains with the small CLIP, and writes the tables.

    python benchmarks/streams/image_streams.py search --out DIR
    python benchmarks/streams/image_streams.py small --out DIR
    python benchmarks/streams/image_streams.py real --data DIR --out DIR
    python benchmarks/streams/image_streams.py vit --out DIR

`small` needs no data. `real` reads MNIST's test images and CIFAR-10, see
`moram.xtail.data.small`.
`vit` is two tasks of the paper's preset with ViT-B/16, random weights: time and memory per step.
Each finished run stays in its folder below --out; the same command goes on with what is missing.
`--shard 0/2` and `--shard 1/2` share the runs out over two processes. The table of a part is
written when all its runs are there.
"""

from runs import parse, run_part

from moram.xtail.data.small import REAL, SMALL
from moram.xtail.report import REPORT
from moram.xtail.run import run_xtail

SEEDS = (0, 1, 2)

# What is compared: a name, its method, and what the small preset does not say already.
SLOW = {"lr": 2.5e-4, "label": "MoRAM, lr 2.5e-4"}
AVERAGE = {"lr": 2e-3, "label": "MoRAM, lr 2e-3"}
IMAGE = {"lr": 1e-3, "text_loss": False, "label": "MoRAM, image loss alone, lr 1e-3"}
PROTECTED = {"lr": 2e-3, "method_args.protect": 0.95}
METHODS = {
    "zero-shot": ("zero-shot", {}),
    "lora": ("lora", {}),
    "moram": ("moram", {}),
    "moram-slow": ("moram", SLOW),
    "moram-average": ("moram", AVERAGE),
    "moram-image": ("moram", IMAGE),
    "moram-protected": ("moram", PROTECTED),
    "moe-lora": ("moe-lora", {}),
    "moe-adapters": ("moe-adapters", {}),
    "codyra": ("codyra", {}),
    "dac": ("dac", {}),
    "lada": ("lada", {}),
    "rail-primal": ("rail-primal", {}),
    "rail-dual": ("rail-dual", {}),
}
# The same rates for every method that has one, on the stream of part small, scored on training
# images that were not drawn.
RATES = (2.5e-4, 5e-4, 1e-3, 2e-3)
VARIANTS = ("moram-slow", "moram-average", "moram-image")
WITHOUT_RATE = ("zero-shot", "rail-primal", "rail-dual", *VARIANTS)


def search_runs():
    """Name, method and changes of each run of the search."""
    for label, (method, changes) in METHODS.items():
        for lr in () if label in WITHOUT_RATE else RATES:
            held_out = {"datasets": SMALL, "held_out": True, "eval_limit": 200}
            held_out |= {"seed": 100, "label": f"{label}, lr {lr:g}"}
            yield f"search/{label}-lr{lr:g}", method, {**changes, **held_out, "lr": lr}


def stream_runs(part, datasets, without=()):
    """All methods over one stream, three seeds; seeds outermost."""
    for seed in SEEDS:
        for label, (method, changes) in METHODS.items():
            if label not in without:
                more = {"datasets": datasets, "seed": seed}
                yield f"{part}/{label}-seed{seed}", method, {**changes, **more}
    yield f"{part}/joint", "joint", {"datasets": datasets, "seed": 0}


def vit_runs():
    """Two tasks of the published protocol with the real architecture, for each backend."""
    short = {
        "pretrained": "random",
        "datasets": ("digits", "textures"),
        "iterations": 2,
        "batch_size": 16,
        "eval_limit": 8,
        "untrained": False,
        "workers": 1,
        "cache_gib": 1.0,
        "seed": 0,
    }
    for backend in ("torch", "reference"):
        named = {"method_args.backend": backend, "label": f"MoRAM, {backend}"}
        yield f"vit/{backend}", "moram", short | named
    yield "vit/lora", "lora", short


PARTS = {
    "search": search_runs,
    "small": lambda: stream_runs("small", SMALL),
    "real": lambda: stream_runs("real", ("digits", *REAL), VARIANTS),
    "vit": vit_runs,
}


def main():
    """Run one part, or this process's share of it."""
    place = "folder of the data sets of part real"
    arguments = parse(__doc__.splitlines()[0], PARTS, place, data_required=False)
    preset = "paper" if arguments.part == "vit" else "small"
    run_part(arguments, PARTS, run_xtail, REPORT, preset)


if __name__ == "__main__":
    main()

"""Runs every method over streams of image domains with the small CLIP, and writes the tables.

    python benchmarks/streams/image_streams.py search --out DIR
    python benchmarks/streams/image_streams.py steps --out DIR
    python benchmarks/streams/image_streams.py small --out DIR
    python benchmarks/streams/image_streams.py unseen --out DIR
    python benchmarks/streams/image_streams.py real --data DIR --out DIR
    python benchmarks/streams/image_streams.py vit --out DIR

`small` needs no data. `unseen` is its stream with what keeps zero-shot's answers on domains to
come. `real` reads MNIST's test images and CIFAR-10, see `moram.xtail.data.small`.
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
# What the experts learned, whatever the selector finds; and the loss of its own paper.
GIVEN = {"method_args.selection": "given", "label": "MoE-Adapters, router given"}
RELATIVE = {"method_args.selector_relative": True, "label": "MoE-Adapters, relative errors"}
SMOOTHED = {"text_loss": False, "label_smoothing": 0.2, "lr": 2.5e-4}
SMOOTHED["label"] = "MoE-Adapters, own loss"
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
    "moe-relative": ("moe-adapters", RELATIVE),
    "moe-given": ("moe-adapters", GIVEN),
    "moe-smoothed": ("moe-adapters", SMOOTHED),
    "codyra": ("codyra", {}),
    "dac": ("dac", {}),
    "lada": ("lada", {}),
    "rail-primal": ("rail-primal", {}),
    "rail-dual": ("rail-dual", {}),
}
# The same rates for every method that has one, on the stream of part small, scored on training
# images that were not drawn.
RATES = (2.5e-4, 5e-4, 1e-3, 2e-3)
# Beside them, for experts whose outputs are multiplied by 0.1.
FASTER = {"moe-adapters": (5e-3, 1e-2)}
VARIANTS = ("moram-slow", "moram-average", "moram-image", "moe-relative", "moe-given")
WITHOUT_RATE = ("zero-shot", "rail-primal", "rail-dual", *VARIANTS)


HELD_OUT = {"datasets": SMALL, "held_out": True, "eval_limit": 200, "seed": 100}
# More training than the 150 steps of the small preset, on the same images: the published number,
# at half the rate that the search found.
STEPS = 500
LONGER = {"lora": ("lora", {}, 5e-4), "moram-protected": ("moram", PROTECTED, 1e-3)}


def search_runs():
    """Name, method and changes of each run of the search."""
    for label, (method, changes) in METHODS.items():
        for lr in () if label in WITHOUT_RATE else (*RATES, *FASTER.get(label, ())):
            more = {**changes, **HELD_OUT, "label": f"{label}, lr {lr:g}", "lr": lr}
            yield f"search/{label}-lr{lr:g}", method, more


def steps_runs():
    """As the search, for how long to train."""
    for label, (method, changes, lr) in LONGER.items():
        more = {"iterations": STEPS, "lr": lr, "label": f"{label}, {STEPS} steps, lr {lr:g}"}
        yield f"steps/{label}-{STEPS}-lr{lr:g}", method, {**changes, **HELD_OUT, **more}


def stream_runs(part, datasets, without=()):
    """All methods over one stream, three seeds; seeds outermost."""
    for seed in SEEDS:
        for label, (method, changes) in METHODS.items():
            if label not in without:
                more = {"datasets": datasets, "seed": seed}
                yield f"{part}/{label}-seed{seed}", method, {**changes, **more}
    yield f"{part}/joint", "joint", {"datasets": datasets, "seed": 0}


def unseen_runs():
    """MoRAM as published and with what keeps zero-shot's answers on domains to come, two seeds."""
    variants = {
        "moram": {},
        "moram-aligned": {"lr": 2e-3, "method_args.alignment": 0.35},
        "moram-first": {"lr": 2e-3, "method_args.zero_shot_first": True},
    }
    for seed in SEEDS[:2]:
        for label, changes in variants.items():
            more = {"datasets": SMALL, "seed": seed}
            yield f"unseen/{label}-seed{seed}", "moram", {**changes, **more}


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
    "steps": steps_runs,
    "small": lambda: stream_runs("small", SMALL),
    "unseen": unseen_runs,
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

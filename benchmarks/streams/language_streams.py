"""Runs every method over language streams with a small real model, and writes the tables.

    python benchmarks/streams/language_streams.py search --data DIR --out DIR
    python benchmarks/streams/language_streams.py textcls --data DIR --out DIR
    python benchmarks/streams/language_streams.py trace --data DIR --out DIR

Each finished run stays in its folder below --out; the same command goes on with what is missing.
`--shard 0/2` and `--shard 1/2` share the runs out over two processes. The table of a part is
written when all its runs are there.
"""

from runs import parse, run_part

from moram.trace.protocol import TRACE
from moram.trace.report import REPORT
from moram.trace.run import run_trace

ORDERS = {
    "order1": ("agnews", "dbpedia", "yelp", "SST-2"),
    "order2": ("SST-2", "yelp", "dbpedia", "agnews"),
}
SEEDS = (0, 1, 2)

# What is compared: a name, its method, and what the small preset does not say already.
METHODS = {
    "lora": ("lora", {}),
    "moram": ("moram", {}),
    "o-lora": ("o-lora", {}),
    "ewc": ("ewc", {}),
    "moe-lora": ("moe-lora", {}),
    "tree-lora": ("tree-lora", {}),
    "moram-protected": ("moram", {"method_args.protect": 0.95}),
}
# The same three rates for every method, on the first two tasks, scored on held-out training data.
RATES = (1e-3, 2e-3, 3e-3)


def search_runs():
    """Name, method and changes of each run of the search."""
    for label, (method, changes) in METHODS.items():
        for lr in RATES:
            held_out = {"tasks": ORDERS["order1"][:2], "eval_split": "held-out", "lr": lr}
            held_out["label"] = f"{label}, lr {lr:g}"
            yield f"search/{label}-lr{lr:g}", method, held_out | changes


# The rate of each method with the highest mean accuracy after both tasks of the search; of equal
# ones the lower. Methods that were not searched take sequential LoRA's.
CHOSEN = {
    "lora": 1e-3,
    "moram": 2e-3,
    "o-lora": 2e-3,
    "ewc": 1e-3,
    "moe-lora": 2e-3,
    "tree-lora": 1e-3,
    "moram-protected": 3e-3,
}
BOUNDS = {"joint": ("joint", {"lr": 1e-3}), "task-lora": ("task-lora", {"lr": 2e-3})}


def chosen(label):
    """Method and changes of a label, with its rate."""
    method, changes = METHODS[label]
    return method, {**changes, "lr": CHOSEN[label]}


def textcls_runs():
    """Two orders and three seeds of four classification tasks; seeds outermost."""
    rows = {label: chosen(label) for label in METHODS}
    # The same method at the rate at which it learns as well as the best of the others.
    rows["lora-plastic"] = ("lora", {"lr": 2e-3, "label": "sequential LoRA, lr 2e-3"})
    yield "textcls/zero-shot", "zero-shot", {"tasks": ORDERS["order1"]}
    for seed in SEEDS:
        for order, tasks in ORDERS.items():
            for label, (method, changes) in rows.items():
                name = f"textcls/{label}-{order}-seed{seed}"
                yield name, method, {**changes, "tasks": tasks, "seed": seed}
    for label, (method, changes) in BOUNDS.items():
        yield f"textcls/{label}", method, {**changes, "tasks": ORDERS["order1"]}


def trace_runs():
    """The eight tasks of TRACE, small: short texts, few examples, one seed."""
    small = {
        # For want of a training file, its eval file is trained on.
        "train_split": {"MeetingBank": "eval"},
        "tasks": TRACE,
        "truncate_right": ("MeetingBank",),
        "train_limit": 128,
        "eval_limit": 32,
        "max_prompt": 128,
        "max_answer": 32,
        "max_new_tokens": 24,
        "eval_batch": 16,
    }
    for label in METHODS:
        method, changes = chosen(label)
        yield f"trace/{label}", method, small | changes
    yield "trace/joint", "joint", small | {"lr": BOUNDS["joint"][1]["lr"]}
    yield "trace/zero-shot", "zero-shot", small


# Tasks of three folders, to be put into one: textcls, those of `make demo`, ScienceQA of TRACE.
EIGHT = ("agnews", "dbpedia", "yelp", "SST-2", "topic", "feeling", "purpose", "ScienceQA")
# Searched as above but on 128 training examples a task, and at 1e-2 too: the best rate, still at
# the edge. The protected stack has the rate of protected MoRAM and was not searched.
EIGHT_ONLY = {
    "inf-lora": ("inf-lora", {"lr": 1e-2}),
    "lora-stack-protected": ("lora-stack", {"lr": 3e-3, "method_args.protect": 0.95}),
    "lora-plastic": ("lora", {"lr": 2e-3, "label": "sequential LoRA, lr 2e-3"}),
}


# The other way round, with another seed, for those that the question is about.
SECOND_LEFT_OUT = ("lora", "o-lora", "joint")
ALL_EIGHT = {"": (EIGHT, 3), "-order2": (EIGHT[::-1], 4)}


def eight_runs():
    """Eight tasks, two orders with a seed each: what does a choice add to protection?"""
    short = {
        "dtype": "float32",
        "pad_multiple": 1,
        "max_prompt": 80,
        "max_answer": 8,
        "train_limit": 160,
        "eval_limit": 50,
        "epochs": {"*": 1, "topic": 2, "feeling": 2, "purpose": 2},
    }
    rows = {label: chosen(label) for label in ("lora", "o-lora", "moram", "moram-protected")}
    for label, (method, changes) in (rows | EIGHT_ONLY | BOUNDS).items():
        for order, (tasks, seed) in ALL_EIGHT.items():
            if order and label in SECOND_LEFT_OUT:
                continue
            name = f"eight/{label}{order}"
            yield name, method, short | changes | {"tasks": tasks, "seed": seed}


# One factor of the protection at a time, beside protect 0.95, 256 directions and half strength.
FACTORS = {
    "protect": (0.9, 0.99),
    "protect_size": (64, 1536),
    "protect_strength": (0.25, 1.0),
}
HELD_OUT = {
    "eval_split": "held-out",
    "held_out": 40,
    "lr": 3e-3,
    "dtype": "float32",
    "pad_multiple": 1,
}


def varied(part, factors, stream):
    """A stream with the protection as it is, and with one factor changed at a time."""
    rows = [(f"{name} {value:g}", {name: value}) for name in factors for value in FACTORS[name]]
    for label, changes in [("protect 0.95, 256 directions, strength 0.5", {}), *rows]:
        args = {f"method_args.{name}": value for name, value in changes.items()}
        name = f"{part}/{label.replace(' ', '-').replace(',', '')}"
        protected = {"method_args.protect": 0.95, "label": label}
        yield name, "moram", HELD_OUT | stream | protected | args


def choice_runs():
    """The protection's settings on the demo's tasks, scored on held-out training examples."""
    demo = {"tasks": EIGHT[4:7], "seed": 3, "max_prompt": 48, "epochs": 2, "first_layer": 22}
    return varied("choice", FACTORS, demo)


def strength_runs():
    """Its strength alone on four classification tasks, which are longer."""
    short = {"seed": 4, "max_prompt": 80, "max_answer": 8, "train_limit": 160}
    return varied("strength", ("protect_strength",), short | {"tasks": ORDERS["order1"]})


PARTS = {
    "search": search_runs,
    "textcls": textcls_runs,
    "trace": trace_runs,
    "eight": eight_runs,
    "choice": choice_runs,
    "strength": strength_runs,
}


def main():
    """Run one part, or this process's share of it."""
    place = "folder of the tasks, in TRACE's format"
    arguments, cached = parse(__doc__.splitlines()[0], PARTS, place), {}
    run_part(arguments, PARTS, lambda own: run_trace(own, cached=cached), REPORT, "small")


if __name__ == "__main__":
    main()

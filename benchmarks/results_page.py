"""Writes the pages of results from the files under `results/`, and the table of methods.

    python benchmarks/results_page.py            # or: make results
    python benchmarks/results_page.py --check    # exit status 1 where a page is out of date

The pages below results/ are written as wholes. In other pages, what lies between the HTML comments
`<!-- begin NAME -->` and `<!-- end NAME -->` is. A part whose file is missing is left out.
"""

import argparse
import inspect
import re
import sys
from functools import partial
from pathlib import Path
from textwrap import fill

import results_tables as tables
from results_words import DEMOS, DETAILS, HEAD, PROBE, STUDIES

from moram.methods.registry import METHODS

ROOT = Path(__file__).resolve().parents[1]
# Folders that hold no page of this repository, besides hidden ones.
ELSEWHERE = {"out", "build"}
ROOMS = ("language", "images")
# Rows of the README's table, besides the best of the others.
FRONT, FRONT_ROWS = "language/textcls", 6
SHOWN = ("MoRAM, protected", "MoRAM", "sequential LoRA")


def results_pages(root):
    """The pages below results/: {path: text}."""
    folder = root / "benchmarks" / "results"
    found = {path.stem: tables.read(path) for path in folder.glob("*.json")}
    demos = [name for name in _ordered(DEMOS, found) if "methods" in found[name]]
    demos = {name: _demo(name, found[name]) for name in demos}
    runs = {
        str(path.parent.relative_to(folder)): tables.read(path)
        for path in folder.glob("*/*/runs.json")
    }
    studies = {name: runs[name] for name in _ordered(STUDIES, runs)}
    whole = [part for name, found in studies.items() for part in _study(name, found, "summary")]
    texts = {folder: [HEAD, *demos.pop("demo", ()), *whole, *_speed(folder)]}
    for room in ROOMS:
        parts = [DETAILS.format(room=room)]
        for name, found in studies.items():
            if name.startswith(f"{room}/"):
                parts += _study(name, found, "tasks")
        texts[folder / room] = parts
    probe, shares = folder / "images" / "probe.csv", folder / "language" / "shares.json"
    found = "What a ridge finds in the features"
    texts[folder / "images"] += _one_file(probe, found, PROBE, tables.probe_table)
    found = _one_file(shares, "Which atoms write", "", tables.share_table)
    texts[folder / "language"] += found + [p for parts in demos.values() for p in parts]
    return {place / "README.md": "\n\n".join(parts) + "\n" for place, parts in texts.items()}


def _ordered(known, found):
    return [name for name in known if name in found] + sorted(set(found) - set(known))


def _demo(name, results):
    settings = results["settings"]
    said = (
        f"{results.get('note', '')} {results['model']}, {settings['dtype'].split('.')[-1]}, seed "
        f"{settings['seed']}, {settings['atoms']} atoms or rank {settings['atoms']} a task, "
        f"{_count(settings['epochs'], 'epoch')}, layers from {settings.get('first_layer', 0)} on, "
        f"{results['total_seconds']:.0f} s in all. One run."
    )
    return [f"## {DEMOS.get(name, name)}", wrap(said), *tables.demo_tables(results)]


def _study(name, runs, shown):
    """A study's title, sentences and table, or nothing where it belongs to the other pages."""
    title, note = STUDIES.get(name, (name, ""))
    is_search, is_cost = name.endswith(("/search", "/steps")), name.endswith("/vit")
    if (is_search and shown == "summary") or (is_cost and shown == "tasks"):
        return []
    if is_search:
        table = tables.search_table(runs)
    elif is_cost:
        table = tables.cost_table(runs)
    else:
        table = {"summary": tables.summary_tables, "tasks": tables.task_tables}[shown](runs)
    told = f"{_protocol(runs)} {note} Files: `{name}`." if shown == "summary" or is_search else ""
    return [part for part in (f"## {title}", wrap(told), table) if part]


def _protocol(runs):
    """What the runs have in common, in sentences."""
    settings = [run["settings"] for run in runs]
    first = settings[0]
    orders = dict.fromkeys(", ".join(run["tasks"]) for run in runs)
    seeds = sorted({one["seed"] for one in settings})
    kind = "epoch" if "epochs" in first else "step"
    counts = dict.fromkeys(str(one.get("epochs", one.get("iterations"))) for one in settings)
    steps = _count(first.get("epochs", first.get("iterations")), kind)
    if len(counts) > 1:
        steps = f"{' or '.join(counts)} {kind}s"
    limits = [
        f"{first[key]} {what}"
        for key, what in (
            ("train_limit", "training examples a task at most"),
            ("eval_limit", "test examples a task"),
            ("shots", "images a class"),
        )
        if isinstance(first.get(key), int)
    ]
    versions = sorted({run["versions"]["torch"].split("+")[0] for run in runs})
    return (
        f"Model {first.get('model') or first.get('backbone')}, rank or atoms {first['rank']} a "
        f"task, {steps}, batches of {first['batch_size']}, {', '.join(limits)}. "
        f"Order: {'; or '.join(orders)}. Seeds: {', '.join(map(str, seeds))}. "
        f"{len(runs)} runs, torch {', '.join(versions)}."
    )


def _count(number, what):
    """A number of things in words; or numbers by task, with "*" for the others."""
    if isinstance(number, dict):
        others = [f"{count} for {task}" for task, count in number.items() if task != "*"]
        return ", ".join([_count(number.get("*", 0), what), *others])
    return f"{number} {what}{'s' * (number != 1)}"


def _one_file(path, title, said, table):
    if not path.is_file():
        return []
    found = tables.read(path)
    return [f"## {title}", wrap(said or found["note"]), table(found)]


def _speed(folder):
    parts = []
    for name, title, table in (
        ("throughput.csv", "Times faster than plain torch on a CPU", tables.speed_table),
        ("throughput_compiled.csv", "The same beside compiled plain torch", tables.compiled_table),
        (
            "sum_or_choice.csv",
            "A stack of LoRAs and a bank of atoms, as tasks become many: us a token (times the "
            "base), memory",
            tables.many_tasks_table,
        ),
        ("versus_lora.csv", "In a language model, beside PEFT's LoRA", tables.lora_table),
        ("images/speed.csv", "What the image harness saves", tables.saving_table),
    ):
        if (folder / name).is_file():
            rows = tables.read(folder / name)
            parts += [f"## {title}", wrap(f"{_machine(rows[0])}File: `{name}`."), table(rows)]
    return parts


def _machine(row):
    if "device_name" not in row:
        return ""
    return (
        f"{row['device_name']}, {row['threads']} threads, torch {row['torch'].split('+')[0]}, "
        f"{row['dtype']}, top_k {row['top_k']}, medians of paired repeats. "
    )


def front_table(root):
    """The README's table: what is asked about most, and the best of the other rows."""
    path = root / "benchmarks" / "results" / FRONT / "runs.json"
    if not path.is_file():
        return ""
    runs = tables.read(path)
    rows = tables.groups(runs)
    shown = [name for name, group in rows.items() if group[0]["name"] in SHOWN]
    others = [name for name in rows if name not in shown]
    kept = [*shown, *others[: FRONT_ROWS - len(shown)]]
    # Six rows, and no seventh for the majority class.
    table = tables.summary_tables([run | {"majority": None} for n in kept for run in rows[n]])
    return f"{table}\n\n" + wrap(
        f"{_protocol(runs)} `[+]` is this project's own addition. Shown are MoRAM with and without "
        f"it, sequential LoRA, and the best of the other {len(others)} rows."
    )


def model_block(root):
    """What benchmarks/README.md says of modelled times."""
    path = root / "benchmarks" / "results" / "roofline.csv"
    if not path.is_file():
        return ""
    rows = tables.read(path)
    device, host = tables.model_tables(rows)
    names = f"**Modelled** for one {rows[0]['device']}, bfloat16, microseconds"
    return (
        f"{names}, as within CUDA graphs:\n\n{device}\n\n{names}, as called from Python:\n\n{host}"
    )


def gate_block(root):
    """What moram_kernels/README.md says of compiled kernels."""
    paths = (root / "tests" / "compile_gate" / "golden").glob("*.json")
    found = sorted((tables.read(path) for path in paths), key=tables.version, reverse=True)
    blocks = [
        wrap(
            "**Compiled.** A cell is the number of configurations, then the most registers, KB of "
            "shared memory and instructions of one."
        )
    ]
    for golden in found:
        said = f"Triton {golden['triton']}; the most bytes of stack are {tables.most_stack(golden)}"
        blocks += [f"{said}:", tables.gate_table(golden)]
    return "\n\n".join(blocks)


def methods_block(root):
    """The methods of the registry: a table, and what each does and stores."""
    rows, told = [], []
    for name, method in METHODS.items():
        text = inspect.getdoc(method)
        what = " ".join(text.splitlines()[0].split())
        stored = re.search(r"\bStores (.+?)\.(?:\s|$)", " ".join(text.split()))
        models = {"clip": "CLIP", "language": "language"}.get(method.needs, "both")
        rows.append([f"`{name}`", "yes" if method.needs_task_id else "no", models])
        told.append(fill(f"- `{name}`: {what}", tables.WIDTH, subsequent_indent="  "))
        if stored:
            line = f"Stores {stored[1]}."
            told.append(fill(line, tables.WIDTH, initial_indent="  ", subsequent_indent="  "))
    titles = ["`--method`", "told the task at inference", "models"]
    return tables.markdown(titles, rows) + "\n\n" + "\n".join(told)


BLOCKS = {
    "results": front_table,
    "modelled": model_block,
    "compiled": gate_block,
    "methods": methods_block,
}


def wrap(text):
    """A paragraph of lines that fit a page."""
    return fill(
        " ".join(text.split()), tables.WIDTH, break_long_words=False, break_on_hyphens=False
    )


def pages(root=ROOT):
    """What this program writes: {path: text} of every page, as it should be."""
    found = results_pages(root)
    for path in _hand_written(root):
        if path not in found:
            text = path.read_text(encoding="utf-8")
            for name, block in BLOCKS.items():
                text = re.sub(
                    rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)",
                    partial(_between, block, root),
                    text,
                    flags=re.DOTALL,
                )
            found[path] = text
    return found


def _hand_written(root):
    tops = [path for path in root.iterdir() if path.is_dir() and path.name not in ELSEWHERE]
    inner = (page for top in tops if top.name[0] != "." for page in top.rglob("*.md"))
    return sorted([*root.glob("*.md"), *inner])


def _between(block, root, match):
    return f"{match[1]}\n{block(root)}\n\n{match[2]}"


def main(argv=None):
    """Write the pages, or say which are out of date; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    arguments = parser.parse_args(argv)
    old = 0
    for path, text in pages().items():
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        old += 1
        if arguments.check:
            print(f"{path.relative_to(ROOT)} is out of date: run make results", file=sys.stderr)
        else:
            path.write_text(text, encoding="utf-8")
            print(f"wrote {path.relative_to(ROOT)}")
    return int(arguments.check and old > 0)


if __name__ == "__main__":
    sys.exit(main())

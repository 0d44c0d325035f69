"""The command `moram`: reads arguments, calls the library. Nothing else does."""

import argparse
import signal
import sys
from dataclasses import fields
from functools import partial
from pathlib import Path

# Shells report a program that Ctrl-C ended so.
INTERRUPTED = 130


def main(argv=None):
    """Run the command line; returns the exit status."""
    from .harness.chatter import without_chatter

    with without_chatter():
        return _main(argv)


def _main(argv):
    parser = argparse.ArgumentParser(prog="moram", description="Continual learning with MoRAM.")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser(
        "demo", help="teach a small language model several tasks in a row, on the CPU"
    )
    _add_demo_arguments(demo)
    trace = commands.add_parser(
        "trace", help="learn a stream of language tasks with one method and score it (TRACE)"
    )
    _add_trace_arguments(trace)
    xtail = commands.add_parser(
        "xtail", help="learn a stream of image domains with one method and score it (X-TAIL)"
    )
    _add_xtail_arguments(xtail)
    table = commands.add_parser(
        "table", help="one table of several finished runs of moram trace or moram xtail"
    )
    table.add_argument("runs", nargs="+", type=Path, help="folders that one of them wrote")
    table.add_argument("--out", type=Path, required=True, help="folder for the tables")
    inspect = commands.add_parser(
        "inspect", help="which atoms fire for which task, in a finished run of moram trace"
    )
    _add_inspect_arguments(inspect)
    arguments = parser.parse_args(argv)
    run = {
        "demo": _run_demo,
        "trace": _run_trace,
        "xtail": _run_xtail,
        "table": _run_table,
        "inspect": _run_inspect,
    }[arguments.command]
    try:
        return run(arguments, commands.choices[arguments.command])
    except ImportError as error:
        extra = arguments.command if arguments.command in ("demo", "xtail") else "trace"
        advice = f"install it with: pip install 'moram[{extra}]'"
        print(f"moram {arguments.command}: {error}; {advice}", file=sys.stderr)
    except (OSError, TypeError, ValueError, RuntimeError) as error:
        # Libraries write errors over several lines.
        print(f"moram {arguments.command}: {' '.join(str(error).split())}", file=sys.stderr)
    return 1


def _add_demo_arguments(parser):
    from .demo.run import DemoSettings

    kinds = {"tasks": str, "data": Path, "out": Path, "cache": Path, "model": Path, "threads": int}
    notes = {
        "data": "folder in TRACE's format: NAME/{train,test}.json, lists of prompt and answer",
        "tasks": "names of the tasks, in order, separated by commas",
        "out": "folder for results.json, demo.png and the runs with their adapters",
        "cache": "folder where the weights are kept",
        "model": "folder of another causal language model",
        "atoms": "atoms per task, also LoRA's rank",
        "protect": "share of earlier inputs' energy that new keys avoid; 0 = the published rule",
        "lr": "MoRAM's peak learning rate",
        "lora_lr": "LoRA's peak learning rate",
        "threads": "CPU threads",
        "dtype": "auto, bfloat16 or float32",
    }
    for item in fields(DemoSettings):
        # Tasks have no default of their own: those of the shipped data, or else they must be named.
        default = None if item.name == "tasks" else item.default
        parser.add_argument(
            f"--{item.name.replace('_', '-')}",
            type=kinds.get(item.name, type(default)),
            default=default,
            help=f"{notes.get(item.name, item.name.replace('_', ' '))} (default: {default})",
        )


def _run_demo(arguments, parser):
    from .demo.run import DATA, TASKS, DemoSettings, run_demo

    values = {item.name: getattr(arguments, item.name) for item in fields(DemoSettings)}
    if values["tasks"] is None and values["data"] != DATA:
        parser.error("--data needs --tasks: which of its tasks, in which order")
    named = values["tasks"]
    values["tasks"] = TASKS if named is None else tuple(n for n in named.split(",") if n)
    run_demo(DemoSettings(**values))
    return 0


def _add_trace_arguments(parser):
    from .trace.protocol import SUITES
    from .trace.settings import TraceSettings

    add = parser.add_argument
    add("--model", help="hub id or folder of a causal language model; smollm2 comes from PyPI")
    add("--data", help="folder in TRACE's format: NAME/{train,eval,test}.json")
    add("--tasks", help="names of the tasks, in order, separated by commas (default: the suite's)")
    add("--suite", choices=SUITES, help="trace, or the 4 and 15 task classification streams")
    add("--order", type=int, help="1-3 of suite standard, 4-6 of suite large")
    _add_settings_arguments(add, TraceSettings)
    add("--full-matrix", action="store_true", default=None, help="score unlearned tasks too")


def _add_settings_arguments(add, settings):
    """What commands that run a stream share; settings is their dataclass."""
    from .harness.sweep import methods_of, share_of

    def seeds(text):
        return [int(seed) for seed in text.split(",")]

    def told(function, *first):
        """An argparse type that says what the function refuses."""

        def parse(text):
            try:
                return function(*first, text)
            except ValueError as error:
                raise argparse.ArgumentTypeError(str(error)) from error

        return parse

    add(
        "--method",
        type=told(methods_of, settings),
        help="what learns (default: moram); several with commas, or all: one after the other, each "
        f"in its own folder below --out, and a table of them. {', '.join(settings.methods())}",
    )
    add("--seeds", type=seeds, help="run each method with these seeds, such as 0,1,2")
    add("--shard", type=told(share_of), help="do this share of several runs: INDEX/COUNT")
    add("--held-out", action="store_true", help="score held-out training examples instead")
    add("--preset", choices=settings.presets, help="settings to start from (default: paper)")
    add("--config", type=Path, action="append", default=[], help="YAML file of settings")
    add(
        "--set",
        dest="changes",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help=f"any setting of {settings.__module__}.{settings.__name__}, such as lr=1e-3 or "
        "method_args.top_k=4",
    )
    add("--out", help="folder for everything the run writes; the same command goes on in it")
    add("--quiet", action="store_true", default=None, help="no bar and no lines")


def _run_trace(arguments, parser):
    from .trace.report import REPORT
    from .trace.run import run_trace

    names = ("model", "data", "tasks", "suite", "order", "out", "full_matrix", "quiet")
    # Runs in one process share hidden states.
    return _run_stream(arguments, names, REPORT, partial(run_trace, cached={}))


def _run_stream(arguments, names, report, run):
    """One run, or several and a table of them, as a command line asks for.

    Args:
        names: of settings that have an option of their own. report: of the benchmark.
        run: function from settings, and `stop`, to results.
    """
    from .harness.sweep import expand, sweep
    from .harness.yaml_values import parse_change

    listed = report.settings.word("tasks")
    given = {n: getattr(arguments, n) for n in names if getattr(arguments, n) is not None}
    if listed in given:
        given[listed] = tuple(name for name in given[listed].split(",") if name)
    methods, seeds, share = arguments.method, arguments.seeds, arguments.shard
    if methods is not None and len(methods) == 1:
        given["method"] = methods[0]
    if arguments.held_out:
        given |= report.settings.choosing
    layers = [given, dict(parse_change(text) for text in arguments.changes)]

    def make(changes):
        files = arguments.config
        return report.settings.make(arguments.preset, files=files, changes=[*layers, changes])

    settings = make({})
    if (methods is None or len(methods) == 1) and seeds is None and share is None:
        return _until_stopped(arguments.command, lambda stop: run(settings, stop=stop))
    runs = expand(make, methods, seeds)

    def run_all(stop):
        log = (lambda line: None) if settings.quiet else print
        sweep(runs, settings.out, partial(run, stop=stop), report, share or (0, 1), log=log)

    return _until_stopped(arguments.command, run_all)


def _until_stopped(command, run):
    """Run until the end, or until Ctrl-C or SIGTERM: the first one lets it save."""
    from .harness.run import Stopped
    from .processes import leave

    asked = []

    def ask(number, frame):
        # The second time, the usual thing happens.
        print(f"moram {command}: stopping after this step", file=sys.stderr)
        asked.append(number)
        signal.signal(number, signal.default_int_handler)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        run(lambda: bool(asked))
    except (Stopped, KeyboardInterrupt) as stopped:
        print(f"moram {command}: {str(stopped) or 'interrupted'}", file=sys.stderr)
        return INTERRUPTED
    finally:
        leave()
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0


def _add_xtail_arguments(parser):
    from .xtail.catalog import XTAIL
    from .xtail.settings import XtailSettings
    from .xtail.small import REAL, SMALL

    parser.epilog = (
        f"Datasets of their own names: {', '.join(XTAIL)}, cifar100; drawn or small ones: "
        f"{', '.join((*SMALL, *REAL))}; any other name is a folder NAME/{{train,test}}/CLASS in "
        "--data-dir, its prompt in NAME/template.txt. Settings: moram.xtail.settings."
    )
    add = parser.add_argument
    # The words of moram trace first; the second ones are older.
    model = ("--model", "--backbone")
    add(*model, dest="backbone", help="of open_clip (ViT-B-16), a Hugging Face CLIP, or small")
    add("--pretrained", help="tag or file of weights, or random (default: openai, or its own)")
    data = ("--data", "--data-dir")
    add(*data, dest="data_dir", help="folder of the datasets; moram xtail check-data looks at it")
    names = ("--tasks", "--datasets")
    add(*names, dest="datasets", help="names, in the order they are learned, with commas; or mtil")
    add("--shots", type=int, help="training images per class (default: 16)")
    _add_settings_arguments(add, XtailSettings)
    add("--skip-bad", action="store_true", default=None, help="leave out undecodable images")
    actions = parser.add_subparsers(dest="action", title="other action")
    check = actions.add_parser("check-data", help="what of the datasets is missing or damaged")
    check.add_argument("folder", type=Path, help="folder of the datasets")
    check.add_argument(*names, dest="named", help="only these, separated by commas")
    check.add_argument("--images", action="store_true", help="decode every image, too")


def _run_xtail(arguments, parser):
    if arguments.action == "check-data":
        from .xtail.check_data import check_data

        named = arguments.named
        named = None if named is None else [n.strip() for n in named.split(",") if n.strip()]
        return int(check_data(arguments.folder, named, arguments.images) > 0)
    from .xtail.report import REPORT
    from .xtail.run import run_xtail

    names = ("backbone", "pretrained", "data_dir", "datasets", "shots", "out", "skip_bad", "quiet")
    return _run_stream(arguments, names, REPORT, run_xtail)


def _run_table(arguments, parser):
    from .harness.tables import read_results
    from .trace.report import REPORT as TRACE
    from .xtail.report import REPORT as XTAIL

    reports = {report.format: report for report in (TRACE, XTAIL)}
    runs = read_results(arguments.runs, reports, "moram trace or moram xtail")
    if len({run["format"] for run in runs}) > 1:
        raise ValueError("one table holds runs of moram trace or of moram xtail, not both")
    reports[runs[0]["format"]].write(runs, arguments.out)
    print((arguments.out / "table.md").read_text(encoding="utf-8"))
    return 0


def _add_inspect_arguments(parser):
    from .trace.settings import SPLITS

    add = parser.add_argument
    add("run", type=Path, help="folder that moram trace wrote with method moram")
    add("--data", type=Path, help="folder in TRACE's format (default: the run's)")
    add("--tasks", help="whose inputs to look at, separated by commas (default: all of the run)")
    add("--split", choices=SPLITS, default="test", help="which examples (default: test)")
    add("--limit", type=int, default=32, help="at most so many examples a task (default: 32)")
    add("--last", type=int, metavar="N", help="only the last N tokens of each (default: all)")
    add("--adapter", help="path of the adapter to draw (default: that separates the tasks best)")
    add("--text", help="also show which of its atoms fire at each token of this text")
    add("--out", type=Path, help="folder for inspect.{json,md,png} (default: RUN/inspect)")


def _run_inspect(arguments, parser):
    from .trace.inspect_run import inspect_run

    names = ("run", "data", "split", "limit", "last", "adapter", "text", "out")
    given = {name: getattr(arguments, name) for name in names}
    tasks = arguments.tasks
    tasks = None if tasks is None else tuple(name for name in tasks.split(",") if name)
    inspect_run(tasks=tasks, **given)
    return 0

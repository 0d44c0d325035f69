"""The command `moram`: reads arguments, calls the library. Nothing else does."""

import json
import sys
from argparse import Action, ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ._version import __version__
from .cli_streams import add_settings_arguments, run_stream, show_settings


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    from .harness.chatter import without_chatter

    with without_chatter():
        return _main(argv)


def _main(argv: Sequence[str] | None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = ArgumentParser(prog="moram", description="Continual learning with MoRAM.")
    parser.add_argument("--version", action="version", version=f"moram {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, command in COMMANDS.items():
        subparser = commands.add_parser(name, help=command.help)
        # What the others take is not asked for, and may take long to say.
        if name in argv:
            command.add_arguments(subparser)
    arguments = parser.parse_args(argv)
    name, command = arguments.command, COMMANDS[arguments.command]
    try:
        return command.run(arguments, commands.choices[name])
    except ImportError as error:
        advice = f"install it with: pip install 'moram[{command.extra}]'"
        print(f"moram {name}: {error}; {advice}", file=sys.stderr)
    except (OSError, TypeError, ValueError, RuntimeError) as error:
        # Libraries write errors over several lines.
        print(f"moram {name}: {' '.join(str(error).split())}", file=sys.stderr)
    return 1


def _add_demo_arguments(parser: ArgumentParser) -> None:
    from .demo.settings import DemoSettings

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


def _run_demo(arguments: Namespace, parser: ArgumentParser) -> int:
    from .demo.run import run_demo
    from .demo.settings import DATA, TASKS, DemoSettings

    values = {item.name: getattr(arguments, item.name) for item in fields(DemoSettings)}
    if values["tasks"] is None and values["data"] != DATA:
        parser.error("--data needs --tasks: which of its tasks, in which order")
    named = values["tasks"]
    values["tasks"] = TASKS if named is None else tuple(n for n in named.split(",") if n)
    run_demo(DemoSettings(**values))
    return 0


def _add_trace_arguments(parser: ArgumentParser) -> None:
    from .methods.registry import ENTRIES
    from .trace.presets import PRESETS
    from .trace.protocol import SUITES

    add = parser.add_argument
    add("--model", help="hub id or folder of a causal language model; smollm2 comes from PyPI")
    add("--data", help="folder in TRACE's format: NAME/{train,eval,test}.json")
    add("--tasks", help="names of the tasks, in order, separated by commas (default: the suite's)")
    add("--suite", choices=SUITES, help="trace, or the 4 and 15 task classification streams")
    add("--order", type=int, help="1-3 of suite standard, 4-6 of suite large")
    methods = [name for name, method in ENTRIES.items() if method.needs != "clip"]
    add_settings_arguments(add, methods, PRESETS, "moram.trace.settings.TraceSettings")
    add("--full-matrix", action="store_true", default=None, help="score unlearned tasks too")
    _add_check_data(parser, "tasks", "--tasks")


def _add_check_data(parser: ArgumentParser, what: str, *names: str) -> ArgumentParser:
    """The other action of a command that runs a stream; returns its parser."""
    actions = parser.add_subparsers(dest="action", title="other action")
    check = actions.add_parser("check-data", help=f"what of the {what} is missing or damaged")
    check.add_argument("folder", type=Path, help=f"folder of the {what}")
    check.add_argument(*names, dest="named", type=_names, help="only these, with commas")
    return check


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _run_trace(arguments: Namespace, parser: ArgumentParser) -> int:
    if arguments.action == "check-data":
        from .trace.check_data import check_data

        return int(check_data(arguments.folder, arguments.named) > 0)
    from .trace.report import REPORT

    if arguments.settings:
        return show_settings(arguments, REPORT.settings)
    from .trace.run import run_trace

    names = ("model", "data", "tasks", "suite", "order", "out", "full_matrix", "quiet")
    # Runs in one process share hidden states.
    return run_stream(arguments, names, REPORT, partial(run_trace, cached={}))


def _add_xtail_arguments(parser: ArgumentParser) -> None:
    from .methods.registry import ENTRIES
    from .xtail.data.catalog import REAL, SMALL, XTAIL
    from .xtail.presets import PRESETS

    methods = [n for n, m in ENTRIES.items() if m.needs != "language" and not m.needs_task_id]
    parser.epilog = (
        f"Datasets of their own names: {', '.join(XTAIL)}, cifar100; drawn or small ones: "
        f"{', '.join((*SMALL, *REAL))}; any other name is a folder NAME/{{train,test}}/CLASS in "
        "--data, its prompt in NAME/template.txt. Settings: moram.xtail.settings."
    )
    add = parser.add_argument
    # The words of moram trace first; the second ones are older.
    model = {"dest": "backbone", "action": _Renamed}
    about = "of open_clip (ViT-B-16), a Hugging Face CLIP, or small"
    add("--model", "--backbone", **model, help=about)
    add("--pretrained", help="tag or file of weights, or random (default: openai, or its own)")
    data = {"dest": "data_dir", "action": _Renamed}
    add("--data", "--data-dir", **data, help="folder of the datasets; check-data looks at it")
    names = ("--tasks", "--datasets")
    listed = {"dest": "datasets", "action": _Renamed}
    add(*names, **listed, help="names, in the order they are learned, with commas; or mtil")
    add("--shots", type=int, help="training images per class (default: 16)")
    add_settings_arguments(add, methods, PRESETS, "moram.xtail.settings.XtailSettings")
    add("--skip-bad", action="store_true", default=None, help="leave out undecodable images")
    check = _add_check_data(parser, "datasets", *names)
    check.add_argument("--images", action="store_true", help="decode every image, too")


def _run_xtail(arguments: Namespace, parser: ArgumentParser) -> int:
    if arguments.action == "check-data":
        from .xtail.data.check_data import check_data

        return int(check_data(arguments.folder, arguments.named, arguments.images) > 0)
    from .xtail.report import REPORT

    if arguments.settings:
        return show_settings(arguments, REPORT.settings)
    from .xtail.run import run_xtail

    names = ("backbone", "pretrained", "data_dir", "datasets", "shots", "out", "skip_bad", "quiet")
    return run_stream(arguments, names, REPORT, run_xtail)


def _add_table_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, help="folders that one of them wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder for the tables")


def _run_table(arguments: Namespace, parser: ArgumentParser) -> int:
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


def _add_inspect_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("run", type=Path, help="folder of a finished run with method moram")
    add("--data", type=Path, help="folder of the data (default: the run's)")
    add("--tasks", help="whose inputs to look at, separated by commas (default: all of the run)")
    add("--split", default="test", help="which examples: train, eval or test (default: test)")
    add("--limit", type=int, default=32, help="at most so many examples a task (default: 32)")
    add("--last", type=int, metavar="N", help="only the last N tokens of each (default: all)")
    add("--adapter", help="path of the adapter to draw (default: that separates the tasks best)")
    add("--text", help="also show which of its atoms fire at each token of this text")
    add("--out", type=Path, help="folder for inspect.{json,md,png} (default: RUN/inspect)")


def _run_inspect(arguments: Namespace, parser: ArgumentParser) -> int:
    from .harness.inspection.run import Choice, inspect_run
    from .trace.inspection import LOOKER as TRACE
    from .xtail.inspection import LOOKER as XTAIL

    given = {item.name: getattr(arguments, item.name) for item in fields(Choice)}
    if given["tasks"] is not None:
        given["tasks"] = tuple(name for name in given["tasks"].split(",") if name)
    inspect_run(arguments.run, (TRACE, XTAIL), Choice(**given), arguments.out)
    return 0


def _add_env_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="the same for programs")


def _run_env(arguments: Namespace, parser: ArgumentParser) -> int:
    from .environment import environment, to_text

    found = environment()
    print(json.dumps(found, indent=2) if arguments.json else "\n".join(to_text(found)))
    return 0


class _Renamed(Action):
    """An option whose first name is the one in use; the others still work, with a note."""

    def __call__(
        self,
        parser: ArgumentParser,
        namespace: Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        if option_string != self.option_strings[0]:
            now = self.option_strings[0]
            print(f"{parser.prog}: {option_string} is an older name of {now}", file=sys.stderr)
        setattr(namespace, self.dest, values)


class Command(NamedTuple):
    """One word behind `moram`.

    help: one line. run: gives an exit status. extra: of setup.py, that installs what the command
    needs.
    """

    help: str
    add_arguments: Callable[[ArgumentParser], None]
    run: Callable[[Namespace, ArgumentParser], int]
    extra: str = "trace"


COMMANDS = {
    "demo": Command(
        "teach a small language model several tasks in a row, on the CPU",
        _add_demo_arguments,
        _run_demo,
        "demo",
    ),
    "trace": Command(
        "learn a stream of language tasks with one method and score it (TRACE)",
        _add_trace_arguments,
        _run_trace,
    ),
    "xtail": Command(
        "learn a stream of image domains with one method and score it (X-TAIL)",
        _add_xtail_arguments,
        _run_xtail,
        "xtail",
    ),
    "table": Command(
        "one table of several finished runs of moram trace or moram xtail",
        _add_table_arguments,
        _run_table,
    ),
    "inspect": Command(
        "which atoms fire for which task, in a finished run of moram trace or xtail",
        _add_inspect_arguments,
        _run_inspect,
    ),
    "env": Command(
        "versions, processor, devices and backends that run here, for a bug report",
        _add_env_arguments,
        _run_env,
    ),
}

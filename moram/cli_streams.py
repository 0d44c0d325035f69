"""What the commands that run a stream of tasks share: their options, and one or many runs."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from shutil import get_terminal_size
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .harness.report import Report, Results
    from .harness.settings import StreamSettings

# Shells report a program that Ctrl-C ended so.
INTERRUPTED = 130


def add_settings_arguments(
    add: Callable[..., argparse.Action],
    methods: Sequence[str],
    presets: Iterable[str],
    settings: str,
) -> None:
    """What commands that run a stream share.

    Args:
        add: `add_argument` of the parser. methods, presets: names that can be given.
        settings: what the dataclass of the settings is called.
    """

    def seeds(text: str) -> list[int]:
        return [int(seed) for seed in text.split(",")]

    def told(name: str, *first: object) -> Callable[[str], Any]:
        """An argparse type that says what a function of `harness.sweep` refuses."""

        def parse(text: str) -> Any:
            from .harness import sweep

            try:
                return getattr(sweep, name)(*first, text)
            except ValueError as error:
                raise argparse.ArgumentTypeError(str(error)) from error

        return parse

    add(
        "--method",
        type=told("methods_of", methods),
        help="what learns (default: moram); several with commas, or all: one after the other, each "
        f"in its own folder below --out, and a table of them. {', '.join(methods)}",
    )
    add("--seeds", type=seeds, help="run each method with these seeds, such as 0,1,2")
    add("--shard", type=told("share_of"), help="do this share of several runs: INDEX/COUNT")
    add("--held-out", action="store_true", help="score held-out training examples instead")
    add("--preset", choices=presets, help="settings to start from (default: paper)")
    add("--config", type=Path, action="append", default=[], help="YAML file of settings")
    add(
        "--set",
        dest="changes",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help=f"any setting of {settings}, such as lr=1e-3 or method_args.top_k=4",
    )
    add("--out", help="folder for everything the run writes; the same command goes on in it")
    add("--quiet", action="store_true", default=None, help="no bar and no lines")
    add("--settings", action="store_true", help="say what every setting is, and run nothing")


def show_settings(arguments: argparse.Namespace, kind: type[StreamSettings]) -> int:
    """Print every setting, with what the preset and the method of the command line make of it."""
    from .config import MoRAMConfig
    from .harness.describe import describe
    from .methods.registry import accepted_arguments
    from .methods.train import TrainSettings

    preset, method = arguments.preset or "paper", (arguments.method or ["moram"])[0]
    related, width = (TrainSettings, MoRAMConfig), min(get_terminal_size().columns, 100)
    print(describe(kind, kind.presets, preset, method, related=related, width=width))
    print(f"\nmethod_args of {method}: {', '.join(accepted_arguments(method)) or 'none'}")
    return 0


def run_stream(
    arguments: argparse.Namespace, names: Iterable[str], report: Report, run: Callable[..., Results]
) -> int:
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

    def make(changes: dict[str, Any]) -> StreamSettings:
        files = arguments.config
        return report.settings.make(arguments.preset, files=files, changes=[*layers, changes])

    settings = make({})
    if (methods is None or len(methods) == 1) and seeds is None and share is None:
        return _until_stopped(arguments.command, lambda stop: run(settings, stop=stop))
    runs = expand(make, methods, seeds)

    def run_all(stop: Callable[[], bool]) -> None:
        log = (lambda line: None) if settings.quiet else print
        sweep(runs, settings.out, partial(run, stop=stop), report, share or (0, 1), log=log)

    return _until_stopped(arguments.command, run_all)


def _until_stopped(command: str, run: Callable[[Callable[[], bool]], object]) -> int:
    """Run until the end, or until Ctrl-C or SIGTERM: the first one lets it save."""
    from .harness.run import Stopped
    from .processes import leave

    asked = []

    def ask(number: int, frame: FrameType | None) -> None:
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

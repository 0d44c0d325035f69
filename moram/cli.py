"""The command `moram`: reads arguments, calls the library. Nothing else does."""

import argparse
import sys
from dataclasses import fields
from pathlib import Path


def main(argv=None):
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="moram", description="Continual learning with MoRAM.")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser(
        "demo", help="teach a small language model several tasks in a row, on the CPU"
    )
    _add_demo_arguments(demo)
    arguments = parser.parse_args(argv)
    return _run_demo(arguments, demo)


def _add_demo_arguments(parser):
    from .demo.run import DemoSettings

    kinds = {"tasks": str, "data": Path, "out": Path, "cache": Path, "model": Path, "threads": int}
    notes = {
        "data": "folder in TRACE's format: NAME/{train,test}.json, lists of prompt and answer",
        "tasks": "names of the tasks, in order, separated by commas",
        "out": "folder for results.json, demo.png and the adapters",
        "cache": "folder where the weights are kept",
        "model": "folder of another causal language model",
        "atoms": "atoms per task, also LoRA's rank",
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
    try:
        run_demo(DemoSettings(**values))
    except ImportError as error:
        print(f"moram demo: {error}; install it with: pip install 'moram[demo]'", file=sys.stderr)
        return 1
    except (OSError, TypeError, ValueError, RuntimeError) as error:
        print(f"moram demo: {error}", file=sys.stderr)
        return 1
    return 0

"""What the benchmarks of streams share: their arguments, and the settings of their runs."""

import argparse
from pathlib import Path

from moram.harness.sweep import share_of, sweep


def parse(description, parts, data_help, data_required=True):
    """The arguments of a benchmark of streams."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("part", choices=parts)
    parser.add_argument("--data", required=data_required, default="", help=data_help)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shard", default="0/1", help="which share of the runs: INDEX/COUNT")
    parser.add_argument("--only", default="", help="only runs whose name contains this")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def run_part(arguments, parts, run, report, preset):
    """Do this process's share of a part's runs; write the table when all are there.

    Args:
        arguments: of `parse`. parts: by name, functions to (name, method, changes) of all runs.
        run, report: see `moram.harness.sweep.sweep`. preset: that the runs start from.
    """
    runs = []
    for name, method, changes in parts[arguments.part]():
        common = {"data": arguments.data, "out": str(arguments.out / name), "quiet": True}
        changes = [common | {"threads": arguments.threads}, changes]
        runs.append((name, report.settings.make(preset, method, changes=changes)))
    share = share_of(arguments.shard)
    sweep(runs, arguments.out / arguments.part, run, report, share, arguments.only)

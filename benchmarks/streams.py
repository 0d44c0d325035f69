"""What the benchmarks of streams share: shares of the runs, finished ones, the final table."""

import argparse
import json
import time
from pathlib import Path

from moram.harness.files import write_json


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


def run_part(arguments, runs, run, report, data_key):
    """Do this process's share of the runs; write the table when all are there.

    Args:
        arguments: of `parse`. runs: (name, method, changes) of all runs of the part.
        run: function from method and changes to results.
        report: a module with `read_results` and `write_report`.
        data_key: the setting that says where the data lies.
    """
    index, count = map(int, arguments.shard.split("/"))
    mine = [one for one in runs if arguments.only in one[0]]
    for name, method, changes in mine[index::count]:
        folder = arguments.out / name
        if finished(folder):
            continue
        start = time.perf_counter()
        common = {data_key: arguments.data, "out": str(folder), "threads": arguments.threads}
        results = run(method, common | {"quiet": True} | changes)
        summary = {key: round(value, 1) for key, value in results["summary"].items()}
        print(f"{name}: {summary}, {time.perf_counter() - start:.0f} s", flush=True)
        # What a finished run needs no more.
        (folder / "state.pt").unlink()
    folders = [arguments.out / name for name, _, _ in runs]
    if all(finished(folder) for folder in folders):
        results = report.read_results(folders)
        report.write_report(results, arguments.out / arguments.part)
        for found in results:
            # Where the data lay is of no interest elsewhere.
            for key in (data_key, "out"):
                found["settings"][key] = Path(found["settings"][key]).name
        write_json(arguments.out / arguments.part / "runs.json", results)


def finished(folder):
    """Whether a run in that folder is complete."""
    path = folder / "results.json"
    return path.is_file() and json.loads(path.read_text(encoding="utf-8"))["complete"]

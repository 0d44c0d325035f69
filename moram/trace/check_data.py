"""What of the tasks is on disk, for `moram trace check-data`. Reads alone, downloads nothing."""

from collections.abc import Callable, Sequence
from pathlib import Path

from ..continual.data import Task, load_stream
from ..continual.scorers import scorer_for
from .protocol import TRACE, origin_of

SPLITS = ("train", "test")


def check_data(
    root: str | Path,
    names: Sequence[str] | None = None,
    log: Callable[[str], object] = print,
) -> int:
    """Say of each task whether it is complete, and where what is missing comes from.

    That the files are there and of TRACE's format is checked. Prompts of the test that are trained
    on are a note and no problem, as is a text that stands twice in one file.

    Args:
        root: folder of all tasks; need not exist. names: of tasks; None = the eight of TRACE.
        log: called with each line.
    Returns:
        The number of problems.
    """
    names = list(dict.fromkeys(TRACE if names is None else names))
    complete = 0
    for name in names:
        try:
            (task,) = load_stream(root, [name])
        except (OSError, ValueError) as error:
            log(f"{name}: {error}")
            missing = [s for s in SPLITS if not (Path(root) / name / f"{s}.json").is_file()]
            if missing:
                origin = origin_of(name)
                log(f"  missing: {', '.join(missing)}" + (f", from {origin}" if origin else ""))
            continue
        complete += 1
        log(
            f"{name}: OK, {len(task.train)} train and {len(task.test)} test examples, scored by "
            f"{scorer_for(name).variant}"
        )
        for line in _notes(task):
            log(f"  note: {line}")
    log(f"{complete} of {len(names)} tasks are complete in {root}")
    return len(names) - complete


def _notes(task: Task) -> list[str]:
    """What may be meant so, and may not."""
    trained = {example.prompt for example in task.train}
    leaked = sum(example.prompt in trained for example in task.test)
    notes = [f"prompts of the test that are trained on: {leaked}"] if leaked else []
    for split, examples in zip(SPLITS, (task.train, task.test), strict=True):
        twice = len(examples) - len({example.prompt for example in examples})
        if twice:
            notes.append(f"prompts of {split} that stand there once more: {twice}")
    return notes

"""The titles and texts of the pages of results."""

# Runs of one folder: its title and what the files do not say. Other folders get their own name.
STUDIES = {
    "language/textcls": ("Four classification tasks", ""),
    "language/eight": ("Eight tasks", ""),
    "language/trace": (
        "TRACE, small",
        "With 32 test examples a task, a standard error is up to 9 points. One seed does not rank "
        "the methods.",
    ),
    "language/choice": (
        "The protection's settings",
        "One factor at a time beside the first row, scored on held-out training examples of the "
        "demo's tasks, 40 each: a cell has a standard error of up to 8 points.",
    ),
    "language/strength": (
        "The protection's strength on longer texts",
        "Scored on held-out training examples, as above.",
    ),
    "language/search": (
        "Search of the rate, language",
        "Each cell is the mean score after two tasks, on held-out training examples.",
    ),
    "images/small": ("Six drawn domains", ""),
    "images/unseen": (
        "Six drawn domains, with what keeps zero-shot's answers",
        "Two seeds. Rates were chosen on training images that were not drawn.",
    ),
    "images/real": ("Real images", ""),
    "images/search": (
        "Search of the rate, images",
        "Each cell is Transfer/Average/Last, on training images that were not drawn.",
    ),
    "images/steps": ("How long to train", "As the search of the rate, which has 150 steps."),
    "images/vit": (
        "The published size, two steps a task",
        "Random weights and two steps: there is no accuracy to speak of, only what a step costs.",
    ),
}
DEMOS = {
    "demo": "The demo",
    "demo_all_layers": "An earlier demo, all layers, the published rule, shipped data",
    "textcls": "An earlier demo, all layers, the published rule, public data",
}
HEAD = """# Results

This page is written by `make results` from the files beside it. Do not edit it.
Scores on each task, searches of rates and earlier demos are in [language](language/README.md) and
[images](images/README.md). Four words are kept apart: *measured* (a clock or a score on this
project's machines), *executed* (ran, without a claim of speed), *compiled* (machine code was made
and read) and *modelled* (computed from rates). Everything on this page is measured, on CPUs. What
is modelled is in [benchmarks](../README.md), what is compiled in
[moram_kernels](../../moram_kernels/README.md).

`[+]` marks this project's own additions to the published rule: key protection, aligned atoms, and
asking zero-shot first.
"just learned" is the mean of the diagonal of R. OP and Last are the mean score after the last task.
BWT is the mean change of the earlier tasks since each was learned, over T - 1 tasks, unclipped;
negative is forgetting. Forgetting is the mean drop from the best to the last score.
Scores are in percent. A value with ± is the mean and the standard deviation over the runs of a row.
The highest score after the last task comes first."""
DETAILS = """# Results, {room}: the details

This page is written by `make results` from the files beside it. Do not edit it.
The summary, and what the columns mean, are in [results](../README.md). Rates stand over columns,
tasks over the score on each after the last task, in percent."""
PROBE = """After the last task of single runs: a kernel ridge fitted at once to the training images
of all domains, on the features as they then are, and what scoring takes.
`benchmarks/streams/image_probe.py` says more. File: `images/probe.csv`."""

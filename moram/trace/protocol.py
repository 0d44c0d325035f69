"""What a stream of language tasks consists of: names, orders, answer kinds. Facts, no code.

Sources: TRACE (Wang et al., 2023, arXiv 2310.06762), MoRAM (arXiv 2506.21035) and O-LoRA (Wang et
al., EMNLP Findings 2023, arXiv 2310.14152), whose table of task orders this repeats.
"""

TRACE = (
    "C-STANCE",
    "FOMC",
    "MeetingBank",
    "Py150",
    "ScienceQA",
    "NumGLUE-cm",
    "NumGLUE-ds",
    "20Minuten",
)

# Epochs per task of the published run, in TRACE's order.
PAPER_EPOCHS = dict(zip(TRACE, (2, 1, 3, 2, 1, 2, 2, 3), strict=True))

_ORDERS = {
    1: "dbpedia amazon yahoo agnews",
    2: "dbpedia amazon agnews yahoo",
    3: "yahoo amazon agnews dbpedia",
    4: "MNLI CB WiC COPA QQP BoolQA RTE IMDB yelp amazon SST-2 dbpedia agnews MultiRC yahoo",
    5: "MultiRC BoolQA WiC MNLI CB COPA QQP RTE IMDB SST-2 dbpedia agnews yelp amazon yahoo",
    6: "yelp amazon MNLI CB COPA QQP RTE IMDB SST-2 dbpedia agnews yahoo MultiRC BoolQA WiC",
}

SUITES = {"trace": (0,), "standard": (1, 2, 3), "large": (4, 5, 6)}


def origin_of(task: str) -> str:
    """Where a task's data come from; empty for a task that is not in a suite."""
    if task in TRACE:
        return "https://github.com/BeyonderXX/TRACE"
    if any(task in names.split() for names in _ORDERS.values()):
        return "https://github.com/cmnfriend/O-LoRA, in TRACE's format"
    return ""


def tasks_of(suite: str, order: int | None = None) -> tuple[str, ...]:
    """The tasks of a suite, in an order.

    Args:
        suite: "trace", "standard" (four tasks) or "large" (fifteen tasks).
        order: 1-3 for "standard", 4-6 for "large"; None = the first.
    Raises:
        ValueError: there is no such suite or order.
    """
    if suite not in SUITES:
        raise ValueError(f"suite must be one of {', '.join(SUITES)}, got {suite!r}")
    if suite == "trace":
        if order is not None:
            raise ValueError(f"suite trace has one order; name tasks to change it, got {order}")
        return TRACE
    order = SUITES[suite][0] if order is None else order
    if order not in SUITES[suite]:
        raise ValueError(f"order of suite {suite} must be one of {SUITES[suite]}, got {order}")
    return tuple(_ORDERS[order].split())

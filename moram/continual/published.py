"""Numbers that others have published, to print beside one's own. Data only; nothing is computed.

TRACE: the results table of the MoRAM page (Artificer-AI-Lab/MoRAM, branch gh-pages at e6a69ce),
mean and standard deviation of 3 runs, eight tasks of 500 training examples. Its BWT is
`trace_forgetting`, lower is better. "CoDyRA" is from that method's own page
(Artificer-AI-Lab/CoDyRA at c1691e4), without a spread. Llama-3.2-1B-Instruct is called
LLaMA-3-1B-Instruct there. Scores per task are not published.

The rows were not made under one protocol: the released MoRAM code differs from TreeLoRA's, from
which most of the others come, in adapted modules (4 against 2 a layer), alpha, learning rate,
epochs, decoding, MeetingBank's context and the scoring of NumGLUE and multiple choice.

X-TAIL: the same MoRAM page; 10 datasets in the order they are learned, 16 shots, CLIP ViT-B/16, one
label space of 1,100 classes. "LoRA" (rank 16, sequential) and the forgetting are from CoDyRA's
page, which gives no formula for the latter. LwF's row of Last is identical to iCaRL's there:
likely a copying error of the page.
"""

from typing import NamedTuple


class Score(NamedTuple):
    """A mean in percent or percentage points, and the standard deviation where one is given."""

    mean: float
    spread: float | None = None


class TraceRow(NamedTuple):
    """A method on TRACE. `forgetting` is the printed BWT, None for a method that does not train."""

    overall_performance: Score
    forgetting: Score | None


class XtailRow(NamedTuple):
    """A method on X-TAIL, averages in percent, None where none is given."""

    transfer: float
    average: float | None
    last: float | None


class XtailDatasets(NamedTuple):
    """A method on X-TAIL, percent for each dataset. The first has no transfer: None."""

    transfer: tuple[float | None, ...]
    average: tuple[float, ...]
    last: tuple[float, ...]


# backbone: method: row
TRACE = {
    "LLaMA-2-7B-Chat": {
        "FIX(ICL)": TraceRow(Score(38.94, 0.3), None),
        "SeqLoRA": TraceRow(Score(34.3, 1.2), Score(18.5, 0.8)),
        "OGD": TraceRow(Score(42.09, 1.6), Score(8.06, 1.2)),
        "GEM": TraceRow(Score(40.08, 1.6), Score(6.77, 1.2)),
        "EWC": TraceRow(Score(42.36, 1.2), Score(5.97, 0.8)),
        "L2P": TraceRow(Score(36.23, 0.8), Score(8.25, 0.8)),
        "DualPrompt": TraceRow(Score(37.69, 1.2), Score(8.03, 0.8)),
        "HiDeLoRA": TraceRow(Score(41.6, 0.8), Score(7.12, 0.4)),
        "O-LoRA": TraceRow(Score(42.78, 0.8), Score(7.16, 0.4)),
        "TreeLoRA": TraceRow(Score(43.52, 1.0), Score(3.46, 0.4)),
        "CoDyRA": TraceRow(Score(43.82), Score(3.25)),
        "MoRAM": TraceRow(Score(44.54, 0.9), Score(1.37, 0.3)),
    },
    "Gemma-2B-it": {
        "FIX(ICL)": TraceRow(Score(32.3, 0.2), None),
        "SeqLoRA": TraceRow(Score(31.89, 0.8), Score(15.28, 0.4)),
        "OGD": TraceRow(Score(32.85, 1.4), Score(12.27, 0.9)),
        "GEM": TraceRow(Score(26.48, 1.5), Score(18.25, 0.9)),
        "EWC": TraceRow(Score(28.35, 1.6), Score(16.96, 1.2)),
        "L2P": TraceRow(Score(31.14, 1.2), Score(15.77, 0.7)),
        "DualPrompt": TraceRow(Score(32.42, 1.0), Score(14.25, 0.5)),
        "HiDeLoRA": TraceRow(Score(33.25, 0.9), Score(13.66, 0.5)),
        "O-LoRA": TraceRow(Score(33.73, 0.8), Score(12.36, 0.4)),
        "TreeLoRA": TraceRow(Score(33.41, 0.9), Score(8.5, 0.5)),
        "CoDyRA": TraceRow(Score(33.96), Score(7.94)),
        "MoRAM": TraceRow(Score(36.27, 0.7), Score(2.74, 0.4)),
    },
    "Llama-3.2-1B-Instruct": {
        "FIX(ICL)": TraceRow(Score(31.16, 0.4), None),
        "SeqLoRA": TraceRow(Score(29.73, 1.6), Score(17.03, 1.2)),
        "OGD": TraceRow(Score(30.12, 2.0), Score(15.2, 1.6)),
        "GEM": TraceRow(Score(32.19, 2.0), Score(10.74, 1.6)),
        "EWC": TraceRow(Score(31.96, 1.6), Score(11.62, 1.2)),
        "L2P": TraceRow(Score(29.38, 1.2), Score(13.57, 0.8)),
        "DualPrompt": TraceRow(Score(30.76, 1.2), Score(11.34, 0.8)),
        "HiDeLoRA": TraceRow(Score(33.73, 1.2), Score(12.36, 0.8)),
        "O-LoRA": TraceRow(Score(32.94, 0.8), Score(12.89, 1.2)),
        "TreeLoRA": TraceRow(Score(36.14, 0.7), Score(7.36, 0.8)),
        "CoDyRA": TraceRow(Score(37.46), Score(5.11)),
        "MoRAM": TraceRow(Score(37.77, 0.8), Score(3.12, 0.8)),
    },
}

XTAIL_DATASETS = (
    "Aircraft",
    "Caltech101",
    "DTD",
    "EuroSAT",
    "Flowers",
    "Food101",
    "MNIST",
    "OxfordPets",
    "StanfordCars",
    "SUN397",
)

XTAIL = {
    "Zero-shot": XtailRow(62.4, None, None),
    "LwF": XtailRow(47.7, 53.2, 64.0),
    "WiSE-FT": XtailRow(52.3, 54.2, 58.0),
    "iCaRL": XtailRow(61.7, 61.0, 64.0),
    "ZSCL": XtailRow(59.0, 60.0, 63.4),
    "LoRA": XtailRow(61.8, 60.5, 59.4),
    "MoE-Adapter": XtailRow(56.0, 63.0, 70.5),
    "RAIL-Primal": XtailRow(62.4, 70.7, 79.1),
    "CoDyRA": XtailRow(63.2, 71.3, 79.2),
    "MoRAM": XtailRow(63.3, 72.7, 80.9),
}

# The untrained model, and the model fine-tuned on each dataset alone: percent for each dataset,
# and the mean that is printed beside it.
XTAIL_ZERO_SHOT = (23.5, 76.8, 37.3, 36.7, 63.6, 84.0, 46.7, 86.7, 66.1, 63.7)
XTAIL_ZERO_SHOT_MEAN = 58.5
XTAIL_FINE_TUNED = (39.6, 84.7, 70.0, 94.7, 97.0, 85.8, 97.6, 93.4, 81.0, 74.7)
XTAIL_FINE_TUNED_MEAN = 81.9

XTAIL_PER_DATASET = {
    "MoRAM": XtailDatasets(
        (None, 74.5, 38.1, 46.9, 65.3, 82.9, 45.8, 88.2, 65.1, 62.9),
        (44.1, 81.6, 64.6, 79.6, 83.9, 84.4, 66.5, 89.7, 68.4, 64.1),
        (37.7, 81.5, 70.7, 92.4, 95.0, 86.0, 97.6, 92.6, 81.0, 74.7),
    ),
    "CoDyRA": XtailDatasets(
        (None, 74.3, 36.8, 44.2, 69.9, 83.5, 42.8, 88.9, 64.6, 63.4),
        (41.4, 81.0, 58.7, 77.8, 83.4, 84.6, 64.5, 90.4, 67.2, 64.4),
        (37.7, 81.5, 65.1, 89.9, 91.4, 85.5, 96.8, 93.3, 77.3, 73.5),
    ),
    # It never changes an answer on a dataset it has not learned.
    "RAIL-Primal": XtailDatasets(
        (None, *XTAIL_ZERO_SHOT[1:]),
        (42.4, 89.8, 55.7, 68.5, 84.0, 83.3, 65.3, 85.8, 67.9, 64.5),
        (41.7, 94.0, 66.0, 86.4, 97.2, 82.4, 93.1, 83.6, 75.0, 71.3),
    ),
    "MoE-Adapter": XtailDatasets(
        (None, 71.0, 34.9, 19.2, 63.0, 86.6, 20.0, 87.2, 63.7, 58.6),
        (43.6, 77.9, 52.1, 34.7, 75.9, 86.3, 45.2, 87.4, 66.6, 60.2),
        (43.2, 78.7, 57.6, 32.8, 79.4, 86.0, 86.7, 87.8, 78.2, 74.2),
    ),
}

# Percentage points, lower is better.
XTAIL_FORGETTING = {
    "ZSCL": 8.78,
    "MoE-Adapter": 5.43,
    "InfLoRA": 3.12,
    "LoRA rank 4": 13.94,
    "LoRA rank 16": 14.86,
    "CoDyRA": 1.87,
}

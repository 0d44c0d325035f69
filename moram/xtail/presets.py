"""Named starting points: the published protocol, and one that fits a CPU and needs no download."""

from .catalog import XTAIL
from .small import SMALL

# The X-TAIL run of arXiv 2506.21035 (its released runner). Its layer has no scale: alpha = rank.
_PAPER = {
    "*": {
        "backbone": "ViT-B-16",
        "pretrained": "auto",
        "datasets": XTAIL,
        "shots": 16,
        "rank": 16,
        "lr": 5e-4,
        "iterations": 500,
        "batch_size": 64,
        "schedule": "cosine",
        "betas": (0.9, 0.9999),
        "clip": None,
        "seed": 42,
        "cache_gib": 16.0,
        "workers": 8,
    },
    "moram": {"method_args": {"temperature": 0.01, "threshold": 0.2, "value_scale": 1.0}},
    "lora": {"method_args": {"alpha": 16}},
    "joint": {"method_args": {"alpha": 16}},
    "moe-lora": {"method_args": {"alpha": 16}},
    "codyra": {"method_args": {"alpha": 16, "max_kappa": 0.005}},
    # Its paper's loss and smoothing; its rates differ from dataset to dataset, 1e-3 is the median.
    "moe-adapters": {
        "lr": 1e-3,
        "betas": (0.9, 0.999),
        "text_loss": False,
        "label_smoothing": 0.2,
    },
}

_SMALL = {
    "*": {
        "backbone": "small",
        "pretrained": "auto",
        "datasets": SMALL,
        "shots": 16,
        "rank": 16,
        "lr": 1e-3,
        "iterations": 100,
        "batch_size": 32,
        "schedule": "cosine",
        "betas": (0.9, 0.999),
        "clip": None,
        "seed": 0,
        "cache_gib": 1.0,
        "workers": 1,
    },
    "moram": {"method_args": {"temperature": 0.01, "threshold": 0.2, "value_scale": 1.0}},
    "lora": {"method_args": {"alpha": 16}},
    "joint": {"method_args": {"alpha": 16}},
    "moe-lora": {"method_args": {"alpha": 16}},
    "codyra": {"method_args": {"alpha": 16, "max_kappa": 0.005}},
    "moe-adapters": {
        "text_loss": False,
        "label_smoothing": 0.2,
        "method_args": {"width": 16},
    },
    "rail-primal": {"method_args": {"width": 2000}},
}

PRESETS = {"paper": _PAPER, "small": _SMALL}

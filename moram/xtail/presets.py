"""Named starting points: the published protocol, and one that fits a CPU and needs no download."""

from .data.catalog import SMALL, XTAIL

# The X-TAIL run of arXiv 2506.21035 (its released runner).
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
    "codyra": {"method_args": {"max_kappa": 0.005}},
    # The loss, smoothing, warm-up and rates of its own few-shot runs (500 steps, 5 shots).
    "moe-adapters": {
        "lr": {
            "aircraft": 8e-3,
            "caltech101": 5e-4,
            "cifar100": 2e-4,
            "dtd": 5e-3,
            "eurosat": 1e-3,
            "oxford_flowers": 1e-3,
            "food101": 1e-2,
            "mnist": 1e-4,
            "oxford_pets": 1e-2,
            "stanford_cars": 1e-2,
            "sun397": 1e-2,
            "*": 1e-3,
        },
        "warmup": 100,
        "betas": (0.9, 0.999),
        "text_loss": False,
        "label_smoothing": 0.2,
    },
    # Rank, batch and rate of its own few-shot runs (500 steps, 5 shots).
    "dac": {"rank": 12, "lr": 2e-3, "batch_size": 32, "betas": (0.9, 0.999)},
    # The rate of its own runs, whose steps differ between datasets.
    "lada": {"lr": 1e-3, "betas": (0.9, 0.999)},
}

# Rates: of four, the one with the highest Average on held-out training images, but for MoRAM.
_SMALL = {
    "*": {
        "backbone": "small",
        "pretrained": "auto",
        "datasets": SMALL,
        "shots": 16,
        "rank": 16,
        "lr": 1e-3,
        "iterations": 150,
        # About the published ratio of batch to classes so far, by which the two losses weigh.
        "batch_size": 20,
        "schedule": "cosine",
        "betas": (0.9, 0.999),
        "clip": None,
        "seed": 0,
        "cache_gib": 1.0,
        "workers": 1,
    },
    # The rate that keeps what zero-shot can do; 2e-3 has a higher Average and a lower Transfer.
    "moram": {
        "lr": 5e-4,
        "method_args": {"temperature": 0.01, "threshold": 0.2, "value_scale": 1.0},
    },
    "codyra": {"method_args": {"max_kappa": 0.005}},
    "moe-lora": {"lr": 5e-4},
    # The others' loss: with its own label smoothing the classes of other datasets win.
    "moe-adapters": {"lr": 1e-2, "method_args": {"width": 16}},
    "dac": {"lr": 2e-3},
    "lada": {"lr": 2e-3},
    "rail-primal": {"method_args": {"width": 2000}},
}

PRESETS = {"paper": _PAPER, "small": _SMALL}

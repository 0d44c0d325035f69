"""Named starting points: the published protocol, and one that fits a small model on a CPU."""

from typing import Any

from .protocol import PAPER_EPOCHS

# The TRACE run of arXiv 2506.21035 (its released runner): sections on data, optimiser, decoding.
# Rates and epochs of the baselines are those of the TreeLoRA code base, which compares them.
_LONG_EPOCHS = dict(zip(PAPER_EPOCHS, (5, 3, 7, 5, 3, 5, 5, 7), strict=True))
_EWC_EPOCHS = dict(zip(PAPER_EPOCHS, (1, 1, 5, 5, 1, 5, 5, 5), strict=True))
_LORA: dict[str, Any] = {
    "lr": 1e-4,
    "epochs": {**_LONG_EPOCHS, "*": 1},
    "method_args": {"alpha": 32},
}
_PAPER: dict[str, dict[str, Any]] = {
    "*": {
        "lr": 5e-4,
        "epochs": {**PAPER_EPOCHS, "*": 1},
        "dropout": 0.1,
        "max_prompt": {"MeetingBank": 4096, "*": 1024},
        "fit_context": True,
        "labels": "separate",
        "truncate_right": ("MeetingBank",),
        "repetition_penalty": 1.2,
        "no_repeat_ngram": 3,
    },
    "moram": {"method_args": {"value_scale": 2.0, "temperature": 0.03, "threshold": 0.2}},
    "lora": _LORA,
    "o-lora": _LORA,
    "hide-lora": _LORA,
    "tree-lora": {"lr": 1e-4, "method_args": {"alpha": 32}},
    # Published for full parameters at 1e-5; on LoRA, at LoRA's rate.
    "ewc": {"lr": 1e-4, "epochs": {**_EWC_EPOCHS, "*": 1}, "method_args": {"alpha": 32}},
    # Not part of that comparison: as sequential LoRA.
    "inf-lora": _LORA,
    "lora-stack": _LORA,
    "moe-lora": _LORA,
    "codyra": _LORA,
    "task-lora": _LORA,
    "joint": _LORA,
    # Room for the demonstrations.
    "in-context": {"max_prompt": {"MeetingBank": 4096, "*": 3584}},
}

_SMALL: dict[str, dict[str, Any]] = {
    "*": {
        "model": "smollm2",
        "first_layer": 20,
        "cache_prefix": True,
        "lr": 2e-3,
        "epochs": 1,
        "batch_size": 4,
        "micro_batch": None,
        "schedule": "linear",
        "betas": (0.9, 0.999),
        "average": "token",
        "drop_last": True,
        "seed": 0,
        "max_prompt": 112,
        "max_answer": 16,
        "labels": "joined",
        "pad_multiple": 32,
        # What is written freely cannot be judged in one pass over the true answer.
        "decoding": {
            "MeetingBank": "generate",
            "Py150": "generate",
            "20Minuten": "generate",
            "*": "forced",
        },
        "max_new_tokens": 24,
        "eval_batch": 8,
        "train_limit": 256,
        "untrained": False,
    },
    "moram": {"method_args": {"value_scale": 8.0}},
    "ewc": {"method_args": {"fisher_examples": 64}},
    "in-context": {"max_prompt": 1024, "method_args": {"max_length": 1024}},
}

# What `make demo` runs, on the three tasks shipped with it: minutes on two cores without AVX-512.
_DEMO: dict[str, dict[str, Any]] = {
    **_SMALL,
    "*": {
        **_SMALL["*"],
        "first_layer": 22,
        "epochs": 2,
        "max_prompt": 48,
        "pad_multiple": 1,
        "untrained": True,
    },
    "moram": {"lr": 3e-3, "method_args": {"value_scale": 8.0, "protect": 0.95}},
}

PRESETS = {"paper": _PAPER, "small": _SMALL, "demo": _DEMO}

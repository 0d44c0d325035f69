"""The model of a run: loaded, quantised, sharded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ..inject import adapters
from ..layers import AdapterLinear
from ..models.quantised import keep_unpacked
from ..models.smollm2 import fetch_weights, pick_dtype
from ..processes import Processes
from .prefix import check_layers
from .settings import TraceSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..harness.progress import Log

    class LanguageModel(nn.Module):
        """A causal language model of transformers, as far as it is used here."""

        config: Any
        generation_config: Any
        model: Any
        is_sharded: bool
        generate: Callable[..., Tensor]
        gradient_checkpointing_enable: Callable[..., None]


SMOLLM2 = "smollm2"


def load(
    settings: TraceSettings, device: torch.device, log: Log
) -> tuple[LanguageModel, PreTrainedTokenizerBase]:
    """The base model in eval mode on the device, and its tokenizer.

    Args:
        settings: of the run. log: called with lines of text.
    Raises:
        OSError, ValueError: there is no such model, or the settings do not fit it.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    name = settings.model
    folder = name
    if name == SMOLLM2:
        folder = Processes().first_then_others(lambda: fetch_weights(None, log))
    # What looks like a folder is not looked for on the hub.
    is_path = name.startswith((".", "/", "~")) or Path(name).is_dir()
    if is_path and not (Path(name) / "config.json").is_file():
        raise FileNotFoundError(f"model {name} is no folder with a config.json")
    dtype = pick_dtype(settings.dtype, device)
    more: dict[str, Any] = {}
    if settings.quantize:
        from transformers import BitsAndBytesConfig

        more["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
        more["device_map"] = {"": device}
    # On the CPU and for short texts the plain attention is the faster one.
    attention = "eager" if device.type == "cpu" else "sdpa"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    try:
        found = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation=attention, **more
        )
        model = cast("LanguageModel", found)
    except SafetensorError as error:
        raise ValueError(f"the weights in {folder} cannot be read: {error}") from error
    if settings.quantize:
        # The base is scored before it is adapted.
        keep_unpacked(model)
    else:
        model.to(device)
    if settings.gradient_checkpointing:
        # The name that newer versions of transformers use, where there is one.
        old = model.gradient_checkpointing_enable
        getattr(model, "activation_checkpointing_enable", old)({"use_reentrant": False})
    check_layers(model, settings.first_layer)
    return model.eval(), tokenizer


def excluded(settings: TraceSettings) -> tuple[str, ...]:
    """`exclude` for the methods: the setting's own, and the layers below first_layer."""
    below = [f"*layers.{layer}.*" for layer in range(settings.first_layer)]
    return (*settings.exclude, *below)


def compile_parts(model: LanguageModel) -> None:
    """Let torch.compile fuse what lies between the adapters: MLPs and norms, usually."""
    for layer in model.model.layers:
        for part in layer.children():
            if not adapters(part, AdapterLinear):
                part.compile(dynamic=False)


def shard(model: LanguageModel) -> None:
    """Share the base's parameters out over the processes (FSDP2); adapters stay whole everywhere.

    Their gradients are summed by the trainer, so banks may grow and methods may replace their
    parameters.
    """
    from torch.distributed.fsdp import fully_shard

    whole = {p for a in adapters(model, AdapterLinear).values() for p in _own_parameters(a)}
    for layer in model.model.layers:
        fully_shard(layer, ignored_params=whole)
    fully_shard(model, ignored_params=whole)
    model.is_sharded = True


def _own_parameters(adapter: nn.Module) -> list[nn.Parameter]:
    return [p for n, p in adapter.named_parameters() if not n.startswith("base_layer.")]


def fit_context(model: LanguageModel, settings: TraceSettings, log: Log) -> TraceSettings:
    """Settings whose prompts and answers fit the model's context.

    Returns:
        The settings, where fit_context says so with a shorter max_prompt for the tasks that need
        it; each is logged.
    Raises:
        ValueError: they do not fit, and may not be cut or cannot be.
    """
    context = getattr(model.config, "max_position_embeddings", None)
    limits: dict[str, int] = {}
    for task in settings.tasks:
        prompt, answer = settings.of("max_prompt", task), settings.max_answer
        if settings.of("decoding", task) == "generate":
            answer = max(answer, settings.of("max_new_tokens", task))
        limits[task] = prompt
        if context is None or prompt + answer <= context:
            continue
        if not settings.fit_context or answer >= context:
            raise ValueError(
                f"max_prompt {prompt} and {answer} tokens of answer for {task} do not fit the "
                f"model's context of {context}: lower max_prompt, max_answer or max_new_tokens, "
                "or set fit_context"
            )
        limits[task] = context - answer
        log(f"{task}: max_prompt {prompt} -> {limits[task]}, to fit the context of {context}")
    return replace(settings, max_prompt=limits)

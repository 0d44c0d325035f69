"""The files of a checkpoint: read, checked, and described so that PEFT can read them, too.

`moram.save` keeps the description in the header of the weights as well, PEFT in the config alone.
Knows no model; `checkpoint` moves what is read here into one.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from .bank_state import PARTS
from .config import MoRAMConfig
from .saved_protection import from_first_format, protection_shapes, tensor_name

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
# What transformers writes where one file would be too large.
INDEX = f"{WEIGHTS}.index.json"
# 1 had other names of tensors, which PEFT could not place.
FORMAT = 2
PREFIX = "base_model.model."


def read_files(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor], MoRAMConfig]:
    """The description, the tensors by name and the settings of a checkpoint, all checked.

    Args:
        directory: what `moram.save` or PEFT's `save_pretrained` wrote.
    Raises:
        FileNotFoundError: there is no checkpoint. ValueError: it is damaged or foreign.
    """
    path, header, tensors = directory / WEIGHTS, {}, {}
    for part in _weight_files(directory):
        try:
            with safe_open(part, framework="pt") as file:
                header |= file.metadata() or {}
                tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{part} is damaged or no safetensors file: {error}") from error
    about = header.get("moram")
    if about is None and not is_foreign(directory / CONFIG) and (directory / CONFIG).exists():
        about = (directory / CONFIG).read_text(encoding="utf-8")
    if about is None:
        raise ValueError(
            f"{path} was not written by moram.save (its header has no 'moram' entry), and no "
            f"{CONFIG} beside it says that PEFT wrote it for MoRAM"
        )
    try:
        about = json.loads(about)
        if about.get("format") == 1:
            from_first_format(about, tensors)
        elif about.get("format") != FORMAT:
            raise ValueError(f"it has format {about.get('format')!r}, this version reads {FORMAT}")
        config = MoRAMConfig.from_dict(about["settings"])
        if "trained" not in about:
            # PEFT says it of whole modules.
            others = [name for name in tensors if ".moram_bank." not in name]
            about["trained"] = {
                name.removeprefix(PREFIX): list(tensors[name].shape) for name in others
            }
        _check_tensors(about, tensors)
        if not about["fingerprint"].keys() <= about["layers"].keys():
            raise ValueError("its fingerprint names layers that it does not hold")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        kind = type(error).__name__
        detail = error if isinstance(error, ValueError) else f"its description lacks sense ({kind})"
        raise ValueError(f"{path} cannot be loaded: {detail}") from error
    return about, tensors, config


def _weight_files(directory: Path) -> list[Path]:
    path, index = directory / WEIGHTS, directory / INDEX
    if path.is_file():
        return [path]
    if not index.is_file():
        raise FileNotFoundError(f"directory holds no MoRAM checkpoint: {path} does not exist")
    names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    return [directory / name for name in sorted(set(names))]


def _check_tensors(about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    wanted = {f"{PREFIX}{n}": tuple(s) for n, s in about["trained"].items()}
    for layer, sizes in about["layers"].items():
        widths = {"keys": sizes["in_features"], "values": sizes["out_features"]}
        for part in PARTS:
            rows, kind = part.split("_")
            wanted[tensor_name(layer, part)] = (sizes[rows], widths[kind])
    wanted |= protection_shapes(about, tensors)
    for name, shape in wanted.items():
        if name not in tensors:
            raise ValueError(f"it lacks {name}")
        if tuple(tensors[name].shape) != shape:
            raise ValueError(f"{name} must be {shape}, got {tuple(tensors[name].shape)}")


def is_foreign(path: Path) -> bool:
    """Whether a config file is there that is not MoRAM's."""
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("peft_type") != "MORAM"
    except FileNotFoundError:
        return False
    except (ValueError, AttributeError):
        # Half a file is what a crash of an older version may have left.
        return False


def for_peft(about: Mapping[str, Any], whole: Iterable[str], kind: str) -> dict[str, Any]:
    """What PEFT asks of its config file beside a description.

    Args:
        whole: paths of the modules whose every tensor is in the file. kind: the model's class.
    """
    return {
        "target_modules": list(about["layers"]),
        "modules_to_save": sorted(whole) or None,
        "inference_mode": True,
        "task_type": "CAUSAL_LM" if kind.endswith("ForCausalLM") else None,
    }

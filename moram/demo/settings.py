"""What `run_demo` takes; reads no library, so that the command's help is there at once."""

from dataclasses import dataclass
from pathlib import Path

DATA = Path(__file__).with_name("data")
TASKS = ("topic", "feeling", "purpose")
# By their names in `moram trace`; the last one's atoms are looked into.
METHODS = ("lora", "moram")


@dataclass(frozen=True)
class DemoSettings:
    """What `run_demo` takes; the defaults are what `make demo` runs.

    All else is the preset "demo" of `moram trace`.

    Args:
        data, tasks: a folder in TRACE's format and the tasks to learn, in order.
        out: folder for results.json, demo.png, the adapters, and a folder for each run.
        cache: where the weights are kept; None = ~/.cache/moram.
        model: folder of another causal language model in transformers' format, or None.
        atoms: atoms per task, also the rank of LoRA; top_k is the same number.
        protect: see `MoRAMConfig`; 0 is the published rule.
        lr, lora_lr: peak learning rates.
        first_layer: decoder layers below it are not adapted.
        epochs, batch_size, seed: see `TrainSettings`.
        threads: CPU threads; None leaves torch's choice.
        dtype: "auto" is bfloat16 where the CPU multiplies it natively, else float32.
    """

    data: Path = DATA
    tasks: tuple[str, ...] = TASKS
    out: Path = Path("out/demo")
    cache: Path | None = None
    model: Path | None = None
    atoms: int = 8
    protect: float = 0.95
    lr: float = 3e-3
    lora_lr: float = 2e-3
    first_layer: int = 22
    epochs: int = 2
    batch_size: int = 4
    seed: int = 0
    threads: int | None = None
    dtype: str = "auto"

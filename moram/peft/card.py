"""The model card of a PEFT adapter: what it is, and the one import that loads it."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .config import MoRAMPeftConfig

BEGIN, END = "<!-- begin moram -->", "<!-- end moram -->"
# What PEFT's own card is full of.
_BLANK = "[More Information Needed]"


def write_card(config: "MoRAMPeftConfig", directory: str | Path) -> None:
    """Write what an adapter is into the README.md of its folder.

    PEFT's blank form is replaced but for its metadata. What someone has written stays; the part
    between two marks is written anew.
    """
    path = Path(directory) / "README.md"
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    start, middle, rest = old.partition("\n---\n")
    metadata = f"{start}{middle}" if old.startswith("---\n") and middle else ""
    text = rest if metadata else old
    if _BLANK in text:
        text = ""
    part = f"{BEGIN}\n{describe(config)}\n{END}"
    before, mark, after = text.partition(BEGIN)
    if mark and END in after:
        text = f"{before}{part}{after.partition(END)[2]}"
    else:
        text = f"{part}\n\n{text.strip()}".strip() + "\n"
    path.write_text(f"{metadata}\n{text}".lstrip("\n"), encoding="utf-8")


def describe(config: "MoRAMPeftConfig") -> str:
    """The text of the card: how to load it, its base, tasks, atoms, settings and scores."""
    base = config.base_model_name_or_path or "the base model"
    auto = "AutoModelForCausalLM" if config.task_type == "CAUSAL_LM" else "AutoModel"
    sizes = [(layer["frozen"], layer["current"]) for layer in config.layers.values()]
    totals = sorted({frozen + current for frozen, current in sizes})
    atoms = "none" if not totals else " to ".join(dict.fromkeys(map(str, (totals[0], totals[-1]))))
    lines = [
        "# A MoRAM adapter",
        "",
        "Every adapted projection owns a bank of rank-1 atoms that decide for themselves when to",
        "fire; those of earlier tasks are frozen ([arXiv 2506.21035](https://arxiv.org/abs/2506.21035)).",
        "",
        "```python",
        "import moram.peft  # pip install 'moram[peft]'; without it, PEFT says KeyError: 'MORAM'",
        "from peft import PeftModel",
        f"from transformers import {auto}",
        "",
        f'model = {auto}.from_pretrained("{base}")',
        'model = PeftModel.from_pretrained(model, "path or name of this adapter")',
        "```",
        "",
        "| | |",
        "| --- | --- |",
        f"| base model | {base} |",
        f"| tasks, in order | {', '.join(config.tasks) or 'not named'} |",
        f"| atoms | {atoms} in each of {len(sizes)} layers, {config.atoms_per_task} a task |",
        f"| top_k, temperature, threshold | {config.top_k}, {config.temperature}, "
        f"{config.threshold} |",
        f"| key protection (an addition to the paper's rule) | {config.protect or 'off'} |",
        f"| alignment (another addition) | {config.alignment or 'off'} |",
    ]
    if config.matrix:
        lines += ["", "Scores in percent: a row for the time after each task, a column a task.", ""]
        columns = len(config.matrix[-1])
        names = [*config.tasks, *(f"task {i + 1}" for i in range(len(config.tasks), columns))]
        lines.append(f"| after | {' | '.join(names[:columns])} |")
        lines.append("| --- " * (columns + 1) + "|")
        for name, row in zip(names, config.matrix, strict=False):
            lines.append(f"| {name} | {' | '.join(f'{score:.1f}' for score in row)} |")
    return "\n".join(lines)

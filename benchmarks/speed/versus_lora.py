"""What a bank of atoms costs in a language model, beside PEFT's LoRA of rank 8.

    python benchmarks/speed/versus_lora.py --out OUT.csv --plot OUT.png

A LLaMA of SmolLM2's width with six layers and random weights, float32, on the CPU. Both adapt q, k,
v and o. The banks have 8 current atoms, the rest is frozen; values are random and the threshold is
off, so that every selected atom writes.

- training: forward, backward and AdamW's step on --batch x --length tokens.
- prefill: the same tokens at inference, logits of the last one.
- decode: one token of one text after --length cached ones.

Ratios are medians of paired repeats, MoRAM's time over LoRA's; below 1 is faster than LoRA. The
vocabulary is so small that six layers have the share of the work that SmolLM2's thirty have.
"""

import argparse
import csv
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

# First of all: it puts this checkout on the path.
import measure
import numpy as np
import torch
from matplotlib.figure import Figure
from peft import LoraConfig, get_peft_model
from sum_or_choice import numbers
from throughput import commit, device_name
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import moram

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
RANK = 8
MODES = ("training", "prefill", "decode")
COLUMNS = ("mode", "atoms", "ms", "lora_ms", "ratio", "ratio_p20", "ratio_p80", "repeats")
COLUMNS += ("batch", "length", "width", "layers", "dtype", "top_k", "threads", "torch")
COLUMNS += ("device_name", "commit")
COLUMNS += ("command",)


def make_model(width, layers, seed=0):
    """A LLaMA whose heads and MLP are SmolLM2's in proportion to the width."""
    heads = max(3, width // 64)
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 3,
        vocab_size=8192,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).requires_grad_(False)


def with_lora(model):
    """The model with PEFT's LoRA of rank 8, whose B is not zero."""
    config = LoraConfig(r=RANK, lora_alpha=RANK, lora_dropout=0.0, target_modules=list(TARGETS))
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.01)
    return adapted


def with_atoms(model, atoms):
    """The model with banks of so many atoms, RANK of them current."""
    config = moram.MoRAMConfig(
        atoms_per_task=RANK, top_k=RANK, threshold=0.0, value_scale=1.0, targets=TARGETS,
        capacity=atoms,
    )  # fmt: skip
    moram.inject(model, config)
    for layer in moram.adapters(model).values():
        with torch.no_grad():
            if atoms > RANK:
                if atoms > 2 * RANK:
                    layer.bank.append(atoms - 2 * RANK)
                layer.bank.current_values.normal_(std=0.01)
                layer.bank.grow(RANK)
            layer.bank.current_values.normal_(std=0.01)
    return model


def make_call(mode, model, batch, length):
    """One timed call of a model in a mode, without arguments."""
    generator = torch.Generator().manual_seed(1)
    vocabulary = model.config.vocab_size
    tokens = torch.randint(vocabulary, (batch, length), generator=generator)
    if mode == "training":
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4)

        def train():
            model.train()
            model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return train
    if mode == "prefill":

        @torch.inference_mode()
        def prefill():
            model.eval()
            model(input_ids=tokens, use_cache=False, logits_to_keep=1)

        return prefill
    model.eval()
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(input_ids=tokens[:1], past_key_values=cache, use_cache=True)

    @torch.inference_mode()
    def decode():
        model(input_ids=tokens[:1, :1], past_key_values=cache, use_cache=True)
        cache.crop(-1)

    return decode


def measure_mode(mode, models, batch, length, repeats, seconds):
    """One row for each number of atoms.

    Args:
        mode: of `MODES`. models: by number of atoms, and LoRA's by "lora".
        batch, length: of the tokens. repeats, seconds: as for `measure.time_calls`.
    """
    calls = {name: make_call(mode, model, batch, length) for name, model in models.items()}
    samples = measure.time_calls(calls, repeats, seconds, SimpleNamespace(device="cpu", seed=0))
    lora = np.array(samples.pop("lora"))
    for atoms, mine in samples.items():
        low, middle, high = np.percentile(np.array(mine) / lora, (20, 50, 80))
        yield {
            "mode": mode,
            "atoms": atoms,
            "ms": f"{np.median(mine):.4g}",
            "lora_ms": f"{np.median(lora):.4g}",
            "ratio": f"{middle:.4g}",
            "ratio_p20": f"{low:.4g}",
            "ratio_p80": f"{high:.4g}",
            "repeats": len(mine),
            "batch": batch if mode != "decode" else 1,
            "length": length,
        }


def plot(rows, path):
    """Ratio to LoRA against the number of atoms, a line a mode, into a PNG."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for mode in dict.fromkeys(row["mode"] for row in rows):
        mine = [row for row in rows if row["mode"] == mode]
        atoms, middle, low, high = (
            np.array([float(row[name]) for row in mine])
            for name in ("atoms", "ratio", "ratio_p20", "ratio_p80")
        )
        axes.errorbar(atoms, middle, (middle - low, high - middle), label=mode, marker="o", ms=4)
    axes.axhline(1, color="#777777", linestyle="--", label="PEFT LoRA, rank 8")
    axes.set(xscale="log", xlabel="atoms in each bank", ylabel="time, LoRA = 1")
    axes.set_xticks(sorted({int(row["atoms"]) for row in rows}))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    axes.set_title("Bars: 20th to 80th percentile of paired repeats", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main(arguments=None):
    """Measure all modes, write the CSV and draw it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--atoms", type=numbers, default=[8, 64, 256, 1024])
    parser.add_argument("--modes", type=lambda text: text.split(","), default=list(MODES))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--seconds", type=float, default=240.0, help="at most, for a mode")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    words = sys.argv[1:] if arguments is None else arguments
    common = {
        "width": given.width,
        "layers": given.layers,
        "dtype": "float32",
        "top_k": RANK,
        "threads": given.threads,
        "torch": torch.__version__,
        "device_name": device_name("cpu"),
        "commit": commit(),
        "command": shlex.join(["python", "benchmarks/speed/versus_lora.py", *words]),
    }
    models = {
        atoms: with_atoms(make_model(given.width, given.layers), atoms) for atoms in given.atoms
    }
    models["lora"] = with_lora(make_model(given.width, given.layers))
    given.out.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    with given.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for mode in given.modes:
            shape = (given.batch, given.length)
            for row in measure_mode(mode, models, *shape, given.repeats, given.seconds):
                rows.append(row | common)
                writer.writerow(rows[-1])
                file.flush()
                print(", ".join(f"{key} {row[key]}" for key in COLUMNS[:8]), flush=True)
    if given.plot:
        plot(rows, given.plot)


if __name__ == "__main__":
    main()

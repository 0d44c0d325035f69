"""A tiny model with MoRAM as PEFT's adapter, and every way to load one. No tests here."""

import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from task_support import batches_of, seeded
from tiny_models import language_model
from transformers import AutoModelForCausalLM

import moram
from moram import adapters
from moram.peft import MoRAMPeftConfig

SETTINGS = {
    "atoms_per_task": 4,
    "top_k": 4,
    "temperature": 0.3,
    "threshold": 0.0,
    "value_scale": 8.0,
    "protect": 0.9,
    "protect_size": 6,
}


def config(**changes):
    """Two projections of each block, with protection."""
    settings = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **SETTINGS}
    return MoRAMPeftConfig(**(settings | changes))


def save_base(folder):
    """A folder with a tiny model, which PEFT's automatic classes can find."""
    language_model().save_pretrained(folder)
    return folder


def settled(model):
    """A model whose base begins where torch puts tensors, and not anywhere in a file: products of
    others are rounded otherwise, and by chance."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if "moram_bank" not in name:
            tensor.data = tensor.data.clone()
    return model


def plain(folder, dtype=torch.float32):
    """The tiny model of a folder."""
    return settled(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval())


def peft_model(folder, name="default", seed=0, **changes):
    """The tiny model of a folder with a fresh adapter."""
    torch.manual_seed(seed)
    return get_peft_model(plain(folder), config(**changes), adapter_name=name)


def learn(model, task, steps=2):
    """Learn a task with a fresh optimiser, as `moram.task` says."""
    batches = batches_of(task)
    with moram.task(model, batches, generator=seeded(task)) as atoms:
        optimizer = torch.optim.AdamW(atoms, lr=1e-2)
        for batch in batches[:steps]:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()


def logits(model):
    """What a model answers in eval mode."""
    with torch.no_grad():
        return model.eval()(batches_of(0)[0]["input_ids"]).logits


def banks(model):
    """All that an adapter's banks know, by the layer's place among them."""
    found = []
    for adapter in adapters(model).values():
        bank = adapter.bank
        parts = {name: t for name, t in bank.state_dict().items() if name.startswith("f")}
        parts |= {"keys": bank.current_keys.detach(), "values": bank.current_values.detach()}
        parts |= {"learned": bank.learned}
        if bank.sketch is not None:
            parts |= {"rows": bank.sketch.rows, "total": bank.sketch.total.float()}
        if bank.guard is not None:
            parts |= {"basis": bank.guard.basis, "gain": bank.guard.gain}
        found.append(parts)
    return found


def by_peft(base, folder, dtype=torch.float32):
    return PeftModel.from_pretrained(plain(base, dtype), folder, is_trainable=True)


def by_peft_without_memory(base, folder, dtype=torch.float32):
    model = plain(base, dtype)
    return PeftModel.from_pretrained(model, folder, is_trainable=True, low_cpu_mem_usage=True)


def by_auto(base, folder, dtype=torch.float32):
    return settled(AutoPeftModelForCausalLM.from_pretrained(folder, is_trainable=True, dtype=dtype))


def by_transformers(base, folder, dtype=torch.float32):
    model = plain(base, dtype)
    model.load_adapter(str(folder), is_trainable=True)
    return model


def by_transformers_without_memory(base, folder, dtype=torch.float32):
    model = plain(base, dtype)
    model.load_adapter(str(folder), is_trainable=True, low_cpu_mem_usage=True)
    return model


def by_transformers_at_once(base, folder, dtype=torch.float32):
    return settled(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype))


def by_moram(base, folder, dtype=torch.float32):
    model = plain(base, dtype)
    moram.load(model, folder)
    return model


LOADERS = (
    by_peft,
    by_peft_without_memory,
    by_auto,
    by_transformers,
    by_transformers_without_memory,
    by_transformers_at_once,
    by_moram,
)

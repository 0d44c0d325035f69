"""Adapters on disk, in PEFT's layout: adapter_model.safetensors and adapter_config.json.

The safetensors header holds the whole description too, and is what `load` reads: one file, replaced
in one step, so a crash leaves either the old checkpoint or the new one. Saving changes nothing in
the model; loading checks everything before it changes anything. Names are those of the plain model,
without torch.compile, DistributedDataParallel and other wrappers, on both sides.
"""

import json
import os
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from .bank_state import PARTS
from .beside import beside, has_other_adapters, note_beside
from .config import MoRAMConfig
from .draw import changes_parameters
from .fit import check_fit, check_trained, fingerprint
from .inject import adapters, parameters, restore, warn_uncalled, wrap_paths
from .layers import MoRAMLinear
from .models import split_attention
from .models.reads import why_read
from .optimizers import watch
from .replicas import watch_replicas
from .saved_protection import restore_protection, tensor_name, write_protection
from .sharded import copy_into, is_sharded, reshard, whole
from .stored import CONFIG, FORMAT, PREFIX, WEIGHTS, for_peft, is_foreign, read_files
from .wrappers import plain_names, plain_paths, unwrapped

SKETCH_DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class SaveReport:
    """How many bytes `save` wrote: of atoms, of sketches, of what else was trained.

    left_out: whether there are sketches that were not written.
    """

    atoms: int
    sketches: int
    trained: int
    left_out: bool

    def __str__(self) -> str:
        sizes = f"atoms {_mib(self.atoms)}, sketches {_mib(self.sketches)}"
        sizes += f", trained beside them {_mib(self.trained)}"
        if self.left_out:
            sizes += "; without their sketches the next task cannot be protected"
        return sizes


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


def save(
    model: nn.Module,
    directory: str | Path,
    *,
    tasks: Sequence[str] = (),
    base_model: str | None = None,
    sketches: str | Literal[False] = "float32",
) -> SaveReport:
    """Write the adapters of a model, and what else of it is trainable; the model is not changed.

    What `moram.task` needs to go on is written, too: the sketches of protection, and inside a task
    the guard of its keys.

    A trainable head, norm or embedding is saved whole, with the buffers of its module, because the
    base model does not have it; so are a batch norm's running statistics. What `load` brought or
    `grow` saw trainable stays part of it when it is frozen later; what was frozen before that does
    not.

    Under `fully_shard` every process must call this, and the first one writes.

    Args:
        model: a model after `inject`.
        directory: made if missing. A checkpoint in it is replaced in one step.
        tasks: names of the tasks learned so far, in order.
        base_model: name or path of the base; by default what the model's config says.
        sketches: dtype of the sketches, "float32" or "bfloat16" (half the bytes, and the next task
            is guarded a little differently). False leaves them out: the next task can then not be
            protected, and inside a task the keys are saved as they act, without their guard.
    Returns:
        `SaveReport`.
    Raises:
        ValueError: the model has no adapters, or they differ in their settings (targets, exclude
            and atoms_per_task may differ); directory is the base model's own, or holds another
            adapter; sketches is none of the above.
        TypeError: tasks is one text.
        RuntimeError: a tensor is a shard that only its wrapper can make whole.
    """
    names = plain_names(model)
    found = {names[path]: adapter for path, adapter in adapters(model).items()}
    if not found:
        raise ValueError("model has no MoRAM adapters to save; call moram.inject first")
    if isinstance(tasks, str):
        raise TypeError(f"tasks must be a sequence of names, got the text {tasks!r}")
    if sketches is not False and sketches not in SKETCH_DTYPES:
        raise ValueError(f"sketches must be {', '.join(SKETCH_DTYPES)} or False, got {sketches!r}")
    directory = Path(directory)
    if (directory / "config.json").exists():
        raise ValueError(
            f"directory must not be a model's own, got {directory}, which holds config.json: with "
            "an adapter's files beside it the model could not be loaded; save into another folder"
        )
    if is_foreign(directory / CONFIG):
        raise ValueError(
            f"directory must hold no adapter of another kind, got {directory}, whose {CONFIG} is "
            "not MoRAM's: saving would overwrite it"
        )
    warn_uncalled(model)
    trained = {name: getattr(*place) for name, place in beside(model).items()}
    for name, tensor in trained.items():
        if tensor.is_meta:
            raise RuntimeError(
                f"{name} must have a value to be saved, got a trainable parameter that is "
                "offloaded and so cannot have learned; freeze it"
            )
    if base_model is None:
        base_config = getattr(unwrapped(model), "config", None)
        base_model = getattr(base_config, "_name_or_path", None) or None
    config = _shared_config(found)
    tensors, notes, layers = {}, {}, {}
    for path, adapter in found.items():
        bank = adapter.bank
        bank.check_whole()
        state = bank.state_dict()
        # Without their guard, keys are saved as they act: what is loaded answers as this model.
        keys = bank.acting_keys() if sketches is False else bank.current_keys
        state |= {"current_keys": keys, "current_values": bank.current_values}
        for part in PARTS:
            rows = whole(state[part]).detach()
            tensors[tensor_name(path, part)] = rows.cpu().contiguous()
        notes[tensor_name(path, "live")] = state["live"].cpu()
        notes[tensor_name(path, "is_learned")] = torch.tensor(bank.learned)
        layers[path] = {
            "in_features": adapter.in_features,
            "out_features": adapter.out_features,
            "frozen": bank.num_frozen,
            "current": bank.num_current,
        }
        if adapter.config.atoms_per_task != config.atoms_per_task:
            layers[path]["atoms_per_task"] = adapter.config.atoms_per_task
    atoms = _bytes(tensors)
    protection = (
        {} if sketches is False else write_protection(found, getattr(torch, sketches), tensors)
    )
    written = _bytes(tensors) - atoms
    for name, tensor in trained.items():
        rows = whole(tensor).detach().cpu()
        tensors[f"{PREFIX}{name}"] = rows.clone(memory_format=torch.contiguous_format)
    about = {
        "peft_type": "MORAM",
        "format": FORMAT,
        "base_model_name_or_path": base_model,
        "tasks": list(tasks),
        "settings": config.to_dict(),
        "layers": layers,
        "trained": {name: list(tensor.shape) for name, tensor in trained.items()},
        "other_adapters": has_other_adapters(model),
        "protection": protection,
        "fingerprint": fingerprint(found),
    }
    about |= for_peft(about, _wholly(model, trained), type(unwrapped(model)).__name__)
    left_out = sketches is False and any(a.bank.sketch is not None for a in found.values())
    report = SaveReport(atoms, written, _bytes(tensors) - atoms - written, left_out)
    if is_sharded(model) and torch.distributed.get_rank() != 0:
        return report
    directory.mkdir(parents=True, exist_ok=True)
    weights_tmp, config_tmp = directory / f".{WEIGHTS}.tmp", directory / f".{CONFIG}.tmp"
    try:
        save_file(
            tensors | notes, weights_tmp, metadata={"format": "pt", "moram": json.dumps(about)}
        )
        config_tmp.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        for path in (weights_tmp, config_tmp):
            _flush(path)
        os.replace(weights_tmp, directory / WEIGHTS)
        os.replace(config_tmp, directory / CONFIG)
    finally:
        weights_tmp.unlink(missing_ok=True)
        config_tmp.unlink(missing_ok=True)
    return report


@changes_parameters
def load(model: nn.Module, directory: str | Path) -> dict[str, Any]:
    """Put saved adapters into a model, injecting them first if it has none.

    What was trained besides the adapters is written into the model and trainable again. No random
    number is drawn from the global state.

    Args:
        model: the base model, or one with adapters on the same projections.
        directory: what `save` wrote.
    Returns:
        The description: settings, tasks, layers, trained, base_model_name_or_path.
    Raises:
        FileNotFoundError: there is no checkpoint in directory.
        ValueError: the file is damaged or foreign, or does not fit the model; the message says
            which layer and which size. The model is left untouched.
    """
    about, tensors, config = read_files(Path(directory))
    reshard(model)
    packed = dict(model.named_modules(remove_duplicate=False))
    try:
        split_like(model, about["layers"])
        actual = check_fit(model, about)
        owners = check_trained(model, about)
        if not adapters(model):
            # The keys drawn here are overwritten.
            generator = torch.Generator()
            wrap_paths(
                model,
                tuple(actual[path] for path in about["layers"]),
                lambda linear: MoRAMLinear.from_linear(linear, config, generator=generator),
            )
    except BaseException:
        restore(model, packed)
        raise

    def change() -> None:
        for path, sizes in about["layers"].items():
            adapter = unwrapped(model.get_submodule(actual[path]))
            assert isinstance(adapter, MoRAMLinear)
            own = sizes.get("atoms_per_task", config.atoms_per_task)
            adapter.configure(replace(config, atoms_per_task=own))
            bank = adapter.bank.to(getattr(torch, config.atom_dtype))
            bank.load_state_dict({part: tensors[tensor_name(path, part)] for part in PARTS})
            # A checkpoint from before `moram.task` does not say; then trained values do.
            if tensor_name(path, "is_learned") in tensors:
                bank.learned = bool(tensors[tensor_name(path, "is_learned")])

    watch(lambda: parameters(model), change, moments=False)
    restore_protection(model, about, tensors, actual)
    for name, (module, own) in owners.items():
        present = getattr(module, own)
        copy_into(present, tensors[f"{PREFIX}{name}"])
        if isinstance(present, nn.Parameter):
            present.requires_grad_(True)
    note_beside(model)
    watch_replicas(model)
    return about


def _wholly(model: nn.Module, trained: Container[str]) -> Iterator[str]:
    """Paths of the modules whose every tensor is among the trained ones, by plain name."""
    names = plain_names(model)
    for path, module in model.named_modules():
        state = [f"{names[path]}.{name}".lstrip(".") for name in module.state_dict()]
        if state and path and not list(module.children()) and all(n in trained for n in state):
            yield names[path]


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())


def _shared_config(found: Mapping[str, MoRAMLinear]) -> MoRAMConfig:
    """The settings of all adapters; where they were injected by turns, with their paths as targets.

    Raises:
        ValueError: they differ in more than targets, exclude and atoms_per_task.
    """
    configs = {adapter.config for adapter in found.values()}
    if len(configs) == 1:
        return next(iter(configs))
    first = next(iter(configs))
    own = {"targets": tuple(found), "exclude": (), "atoms_per_task": first.atoms_per_task}
    if len({replace(config, **own) for config in configs}) > 1:
        raise ValueError(
            "adapters must share one config to be saved together, apart from targets, exclude and "
            "atoms_per_task"
        )
    return replace(first, **own)


def _flush(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def split_like(model: nn.Module, layers: Iterable[str]) -> None:
    """Split the packed attention whose projections the checkpoint adapts, or beside which the
    model would read the weight of one that it does."""
    actual = plain_paths(model)
    packed = {path for path, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)}
    wanted = set()
    for layer in layers:
        parent, _, name = layer.rpartition(".")
        parent = actual.get(parent)
        wanted.add(parent)
        if parent is not None and why_read(model.get_submodule(parent), name):
            wanted.add(f"{parent}.self_attn".lstrip("."))
    if packed & wanted:
        split_attention(model, tuple(packed & wanted))

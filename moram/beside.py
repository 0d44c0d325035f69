"""What of a model belongs to its adapters although it lies beside them: trained heads and norms."""

from torch import nn

from .bank import AtomBank
from .layers import MoRAMLinear
from .wrappers import plain_tensors


def beside(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Where the tensors are that the base model does not have: {plain name: (module, its name)}.

    Trainable parameters outside the banks with the buffers of their modules, those that
    `note_beside` has noted, and the running statistics of batch norms, which change in training
    even where their parameters are frozen.
    """
    noted = set().union(*(m.beside for m in model.modules() if isinstance(m, MoRAMLinear)))
    found, seen = {}, set()
    for name, (module, own) in plain_tensors(model).items():
        tensor = getattr(module, own)
        if tensor is None or isinstance(module, AtomBank) or id(tensor) in seen:
            continue
        learns = any(p.requires_grad for p in module._parameters.values() if p is not None)
        learns |= isinstance(module, nn.modules.batchnorm._NormBase)
        is_buffer = own in module._buffers and own not in module._non_persistent_buffers_set
        if tensor.requires_grad or (learns and is_buffer) or name in noted:
            seen.add(id(tensor))
            found[name] = (module, own)
    return found


def note_beside(model: nn.Module) -> None:
    """Remember what is beside the adapters now, also for the time when it is frozen again."""
    names = frozenset(beside(model))
    for module in model.modules():
        if isinstance(module, MoRAMLinear):
            module.beside = names


def has_other_adapters(model: nn.Module) -> bool:
    """Whether PEFT has put adapters of its own into the model."""
    return any(type(module).__module__.startswith("peft.tuners") for module in model.modules())

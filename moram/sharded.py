"""Parameters that `fully_shard`, FullyShardedDataParallel or DeepSpeed hold: as wholes, and which
they are."""

from torch import Tensor, nn


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or all of a DTensor's rows; then every process must call this."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def copy_into(parameter: Tensor, tensor: Tensor) -> None:
    """Overwrite a parameter by a whole tensor, in every process its own shard."""
    if hasattr(parameter, "full_tensor") and not hasattr(tensor, "full_tensor"):
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(parameter, DTensor)
        tensor = tensor.to(parameter.device, parameter.dtype)
        tensor = distribute_tensor(tensor, parameter.device_mesh, parameter.placements)
    parameter.copy_(tensor)
    if getattr(parameter, "_hp_mapping", None) is not None:
        # From its own copy, DeepSpeed's optimiser would write the earlier one back.
        set_full = parameter.set_full_hp_param  # pyright: ignore[reportAttributeAccessIssue]
        set_full(tensor)


def remedy_for_shard(parameter: Tensor) -> str | None:
    """What to do where a parameter is a piece, and not [rows, width]; None where it is whole."""
    if parameter.dim() == 2:
        return None
    if hasattr(parameter, "ds_id"):
        return "DeepSpeed's ZeRO-3 has cut it up: use ZeRO-2, or FSDP2"
    return "do this inside FullyShardedDataParallel.summon_full_params(model)"


def is_managed(parameter: Tensor) -> bool:
    """Whether a sharding library holds a parameter, so that no other may take its place."""
    return hasattr(parameter, "full_tensor") or hasattr(parameter, "_fsdp_flattened")


def is_sharded(model: nn.Module) -> bool:
    """Whether `fully_shard` has cut up a parameter of the model."""
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


def reshard(model: nn.Module) -> None:
    """Put back what `fully_shard` has gathered: after a forward pass without a backward one, the
    root's parameters stay whole, and what is written to them is lost."""
    for module in model.modules():
        # FSDPModule, without importing what may not be there.
        put_back = getattr(module, "reshard", None)
        if callable(put_back) and hasattr(module, "unshard"):
            put_back()

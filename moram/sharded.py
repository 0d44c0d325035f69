"""Parameters that `fully_shard` or FullyShardedDataParallel hold: as wholes, and which they are."""


def whole(tensor):
    """The tensor itself, or all of a DTensor's rows; then every process must call this."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def copy_into(parameter, tensor):
    """Overwrite a parameter by a whole tensor, in every process its own shard."""
    if hasattr(parameter, "full_tensor") and not hasattr(tensor, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        tensor = tensor.to(parameter.device, parameter.dtype)
        tensor = distribute_tensor(tensor, parameter.device_mesh, parameter.placements)
    parameter.copy_(tensor)


def is_managed(parameter):
    """Whether a sharding library holds a parameter, so that no other may take its place."""
    return hasattr(parameter, "full_tensor") or hasattr(parameter, "_fsdp_flattened")


def reshard(model):
    """Put back what `fully_shard` has gathered: after a forward pass without a backward one, the
    root's parameters stay whole, and what is written to them is lost."""
    for module in model.modules():
        # FSDPModule, without importing what may not be there.
        if hasattr(module, "unshard") and hasattr(module, "reshard"):
            module.reshard()

"""Bases whose weights bitsandbytes holds in four bits. A leaf, which imports nothing of it."""

from typing import Any, cast

from torch import nn


def keep_unpacked(model: nn.Module) -> None:
    """Let gradients pass through 4-bit weights, whatever the CPU.

    On CPUs with AVX512-BF16, bitsandbytes repacks a weight when it is first called without a
    gradient in eval mode, and no gradient passes through it afterwards. This turns that off, and
    undoes what has happened; of that remains that the scales of blocks were rounded to bfloat16.

    Args:
        model: any; only bitsandbytes' `Linear4bit`s are touched.
    """
    for module in model.modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        linear = cast(Any, module)
        linear.support_avx512bf16_for_cpu = False
        state = getattr(linear.weight, "quant_state", None)
        if not getattr(state, "packing_format_for_cpu", False):
            continue
        # What writes a module to disk unpacks its weight first, in place; of scales that are not
        # quantised themselves, 0.50 forgets that it has transposed them.
        linear.state_dict()
        state = linear.weight.quant_state
        if state.absmax.dim() == 2:
            state.absmax = state.absmax.T.reshape(-1).float()

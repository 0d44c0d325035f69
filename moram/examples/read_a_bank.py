"""The operator alone: one read of a bank, its gradients, and the path that it takes.

python -m moram.examples.read_a_bank
"""

import torch

from moram_kernels import SelfActivation, available_backends, retrieve


def main(tokens: int = 32, width: int = 64, frozen: int = 24, current: int = 8) -> dict[str, float]:
    """Read with every backend that runs here; returns its largest relative error, by name.

    Args:
        tokens, width: of the input, [tokens, width]. frozen, current: atoms.
    """
    generator = torch.Generator().manual_seed(0)
    sizes = (tokens, frozen, frozen, current, current)
    x, keys, values, *fresh = (torch.randn(n, width, generator=generator) for n in sizes)
    rule = SelfActivation(top_k=8, temperature=0.03, threshold=0.2)
    found = {}
    for backend in available_backends():
        # Only atoms of the current task take gradients; frozen ones cost no gradient work.
        mine = [tensor.clone().requires_grad_() for tensor in fresh]
        call = {"current_keys": mine[0], "current_values": mine[1], "backend": backend}
        update = retrieve(x, keys, values, rule, training=True, **call)
        update.square().sum().backward()
        # At inference the threshold silences weak atoms.
        quiet = retrieve(x, keys, values, rule, **call).detach()
        found[backend] = [update.detach(), quiet, *(tensor.grad for tensor in mine)]
        print(f"{backend}: update {tuple(update.shape)}, of norm {update.norm():.2f}")
    expected = found["reference"]
    return {
        name: max(((a - b).norm() / b.norm()).item() for a, b in zip(each, expected, strict=True))
        for name, each in found.items()
    }


if __name__ == "__main__":
    print(main())

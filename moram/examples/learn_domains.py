"""Teach a CLIP two image domains one after the other; a tiny random one and drawn images.

python -m moram.examples.learn_domains
"""

from typing import Any

import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

import moram

SMALL: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
VISION = SMALL | {"num_attention_heads": 2, "image_size": 16, "patch_size": 8}
TEXT = SMALL | {"num_attention_heads": 2, "vocab_size": 64, "max_position_embeddings": 8}
TEXT |= {"eos_token_id": 63, "bos_token_id": 1}


def domain(first: int, generator: torch.Generator, shots: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy images [4 shots, 3, 16, 16] of four classes, their labels, the classes' prompts."""
    patterns = torch.randn(4, 3, 16, 16, generator=generator)
    labels = torch.arange(4).repeat(shots)
    images = patterns[labels] + 0.5 * torch.randn(4 * shots, 3, 16, 16, generator=generator)
    names = torch.arange(first, first + 4)
    prompts = torch.stack([torch.tensor([1, 2, name, 63]) for name in names])
    return images, labels, prompts


def main(steps: int = 40) -> list[list[float]]:
    """Learn both domains; returns R[t][i], the percent right on domain i after domain t."""
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=16))
    generator = torch.Generator().manual_seed(1)
    domains = [domain(first, generator) for first in (10, 20)]
    config = moram.MoRAMConfig(atoms_per_task=4, top_k=4, protect=0.95)
    print(moram.inject(model, config, generator=generator))
    matrix = []
    for images, labels, prompts in domains:
        batches = [{"input_ids": prompts, "pixel_values": images}]
        with moram.task(model, batches, generator=generator) as atoms:
            optimizer = torch.optim.AdamW(atoms, lr=1e-2)
            for _ in range(steps):
                scores = model.train()(**batches[0]).logits_per_image
                torch.nn.functional.cross_entropy(scores, labels).backward()
                optimizer.step()
                optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            found = [model(input_ids=p, pixel_values=x).logits_per_image for x, _, p in domains]
        pairs = zip(found, domains, strict=True)
        matrix.append([100 * (s.argmax(1) == y).float().mean().item() for s, (_, y, _) in pairs])
        print(f"percent right on each domain: {matrix[-1]}")
    return matrix


if __name__ == "__main__":
    main()

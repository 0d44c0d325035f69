"""MoE-Adapters: shared experts, a router per task, and a selector that finds the task."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import check_count
from ..inject import adapters
from ..layers.beside_mlp import BesideMLP
from ..layers.moe_adapters import MoEAdapterMLP
from ..models.clip import Clip
from .base import Classifier, Images, ImageStage, Method
from .selector import TaskSelector, load_alexnet

# The parts of open_clip's and Hugging Face's CLIP that encode images, and those that encode texts.
ENCODERS = {
    "image": ("visual.", "vision_model."),
    "text": ("transformer.", "text.", "text_model."),
}
# The attention and the norm before the MLP of their blocks.
BLOCKS = (("attn", "ln_2"), ("self_attn", "layer_norm2"))
# The smallest images that AlexNet's convolutions can read.
ALEXNET_SIDE = 31
# Images encoded at once to train the selector.
READ = 64


class MoEAdapters(Method):
    """Experts in every transformer block of a CLIP, a router per task, per-image task selection.

    `MoEAdapterMLP` says what a block computes. A task trains its own router and all experts that
    are not frozen; when it ends, the experts that it used most freeze in every block, and its
    selector (`TaskSelector`) learns from its training images. At test an image goes through the
    router of the task that the selector finds, and is compared with texts encoded with that same
    router; if none is found, both go through the original CLIP.

    Deviations: the selector chooses for each image, not for each batch, and reads the original
    CLIP's image features; selection="batch" with selector_features="alexnet" is as published but
    for the reference autoencoder, whose part thresholds take (see `TaskSelector`), and the pixels,
    which AlexNet sees as CLIP normalises them. Experts that a task has never used do not freeze.

    Needs no task id, but for selection="given". Stores the experts, a router per task and block,
    the current one's noise, and an autoencoder per task; a selector on AlexNet needs that model,
    too.

    Trained per task: (E - F) (2 W D + W + D) + 2 D E in each block of width D, for E experts of
    bottleneck W, F of them frozen. In a ViT-B/16: 43,625,472 in the experts at first, 3,965,952
    fewer with every task, and 675,840 in the router. One process: counts are not shared.

    Args:
        experts, top_k, width, scale, dropout: see `MoEAdapterMLP`.
        freeze: experts that freeze per task and block.
        seed: of the experts' and selectors' initial weights.
        selection: "image"; "batch": one task for all images that are scored together, which tells
            the domain where a batch comes from one domain; or "given": every image is scored with
            the router of its own task, or without any where that is not learned yet. The last is
            told the task: it shows what the experts have learned, whatever the selector does.
        selector_features: "clip", or "alexnet", with its sigmoid.
        alexnet: file of torchvision's AlexNet weights.
        selector_width, selector_steps, selector_lr, threshold, quantile: see `TaskSelector`.
        selector_relative: its `relative`.
    Source: Yu et al., "Boosting Continual Learning of Vision-Language Models via Mixture-of-Experts
        Adapters", CVPR 2024, arXiv 2403.11549.
    Cost: an image is encoded twice, and all texts once for each task and once without.
    """

    name = "MoE-Adapters"
    needs = "clip"
    freeze: int
    selection: str
    given: int
    alexnet: nn.Module | None
    selector: TaskSelector

    def __init__(
        self,
        experts: int = 22,
        top_k: int = 2,
        width: int = 64,
        scale: float = 0.1,
        dropout: float = 0.1,
        freeze: int = 2,
        seed: int = 0,
        selection: str = "image",
        selector_features: str = "clip",
        alexnet: str | Path | None = None,
        selector_width: int = 100,
        selector_steps: int = 300,
        selector_lr: float = 0.003,
        threshold: float | None = None,
        quantile: float = 0.95,
        selector_relative: bool = False,
    ) -> None:
        for key, value in (("experts", experts), ("top_k", top_k), ("width", width)):
            check_count(key, value, 1)
        check_count("freeze", freeze, 0)
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        if not 0 < scale < float("inf"):
            raise ValueError(f"scale must be finite and > 0, got {scale}")
        for key, value, allowed in (
            ("selection", selection, ("image", "batch", "given")),
            ("selector_features", selector_features, ("clip", "alexnet")),
        ):
            if value not in allowed:
                raise ValueError(f"{key} must be one of {', '.join(allowed)}, got {value!r}")
        if (alexnet is not None) != (selector_features == "alexnet"):
            raise ValueError(
                'alexnet must be a file of weights with selector_features="alexnet", and None '
                f"without, got {alexnet!r} with {selector_features!r}"
            )
        self.settings: dict[str, Any] = {
            "experts": experts,
            "top_k": top_k,
            "width": width,
            "scale": scale,
            "dropout": dropout,
        }
        self.freeze, self.selection = freeze, selection
        self.needs_task_id = selection == "given"
        # The task that is scored, where it is told.
        self.given = -1
        # Images that are scored together are given to one task.
        self.tied = frozenset({"eval_batch"} if selection == "batch" else ())
        self.generator = torch.Generator().manual_seed(seed)
        self.alexnet = None if alexnet is None else load_alexnet(alexnet)
        self.selector = TaskSelector(
            selector_width,
            selector_steps,
            selector_lr,
            threshold,
            quantile,
            bounded=alexnet is not None,
            relative=selector_relative,
        )

    def setup(self, model: nn.Module) -> None:
        blocks = find_blocks(model)
        model.requires_grad_(False)
        for block, norm in blocks:
            features = norm.weight.shape[0]
            layer = MoEAdapterMLP(block.mlp, features, generator=self.generator, **self.settings)
            layer.listen(norm)
            block.mlp = layer.train(block.mlp.training)

    def layers(self, model: nn.Module) -> dict[str, MoEAdapterMLP]:
        """This method's layers by path, in the order of the model."""
        return adapters(model, MoEAdapterMLP)

    def begin_task(self, model: nn.Module, index: int, stage: ImageStage) -> None:
        if self.alexnet is not None and stage.clip.preprocess.size < ALEXNET_SIDE:
            raise ValueError(
                f'selector_features="alexnet" needs images of {ALEXNET_SIDE} pixels, this CLIP '
                f"reads {stage.clip.preprocess.size}"
            )
        for layer in self.layers(model).values():
            layer.grow()

    def end_task(self, model: nn.Module, index: int, stage: ImageStage) -> None:
        for layer in self.layers(model).values():
            layer.freeze(self.freeze)
        was_training = model.training
        model.eval()
        with torch.no_grad():
            features = [
                self._selector_input(pixels, self._encode(stage.clip, -1, pixels))
                for pixels, _ in stage.batches(READ)
            ]
        model.train(was_training)
        self.selector.learn(torch.cat(features), self.generator)

    def select(self, model: nn.Module, index: int) -> None:
        self.given = index

    def classifier(self, clip: Clip, prompts: Tensor) -> Classifier:
        """Each image's similarities with the texts, both encoded for the task it is given to."""
        texts = {
            task: self._with_task(clip.model, task, clip.encode_text, prompts)
            for task in range(-1, len(self.selector))
        }

        def classify(images: Images) -> Tensor:
            pixels = images.pixels()
            features = self._encode(clip, -1, pixels)
            if self.selection == "given":
                known = self.given if self.given in texts else -1
                chosen = torch.full((len(pixels),), known, device=pixels.device)
            else:
                inputs = self._selector_input(pixels, features)
                chosen = self.selector.select(inputs, whole_batch=self.selection == "batch")
            scores = clip.logits(features, texts[-1])
            for task in chosen[chosen >= 0].unique().tolist():
                rows = chosen == task
                scores[rows] = clip.logits(self._encode(clip, task, pixels[rows]), texts[task])
            return scores

        return classify

    def _selector_input(self, pixels: Tensor, features: Tensor) -> Tensor:
        """What the selector reads of some images, float32 [B, E]."""
        if self.alexnet is None:
            return features.float()
        return self.alexnet.to(pixels.device)(pixels.float()).flatten(1).sigmoid()

    def _encode(self, clip: Clip, task: int, pixels: Tensor) -> Tensor:
        return self._with_task(clip.model, task, clip.encode_image, pixels)

    def _with_task(
        self, model: nn.Module, task: int, function: Callable[[Tensor], Tensor], argument: Tensor
    ) -> Tensor:
        """function(argument) with the router of a task, -1 = the original model."""
        layers = self.layers(model).values()
        before = [layer.task for layer in layers]
        for layer in layers:
            layer.use(task)
        try:
            return function(argument)
        finally:
            for layer, earlier in zip(layers, before, strict=True):
                layer.use(earlier)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"selector": self.selector.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.selector.load_state_dict(state["selector"])


def find_blocks(
    model: nn.Module, encoders: Iterable[str] = tuple(ENCODERS)
) -> list[tuple[Any, nn.LayerNorm]]:
    """The transformer blocks of a CLIP's encoders, each with the norm before its MLP.

    Raises:
        ValueError: an encoder has no such blocks, or blocks of another form.
    """
    found = []
    for encoder in encoders:
        prefixes = ENCODERS[encoder]
        blocks = [
            (path, module, getattr(module, norm))
            for path, module in model.named_modules()
            for attention, norm in BLOCKS
            if path.startswith(prefixes)
            and all(hasattr(module, name) for name in (attention, norm, "mlp"))
        ]
        if not blocks:
            raise ValueError(
                f"model must be a CLIP of open_clip or Hugging Face with transformer blocks in its "
                f"{' and '.join(encoders)} encoder; {type(model).__name__} has none in its "
                f"{encoder} encoder"
            )
        for path, block, norm in blocks:
            problem = _why_refused(block)
            if problem:
                raise ValueError(f"block {path} cannot take experts: {problem}")
            found.append((block, norm))
    return found


def _why_refused(block: Any) -> str | None:
    if isinstance(block.mlp, BesideMLP):
        return "it has some already"
    if not isinstance(getattr(block, "ls_2", nn.Identity()), nn.Identity):
        return "it scales its MLP's output (ls_2), and would scale theirs"
    if not getattr(getattr(block, "attn", None), "batch_first", True):
        return "its tensors are [T, B, D]; build the model with batch_first"
    return None

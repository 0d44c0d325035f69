"""RAIL: ridge regression on frozen image features, learned task by task without forgetting.

In its primal form (a random layer and a recursion) and in its dual form (a kernel and the stored
features), with the fusion that both share. Adapters and training steps do not occur here.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import check_count
from ..models.clip import Clip
from .base import Classifier, Images, ImageStage, Method, check_order

DTYPES = ("float64", "float32")
# Images read at once by the dual form, which learns from all of them together.
READ = 128
# From features [B, E] to scores [B, learned classes].
Regression = Callable[[Tensor], Tensor]


class _RAIL(Method):
    """What both forms share: a frozen model, the order of classes and the fused classifier."""

    needs = "clip"
    has_steps = False
    has_frozen_features = True

    def __init__(self, ridge: float, fusion: float, dtype: str) -> None:
        _check_positive("ridge", ridge)
        _check_number("fusion", fusion)
        if not 0 <= fusion <= 1:
            raise ValueError(f"fusion must be in [0, 1], got {fusion}")
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        self.ridge, self.fusion = ridge, fusion
        self.dtype: torch.dtype = getattr(torch, dtype)
        # What the regression multiplies its inputs with: [width or N, learned classes].
        self.coefficients: Tensor | None = None
        self.learned = 0

    def setup(self, model: nn.Module) -> None:
        model.requires_grad_(False)

    def classifier(self, clip: Clip, prompts: Tensor) -> Classifier:
        """The fused scores of `fuse`; before the first task, zero-shot's."""
        if not self.learned:
            return super().classifier(clip, prompts)
        texts = clip.encode_text(prompts)
        regression = self._regression(texts.shape[1], texts.device)

        def classify(images: Images) -> Tensor:
            features = images.features()
            logits = clip.logits(features, texts)
            return fuse(logits, regression(features.to(self.dtype)), self.fusion)

        return classify

    def _regression(self, size: int, device: torch.device) -> Regression:
        """A function from features [B, size] to regression scores [B, learned classes]."""
        raise NotImplementedError

    def _examples(
        self, stage: ImageStage, size: int, device: torch.device
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (features [B, E], labels [B] in the union of all classes) of a stage."""
        check_order(stage, self.learned)
        for features, labels in stage.features(size):
            if labels.lt(0).any() or labels.ge(stage.count).any():
                raise ValueError(
                    f"labels must be in 0..{stage.count - 1}, got {labels.min()}..{labels.max()}"
                )
            yield features.to(device), labels.to(device) + stage.offset


class RAILPrimal(_RAIL):
    """Ridge regression on a wide random layer, updated recursively; no example is kept.

    phi(f) = relu(f H), H [E, width] drawn once from U(-1/sqrt(E), 1/sqrt(E)), never trained.
    Scores are phi(f) W, where W minimises |Phi W - Y|^2 + ridge |W|^2 over all examples of all
    tasks so far, Y one-hot. With R = (Phi^T Phi + ridge I)^-1, each mini-batch gives

        R <- R - R Phi^T S^-1 Phi R,   W <- W + R Phi^T S^-1 (Y - Phi W),   S = I + Phi R Phi^T

    with the R of before on the right; R Phi^T S^-1 is the new R times Phi^T, as it is published.
    New classes get columns of zeros. So nothing is forgotten, and neither the order of the tasks
    nor the size of the batches matters, up to rounding.

    Deviations: the first task goes through the same recursion, from R = I / ridge and W = 0,
    instead of one inversion: the same R in exact arithmetic. And those of `fuse`.

    Needs no task id. Stores R [width, width] and W [width, C]; H is drawn again from the seed. At
    the defaults R takes 1.8 GB and 1,100 classes 0.13 GB; float32 halves both.

    Args:
        width: outputs of the random layer.
        ridge: regularisation, > 0.
        fusion: share of the regression in the fused scores, in [0, 1].
        batch: images a mini-batch.
        seed: of the random layer.
        dtype: "float64" or "float32", of R, W and all arithmetic. H is the same in both, rounded.
    Source: Xu et al., "Advancing Cross-domain Discriminability in Continual Learning of
        Vision-Language Models", NeurIPS 2024, arXiv 2406.18868 (primal form).
    Cost: 4 * width^2 FLOPs an image to learn; two R in memory while a task is learned.
    """

    name = "RAIL-Primal"
    width: int
    batch: int
    seed: int
    learned: int

    def __init__(
        self,
        width: int = 15000,
        ridge: float = 0.1,
        fusion: float = 0.8,
        batch: int = 128,
        seed: int = 0,
        dtype: str = "float64",
    ) -> None:
        super().__init__(ridge, fusion, dtype)
        check_count("width", width, 1)
        check_count("batch", batch, 1)
        check_count("seed", seed, 0)
        self.width, self.batch, self.seed = width, batch, seed
        self.inverse: Tensor | None = None

    @torch.no_grad()
    def end_task(self, model: nn.Module, index: int, stage: ImageStage) -> None:
        device = next(model.parameters()).device
        # Copies, so that a state taken before stays as it was, and a task is learned or is not.
        inverse, coefficients = self._grown(stage.count, device)
        total, hidden = coefficients.shape[1], None
        for features, labels in self._examples(stage, self.batch, device):
            if hidden is None:
                hidden = self._hidden(features.shape[1], device)
            inputs = (features.to(self.dtype) @ hidden).relu()
            _absorb(inverse, coefficients, inputs, F.one_hot(labels, total).to(self.dtype))
        self.inverse, self.coefficients, self.learned = inverse, coefficients, total

    def written_bytes(self, model: nn.Module, count: int) -> int:
        # A state and the one that it replaces.
        return 2 * self.width**2 * self.dtype.itemsize

    def _grown(self, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Copies of R, and of W with columns of zeros for `count` new classes."""
        if self.inverse is None or self.coefficients is None:
            inverse = torch.eye(self.width, dtype=self.dtype, device=device).div_(self.ridge)
            return inverse, inverse.new_zeros(self.width, count)
        return self.inverse.to(device, copy=True), F.pad(self.coefficients.to(device), (0, count))

    def _hidden(self, size: int, device: torch.device) -> Tensor:
        """The random layer [size, width]; drawn in float64, so that dtype only rounds it."""
        generator = torch.Generator().manual_seed(self.seed)
        bound = 1 / math.sqrt(size)
        hidden = torch.empty(size, self.width, dtype=torch.float64)
        return hidden.uniform_(-bound, bound, generator=generator).to(device, self.dtype)

    def _regression(self, size: int, device: torch.device) -> Regression:
        assert self.coefficients is not None
        hidden, coefficients = self._hidden(size, device), self.coefficients.to(device)
        return lambda features: (features @ hidden).relu() @ coefficients

    def state_dict(self) -> dict[str, Any]:
        if self.inverse is None:
            return {}
        return {"seed": self.seed, "inverse": self.inverse, "coefficients": self.coefficients}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`.

        Raises:
            ValueError: the state is of another width, seed or dtype.
        """
        inverse = state.get("inverse")
        if inverse is not None:
            found = (len(inverse), state["seed"], inverse.dtype)
            if found != (self.width, self.seed, self.dtype):
                raise ValueError(
                    f"state must be of width {self.width}, seed {self.seed} and {self.dtype}, got "
                    f"width {found[0]}, seed {found[1]} and {found[2]}"
                )
        self.inverse, self.coefficients = inverse, state.get("coefficients")
        self.learned = 0 if self.coefficients is None else self.coefficients.shape[1]


def _absorb(inverse: Tensor, coefficients: Tensor, inputs: Tensor, targets: Tensor) -> None:
    """One step of the recursion, in place: inputs [B, width], targets [B, C]."""
    product = inputs @ inverse
    system = product @ inputs.T
    system.diagonal().add_(1)
    factor = torch.linalg.cholesky(system)
    # With S = L L^T and half = L^-1 Phi R, R loses half^T half: what is symmetric stays so.
    half = torch.linalg.solve_triangular(factor, product, upper=False)
    residual = targets - inputs @ coefficients
    inverse.addmm_(half.T, half, alpha=-1)
    coefficients.addmm_(half.T, torch.linalg.solve_triangular(factor, residual, upper=False))


class RAILDual(_RAIL):
    """Kernel ridge regression on the features of all tasks so far, solved anew after each task.

    K(x, y) = exp(-gamma |x - y|^2); scores are K(f, memory) A with (K + ridge I) A = Y, where K is
    the memory's own kernel matrix [N, N] and Y one-hot. The order of the tasks does not matter, up
    to rounding. For deviations see `fuse`.

    Needs no task id. Stores the N training features [N, E] in their own dtype, and their labels;
    A [N, C] follows from them and is solved again after a state is loaded.

    Args:
        gamma: of the kernel, > 0.
        ridge: regularisation, > 0.
        fusion: share of the regression in the fused scores, in [0, 1].
        dtype: "float64" or "float32", of the kernel and the solution. K's largest eigenvalue is
            close to N, so at 10^4 images float32 rounds by as much as the default ridge: with
            17,600 artificial features its scores were off by 1e-3.
    Source: Xu et al., "Advancing Cross-domain Discriminability in Continual Learning of
        Vision-Language Models", NeurIPS 2024, arXiv 2406.18868 (dual form).
    Cost: N^3 / 3 + 2 N^2 (E + C) FLOPs a task, two [N, N] in memory; 2 N (E + C) an image to
        classify.
    """

    name = "RAIL-Dual"
    learned: Any

    def __init__(
        self,
        gamma: float = 0.1,
        ridge: float = 0.001,
        fusion: float = 0.8,
        dtype: str = "float64",
    ) -> None:
        super().__init__(ridge, fusion, dtype)
        _check_positive("gamma", gamma)
        self.gamma = gamma
        self.features: Tensor | None = None
        self.labels: Tensor | None = None

    @torch.no_grad()
    def end_task(self, model: nn.Module, index: int, stage: ImageStage) -> None:
        device = next(model.parameters()).device
        parts = list(self._examples(stage, READ, device))
        if self.features is not None and self.labels is not None:
            parts.insert(0, (self.features.to(device), self.labels.to(device)))
        features, labels = (torch.cat(part) for part in zip(*parts, strict=True))
        learned = stage.offset + stage.count
        self.coefficients = self._solve(features, labels, learned)
        self.features, self.labels, self.learned = features, labels, learned

    def _solve(self, features: Tensor, labels: Tensor, learned: int) -> Tensor:
        # Held by no name, the system is freed before the solver copies its factor.
        factor = torch.linalg.cholesky(self._system(features.to(self.dtype)))
        return torch.cholesky_solve(F.one_hot(labels, learned).to(self.dtype), factor)

    def _system(self, features: Tensor) -> Tensor:
        """K + ridge I of all stored features."""
        kernel = self._kernel(features, features)
        kernel.diagonal().add_(self.ridge)
        return kernel

    def _kernel(self, x: Tensor, y: Tensor) -> Tensor:
        """K [B, N] of rows x [B, E] and y [N, E], in a single buffer."""
        kernel = (x @ y.T).mul_(-2)
        kernel.add_(x.square().sum(1)[:, None]).add_(y.square().sum(1))
        return kernel.clamp_min_(0).mul_(-self.gamma).exp_()

    def _regression(self, size: int, device: torch.device) -> Regression:
        assert self.features is not None and self.labels is not None
        memory = self.features.to(device)
        if self.coefficients is None:
            self.coefficients = self._solve(memory, self.labels.to(device), self.learned)
        memory, coefficients = memory.to(self.dtype), self.coefficients.to(device)
        return lambda features: self._kernel(features, memory) @ coefficients

    def state_dict(self) -> dict[str, Any]:
        if not self.learned:
            return {}
        return {"learned": self.learned, "features": self.features, "labels": self.labels}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.learned = state.get("learned", 0)
        self.features, self.labels = state.get("features"), state.get("labels")
        # Solved when it is needed, on the device that needs it.
        self.coefficients = None


def fuse(logits: Tensor, regression: Tensor, fusion: float) -> Tensor:
    """Scores from CLIP's and the regression's, which leave zero-shot's answers outside alone.

    Where zero-shot's answer is a learned class, the learned classes score (1 - fusion) softmax of
    the logits over all classes + fusion * regression, and all others -inf. Elsewhere the scores
    are the logits: zero-shot's own, down to ties that a softmax would make or break.

    So an image of a task to come is right exactly where zero-shot is right: Transfer is
    zero-shot's. The published code pads the regression with zeros instead of -inf; the two answer
    differently only where every learned class's fused score is below an unlearned one's.

    Args:
        logits: [B, C], scaled similarities; the learned classes come first.
        regression: [B, learned], learned <= C.
        fusion: in [0, 1].
    Returns:
        [B, C], in the wider of the two dtypes. Rows of either kind are comparable within
        themselves alone.
    Source: Xu et al., NeurIPS 2024, arXiv 2406.18868 (fusion module).
    """
    dtype = torch.promote_types(logits.dtype, regression.dtype)
    learned = regression.shape[1]
    is_learned = logits.argmax(1, keepdim=True) < learned
    logits = logits.to(dtype)
    fused = torch.full_like(logits, -math.inf)
    fused[:, :learned] = (1 - fusion) * logits.softmax(1)[:, :learned] + fusion * regression
    return torch.where(is_learned, fused, logits)


def _check_number(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")


def _check_positive(name: str, value: float) -> None:
    _check_number(name, value)
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be finite and > 0, got {value}")

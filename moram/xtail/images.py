"""From image files to batches of normalised pixels: decoding, transforms, a cache in memory."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import Any, TypeVar, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..models.clip import Clip, Preprocess
from .data.domains import BadImage, Split, origin

# Of the published training transform: part of the area that is kept, and the crop's proportions.
SCALE, RATIO = (0.9, 1.0), (3 / 4, 4 / 3)

Item = TypeVar("Item")
Found = TypeVar("Found")
Rows = Tensor | Sequence[int]
# From an image in RGB to what is kept of it.
Prepare = Callable[[Image.Image], Tensor]


class ImageStore:
    """Decoded images, as many as fit into a budget of memory; others are decoded when needed.

    Args:
        gib: the budget, in GiB (2^30 bytes). workers: threads that decode; 1 = no threads.
    """

    left: int
    lock: Lock
    pool: ThreadPoolExecutor | None

    def __init__(self, gib: float, workers: int = 1) -> None:
        self.left, self.lock = int(gib * 2**30), Lock()
        self.kept: dict[tuple[int, int, Prepare | None], tuple[Image.Image | Tensor, Split]] = {}
        self.pool = ThreadPoolExecutor(workers) if workers > 1 else None

    @overload
    def load(self, split: Split, rows: Rows) -> list[Image.Image]: ...
    @overload
    def load(self, split: Split, rows: Rows, prepare: Prepare) -> list[Tensor]: ...
    def load(self, split: Split, rows: Rows, prepare: Prepare | None = None) -> list[Any]:
        """Images of a split, each after `prepare` (None = as it is). The same one for all calls.

        Raises:
            BadImage: one of them cannot be decoded.
        """
        return list(self.map(lambda row: self._one(split, int(row), prepare), rows))

    def map(self, function: Callable[[Item], Found], items: Iterable[Item]) -> Iterator[Found]:
        """The results of a function in order, by the threads if there are any."""
        return map(function, items) if self.pool is None else self.pool.map(function, items)

    def close(self) -> None:
        """Let the threads go."""
        if self.pool is not None:
            self.pool.shutdown()

    def _one(self, split: Split, row: int, prepare: Prepare | None) -> Image.Image | Tensor:
        # The same image under whatever selection.
        split, row = origin(split, row)
        key = (id(split), row, prepare)
        if key in self.kept:
            return self.kept[key][0]
        image = split.load(row)
        image = image if prepare is None else prepare(image)
        size = image.nbytes if isinstance(image, Tensor) else 3 * image.width * image.height
        with self.lock:
            # Another thread may have been as fast.
            if key not in self.kept and size <= self.left:
                self.left -= size
                # Keeping the split keeps its id from being given to another one.
                self.kept[key] = (image, split)
        return image

    def find_bad(
        self,
        split: Split,
        prepare: Prepare | None = None,
        step: Callable[[int], object] = lambda count: None,
    ) -> dict[int, str]:
        """Decode every image once: {row: reason} of those that cannot be.

        Args:
            step: called with the number of images done.
        """

        def reason(row: int) -> tuple[int, str] | None:
            try:
                self._one(split, row, prepare)
            except BadImage as error:
                return row, str(error)
            return None

        bad = {}
        for found in self.map(reason, range(len(split))):
            if found is not None:
                bad[found[0]] = found[1]
            step(1)
        return bad


class Transforms:
    """The two transforms of CLIP, to uint8; `pixels` normalises."""

    size: int
    mean: Tensor
    std: Tensor

    def __init__(self, preprocess: Preprocess) -> None:
        self.size = preprocess.size
        self.mean, self.std = (
            torch.tensor(values).view(1, 3, 1, 1) for values in (preprocess.mean, preprocess.std)
        )

    def test(self, image: Image.Image) -> Tensor:
        """The shorter side to the model's size (bicubic), then the middle: [3, S, S] uint8."""
        V = _transforms().functional
        image = V.resize(image, self.size, V.InterpolationMode.BICUBIC)
        return to_tensor(V.center_crop(image, self.size))

    def crop(self, image: Image.Image, box: tuple[int, int, int, int]) -> Tensor:
        """A part of an image at the model's size (bicubic): [3, S, S] uint8."""
        V, size = _transforms().functional, [self.size, self.size]
        return to_tensor(V.resized_crop(image, *box, size, V.InterpolationMode.BICUBIC))

    def draw_box(self, image: Image.Image) -> tuple[int, int, int, int]:
        """(top, left, height, width) of a random crop, drawn from torch's global generator."""
        return _transforms().RandomResizedCrop.get_params(image, SCALE, RATIO)

    def pixels(self, images: list[Tensor], like: Tensor) -> Tensor:
        """A list of [3, S, S] uint8 as one normalised batch, of a tensor's device and dtype."""
        batch = torch.stack(images).to(like.device)
        mean, std = self.mean.to(like.device), self.std.to(like.device)
        return ((batch.float() / 255 - mean) / std).to(like.dtype)


def _transforms() -> Any:
    """Those of torchvision, which take PIL images, though their types say tensors."""
    from torchvision import transforms

    return transforms


def to_tensor(image: Image.Image) -> Tensor:
    """A PIL image as uint8 [3, H, W]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


class ImageRows:
    """The training images of a task: a few per class, randomly cropped each time.

    Args:
        clip: the model. split: the images. prompts: of the task's classes.
        offset: classes of all earlier tasks. store, transforms: of the images.
        text_loss, label_smoothing: see `moram.xtail.objective.contrastive`.
    """

    # See `TaskTrainer`.
    joint = True
    clip: Clip
    split: Split
    offset: int
    count: int
    store: ImageStore
    transforms: Transforms
    labels: Tensor
    prompt_ids: Tensor
    text_loss: bool
    label_smoothing: float

    def __init__(
        self,
        clip: Clip,
        split: Split,
        prompts: Sequence[str],
        offset: int,
        store: ImageStore,
        transforms: Transforms,
        text_loss: bool = True,
        label_smoothing: float = 0.0,
    ) -> None:
        self.clip, self.split, self.offset, self.count = clip, split, offset, len(prompts)
        self.store, self.transforms = store, transforms
        self.labels = torch.as_tensor(split.labels)
        self.prompt_ids = clip.tokens(prompts)
        self.text_loss, self.label_smoothing = text_loss, label_smoothing
        # The prompts' features, once it has shown that no trained parameter changes them.
        self.fixed_texts: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def num_labels(self, rows: Tensor) -> int:
        """What the loss of a step is divided by: it is a mean already."""
        return 1

    def pixels(self, rows: Rows, share: slice = slice(None)) -> Tensor:
        """Normalised crops [B, 3, S, S], drawn from torch's global generator; for all rows, also
        where those of a share alone are made."""
        images = self.store.load(self.split, rows)
        # Drawn in order: threads would draw in any.
        pairs = [(image, self.transforms.draw_box(image)) for image in images]
        cropped = list(self.store.map(lambda pair: self.transforms.crop(*pair), pairs[share]))
        return self.transforms.pixels(cropped, self.clip.parameter)

    def texts(self) -> Tensor:
        """Features of the task's prompts [C, E], once a task where nothing trained changes them."""
        if self.fixed_texts is not None:
            return self.fixed_texts
        texts = self.clip.encode_text(self.prompt_ids)
        if torch.is_grad_enabled() and not texts.requires_grad:
            self.fixed_texts = texts
        return texts


class TestImages:
    """The test images of a task, in batches.

    Args:
        clip, split, store, transforms: as for `ImageRows`.
        frozen: keep the images' features, which no method changes.
    """

    __test__ = False
    clip: Clip
    split: Split
    store: ImageStore
    transforms: Transforms
    labels: Tensor

    def __init__(
        self,
        clip: Clip,
        split: Split,
        store: ImageStore,
        transforms: Transforms,
        frozen: bool = False,
    ) -> None:
        self.clip, self.split, self.store, self.transforms = clip, split, store, transforms
        self.labels = torch.as_tensor(split.labels)
        self.kept: dict[tuple[int, int], Tensor] | None = {} if frozen else None

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, size: int) -> Iterator["ImageBatch"]:
        """`ImageBatch`es of the images in order."""
        for rows in torch.arange(len(self)).split(size):
            yield ImageBatch(self, rows)


class ImageBatch:
    """A batch of test images, whose pixels and features are computed when asked for."""

    images: TestImages
    rows: Tensor

    def __init__(self, images: TestImages, rows: Tensor) -> None:
        self.images, self.rows = images, rows

    def __len__(self) -> int:
        return len(self.rows)

    def pixels(self) -> Tensor:
        """Normalised images [B, 3, S, S]."""
        images = self.images
        loaded = images.store.load(images.split, self.rows, images.transforms.test)
        return images.transforms.pixels(loaded, images.clip.parameter)

    def features(self) -> Tensor:
        """Their unit features [B, E]."""
        kept, key = self.images.kept, (int(self.rows[0]), len(self.rows))
        if kept is None:
            return self.images.clip.encode_image(self.pixels())
        if key not in kept:
            kept[key] = self.images.clip.encode_image(self.pixels())
        return kept[key]

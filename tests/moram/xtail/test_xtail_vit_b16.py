"""The published setting of X-TAIL at its real size: ViT-B-16 with random weights, and its images.

Training is compared on a tiny CLIP, in test_xtail_parity.py.
"""

import copy
from types import SimpleNamespace

import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision import transforms as V

import moram
from moram import MoRAMConfig
from moram.models import SplitAttention, pack_attention, split_attention
from moram.models.clip import Preprocess
from moram.xtail.images import ImageRows, ImageStore, TestImages, Transforms

# OpenAI's, as in its repository.
SIZE = 224
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
TOWERS = ("visual.transformer", "transformer")


class Vit:
    """ViT-B-16 with what it was before anything was done to it."""

    def __init__(self):
        torch.manual_seed(0)
        self.model = open_clip.create_model("ViT-B-16").eval()
        self.state = {name: t.clone() for name, t in self.model.state_dict().items()}
        self.image = torch.randn(1, 3, SIZE, SIZE)
        self.ids = open_clip.get_tokenizer("ViT-B-16")(["a photo of a cat.", "lined texture."])
        self.features = self.encode()

    @torch.no_grad()
    def encode(self):
        return torch.cat([self.model.encode_image(self.image), self.model.encode_text(self.ids)])


@pytest.fixture(scope="module")
def untouched():
    return Vit()


@pytest.fixture
def vit(untouched):
    """The model with packed attention; packed again after the test."""
    yield untouched
    moram.eject(untouched.model)
    pack_attention(untouched.model)


def test_splitting_the_attention_changes_features_by_rounding_alone(vit):
    assert len(split_attention(vit.model)) == 24
    # Features have numbers of size 1, and float32 keeps 7 digits of each of 12 blocks.
    assert vit.features.std() > 0.1
    torch.testing.assert_close(vit.encode(), vit.features, rtol=0, atol=2e-5)


@pytest.mark.parametrize("tower", TOWERS)
def test_a_split_block_equals_the_packed_one_in_float64(untouched, tower):
    packed = copy.deepcopy(untouched.model.get_submodule(tower).resblocks[0]).double()
    split = copy.deepcopy(packed)
    assert split_attention(split) == ["attn"]
    assert isinstance(split.attn, SplitAttention)
    tokens, width, mask = (197, 768, None) if tower == TOWERS[0] else (77, 512, "causal")
    if mask:
        mask = torch.full((tokens, tokens), float("-inf"), dtype=torch.float64).triu(1)
    x = torch.randn(1, tokens, width, dtype=torch.float64)
    with torch.no_grad():
        expected = packed(x, attn_mask=mask)
        torch.testing.assert_close(split(x, attn_mask=mask), expected, rtol=0, atol=1e-12)
    assert (expected - x).abs().max() > 0.1


def test_packing_restores_the_state_dict_bit_for_bit(vit):
    split_attention(vit.model)
    assert "visual.transformer.resblocks.11.attn.q_proj.weight" in vit.model.state_dict()
    pack_attention(vit.model)
    state = vit.model.state_dict()
    assert list(state) == list(vit.state)
    for name, tensor in vit.state.items():
        assert torch.equal(state[name], tensor), name


def trainable(model, prefix=""):
    return sum(
        p.numel() for n, p in model.named_parameters() if p.requires_grad and n.startswith(prefix)
    )


# Section 1.5 of the protocol.
MODULES, PARAMETERS, VISION, TEXT = 144, 4_423_680, 2_654_208, 1_769_472


def test_preset_adapts_144_modules_with_4423680_parameters(vit):
    report = moram.inject(vit.model, MoRAMConfig.preset("xtail"))
    assert (len(report.paths), report.num_trainable) == (MODULES, PARAMETERS)
    assert len(moram.adapters(vit.model)) == MODULES
    assert trainable(vit.model) == PARAMETERS
    assert trainable(vit.model, "visual.") == VISION
    assert trainable(vit.model, "transformer.") == TEXT


def test_fresh_atoms_change_features_by_rounding_alone(vit):
    moram.inject(vit.model, MoRAMConfig.preset("xtail"))
    torch.testing.assert_close(vit.encode(), vit.features, rtol=0, atol=2e-5)


def test_preset_adapts_as_much_of_hugging_faces_clip():
    from transformers import CLIPConfig, CLIPModel

    with torch.device("meta"):
        model = CLIPModel(CLIPConfig())
        report = moram.inject(model, MoRAMConfig.preset("xtail"))
    assert (len(report.paths), report.num_trainable) == (MODULES, PARAMETERS)
    assert trainable(model, "vision_model.") == VISION
    assert trainable(model, "text_model.") == TEXT


class Photos:
    """Smooth random images in RGB; lists what is decoded."""

    def __init__(self, sizes):
        generator = torch.Generator().manual_seed(0)
        self.images, self.labels, self.decoded = [], [0] * len(sizes), []
        for width, height in sizes:
            coarse = 255 * torch.rand(1, 3, 9, 9, generator=generator)
            pixels = F.interpolate(coarse, (height, width), mode="bilinear").byte()
            self.images.append(Image.fromarray(pixels[0].permute(1, 2, 0).numpy()))

    def __len__(self):
        return len(self.images)

    def load(self, row):
        self.decoded.append(row)
        return self.images[row].copy()


# Square, wide, tall, smaller than the model's images, and exactly of their size.
SIZES = [(256, 256), (331, 230), (229, 400), (90, 61), (61, 300), (224, 224)]
ROWS = torch.tensor([4, 0, 0, 2, 1, 5, 3])


def image_rows(photos, gib=1, workers=1, kind=ImageRows):
    clip = SimpleNamespace(tokens=lambda prompts: None, parameter=torch.zeros(()))
    store, transforms = ImageStore(gib, workers), Transforms(Preprocess(SIZE, MEAN, STD))
    if kind is TestImages:
        return TestImages(clip, photos, store, transforms)
    return ImageRows(clip, photos, ["a photo."], 0, store, transforms)


def crops(data, rows=ROWS, seed=5):
    torch.manual_seed(seed)
    return data.pixels(rows)


TO_PIXELS = [V.ToTensor(), V.Normalize(MEAN, STD)]
BICUBIC = V.InterpolationMode.BICUBIC
TRAIN = {
    "torchvision": V.Compose(
        [V.RandomResizedCrop(SIZE, scale=(0.9, 1.0), interpolation=BICUBIC), *TO_PIXELS]
    ),
    "open_clip": open_clip.image_transform(SIZE, is_train=True, mean=MEAN, std=STD),
}
TEST = {
    "torchvision": V.Compose([V.Resize(SIZE, BICUBIC), V.CenterCrop(SIZE), *TO_PIXELS]),
    "open_clip": open_clip.image_transform(SIZE, is_train=False, mean=MEAN, std=STD),
}
CLOSE = {"rtol": 0, "atol": 1e-6}


@pytest.mark.parametrize("workers", [1, 2], ids=["one_worker", "two_workers"])
@pytest.mark.parametrize("source", TRAIN)
def test_training_crops_are_the_published_transform_of_the_same_draws(source, workers):
    photos = Photos(SIZES)
    torch.manual_seed(5)
    expected = torch.stack([TRAIN[source](photos.images[row]) for row in ROWS])
    data = image_rows(photos, workers=workers)
    torch.testing.assert_close(crops(data), expected, **CLOSE)
    assert not torch.equal(expected[1], expected[2]), "one image, cropped twice"
    data.store.close()


@pytest.mark.parametrize("workers", [1, 2], ids=["one_worker", "two_workers"])
@pytest.mark.parametrize("source", TEST)
def test_test_images_are_the_published_transform_kept_or_not(source, workers):
    photos = Photos(SIZES)
    expected = torch.stack([TEST[source](image) for image in photos.images])
    data = image_rows(photos, workers=workers, kind=TestImages)
    for _ in range(2):
        found = torch.cat([batch.pixels() for batch in data.batches(4)])
        torch.testing.assert_close(found, expected, **CLOSE)
    assert len(photos.decoded) == len(SIZES)
    data.store.close()


def test_two_workers_give_the_same_crops_as_one_bit_for_bit():
    one, two = (image_rows(Photos(SIZES), workers=workers) for workers in (1, 2))
    assert torch.equal(crops(one), crops(two))
    two.store.close()


@pytest.mark.parametrize("workers", [1, 2], ids=["one_worker", "two_workers"])
def test_a_budget_of_zero_keeps_nothing_and_changes_no_crop(workers):
    kept, fresh = Photos(SIZES), Photos(SIZES)
    first, second = image_rows(kept), image_rows(fresh, gib=0, workers=workers)
    for seed in (5, 6):
        assert torch.equal(crops(first, seed=seed), crops(second, seed=seed))
    assert (len(kept.decoded), len(fresh.decoded)) == (len(SIZES), 2 * len(ROWS))
    assert not second.store.kept
    second.store.close()


def as_bytes(image):
    """[3, 5, 2] of what is left of an image of 10 x 8: 30 bytes."""
    return torch.zeros(3, 5, 2, dtype=torch.uint8) + image.getpixel((0, 0))[0]


@pytest.mark.parametrize(
    "prepare, budget, fit, left",
    # An image of 10 x 8 takes 240 bytes, a prepared one 30.
    [(None, 700, 2, 220), (None, 720, 3, 0), (None, 239, 0, 239), (as_bytes, 100, 3, 10)],
    ids=["two_fit", "three_fit_exactly", "none_fits", "three_prepared_fit"],
)
def test_store_keeps_what_fits_into_its_budget_and_decodes_the_rest_again(
    prepare, budget, fit, left
):
    photos, store = Photos([(10, 8)] * 5), ImageStore(budget / 2**30)
    passes = [store.load(photos, range(5), prepare) for _ in range(3)]
    assert (len(store.kept), store.left) == (fit, left)
    assert len(photos.decoded) == 5 + 2 * (5 - fit)
    for images in passes:
        for found, image in zip(images, photos.images, strict=True):
            if prepare is None:
                assert found.tobytes() == image.tobytes()
            else:
                assert torch.equal(found, prepare(image))


def test_two_splits_in_one_store_keep_their_own_images():
    first, second = Photos([(10, 8)] * 2), Photos([(6, 4)] * 2)
    store = ImageStore(1)
    for _ in range(2):
        assert [image.size for image in store.load(first, (0, 1))] == [(10, 8)] * 2
        assert [image.size for image in store.load(second, (0, 1))] == [(6, 4)] * 2

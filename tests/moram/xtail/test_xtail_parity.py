"""CLIP training on X-TAIL against plain torch, written from the published equations alone.

The protocol's images and the real architecture are in test_xtail_vit_b16.py.
"""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from tiny_models import hf_clip
from torch import nn

from moram import MoRAMConfig, adapters
from moram.methods.moram import MoRAM
from moram.methods.train import Stage, TaskTrainer, TrainSettings
from moram.models.clip import MEAN, STD, Clip, Preprocess
from moram.xtail.data.domains import ArraySplit
from moram.xtail.images import ImageRows, ImageStore, TestImages, Transforms
from moram.xtail.objective import contrastive

SIZE, LAYERS, HEADS = 32, 2, 2
LR, BETAS, STEPS, BATCH = 5e-4, (0.9, 0.9999), 20, 6
TASKS = (["plane", "old plane", "jet"], ["cat", "dog", "white dog", "owl"])
PROMPTS = TASKS[0] + TASKS[1]
# The published settings but for the atoms of a task.
SETTINGS = {"atoms_per_task": 4, "top_k": 5, "temperature": 0.01, "threshold": 0.2}
SETTINGS |= {"value_scale": 1.0}

# From Hugging Face's names to open_clip's, in this order.
RENAMED = {"vision_model.": "visual.", "text_model.": "", "encoder.layers": "transformer.resblocks"}
RENAMED |= {"self_attn.": "attn.", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
RENAMED |= {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "final_layer_norm": "ln_final"}
RENAMED |= {"pre_layrnorm": "ln_pre", "post_layernorm": "ln_post", "patch_embedding": "conv1"}
RENAMED |= {"position_embedding.weight": "positional_embedding", "embeddings.": ""}
RENAMED |= {"visual_projection.weight": "visual.proj", "text_projection.weight": "text_projection"}


def plain_name(name):
    for theirs, ours in RENAMED.items():
        name = name.replace(theirs, ours)
    return name


def plain_weights(state):
    """A CLIP's state dict under open_clip's names, with q, k and v apart."""
    weights = {}
    for name, tensor in state.items():
        tensor = tensor.clone()
        if "in_proj_" in name:
            for letter, third in zip("qkv", tensor.chunk(3), strict=True):
                weights[name.replace("in_proj_", f"{letter}_proj.")] = third
        else:
            # Hugging Face has Linears where open_clip has matrices.
            linear = name in ("visual_projection.weight", "text_projection.weight")
            weights[plain_name(name)] = tensor.T if linear else tensor
    return weights


class PlainClip:
    """CLIP as a function of plain tensors, with a bank for each of some projections."""

    def __init__(self, state, quick):
        self.w, self.quick, self.banks, self.training = plain_weights(state), quick, {}, False

    def update(self, x, bank):
        """Section 1.2, lines 3 to 9."""
        keys, values = torch.cat(bank["keys"]), torch.cat(bank["values"])
        raw = x @ keys.T
        score = raw / raw.square().sum(-1, keepdim=True).sqrt().clamp_min(1e-12)
        best = score.topk(min(SETTINGS["top_k"], len(keys)), -1)
        kept = torch.full_like(score, -math.inf).scatter(-1, best.indices, best.values)
        weights = (kept / SETTINGS["temperature"]).softmax(-1)
        if not self.training:
            weights = weights * (score >= SETTINGS["threshold"])
        return (raw * weights) @ values

    def linear(self, x, path):
        y = x @ self.w[f"{path}.weight"].T + self.w[f"{path}.bias"]
        return y + self.update(x, self.banks[path]) if path in self.banks else y

    def norm(self, x, path):
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * self.w[f"{path}.weight"] + self.w[f"{path}.bias"]

    def blocks(self, x, root, hidden):
        for path in (f"{root}.resblocks.{i}." for i in range(LAYERS)):
            h = self.norm(x, f"{path}ln_1")
            q, k, v = (
                self.linear(h, f"{path}attn.{n}_proj").unflatten(-1, (HEADS, -1)).transpose(1, 2)
                for n in "qkv"
            )
            scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
            mixed = scores.masked_fill(hidden, -math.inf).softmax(-1) @ v
            x = x + self.linear(mixed.transpose(1, 2).flatten(2), f"{path}attn.out_proj")
            h = self.linear(self.norm(x, f"{path}ln_2"), f"{path}mlp.c_fc")
            exact = 0.5 * h * (1 + torch.erf(h / math.sqrt(2)))
            h = h * torch.sigmoid(1.702 * h) if self.quick else exact
            x = x + self.linear(h, f"{path}mlp.c_proj")
        return x

    def encode_image(self, pixels):
        kernel = self.w["visual.conv1.weight"]
        patches = F.conv2d(pixels, kernel, stride=kernel.shape[-1]).flatten(2).transpose(1, 2)
        x = torch.cat([self.w["visual.class_embedding"].expand(len(pixels), 1, -1), patches], 1)
        x = self.norm(x + self.w["visual.positional_embedding"], "visual.ln_pre")
        x = self.blocks(x, "visual.transformer", torch.zeros(1, 1, dtype=torch.bool))
        x = self.norm(x[:, 0], "visual.ln_post") @ self.w["visual.proj"]
        return x / x.norm(dim=-1, keepdim=True)

    def encode_text(self, ids):
        later = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)
        x = self.w["token_embedding.weight"][ids] + self.w["positional_embedding"]
        x = self.norm(self.blocks(x, "transformer", later), "ln_final")
        x = x[range(len(ids)), ids.argmax(1)] @ self.w["text_projection"]
        return x / x.norm(dim=-1, keepdim=True)

    def logits(self, pixels, ids):
        return self.w["logit_scale"].exp() * self.encode_image(pixels) @ self.encode_text(ids).T

    def learn(self, fresh_keys, batches, seen_ids, ids):
        """A task (section 3.4) on recorded batches; returns the losses."""
        self.training = False
        seen = self.encode_text(seen_ids).detach() if self.banks else None
        for path, keys in fresh_keys.items():
            bank = self.banks.setdefault(path, {"keys": [], "values": []})
            zeros = torch.zeros(len(keys), len(self.w[f"{path}.weight"]), dtype=keys.dtype)
            for name, new in (("keys", keys.clone()), ("values", zeros)):
                bank[name] = [old.detach() for old in bank[name]] + [new.requires_grad_()]
        trained = [bank[name][-1] for bank in self.banks.values() for name in bank]
        moments, losses = [[torch.zeros_like(p) for _ in BETAS] for p in trained], []
        self.training = True
        for t, (pixels, labels) in enumerate(batches):
            features = self.encode_image(pixels), self.encode_text(ids)
            loss = sum(published_losses(self.w["logit_scale"].exp(), *features, labels, seen))
            rate = 0.5 * (1 + math.cos(math.pi * t / len(batches))) * LR
            grads = torch.autograd.grad(loss, trained)
            for parameter, grad, pair in zip(trained, grads, moments, strict=True):
                for i, power in enumerate((grad, grad * grad)):
                    pair[i] = BETAS[i] * pair[i] + (1 - BETAS[i]) * power
                first, second = (pair[i] / (1 - BETAS[i] ** (t + 1)) for i in (0, 1))
                parameter.data -= rate * first / (second.sqrt() + 1e-8)
            losses.append(loss.detach())
        self.training = False
        return torch.stack(losses)


def published_losses(scale, images, texts, labels, seen=None):
    """(CE_i, CE_t) of section 3.5, with the features of seen texts and the whole matrix M."""
    first, columns = 0 if seen is None else len(seen), range(len(labels))
    texts = texts if seen is None else torch.cat([seen, texts])
    logits = scale * images @ texts.T
    masked = logits.masked_fill(torch.arange(len(texts)) < first, -math.inf)
    image_loss = -masked.log_softmax(1)[columns, first + labels].mean()
    targets = torch.zeros(len(texts), len(labels), dtype=logits.dtype)
    targets[first + labels, columns] = 1
    over_batch = (scale * texts @ images.T).log_softmax(1)
    return image_loss, -(targets * over_batch).sum(1).mean()


def tiny_clip(kind):
    """A `Clip` in float64 with random biases and norms: zeros and ones would hide a mix-up."""
    if kind == "hf":
        model = hf_clip()
    else:
        from open_clip.model import CLIP

        towers = {"layers": LAYERS, "width": 64}
        vision = towers | {"head_width": 32, "patch_size": 16, "image_size": SIZE}
        text = towers | {"heads": HEADS, "context_length": 8, "vocab_size": 64}
        torch.manual_seed(0)
        model = CLIP(32, vision, text, quick_gelu=kind == "quick").eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return Clip(model.double(), tokenize, Preprocess(SIZE, MEAN, STD))


def tokenize(texts):
    """Letters as ids, then 63, the end, then padding."""
    ids = [[ord(letter) % 61 + 1 for letter in text[:7]] + [63] for text in texts]
    return torch.tensor([row + [0] * (8 - len(row)) for row in ids])


def photos(number, classes, seed):
    """Random images of 40 x 36 pixels."""
    generator = torch.Generator().manual_seed(seed)
    coarse = 255 * torch.rand(number, 3, 5, 5, generator=generator)
    pixels = F.interpolate(coarse, (40, 36)).permute(0, 2, 3, 1).byte()
    return ArraySplit(pixels, [i % classes for i in range(number)], "photos")


def set_up(kind="quick", targets="auto"):
    clip = tiny_clip(kind)
    plain = PlainClip(clip.model.state_dict(), quick=kind != "gelu")
    method = MoRAM(MoRAMConfig(**SETTINGS, targets=targets, atom_dtype="float64"), seed=3)
    method.setup(clip.model)
    return clip, method, plain


def begin(clip, method, index, rows=ImageRows):
    """The training images of a task; the method begins it."""
    split, offset = photos(14, len(TASKS[index]), seed=index), len(TASKS[0]) * index
    data = rows(clip, split, TASKS[index], offset, ImageStore(1), Transforms(clip.preprocess))
    method.begin_task(clip.model, index, Stage(clip.model, data, TrainSettings()))
    return data


def train(clip, method, index, data, steps=STEPS):
    """The losses in full precision, and the batches: [(pixels, labels)]."""
    losses, batches, crop = [], [], data.pixels

    def pixels(rows, share):
        batches.append((crop(rows, share), data.labels[rows]))
        return batches[-1][0]

    def objective(*args, **named):
        found = contrastive(*args, **named)
        losses.append(found[0].detach())
        return found

    data.pixels = pixels
    settings = {"lr": LR, "betas": BETAS, "schedule": "cosine", "batch_size": BATCH, "clip": None}
    settings = TrainSettings(**settings, drop_last=False, iterations=steps)
    TaskTrainer(clip.model, method, data, settings, index, objective=objective).run()
    return torch.stack(losses), batches


@pytest.mark.parametrize(
    "kind, targets, projections",
    [("quick", "auto", 24), ("gelu", "open_clip-vision", 12), ("hf", "auto", 24)],
    ids=["open_clip-quick_gelu-both", "open_clip-gelu-vision", "hf-quick_gelu-both"],
)
def test_losses_logits_and_atoms_of_two_tasks_equal_plain_torch(kind, targets, projections):
    clip, method, plain = set_up(kind, targets)
    close = {"rtol": 0, "atol": 1e-8}
    for index in (0, 1):
        data = begin(clip, method, index)
        banks = {plain_name(path): layer.bank for path, layer in adapters(clip.model).items()}
        assert len(banks) == projections
        fresh = {path: bank.current_keys.detach().clone() for path, bank in banks.items()}
        losses, batches = train(clip, method, index, data)
        seen_ids, ids = tokenize(TASKS[0][: data.offset]), tokenize(TASKS[index])
        expected = plain.learn(fresh, batches, seen_ids, ids)
        assert len(losses) == STEPS
        torch.testing.assert_close(losses, expected, **close)
        moved = 0
        for path, bank in banks.items():
            for name in ("keys", "values"):
                current = getattr(bank, f"current_{name}").detach()
                torch.testing.assert_close(current, plain.banks[path][name][-1], **close)
            moved += bool((bank.current_keys - fresh[path]).abs().max() > 1e-4)
        assert moved > projections / 2
    test = TestImages(clip, photos(5, 4, 9), ImageStore(1), Transforms(clip.preprocess))
    batch = next(test.batches(5))
    pixels, ids = batch.pixels(), tokenize(PROMPTS)
    with torch.no_grad():
        logits = method.classifier(clip, clip.tokens(PROMPTS))(batch)
        torch.testing.assert_close(logits, plain.logits(pixels, ids), **close)
        plain.training = True
        assert (logits - plain.logits(pixels, ids)).abs().max() > 1e-4, "the threshold cuts nothing"


class Features(nn.Module):
    """A CLIP whose images are their own features."""

    logit_scale = torch.tensor(3.0, dtype=torch.float64)

    def encode_image(self, pixels, normalize):
        return pixels


def loss_of(images, texts, labels, offset=0, **changes):
    clip = Clip(Features(), None, None)
    data = {"clip": clip, "pixels": lambda rows, share: images[rows[share]], "texts": lambda: texts}
    data |= {"labels": labels, "offset": offset, "count": len(texts)}
    data = SimpleNamespace(**(data | {"text_loss": True, "label_smoothing": 0.0} | changes))
    return contrastive(clip.model, data, torch.arange(len(labels)))[0]


def unit(rows, seed):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, 8, generator=generator, dtype=torch.float64), dim=1)


SCALE, EXACT = math.exp(3), {"rtol": 0, "atol": 1e-12}
LABELS = {"each_class_once": [2, 0, 1, 3, 4], "duplicates_and_absent": [3, 3, 0, 3, 0, 1, 1]}
LABELS |= {"one_class": [2, 2, 2], "one_image": [4]}


@pytest.mark.parametrize("seen", [0, 7], ids=["nothing_seen", "seven_seen"])
@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
def test_loss_is_the_published_one_and_without_its_text_part_the_image_loss(labels, seen):
    labels = torch.tensor(labels)
    images, texts = unit(len(labels), 1), unit(5, 2)
    image_loss, text_loss = published_losses(SCALE, images, texts, labels, unit(seen, 3))
    without = loss_of(images, texts, labels, seen, text_loss=False)
    torch.testing.assert_close(without, image_loss, **EXACT)
    difference = loss_of(images, texts, labels, seen) - without
    torch.testing.assert_close(difference, text_loss, **EXACT)


@pytest.mark.parametrize("seen", [0, 1, 98], ids=["seen0", "seen1", "seen98"])
def test_text_loss_is_divided_by_seen_and_current_classes(seen):
    # Logits ln 3 at each image's own text and 0 elsewhere: every softmax gives 3/4.
    images, texts = torch.eye(2, dtype=torch.float64) * math.log(3) / SCALE, torch.eye(2).double()
    expected = torch.tensor(math.log(4 / 3) * (1 + 2 / (seen + 2)), dtype=torch.float64)
    loss = loss_of(images, texts, torch.tensor([0, 1]), seen)
    torch.testing.assert_close(loss, expected, **EXACT)


def test_label_smoothing_acts_on_the_image_loss_alone():
    labels, images, texts = torch.tensor([3, 3, 0, 1]), unit(4, 1), unit(5, 2)
    smooth, sharp = (loss_of(images, texts, labels, 7, label_smoothing=e) for e in (0.1, 0.0))
    # A tenth of the target moves from the image's class to all classes evenly.
    log_p = (SCALE * images @ texts.T).log_softmax(1)
    expected = 0.1 * (log_p[range(4), labels] - log_p.mean(1)).mean()
    torch.testing.assert_close(smooth - sharp, expected, **EXACT)


class EveryStep(ImageRows):
    """Encodes the prompts at every step."""

    def texts(self):
        return self.clip.encode_text(self.prompt_ids)


@pytest.mark.parametrize("targets, expected", [("both", 4), ("text", 4), ("vision", 1)])
def test_prompts_are_encoded_once_a_step_or_once_a_task_if_nothing_trained_changes_them(
    targets, expected
):
    results = []
    for rows, count in ((ImageRows, expected), (EveryStep, 4)):
        clip, method, _ = set_up(targets=f"open_clip-{targets}".removesuffix("-both"))
        calls, encode = [], clip.encode_text
        clip.encode_text = lambda ids, c=calls, e=encode: c.append(len(ids)) or e(ids)
        losses = [train(clip, method, i, begin(clip, method, i, rows), steps=4)[0] for i in (0, 1)]
        assert calls == [3] * count + [4] * count
        results.append(torch.cat(losses))
    torch.testing.assert_close(*results, rtol=0, atol=0)

"""Tasks for a tiny CLIP in float64, their training, and Adam written out. No tests here."""

import torch
from xtail_support import SIDE, tiny_clip, tokenize

from moram.methods.train import TaskTrainer, TrainSettings
from moram.xtail.objective import ImageStage

# The classes of two tasks.
TASKS = (("fig", "lime", "plum"), ("auk", "emu"))
PROMPTS = tokenize([f"a photo of a {name}." for names in TASKS for name in names])
IMAGES, BATCH, STEPS, LR, BETAS = 6, 8, 3, 0.01, (0.9, 0.99)
SETTINGS = TrainSettings(
    lr=LR, betas=BETAS, batch_size=BATCH, iterations=STEPS, schedule="constant", clip=None
)
EXACT = {"rtol": 0, "atol": 1e-9}


def double_clip():
    """A tiny CLIP in float64."""
    clip = tiny_clip()
    clip.model.double()
    return clip


def pictures(task, count=IMAGES, seed=0):
    """Noisy images [N, 3, S, S] of a task, a pattern for each class, and their labels."""
    classes = len(TASKS[task])
    drawn = torch.Generator().manual_seed(10 * seed + task)
    labels = torch.arange(classes).repeat_interleave(count)
    patterns = torch.Generator().manual_seed(100 + task)
    like = {"dtype": torch.float64}
    pattern = torch.randn(classes, 3, SIDE, SIDE, generator=patterns, **like)
    noise = torch.randn(len(labels), 3, SIDE, SIDE, generator=drawn, **like)
    return pattern[labels] + 0.7 * noise, labels


class Pictures:
    """A task's training images, which are never cropped."""

    joint, text_loss, label_smoothing = True, True, 0.0

    def __init__(self, clip, task):
        self.clip, self.images = clip, pictures(task)[0]
        self.labels = pictures(task)[1]
        self.count, self.offset = len(TASKS[task]), sum(map(len, TASKS[:task]))
        self.prompt_ids = PROMPTS[self.offset :][: self.count]

    def __len__(self):
        return len(self.labels)

    def num_labels(self, rows):
        return 1

    def pixels(self, rows, share=slice(None)):
        return self.images[rows[share]]

    def texts(self):
        return self.clip.encode_text(self.prompt_ids)


class Test:
    """Images to score."""

    __test__ = False

    def __init__(self, clip, pixels):
        self.clip, self._pixels = clip, pixels

    def __len__(self):
        return len(self._pixels)

    def pixels(self):
        return self._pixels

    def features(self):
        return self.clip.encode_image(self._pixels)


def begin(clip, method, task):
    """Begin a task; returns its stage and a trainer that has done no step."""
    stage = ImageStage(clip.model, Pictures(clip, task), SETTINGS, 0, method.image_loss)
    method.begin_task(clip.model, task, stage)
    named = {"objective": stage.objective}
    return stage, TaskTrainer(clip.model, method, stage.data, SETTINGS, task, **named)


class Adam:
    """Adam as Kingma and Ba write it, for tensors by name."""

    def __init__(self, tensors):
        self.tensors, self.number = tensors, 0
        self.first = {name: torch.zeros_like(t) for name, t in tensors.items()}
        self.second = {name: torch.zeros_like(t) for name, t in tensors.items()}

    @torch.no_grad()
    def step(self, gradients):
        self.number += 1
        (one, two), number = BETAS, self.number
        for name, tensor in self.tensors.items():
            gradient = gradients[name]
            self.first[name] = one * self.first[name] + (1 - one) * gradient
            self.second[name] = two * self.second[name] + (1 - two) * gradient * gradient
            mean = self.first[name] / (1 - one**number)
            size = (self.second[name] / (1 - two**number)).sqrt()
            tensor -= LR * mean / (size + 1e-8)

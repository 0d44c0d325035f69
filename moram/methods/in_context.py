"""In-context learning: demonstrations in the prompt instead of training ("FIX" of TRACE)."""

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from ..config import check_count
from ..continual.data import Example, Task
from .zero_shot import ZeroShot

SOURCES = ("train", "test")
HEADER = (
    "We will give you several examples and you should follow them to accomplish the task.\n"
    " Examples:\n"
)
# The beginning of each task's prompts, which is said once. Py150's have none: it is put in front.
INSTRUCTIONS = {
    "C-STANCE": (
        "判断以下文本对指定对象的态度，选择一项：A.支持，B.反对，C.中立。"  # noqa: RUF001
        "输出A，B或者C。\n"  # noqa: RUF001
    ),
    "FOMC": (
        "What is the monetary policy stance for the following text? A. dovish, B. hawkish, "
        "C. neutral. Choose one from A, B and C.\n"
    ),
    "Py150": "Continue writing the code.\n",
    "ScienceQA": "Choose an answer for the following question and give your reasons.\n\n",
    "NumGLUE-cm": "Solve the following math problem.\n",
    "NumGLUE-ds": "Solve the following math problem.\n",
    "20Minuten": "Provide a simplified version of the following paragraph in German.\n\n",
}
LEADS = {"Py150": "Code:\n"}
# Its transcripts leave no room.
WITHOUT = ("MeetingBank",)


class InContext(ZeroShot):
    """The base model, shown a few solved examples of the task before each question.

    prompt = instruction, header, demonstrations (prompt without instruction, answer, blank line),
    question without instruction; MeetingBank's prompts stay as they are. A demonstration has at
    most (max_length - tokens of instruction and header) / (2 * demonstrations) tokens, so that they
    leave half the room. Their answers differ; where a task has fewer different answers than
    demonstrations, two may share one, as in TRACE's tasks of three labels.

    Needs the task id at inference, to show that task's demonstrations. Nothing is trained; the
    training examples must be kept.

    Deviation: the published comparison draws demonstrations from the test set, where a question may
    be its own demonstration; source="test" does so, but never shows a question its own answer.

    Args:
        demonstrations: how many at most.
        max_length: tokens that prompts are cut to, from the left; 3584 is the published limit.
        source: "train" or "test", where demonstrations are drawn from.
        seed: of the draw, with the task's name.
        instructions: by task name, in place of or besides those of TRACE; a task without one has
            its prompts repeated as they are.
    Source: Wang et al., 2023, arXiv 2310.06762 (TRACE); texts as in the code of MoRAM, arXiv
        2506.21035.
    Cost: at most twice max_length / 2 tokens of prompt for each question.
    """

    name = "in-context learning"
    needs_task_id = True
    needs = "language"
    demonstrations: int
    max_length: int
    seed: int
    instructions: dict[str, str]

    def __init__(
        self,
        demonstrations: int = 6,
        max_length: int = 3584,
        source: str = "train",
        seed: int = 0,
        instructions: Mapping[str, str] | None = None,
    ) -> None:
        check_count("demonstrations", demonstrations, 1)
        check_count("max_length", max_length, 1)
        if source not in SOURCES:
            raise ValueError(f"source must be one of {', '.join(SOURCES)}, got {source!r}")
        self.demonstrations, self.max_length = demonstrations, max_length
        self.source, self.seed = source, seed
        self.instructions = {**INSTRUCTIONS, **(instructions or {})}

    def prompts(self, task: Task, count: Callable[[str], int]) -> list[str]:
        """One prompt for each test example of a task, in order.

        Args:
            count: function from text to its number of tokens.
        """
        if task.name in WITHOUT:
            return [example.prompt for example in task.test]
        instruction, lead = self.instructions.get(task.name, ""), LEADS.get(task.name, "")
        head = instruction + HEADER
        pool = self._pool(task, instruction, count, count(head))
        answers = {example.answer for example in pool}
        per_answer = 1 if len(answers) >= self.demonstrations else 2
        found = []
        for query in task.test:
            shown = "".join(
                f"{lead}{example.prompt.removeprefix(instruction)}{example.answer}\n\n"
                for example in self._choose(pool, query, per_answer)
            )
            found.append(f"{head}{shown}{lead}{query.prompt.removeprefix(instruction)}")
        return found

    def _pool(
        self, task: Task, instruction: str, count: Callable[[str], int], used: int
    ) -> list[Example]:
        """The examples short enough to be shown, in an order drawn by seed and name."""
        examples: Sequence[Example] = getattr(task, self.source)
        room = (self.max_length - used) / (2 * self.demonstrations)
        seed = self.seed * 2**32 + zlib.crc32(task.name.encode())
        order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed))
        drawn = [examples[i] for i in order.tolist()]
        return [
            example
            for example in drawn
            if count(example.prompt.removeprefix(instruction)) + count(example.answer) <= room
        ]

    def _choose(self, pool: Iterable[Example], query: Example, per_answer: int) -> list[Example]:
        chosen: list[Example] = []
        used: dict[str, int] = {}
        for example in pool:
            if len(chosen) == self.demonstrations:
                break
            if example.prompt != query.prompt and used.get(example.answer, 0) < per_answer:
                used[example.answer] = used.get(example.answer, 0) + 1
                chosen.append(example)
        return chosen

"""Text to tokens and batches: what is cut, what is learned, how batches are padded.

Two ways of joining prompt and answer. "separate" is the published one: prompt and answer are
tokenised as one text, and as many final tokens are learned as the answer has when it is tokenised
alone. "joined" tokenises both apart, with a space between them where the prompt ends in none, so
that what is learned is the answer exactly. Both end in the end-of-text token.

Before a prompt, "joined" has what the tokenizer itself puts before a text, often a token, often
nothing; it counts as part of the prompt, and cutting leaves it. "separate" has, as published, the
beginning-of-text token (or else the end-of-text token) where there is room for it, whether or not
the tokenizer puts it there. A text that begins so already gets no second one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal, Protocol, Self

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..continual.data import Example, Task
from ..continual.scoring import IGNORED, beginning, without_beginning
from .settings import TraceSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A prompt and its answer.
Pair = Example | tuple[str, str]
# Which examples: their places.
Places = Tensor | Sequence[int]
# Token ids or states, attention mask and labels.
Batch = tuple[Tensor, Tensor, Tensor]


class Batches(Protocol):
    """`Rows` or `CachedRows`."""

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self: ...

    def __len__(self) -> int: ...

    def batch(self, rows: Places) -> Batch: ...

    def length(self, row: int) -> int: ...

    def num_labels(self, rows: Places) -> int: ...


class Rows:
    """Examples as token lists, with how many final tokens of each are the answer.

    Args:
        ids: of each. answers: answer tokens of each, 0 where nothing is learned.
        pad: id of the padding token. multiple: batches are padded, on the left, up to a multiple.
    """

    ids: list[list[int]]
    answers: list[int]
    pad: int
    multiple: int

    def __init__(
        self, ids: list[list[int]], answers: list[int], pad: int, multiple: int = 8
    ) -> None:
        self.ids, self.answers, self.pad, self.multiple = ids, answers, pad, multiple

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """The examples of several `Rows` as one."""
        ids = [row for part in parts for row in part.ids]
        answers = [count for part in parts for count in part.answers]
        return cls(ids, answers, parts[0].pad, parts[0].multiple)

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, rows: Places) -> Batch:
        """(input_ids, attention_mask, labels), each [B, L], of some examples."""
        rows = [int(row) for row in rows]
        ids = [torch.tensor(self.ids[row]) for row in rows]
        ones = [torch.ones_like(row) for row in ids]
        labels = [row.clone() for row in ids]
        for label, row in zip(labels, rows, strict=True):
            label[: len(label) - self.answers[row]] = IGNORED
        return self._pad(ids, self.pad), self._pad(ones, 0), self._pad(labels, IGNORED)

    def length(self, row: int) -> int:
        """Tokens of an example."""
        return len(self.ids[row])

    def num_labels(self, rows: Places) -> int:
        """Answer tokens of some examples together."""
        return sum(self.answers[int(row)] for row in rows)

    def _pad(self, rows: list[Tensor], value: int) -> Tensor:
        batch = pad_sequence(rows, batch_first=True, padding_value=value, padding_side="left")
        short = -batch.shape[1] % self.multiple
        return torch.nn.functional.pad(batch, (short, 0), value=value)


class Encoder:
    """Turns a task's examples into `Rows`.

    Args:
        tokenizer: a Hugging Face tokenizer. settings: of the run.
    """

    tokenizer: PreTrainedTokenizerBase
    settings: TraceSettings
    eos: int
    bos: int
    begin: list[int]
    pad: int

    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: TraceSettings) -> None:
        self.tokenizer, self.settings = tokenizer, settings
        eos, bos = special_id(tokenizer, "eos"), special_id(tokenizer, "bos")
        if eos is None:
            raise ValueError("the tokenizer has no end-of-text token")
        self.eos, self.bos = eos, eos if bos is None else bos
        # What each prompt begins with, also one that is cut.
        self.begin = beginning(tokenizer) if settings.labels == "joined" else []
        # The published choice: unknown, else end, else beginning of text.
        options = (special_id(tokenizer, "pad"), special_id(tokenizer, "unk"), eos)
        self.pad = next(token for token in options if token is not None)

    def tokens(self, text: str) -> list[int]:
        """The ids of a text, without special tokens."""
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def prompts(self, task: str, texts: Iterable[str]) -> Rows:
        """`Rows` of prompts alone, to be continued."""
        limit = self.settings.of("max_prompt", task)
        rows = []
        for text in texts:
            ids = self._head(text, task)
            if self.settings.labels == "separate" and len(ids) < limit:
                ids = self._begun(ids)
            rows.append(ids)
        return Rows(rows, [0] * len(rows), self.pad, self.settings.pad_multiple)

    def examples(self, task: str, examples: Iterable[Pair]) -> Rows:
        """`Rows` of prompts with their answers."""
        make = self._joined if self.settings.labels == "joined" else self._separate
        rows = [make(task, prompt, answer) for prompt, answer in examples]
        return Rows(
            [ids for ids, _ in rows], [n for _, n in rows], self.pad, self.settings.pad_multiple
        )

    def scored(self, task: str, examples: Sequence[Pair]) -> Rows:
        """`Rows` of prompts as they are continued, with their answers: for decoding "forced"."""
        if self.settings.labels == "joined":
            return self.examples(task, examples)
        rows = self.prompts(task, [prompt for prompt, _ in examples])
        for place, (prompt, answer) in enumerate(examples):
            whole, head = self.tokens(prompt + answer), self.tokens(prompt)
            # The answer's tokens after its prompt, unless one token reaches over both.
            tail = whole[len(head) :] if whole[: len(head)] == head else self.tokens(answer)
            tail = [*tail[: self.settings.max_answer], self.eos]
            rows.ids[place], rows.answers[place] = [*rows.ids[place], *tail], len(tail)
        return rows

    def num_cut(self, task: str, examples: Sequence[Example]) -> tuple[int, int]:
        """How many prompts, and how many answers, are longer than they may be."""
        prompt, answer = self.settings.of("max_prompt", task), self.settings.max_answer
        joined = self.settings.labels == "joined"
        answers = [_spaced(e.prompt, e.answer) if joined else e.answer for e in examples]
        return (
            sum(len(self._body(e.prompt)) + len(self.begin) > prompt for e in examples),
            sum(len(self.tokens(text)) + joined > answer for text in answers),
        )

    def without_beginnings(self, task: Task) -> Task:
        """A task whose prompts lack what the tokenizer puts before each: to be put together."""
        begin = beginning(self.tokenizer)
        if not begin:
            return task
        text = decoded(self.tokenizer, begin)
        return Task(
            task.name,
            *(
                tuple(e._replace(prompt=e.prompt.removeprefix(text)) for e in part)
                for part in (task.train, task.test)
            ),
        )

    def _body(self, prompt: str) -> list[int]:
        return without_beginning(self.tokens(prompt), self.begin)

    def _begun(self, ids: list[int]) -> list[int]:
        """With the published beginning before them, once."""
        return [self.bos, *without_beginning(ids, [self.bos])]

    def _head(self, prompt: str, task: str) -> list[int]:
        """The tokens of a prompt within its limit."""
        room = max(0, self.settings.of("max_prompt", task) - len(self.begin))
        ids = self._body(prompt)
        # Something must come before the answer's first token, to predict it.
        ids = ids if ids or self.begin else [self.bos]
        right = task in self.settings.truncate_right
        return [*self.begin, *(ids[:room] if right else ids[max(0, len(ids) - room) :])]

    def _joined(self, task: str, prompt: str, answer: str) -> tuple[list[int], int]:
        spaced = self.tokens(_spaced(prompt, answer))
        tail = [*spaced[: self.settings.max_answer - 1], self.eos]
        return self._head(prompt, task) + tail, len(tail)

    def _separate(self, task: str, prompt: str, answer: str) -> tuple[list[int], int]:
        limit, room = self.settings.of("max_prompt", task), self.settings.max_answer
        if task in self.settings.truncate_right:
            # The answer first, with room for both special tokens; the prompt takes what is left.
            label = [*self.tokens(answer)[: room + 1], self.eos]
            head = without_beginning(self.tokens(prompt), [self.bos])
            head = head[: max(0, limit + room - len(label) - 1)]
            return [self.bos, *head, *label], len(label)
        length = limit + room
        ids = self.tokens(prompt + answer)[-length:]
        count = len(self.tokens(answer)) + 1
        # As published: without room for it there is no end of text, and the count stays.
        if len(ids) < length:
            ids = [*ids, self.eos]
        if len(ids) < length:
            ids = self._begun(ids)
        return ids, min(count, len(ids) - 1)


def special_id(
    tokenizer: PreTrainedTokenizerBase, name: Literal["bos", "eos", "pad", "unk"]
) -> int | None:
    """The id of a special token, or None where the tokenizer has none."""
    return getattr(tokenizer, f"{name}_token_id")


def decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int] | Tensor, **settings: bool) -> str:
    """The text of one list of tokens."""
    text = tokenizer.decode(ids, **settings)
    assert isinstance(text, str)
    return text


def _spaced(prompt: str, answer: str) -> str:
    """The answer with a space before it, where the prompt ends in none."""
    return answer if prompt[-1:].isspace() else f" {answer}"


def by_length(rows: Batches) -> list[int]:
    """The places of examples, short ones first: batches of equal lengths need little padding."""
    return sorted(range(len(rows)), key=rows.length)

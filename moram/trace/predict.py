"""Answers of a model: generated, or decided in one pass over the true answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..continual.scoring import IGNORED, answer_logits
from ..processes import Processes
from .encode import Batches, Rows, by_length, decoded, special_id
from .settings import TraceSettings

if TYPE_CHECKING:
    from transformers import LogitsProcessorList, PreTrainedTokenizerBase

    from .model import LanguageModel

_AS_WRITTEN = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}


@torch.no_grad()
def generate(
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    settings: TraceSettings,
    task: str,
    processes: Processes,
    step: Callable[[int], object] = lambda count: None,
) -> list[str]:
    """Greedy continuations of prompts, as text, without special tokens.

    Prompts are padded on the left, and those of equal length go together, so that what a batch
    holds besides an example changes its answer by rounding at most.

    Args:
        rows: of prompts. processes: each answers its share, and all get all answers.
        step: called with the number of examples done.
    """
    from transformers import GenerationConfig

    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=settings.of("max_new_tokens", task),
        no_repeat_ngram_size=settings.no_repeat_ngram,
        pad_token_id=rows.pad,
        eos_token_id=_stops(model, tokenizer),
        use_cache=True,
    )
    device = next(model.parameters()).device
    answers: list[tuple[int, str]] = []
    for part in _batches(rows, settings, processes):
        ids, mask, _ = (t.to(device) for t in rows.batch(part))
        with _without_habits(model):
            out = model.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=config,
                logits_processor=_penalty(settings.repetition_penalty, mask),
                synced_gpus=processes.world > 1 and getattr(model, "is_sharded", False),
            )
        texts = tokenizer.batch_decode(out[:, ids.shape[1] :], **_AS_WRITTEN)
        answers += zip(part, texts, strict=True)
        step(len(part) * processes.world)
    found = dict(processes.gather(answers))
    return [found[row] for row in range(len(rows))]


@contextmanager
def _without_habits(model: LanguageModel) -> Iterator[None]:
    """Hugging Face fills what a call leaves open from the model's own generation_config.json."""
    from transformers import GenerationConfig

    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def _penalty(penalty: float, mask: Tensor) -> LogitsProcessorList:
    """Hugging Face's repetition penalty without padding, which may be the end-of-text token."""
    from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor

    class Penalty(RepetitionPenaltyLogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            places = torch.arange(input_ids.shape[1], device=input_ids.device)
            # The prompt's first token is penalised anyway.
            own = input_ids.gather(1, starts).where(places < starts, input_ids)
            # A LongTensor is what a Tensor of that dtype is called there.
            return super().__call__(own, scores)  # pyright: ignore[reportArgumentType]

    starts = mask.argmax(1, keepdim=True)
    return LogitsProcessorList([] if penalty == 1 else [Penalty(penalty)])


def _stops(model: LanguageModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    own = getattr(model.generation_config, "eos_token_id", None)
    own = own if isinstance(own, list) else [own]
    return sorted({t for t in (*own, special_id(tokenizer, "eos")) if t is not None})


@torch.no_grad()
def forced(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Batches,
    settings: TraceSettings,
    processes: Processes,
    step: Callable[[int], object] = lambda count: None,
) -> list[str]:
    """What greedy decoding writes, as far as it agrees with the true answer, as text.

    One pass over prompt and true answer gives the most likely token at each place. Up to and with
    the first one that differs from the answer, these are the tokens that greedy decoding writes;
    the text ends there. So a text begins with the answer where greedy decoding begins so.

    Args:
        rows: of prompts with answers; the rest as for `generate`.
    """
    device = next(model.parameters()).device
    answers: list[tuple[int, str]] = []
    for part in _batches(rows, settings, processes):
        ids, mask, labels = (t.to(device) for t in rows.batch(part))
        tail = int(labels.ne(IGNORED).sum(1).max())
        best = answer_logits(model, ids, mask, tail).argmax(-1)
        for row, found, wanted in zip(part, best.cpu(), labels[:, -tail:].cpu(), strict=True):
            known = wanted.ne(IGNORED)
            found, wanted = found[known], wanted[known]
            wrong = found.ne(wanted).nonzero()
            end = len(found) if not len(wrong) else int(wrong[0]) + 1
            answers.append((row, decoded(tokenizer, found[:end], **_AS_WRITTEN)))
        step(len(part) * processes.world)
    found = dict(processes.gather(answers))
    return [found[row] for row in range(len(rows))]


def _batches(
    rows: Batches, settings: TraceSettings, processes: Processes
) -> Iterator[Sequence[int]]:
    """This process's batches. All have as many: the processes of a sharded model call together."""
    order = by_length(rows)
    order += [order[i % len(order)] for i in range(-len(order) % processes.world)]
    mine = processes.share(order)
    for start in range(0, len(mine), settings.eval_batch):
        yield mine[start : start + settings.eval_batch]

"""A tiny model folder, data in TRACE's format and settings for runs over them. No tests here."""

import json

from tiny_models import language_model

from moram.trace.settings import make_settings

TASKS = ("letters", "colours", "sizes")


def make_tokenizer(template=None):
    """A tokenizer of bytes: any text can be written with it, one token a byte.

    Args:
        template: what it puts around a text that is asked for with special tokens, such as
            "<bos> $A", as Gemma and Llama 3 do; None = nothing.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(special + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if template is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<bos>", 2), ("<eos>", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
    )


def write_model(folder, template=None, **changes):
    """Save a tiny Llama and its tokenizer (see `make_tokenizer`); returns the folder as text."""
    # The weights of a head that starts at 0.02 are too weak to tell answers apart.
    sizes = {"vocab_size": 264, "initializer_range": 0.15, "max_position_embeddings": 128}
    ids = {"bos_token_id": 2, "eos_token_id": 1}
    model = language_model(**(sizes | ids | changes))
    model.save_pretrained(folder)
    make_tokenizer(template).save_pretrained(folder)
    return str(folder)


def write_data(folder, tasks=TASKS, examples=16):
    """Tasks whose answer follows from one letter of the prompt; returns the folder as text."""
    for t, task in enumerate(tasks):
        for split in ("train", "eval", "test"):
            rows = [
                {"prompt": f"{task[:3]} {v}{'xy'[c]}{t}:", "answer": "AB"[c]}
                for v in range(examples // 2)
                for c in range(2)
            ]
            path = folder / task / f"{split}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(rows), encoding="utf-8")
    return str(folder)


def settings_for(model, data, out, method="moram", **changes):
    """Settings of a run that takes a second or two."""
    quick = {
        "model": model,
        "data": data,
        "out": str(out),
        "tasks": TASKS,
        "first_layer": 0,
        "cache_prefix": False,
        "rank": 4,
        "lr": 0.02,
        "epochs": 2,
        "batch_size": 4,
        "train_limit": None,
        "max_prompt": 24,
        "max_answer": 4,
        "pad_multiple": 8,
        "max_new_tokens": 3,
        "eval_batch": 4,
        "dtype": "float32",
        "threads": 1,
        "quiet": True,
    }
    return make_settings("small", method, changes=[quick | changes])

"""A tokenizer of whole words and a stream of learnable toy tasks. No tests here."""

import re
from types import SimpleNamespace

from moram.continual import Example, Task


class WordTokenizer:
    """Each word, with the space before it, is one token; ids are given in order of appearance."""

    pad_token_id, eos_token_id = 0, 1

    def __init__(self):
        self.ids = {}

    def __call__(self, text, add_special_tokens=True):
        # It puts nothing before a text, which an empty one shows.
        assert not (add_special_tokens and text)
        words = re.findall(r"\s*\S+|\s+$", text)
        return SimpleNamespace(input_ids=[self[word] for word in words])

    def __getitem__(self, word):
        return self.ids.setdefault(word, len(self.ids) + 2)


def toy_stream(tasks=2, copies=4):
    """Tasks with words of their own, whose answer is the class of the word."""
    stream = []
    for t in range(tasks):
        examples = [
            Example(f"Q{t} {filler} w{t}{c}{v} ?", "AB"[c])
            for c in range(2)
            for v in range(2)
            for filler in ("the", "a", "one", "some")[:copies]
        ]
        stream.append(Task(f"task{t}", tuple(examples), tuple(examples[::2])))
    return stream

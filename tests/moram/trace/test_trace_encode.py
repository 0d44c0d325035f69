"""How `moram trace` turns texts into tokens and batches; expected token lists are made by hand."""

import pytest
import torch
from trace_support import make_tokenizer

from moram.continual import Example
from moram.trace.encode import Encoder, Rows
from moram.trace.settings import make_settings

PAD, EOS, BOS, UNK = range(4)
NO = -100


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def encoder(tokenizer):
    def make(labels="separate", own=tokenizer, **changes):
        given = {"model": "m", "data": "d", "tasks": ("plain", "right"), "labels": labels}
        given |= {"max_prompt": {"*": 6, "right": 8}, "max_answer": 4}
        given |= {"truncate_right": ("right",), "pad_multiple": 4, "decoding": "forced"}
        return Encoder(own, make_settings("paper", changes=[given | changes]))

    return make


def ids_of(text, tokenizer):
    """Tokens of a text by a second way: the vocabulary's own entry for each byte."""
    # The byte alphabet is sorted by code point: printable bytes stand for themselves, and the
    # others, in order, for the characters from 256 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable}
    characters |= {byte: chr(256 + place) for place, byte in enumerate(others)}
    places = {c: 4 + place for place, c in enumerate(sorted(characters.values()))}
    return [places[characters[byte]] for byte in text.encode()]


def only(rows):
    assert len(rows) == 1
    return rows.ids[0], rows.answers[0]


@pytest.mark.parametrize("text", ["", "ab c\n", "é", "Stance: 判断", "<eos>", "🙂\t0"])
def test_tokens_are_bytes_and_never_special_ones(tokenizer, encoder, text):
    # A special token written in a text is that token, as in every Hugging Face tokenizer.
    expected = [EOS] if text == "<eos>" else ids_of(text, tokenizer)
    assert encoder().tokens(text) == expected


# max_prompt 6 + max_answer 4: 10 tokens; the end of text first, the beginning if there is room.
SEPARATE = {
    "room for both": ("ab", "xy", [BOS, *"abxy", EOS], 3),
    "room for both, just": ("abcdef", "xy", [BOS, *"abcdefxy", EOS], 3),
    "room for the end alone": ("abcdefg", "xy", [*"abcdefgxy", EOS], 3),
    "no room: the count stays": ("abcdefgh", "xy", [*"abcdefghxy"], 3),
    "a long prompt loses its beginning": ("0123abcdefgh", "xy", [*"abcdefghxy"], 3),
    "an answer longer than its room takes the prompt's": ("abc", "uvwxyz", [*"abcuvwxyz", EOS], 7),
    "an answer longer than everything": ("abc", "0123456789z", [*"123456789z"], 9),
    "a long answer that leaves a place": ("ab", "12345678", [*"ab12345678"], 9),
}


@pytest.mark.parametrize("case", SEPARATE)
def test_separate_labels_of_hand_made_examples(tokenizer, encoder, case):
    prompt, answer, expected, count = SEPARATE[case]
    expected = [x if isinstance(x, int) else ids_of(x, tokenizer)[0] for x in expected]
    assert only(encoder().examples("plain", [(prompt, answer)])) == (expected, count)


# The answer has 4 + 2 tokens at most with its end, the whole 8 + 4 with the beginning.
RIGHT = {
    "short": ("ab", "xy", [BOS, *"abxy", EOS], 3),
    "a long prompt loses its end": ("abcdefghijkl", "xy", [BOS, *"abcdefghxy", EOS], 3),
    "a short answer leaves its room to the prompt": (
        "abcdefghijkl",
        "x",
        [BOS, *"abcdefghix", EOS],
        2,
    ),
    "a long answer is cut, and has its end": ("abcdefghi", "0123456", [BOS, *"abcde01234", EOS], 6),
}


@pytest.mark.parametrize("case", RIGHT)
def test_separate_labels_of_a_task_that_is_cut_on_the_right(tokenizer, encoder, case):
    prompt, answer, expected, count = RIGHT[case]
    expected = [x if isinstance(x, int) else ids_of(x, tokenizer)[0] for x in expected]
    assert len(expected) <= 12
    assert only(encoder().examples("right", [(prompt, answer)])) == (expected, count)


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_an_answer_may_leave_nothing_of_a_prompt_cut_on_the_right(tokenizer, encoder, limit):
    rows = encoder(max_prompt=limit).examples("right", [("abcdefghij", "0123456")])
    assert only(rows) == ([BOS, *ids_of("01234", tokenizer), EOS], 6)


JOINED = {
    "a space is put between": ("ab", "xy", "ab xy", 4),
    "but not after a space": ("ab ", "xy", "ab xy", 3),
    "nor after a line's end": ("ab\n", "xy", "ab\nxy", 3),
    "a long prompt loses its beginning": ("0123abcdef", "xy", "abcdef xy", 4),
    "a long answer loses its end": ("ab", "uvwxyz", "ab uv", 4),
}


@pytest.mark.parametrize("case", JOINED)
def test_joined_labels_are_the_answer_and_its_end(tokenizer, encoder, case):
    prompt, answer, text, count = JOINED[case]
    rows = encoder("joined").examples("plain", [(prompt, answer)])
    assert only(rows) == ([*ids_of(text, tokenizer), EOS], count)


def test_joined_labels_of_a_task_that_is_cut_on_the_right(tokenizer, encoder):
    rows = encoder("joined").examples("right", [("abcdefghijkl", "xy")])
    assert only(rows) == ([*ids_of("abcdefgh xy", tokenizer), EOS], 4)


@pytest.mark.parametrize("labels", ["joined", "separate"])
def test_non_ascii_answers_are_learned_byte_by_byte(tokenizer, encoder, labels):
    ids, count = only(encoder(labels, max_answer=9).examples("plain", [("对。", "é反")]))
    # Two bytes and three, the end of text, and the space of joined labels.
    assert count == 2 + 3 + 1 + (labels == "joined")
    assert tokenizer.decode(ids, skip_special_tokens=True) == (
        "对。 é反" if labels == "joined" else "对。é反"
    )


def test_prompts_to_continue_have_no_end_and_a_beginning_if_there_is_room(tokenizer, encoder):
    texts = ["ab", "abcde", "abcdef", "0abcdef"]
    rows = encoder().prompts("plain", texts)
    whole = ids_of("abcdef", tokenizer)
    assert rows.ids == [[BOS, *whole[:2]], [BOS, *whole[:5]], whole, whole]
    assert rows.answers == [0, 0, 0, 0]
    right = encoder().prompts("right", ["abcdefghij", "ab"])
    assert right.ids == [ids_of("abcdefgh", tokenizer), [BOS, *whole[:2]]]
    joined = encoder("joined").prompts("plain", texts)
    assert joined.ids == [whole[:2], whole[:5], whole, whole]


@pytest.mark.parametrize("labels", ["joined", "separate"])
@pytest.mark.parametrize("task", ["plain", "right"])
def test_forced_decoding_sees_the_prompts_that_generation_continues(encoder, labels, task):
    texts = ["a", "abcdef", "abcdefghijklmnop"]
    own = encoder(labels)
    scored = own.scored(task, [(text, "xy") for text in texts])
    heads = [row[:-n] for row, n in zip(scored.ids, scored.answers, strict=True)]
    assert heads == own.prompts(task, texts).ids
    assert scored.answers == [4, 4, 4] if labels == "joined" else [3, 3, 3]


def test_forced_decoding_cuts_answers_that_are_too_long(tokenizer, encoder):
    rows = encoder().scored("plain", [("ab", "uvwxyz")])
    assert only(rows) == ([BOS, *ids_of("abuvwx", tokenizer), EOS], 5)


class Pairs:
    """A tokenizer that joins "b" and "x" into one token where they meet."""

    bos_token_id, eos_token_id, pad_token_id, unk_token_id = 2, 1, 0, None

    def __call__(self, text, add_special_tokens):
        assert not (add_special_tokens and text)
        found = text.replace("bx", "#")
        return type("Encoding", (), {"input_ids": [ord(c) for c in found]})


def test_as_many_tokens_are_learned_as_the_answer_has_alone(encoder):
    # a # y <eos>: "xy" alone has two tokens, with its end three, so the merged token is learned.
    ids, count = only(encoder(own=Pairs()).examples("plain", [("ab", "xy")]))
    assert (ids, count) == ([2, ord("a"), ord("#"), ord("y"), 1], 3)
    # To be scored, prompt and answer must be apart.
    ids, count = only(encoder(own=Pairs()).scored("plain", [("ab", "xy")]))
    assert (ids, count) == ([2, *map(ord, "abxy"), 1], 3)


def test_a_prompt_without_tokens_begins_with_the_beginning(encoder):
    class Strips(Pairs):
        def __call__(self, text, add_special_tokens):
            return super().__call__(text.strip(), add_special_tokens)

    own = encoder("joined", own=Strips())
    assert own.prompts("plain", [" "]).ids == [[BOS]]
    # What is learned never begins a text: nothing would predict it.
    for rows in (own.examples("plain", [(" ", "x")]), own.scored("plain", [(" ", "x")])):
        assert only(rows) == ([BOS, ord("x"), EOS], 2)


def test_special_tokens_that_are_missing_have_the_published_substitutes(encoder):
    class Own(Pairs):
        bos_token_id = pad_token_id = None

    assert (encoder(own=Own()).bos, encoder(own=Own()).pad) == (1, 1)
    Own.unk_token_id = 7
    assert encoder(own=Own()).pad == 7
    Own.eos_token_id = None
    with pytest.raises(ValueError, match="the tokenizer has no end-of-text token"):
        encoder(own=Own())


def test_num_cut_counts_prompts_and_answers_that_lose_something(encoder):
    examples = [Example("abcdef", "wxyz"), Example("abcdefg", "wxyz"), Example("a", "vwxyz")]
    assert encoder().num_cut("plain", examples) == (1, 1)
    assert encoder().num_cut("right", examples) == (0, 1)
    # Joined, there is room for three tokens and the end of text, and a space may be one of them.
    examples = [
        Example("a", "xy"),
        Example("a", "xyz"),
        Example("a ", "xyz"),
        Example("b ", "uxyz"),
    ]
    assert encoder("joined").num_cut("plain", examples) == (0, 2)


def test_batches_are_padded_on_the_left_to_a_multiple_and_learn_the_answer_alone():
    rows = Rows([[11, 12, 13, 14, 15], [21, 22], [31, 32, 33]], [2, 1, 0], pad=9, multiple=4)
    ids, mask, labels = rows.batch([1, 0])
    assert ids.tolist() == [[9, 9, 9, 9, 9, 9, 21, 22], [9, 9, 9, 11, 12, 13, 14, 15]]
    assert mask.tolist() == [[0, 0, 0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 1, 1, 1]]
    assert labels.tolist() == [[NO] * 7 + [22], [NO] * 6 + [14, 15]]
    ids, mask, labels = rows.batch(torch.tensor([2]))
    assert ids.tolist() == [[9, 31, 32, 33]] and labels.tolist() == [[NO] * 4]
    assert rows.num_labels(torch.tensor([0, 1, 2])) == 3
    assert [rows.length(row) for row in range(len(rows))] == [5, 2, 3]


def test_a_length_that_is_a_multiple_gets_no_padding():
    ids, mask, _ = Rows([[1, 2, 3, 4]], [1], pad=0, multiple=4).batch([0])
    assert ids.shape == (1, 4) and mask.sum() == 4


def test_joining_keeps_the_order():
    parts = [Rows([[1], [2]], [1, 0], 0, 8), Rows([[3]], [1], 0, 8)]
    rows = Rows.join(parts)
    assert (rows.ids, rows.answers, rows.pad, rows.multiple) == ([[1], [2], [3]], [1, 0, 1], 0, 8)

"""The beginning-of-text token: before every prompt, once, where the tokenizer itself puts one."""

import json
from types import SimpleNamespace

import pytest
import torch
from tiny_models import language_model
from trace_support import TASKS, make_tokenizer, settings_for, write_data, write_model

from moram.continual import Example, Task
from moram.continual.scoring import beginning
from moram.harness.inspection.run import Choice, inspect_run
from moram.methods import make_method
from moram.processes import Processes
from moram.trace.encode import Encoder
from moram.trace.inspection import LOOKER
from moram.trace.predict import generate
from moram.trace.run import run_trace
from moram.trace.settings import make_settings
from moram.trace.streams import StreamRows

PAD, EOS, BOS, UNK = range(4)
BEGINS = "<bos> $A"


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(BEGINS)


def encoder(tokenizer, labels="joined", **changes):
    given = {"model": "m", "data": "d", "tasks": ("plain", "right"), "labels": labels}
    given |= {"max_prompt": 6, "max_answer": 4, "truncate_right": ("right",)}
    return Encoder(tokenizer, make_settings("paper", changes=[given | changes]))


def bytes_of(text):
    """Tokens of a text by a tokenizer that puts nothing before it."""
    return make_tokenizer()(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (None, []),
        (BEGINS, [BOS]),
        ("<bos> $A <eos>", [BOS]),
        ("$A <eos>", []),
        ("<bos> <bos> $A", [BOS, BOS]),
    ],
)
def test_the_beginning_is_what_the_tokenizer_puts_before_a_text(template, expected):
    assert beginning(make_tokenizer(template)) == expected


PROMPTS = {
    "short": ("ab", "ab"),
    "as long as there is room": ("abcde", "abcde"),
    "one too long loses its beginning, not the token": ("0abcde", "abcde"),
    "a text that begins so already": ("<bos>ab", "ab"),
    "a long text that begins so already": ("<bos>01abcde", "abcde"),
    "a token within the text stays": ("a<bos>b", "a<bos>b"),
    "no text": ("<bos>", ""),
}


@pytest.mark.parametrize("case", PROMPTS)
def test_every_prompt_begins_once(tokenizer, case):
    prompt, kept = PROMPTS[case]
    own, head = encoder(tokenizer), [BOS, *bytes_of(kept)]
    assert own.prompts("plain", [prompt]).ids == [head]
    answer = [*bytes_of(" x"), EOS]
    for rows in (own.examples("plain", [(prompt, "x")]), own.scored("plain", [(prompt, "x")])):
        assert (rows.ids, rows.answers) == ([head + answer], [3])


def test_a_prompt_that_is_cut_on_the_right_begins_once(tokenizer):
    own = encoder(tokenizer)
    assert own.prompts("right", ["abcdefg"]).ids == [[BOS, *bytes_of("abcde")]]


def test_the_beginning_takes_the_only_place_there_is(tokenizer):
    assert encoder(tokenizer, max_prompt=1).prompts("plain", ["abc"]).ids == [[BOS]]


def test_prompts_count_as_cut_where_the_beginning_takes_their_place(tokenizer):
    examples = [Example("abcde", "x"), Example("<bos>abcde", "x"), Example("abcdef", "x")]
    assert encoder(tokenizer).num_cut("plain", examples) == (1, 0)
    assert encoder(make_tokenizer()).num_cut("plain", examples[::2]) == (0, 0)


def test_the_published_way_has_a_beginning_where_there_is_room_and_none_twice(tokenizer):
    own = encoder(tokenizer, "separate")
    texts = ["abcde", "abcdef", "<bos>ab", "<bos>abcdefg"]
    expected = [[BOS, *bytes_of(text)] for text in ("abcde", "ab")]
    expected[1:1] = [bytes_of("abcdef")]
    assert own.prompts("plain", texts).ids == [*expected, bytes_of("bcdefg")]
    rows = own.examples("plain", [("<bos>ab", "x")])
    assert rows.ids == [[BOS, *bytes_of("abx"), EOS]]
    rows = own.examples("right", [("<bos>abcdefghij", "x")])
    assert rows.ids == [[BOS, *bytes_of("abcdefgx"), EOS]]


@pytest.mark.parametrize("labels", ["joined", "separate"])
@pytest.mark.parametrize("decoding", ["forced", "generate"])
def test_demonstrations_that_begin_so_begin_once_together(tokenizer, labels, decoding):
    examples = tuple(Example(f"<bos>q{i}:", "AB"[i % 2]) for i in range(4))
    stream = [Task("letters", examples[:2], examples[2:])]
    own = settings_for(
        "m", "d", "o", "in-context", labels=labels, decoding=decoding, max_prompt=300
    )
    method = make_method("in-context", demonstrations=2)
    rows = StreamRows(stream, Encoder(tokenizer, own), method, None, own, False, {}, None)
    for ids in rows.test[0].ids:
        assert ids[0] == BOS and ids.count(BOS) == 1
        assert tokenizer.decode(ids).count("q") > 1, "the case should have demonstrations"


def test_generation_continues_a_prompt_that_begins_once(tokenizer):
    model, seen = language_model(vocab_size=264), []

    def write(input_ids, **_):
        seen.append(input_ids.tolist())
        return torch.cat([input_ids, torch.tensor([bytes_of("A")])], 1)

    model.generate = write
    own = settings_for("m", "d", "o", decoding="generate", eval_batch=1, pad_multiple=1)
    rows = Encoder(tokenizer, own).prompts("letters", ["<bos>q:"])
    assert generate(model, tokenizer, rows, own, "letters", Processes()) == ["A"]
    assert seen == [[[BOS, *bytes_of("q:")]]]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return write_model(folder / "model", BEGINS), write_data(folder / "data")


def steps_of(out):
    return [line.split(",")[:3] for line in (out / "steps.csv").read_text().splitlines()[1:]]


def test_a_run_reads_the_beginning_with_and_without_cached_states(inputs, tmp_path):
    found = []
    for name, cache in (("plain", False), ("cached", True)):
        changes = {"first_layer": 1, "cache_prefix": cache}
        results = run_trace(settings_for(*inputs, tmp_path / name, **changes))
        found.append((results["matrix"], steps_of(tmp_path / name)))
    assert found[0][0] == found[1][0]
    losses = [[float(row[2]) for row in steps] for _, steps in found]
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)
    # As does a run over texts that hold it, with a tokenizer that puts nothing before them.
    data = write_data(tmp_path / "data")
    for file in (tmp_path / "data").rglob("*.json"):
        rows = [row | {"prompt": f"<bos>{row['prompt']}"} for row in json.loads(file.read_text())]
        file.write_text(json.dumps(rows))
    model = write_model(tmp_path / "model")
    changes = {"first_layer": 1, "cache_prefix": False}
    results = run_trace(settings_for(model, data, tmp_path / "written", **changes))
    assert results["matrix"] == found[0][0]
    assert steps_of(tmp_path / "written") == found[0][1]


def test_inspect_reads_the_beginning_of_a_text(inputs, tmp_path):
    run_trace(settings_for(*inputs, tmp_path / "run", tasks=TASKS[:2]))
    found = inspect_run(
        tmp_path / "run", [LOOKER], Choice(text="<bos>ab", limit=2), log=lambda line: None
    )
    assert [row["token"] for row in found["text"]] == ["<bos>", "a", "b"]


def test_a_tokenizer_that_puts_nothing_before_texts_is_asked_about_none():
    asked = []

    def plain(text, add_special_tokens):
        asked.append((text, add_special_tokens))
        return SimpleNamespace(input_ids=[])

    assert beginning(plain) == [] and asked == [("", True)]

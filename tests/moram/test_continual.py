"""Metrics, streams on disk, tokens and exact match, the data that ships, the command line."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from choices import DRAWN, Choices
from tiny_models import language_model
from toy_language import WordTokenizer

import moram
from moram.cli import main
from moram.continual import (
    Example,
    backward_transfer,
    forgetting,
    load_stream,
    majority_accuracy,
    overall_performance,
    plasticity,
)
from moram.continual.scoring import Encoded, encode, exact_match, predict

TASKS = ("topic", "feeling", "purpose")
# Row t: after task t. Task 0 peaks after task 1, task 1 is forgotten, task 2 is last.
MATRIX = [[80.0, 30.0, 20.0], [96.0, 90.0, 25.0], [70.0, 50.0, 84.0]]


def test_metrics_of_a_matrix_worked_out_by_hand():
    assert overall_performance(MATRIX) == pytest.approx(68.0)  # (70 + 50 + 84) / 3
    assert plasticity(MATRIX) == pytest.approx(254 / 3)  # 80, 90, 84
    assert backward_transfer(MATRIX) == pytest.approx(-25.0)  # (-10 - 40) / 2
    assert forgetting(MATRIX) == pytest.approx(33.0)  # (26 + 40) / 2


def test_backward_transfer_may_be_positive_and_forgetting_may_not():
    matrix = [[50.0, 0.0], [75.0, 60.0]]
    assert backward_transfer(matrix) == 25.0
    assert forgetting(matrix) == 0.0


def test_metrics_of_one_task():
    assert backward_transfer([[40.0]]) == forgetting([[40.0]]) == 0
    assert overall_performance([[40.0]]) == plasticity([[40.0]]) == 40.0


def test_metrics_leave_the_matrix_alone():
    matrix = [row[:] for row in MATRIX]
    for metric in (overall_performance, plasticity, backward_transfer, forgetting):
        metric(matrix)
    assert matrix == MATRIX


def test_majority_accuracy_is_the_share_of_the_most_frequent_answer():
    examples = [Example("p", answer) for answer in "ABBBC"]
    assert majority_accuracy(examples) == 60.0


def write_task(folder, name="one", **parts):
    rows = [{"prompt": "p", "answer": "a"}]
    (folder / name).mkdir()
    for part in ("train", "test"):
        content = parts.get(part, rows)
        if content is not None:
            text = content if isinstance(content, str) else json.dumps(content)
            (folder / name / f"{part}.json").write_text(text, encoding="utf-8")


def test_stream_is_read_in_the_order_of_the_names(tmp_path):
    write_task(tmp_path, "one", train=[{"prompt": "é?", "answer": "ü"}] * 2)
    write_task(tmp_path, "two")
    stream = load_stream(tmp_path, ["two", "one"])
    assert [task.name for task in stream] == ["two", "one"]
    assert stream[1].train == (Example("é?", "ü"),) * 2
    assert stream[1].test == (Example("p", "a"),)


@pytest.mark.parametrize("names", [[], ["one", "one"]], ids=["none", "repeated"])
def test_names_must_be_there_and_differ(tmp_path, names):
    write_task(tmp_path)
    message = f"tasks must be one or more different names, got {names}"
    with pytest.raises(ValueError, match=re.escape(message)):
        load_stream(tmp_path, names)


def test_missing_task_lists_the_present_ones(tmp_path):
    write_task(tmp_path, "b")
    write_task(tmp_path, "a")
    message = f"{tmp_path} has no task 'c' (no c/train.json); it has: a, b"
    with pytest.raises(FileNotFoundError, match=re.escape(message)):
        load_stream(tmp_path, ["a", "c"])
    with pytest.raises(FileNotFoundError, match=r"it has: none"):
        load_stream(tmp_path / "nowhere", ["a"])


def test_missing_test_part_is_named(tmp_path):
    write_task(tmp_path, test=None)
    message = f"{tmp_path / 'one' / 'test.json'} does not exist"
    with pytest.raises(FileNotFoundError, match=re.escape(message)):
        load_stream(tmp_path, ["one"])


GOOD = {"prompt": "p", "answer": "a"}
BAD_PARTS = {
    "no_json": ("[{", "is not JSON: "),
    "object": (GOOD, "must hold a non-empty list, got dict"),
    "empty": ([], "must hold a non-empty list, got list"),
    "no_answer": ([GOOD, {"prompt": "p"}], "entry 1 must be {"),
    "number": ([{"prompt": "p", "answer": 3}], "entry 0 must be {"),
    "empty_text": ([{"prompt": "", "answer": "a"}], "entry 0 must be {"),
    "no_object": ([GOOD, GOOD, "text"], "entry 2 must be {"),
}


@pytest.mark.parametrize("part", ["train", "test"])
@pytest.mark.parametrize("case", BAD_PARTS)
def test_malformed_file_is_named_with_its_entry(tmp_path, case, part):
    content, message = BAD_PARTS[case]
    write_task(tmp_path, **{part: content})
    path = tmp_path / "one" / f"{part}.json"
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}:? {re.escape(message)}"):
        load_stream(tmp_path, ["one"])


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_byte_order_mark_before_a_task_is_no_part_of_it(tmp_path, part):
    write_task(tmp_path)
    path = tmp_path / "one" / f"{part}.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    (task,) = load_stream(tmp_path, ["one"])
    assert task.train == task.test == (Example("p", "a"),)


@pytest.mark.parametrize("part", ["train", "test"])
@pytest.mark.parametrize("field", ["prompt", "answer"])
def test_half_a_surrogate_pair_in_a_task_is_named_with_its_entry(tmp_path, part, field):
    # As ASCII, JSON writes both halves of a pair; one alone is no character.
    whole = [{"prompt": "p \U0001f642", "answer": "a"}]
    write_task(tmp_path, train=whole, test=whole)
    assert load_stream(tmp_path, ["one"])[0].train[0].prompt == "p \U0001f642"
    path = tmp_path / "one" / f"{part}.json"
    path.write_text(json.dumps([GOOD, GOOD | {field: "ab\ud83d"}]), encoding="utf-8")
    message = (
        f"{path}: the {field} of entry 1 must hold whole characters, got '\\ud83d' in place 2: "
        "half of a surrogate pair"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        load_stream(tmp_path, ["one"])


def test_encoding_pads_left_and_labels_the_answer_and_its_end():
    # Ids in order of appearance: "a" 2, " b" 3, " c" 4, " X" 5; then " Y" 6, " Z" 7.
    examples = [Example("a b c", "X"), Example("a", "Y Z")]
    encoded = encode(WordTokenizer(), examples, multiple=4)
    assert encoded.input_ids.tolist() == [[0, 0, 0, 2, 3, 4, 5, 1], [0, 0, 0, 0, 2, 6, 7, 1]]
    assert encoded.attention_mask.tolist() == [[0] * 3 + [1] * 5, [0] * 4 + [1] * 4]
    assert encoded.labels.tolist() == [[-100] * 6 + [5, 1], [-100] * 5 + [6, 7, 1]]
    assert encoded.tail == 3


@pytest.mark.parametrize(("words", "length"), [(2, 4), (3, 8), (6, 8), (7, 12)])
def test_lengths_are_the_next_multiple(words, length):
    example = Example(" ".join(["w"] * words), "X")
    assert encode(WordTokenizer(), [example], multiple=4).input_ids.shape == (1, length)


def test_truncation_keeps_the_end_of_the_prompt():
    tokenizer = WordTokenizer()
    encoded = encode(tokenizer, [Example("a b c d e", "X")], max_length=5, multiple=1)
    ids = [tokenizer[word] for word in (" c", " d", " e", " X")]
    assert encoded.input_ids.tolist() == [[*ids, 1]]
    assert encoded.attention_mask.tolist() == [[1] * 5]


def test_answer_after_white_space_gets_no_second_space():
    tokenizer = WordTokenizer()
    encode(tokenizer, [Example("a\n", "X"), Example("b", "Y")])
    assert "X" in tokenizer.ids and " X" not in tokenizer.ids
    assert " Y" in tokenizer.ids and "Y" not in tokenizer.ids


def test_padding_is_the_end_of_text_where_there_is_no_padding_token():
    tokenizer = WordTokenizer()
    tokenizer.pad_token_id = None
    encoded = encode(tokenizer, [Example("a", "X")], multiple=5)
    assert encoded.input_ids.tolist() == [[1, 1, 2, 3, 1]]
    assert encoded.attention_mask.tolist() == [[0, 0, 1, 1, 1]]


def test_answer_that_leaves_no_room_is_refused():
    message = "an answer has 4 tokens, max_length is 4: 'X Y Z'"
    with pytest.raises(ValueError, match=message):
        encode(WordTokenizer(), [Example("a", "X Y Z")], max_length=4)
    encode(WordTokenizer(), [Example("a", "X Y Z")], max_length=5)


def test_exact_match_needs_the_whole_answer_and_not_its_end():
    labels = torch.tensor([[-100, 5, 1], [6, 7, 1], [6, 7, 1], [-100, 8, 1]])
    encoded = Encoded(labels, labels, torch.cat([labels[:, :1] * 0 - 100, labels], 1), 3)
    predictions = torch.tensor([[9, 5, 4], [6, 7, 1], [6, 8, 1], [8, 9, 1]])
    assert exact_match(predictions, encoded) == 50.0


def greedy_case():
    """Examples of which a third has the greedy answer, and which of them greedy writes exactly."""
    # Larger weights than a fresh model's, so that no two tokens are nearly as likely.
    model = language_model(seed=3, initializer_range=0.5)
    tokenizer = WordTokenizer()
    words = [f" v{i}" for i in range(2, 64)]
    assert [tokenizer[word] for word in words] == list(range(2, 64))
    generator = torch.Generator().manual_seed(0)
    examples, written = [], []
    while len(examples) < 18:
        count, answers = 3 + len(examples) % 5, 1 + len(examples) % 3
        prompt = torch.randint(2, 64, (1, count), generator=generator)
        greedy = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=answers,
            eos_token_id=None,
        )[0, count:]
        if (greedy < 2).any():
            continue
        answer = greedy.clone()
        if len(examples) % 3:
            position = len(examples) % answers
            answer[position] = (answer[position] - 1) % 62 + 2
        text = ["".join(words[i - 2] for i in ids.tolist()) for ids in (prompt[0], answer)]
        examples.append(Example(text[0], text[1].removeprefix(" ")))
        written.append(torch.equal(answer, greedy))
    return model, tokenizer, examples, written


def predict_clearly(model, encoded, batch_size):
    """Predictions of which no rounding decides any."""
    with Choices(DRAWN) as choices:
        predictions = predict(model, encoded, batch_size)
    assert choices.made and not choices.unclear
    return predictions


def test_exact_match_agrees_with_greedy_generation():
    model, tokenizer, examples, written = greedy_case()
    assert 0 < sum(written) < len(written)
    encoded = encode(tokenizer, examples, multiple=16)
    predictions = predict_clearly(model, encoded, 5)
    assert exact_match(predictions, encoded) == pytest.approx(100 * sum(written) / len(written))
    for i, is_written in enumerate(written):
        one = Encoded(*(t[i : i + 1] for t in encoded[:3]), encoded.tail)
        assert exact_match(predictions[i : i + 1], one) == 100 * is_written


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_predictions_do_not_depend_on_the_batch_size(training):
    model, tokenizer, examples, _ = greedy_case()
    encoded = encode(tokenizer, examples, multiple=16)
    expected = predict_clearly(model, encoded, 1)
    model.train(training)
    for batch_size in (2, 5, 18, 40):
        done = []
        assert torch.equal(predict(model, encoded, batch_size, done.append), expected)
        assert sum(done) == 18 and max(done) <= batch_size
        assert model.training == training


def shipped():
    return load_stream(Path(moram.__file__).parent / "demo" / "data", TASKS)


def test_shipped_tasks_are_large_enough_and_share_their_answers():
    for task in shipped():
        assert len(task.train) >= 150 and len(task.test) >= 60, task.name
        for part in (task.train, task.test):
            counts = Counter(example.answer for example in part)
            assert set(counts) == set("ABCD"), task.name
            assert len(set(counts.values())) == 1, (task.name, counts)


def test_no_shipped_test_sentence_is_trained_on():
    def sentences(examples):
        found = [re.search(r"Text: (.*)\nAnswer:", e.prompt, re.DOTALL) for e in examples]
        return [re.sub(r"[^a-z0-9]+", " ", match[1].lower()).strip() for match in found]

    stream = shipped()
    trained = {s for task in stream for s in sentences(task.train)}
    for task in stream:
        tested = sentences(task.test)
        assert set(tested) & trained == set(), task.name
        assert len(set(tested)) == len(tested) == len(task.test), task.name
        assert all(len(s.split()) >= 3 for s in tested), task.name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: command"),
        (["serve"], "invalid choice: 'serve'"),
        (["demo", "--epochs", "two"], "argument --epochs: invalid int value: 'two'"),
        (["demo", "--lr", "fast"], "argument --lr: invalid float value: 'fast'"),
        (["demo", "--threads", "x"], "argument --threads: invalid int value: 'x'"),
        (["demo", "--colour", "red"], "unrecognized arguments: --colour red"),
        (["demo", "--data", "x"], "--data needs --tasks: which of its tasks, in which order"),
    ],
    ids=lambda value: "-".join(value) or "nothing" if isinstance(value, list) else "",
)
def test_malformed_command_line_exits_with_usage(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "topic,weather"], "has no task 'weather'"),
        (["--tasks", ""], "tasks must be one or more different names, got []"),
        (["--tasks", "topic,topic"], "tasks must be one or more different names"),
        (["--data", "nowhere", "--tasks", "a"], "nowhere has no task 'a'"),
        (["--dtype", "float64"], "dtype must be auto, bfloat16 or float32, got 'float64'"),
        (["--model", "/nowhere/at/all", "--atoms", "0"], "atoms_per_task must be >= 1, got 0"),
        (["--model", "/nowhere/at/all"], "/nowhere/at/all"),
    ],
    ids=["missing", "none", "repeated", "data", "dtype", "atoms", "model"],
)
def test_bad_demo_setting_is_one_line_and_status_1(arguments, message, capsys, monkeypatch):
    def start(*_):
        raise AssertionError("the demo started in spite of a bad setting")

    monkeypatch.setattr("moram.demo.run.fetch_weights", start)
    assert main(["demo", *arguments]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("moram demo: ") and message in error

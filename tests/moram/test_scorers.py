"""The scorers against values worked out by hand, and what they refuse."""

import ast
import sys
from pathlib import Path

import pytest

from moram.continual import scorers
from moram.continual.scorers import (
    SCORERS,
    Scorer,
    edit_similarity,
    exact_accuracy,
    first_letter_accuracy,
    letter_accuracy,
    numeric_accuracy,
    prefix_accuracy,
    rouge_l,
    sari,
    scorer_for,
)
from moram.continual.scorers.common import lcs_length

PAIR_SCORERS = [
    prefix_accuracy,
    exact_accuracy,
    letter_accuracy,
    first_letter_accuracy,
    numeric_accuracy,
    rouge_l,
    edit_similarity,
]


@pytest.mark.parametrize("function", PAIR_SCORERS, ids=lambda f: f.__name__)
def test_an_empty_text_scores_zero_and_counts(function):
    assert function(["A", "", "A", ""], ["A", "A", "", ""]) == pytest.approx(25.0)


@pytest.mark.parametrize("function", PAIR_SCORERS, ids=lambda f: f.__name__)
@pytest.mark.parametrize(("many", "others"), [(0, 0), (1, 2), (2, 1)])
def test_unequal_or_no_texts_are_refused(function, many, others):
    message = f"predictions, references must be equally many, at least one, got {many}, {others}"
    with pytest.raises(ValueError, match=message):
        function(["A"] * many, ["A"] * others)


def test_sari_refuses_unequal_or_no_texts():
    message = "sources, predictions, references must be equally many, at least one, got 1, 2, 1"
    with pytest.raises(ValueError, match=message):
        sari(["a"], ["a", "b"], ["a"])
    with pytest.raises(ValueError, match="got 0, 0, 0"):
        sari([], [], [])


def test_sari_refuses_an_example_without_reference():
    message = "references must hold one or more texts each, got none at 1"
    with pytest.raises(ValueError, match=message):
        sari(["a", "a"], ["a", "a"], [["a"], []])


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        # 2 of 4 predicted and 2 of 3 expected words.
        ("a b c. d", "a c. e", 2 * (1 / 2) * (2 / 3) / (1 / 2 + 2 / 3)),
        # Sets: a word counts once.
        ("the the the", "the", 1),
        # "a" and "b" are both LCS of "a b" and "b a". The rule for ties takes "b", the last word
        # of the reference, so that "a" is new and a second "b" is not.
        ("b a. a", "a b", 1),
        ("b a. b", "a b", 1 / 2),
        # A piece of white space after the last point is a word: P = 1/2, R = 1.
        ("a. ", "a.", 2 / 3),
        # An order that differs breaks a sentence, and not the order of sentences.
        ("c b a", "a b c", 1 / 3),
        ("c. b. a", "a. b. c", 1),
        ("A", "a", 0),
        ("...", "a", 0),
        ("a", "...", 0),
    ],
)
def test_rouge_l_of_sentences_worked_out_by_hand(prediction, reference, expected):
    found = rouge_l([prediction], [reference])
    assert found == pytest.approx(100 * expected, rel=1e-7)


def test_rouge_l_of_the_same_text_is_below_100_by_the_published_constant():
    assert rouge_l(["a"], ["a"]) == 100 * 2 / (2 + 1e-8) < 100


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("The CAT, sat", "the cat", 2 * 2 / 5),
        ("a. b", "a b", 1),
        # Umlauts split words: "gr", "e" against "gr", "n".
        ("Größe", "Grün", 1 / 2),
        ("支持", "支持", 0),
        ("c b a", "a b c", 1 / 3),
    ],
)
def test_rouge_l_of_whole_texts_worked_out_by_hand(prediction, reference, expected):
    assert rouge_l([prediction], [reference], "rouge_score") == pytest.approx(100 * expected)


def test_longest_common_subsequence_agrees_with_the_table():
    def by_table(first, second):
        row = [0] * (len(second) + 1)
        for item in first:
            above = row[:]
            for j, other in enumerate(second):
                row[j + 1] = above[j] + 1 if item == other else max(above[j + 1], row[j])
        return row[-1]

    texts = ["", "a", "abcbdab", "bdcaba", "aaaa", "xmjyauz", "mzjawxu", "ab" * 40, "ba" * 35]
    for first in texts:
        for second in texts:
            assert lcs_length(first, second) == by_table(first, second), (first, second)


@pytest.mark.parametrize(
    ("prediction", "reference", "difflib", "rapidfuzz"),
    [
        ("abcd", "bcde", 75, 75),
        # difflib takes the longest block, abc, before which nothing is left; pqrs is longer.
        ("pqrsabc", "abcpxqyrzs", round(600 / 17), round(800 / 17)),
        # Halves round to the even neighbour: 12.5 and 37.5.
        ("q", "q" + "-" * 14, 12, 12),
        ("abc", "abc" + "-" * 10, 38, 38),
        ("<NUM_LIT>", "0", 100, 100),
        ("<NUM_LIT:42>", "42", 100, 100),
        ("x<STR_LIT>y<CHAR_LIT>", "xy", 100, 100),
        ("<STR_LIT:ab>", "<CHAR_LIT:ab>", 100, 100),
        ("<STR_LIT:a\nb>", "a\nb", 100, 100),
        ("<STR_LIT:>x", "x", 100, 100),
        # Empty once the placeholder is gone, even on both sides.
        ("<STR_LIT>", "<STR_LIT>", 0, 0),
        ("<STR_LIT>", "x", 0, 0),
        ("ab", "cd", 0, 0),
    ],
)
def test_edit_similarity_worked_out_by_hand(prediction, reference, difflib, rapidfuzz):
    assert edit_similarity([prediction], [reference]) == difflib
    assert edit_similarity([prediction], [reference], "rapidfuzz") == rapidfuzz


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (rouge_l, "variant must be one of rouge, rouge_score, got 'bleu'"),
        (edit_similarity, "variant must be one of difflib, rapidfuzz, got 'bleu'"),
    ],
    ids=["rouge_l", "edit_similarity"],
)
def test_unknown_variant_lists_the_known_ones(function, message):
    with pytest.raises(ValueError, match=message):
        function(["a"], ["a"], variant="bleu")


def test_sari_worked_out_by_hand():
    # keep a: 1, delete b: 1, add c for d: 0; pairs the same with 0 / 0 = 1; then all 1.
    assert sari(["a b"], ["a c"], ["a d"]) == pytest.approx(100 * 10 / 12)


def test_sari_is_that_of_the_example_in_its_documentation():
    source = "About 95 species are currently accepted ."
    references = [
        "About 95 species are currently known .",
        "About 95 species are now accepted .",
        "95 species are now accepted .",
    ]
    found = sari([source], ["About 95 you now get in ."], [references])
    assert found == pytest.approx(26.953601953601954)


def test_sari_takes_one_text_for_a_list_of_one():
    arguments = ["a b c", "b d"], ["a c", "d"]
    assert sari(*arguments, ["a", "d e"]) == sari(*arguments, [["a"], ["d e"]])


@pytest.mark.parametrize(
    ("task", "name", "variant"),
    [
        ("C-STANCE", "letter_accuracy", "accuracy (first letter of ABC found)"),
        ("FOMC", "letter_accuracy", "accuracy (first letter of ABC found)"),
        ("MeetingBank", "rouge_l", "ROUGE-L (rouge 1.0.1, summary level)"),
        ("Py150", "edit_similarity", "edit similarity (fuzz.ratio, difflib)"),
        ("ScienceQA", "first_letter_accuracy", "accuracy (first character)"),
        ("NumGLUE-cm", "numeric_accuracy_published", "accuracy (last number, no sympy)"),
        ("NumGLUE-ds", "numeric_accuracy_published", "accuracy (last number, no sympy)"),
        ("20Minuten", "sari", "SARI (huggingface evaluate, 13a, source = whole prompt)"),
        ("topic", "prefix_accuracy", "accuracy (answer begins with the gold)"),
    ],
)
def test_each_task_has_its_scorer_and_variant(task, name, variant):
    scorer = scorer_for(task)
    assert scorer is SCORERS[name]
    assert (scorer.name, scorer.variant) == (name, variant)


def test_variants_are_chosen_for_the_tasks_that_have_them():
    chosen = {"rouge": "rouge_score", "similarity": "rapidfuzz"}
    assert scorer_for("MeetingBank", **chosen).variant == "ROUGE-L (rouge-score, no stemmer)"
    assert scorer_for("Py150", **chosen).variant == "edit similarity (fuzz.ratio, rapidfuzz)"
    assert scorer_for("FOMC", **chosen) is scorer_for("FOMC")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rouge": "bleu"}, "rouge must be one of rouge, rouge_score, got 'bleu'"),
        ({"similarity": "x"}, "similarity must be one of difflib, rapidfuzz, got 'x'"),
    ],
    ids=["rouge", "similarity"],
)
def test_scorer_for_refuses_unknown_variants_for_every_task(settings, message):
    with pytest.raises(ValueError, match=message):
        scorer_for("FOMC", **settings)


UNIFORM = {
    # Of the predictions "B 60", "abcd" for the gold answers "B 6", "bcde".
    "prefix_accuracy": 50.0,
    "exact_accuracy": 0.0,
    # "A", the first label in "abcd", is not "bcde", and "B" is too short for "B 6".
    "letter_accuracy": 0.0,
    "first_letter_accuracy": 50.0,
    "numeric_accuracy": 0.0,
    "numeric_accuracy_published": 0.0,
    # One of two words, then none.
    "rouge_l": pytest.approx(25.0),
    "rouge_l_rouge_score": pytest.approx(25.0),
    # 6 of 7 characters are 86, and 75.
    "edit_similarity": 80.5,
    "edit_similarity_rapidfuzz": 80.5,
}


@pytest.mark.parametrize("name", UNIFORM)
def test_scorers_take_prompts_predictions_and_references(name):
    found = SCORERS[name].function(["p", "q"], ["B 60", "abcd"], ["B 6", "bcde"])
    assert found == UNIFORM[name]


def test_sari_scorer_takes_the_prompt_as_source():
    assert set(SCORERS) == {*UNIFORM, "sari"}
    assert SCORERS["sari"].function(["a b"], ["a c"], ["a d"]) == pytest.approx(100 * 10 / 12)


def test_scorers_are_frozen_and_known_by_their_names():
    assert all(isinstance(s, Scorer) and s.name == name for name, s in SCORERS.items())
    assert len({scorer.variant for scorer in SCORERS.values()}) == len(SCORERS)
    with pytest.raises(AttributeError):
        SCORERS["sari"].name = "x"


def test_scorers_import_only_the_standard_library():
    for path in Path(scorers.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names.append(node.module)
            assert {name.split(".")[0] for name in names} <= sys.stdlib_module_names, path

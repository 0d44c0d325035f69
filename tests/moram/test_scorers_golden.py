"""The scorers against numbers of the reference packages, in fixtures/scorers.json.

The file was written by fixtures/make_scorers.py, which names packages and versions.
"""

import json
from pathlib import Path

import pytest
from fixtures.make_scorers import long_texts

from moram.continual.scorers import edit_similarity, rouge_l, sari
from moram.continual.scorers.sari import tokens

PATH = Path(__file__).parent / "fixtures" / "scorers.json"
GOLDEN = json.loads(PATH.read_text(encoding="utf-8"))
# The packages add and divide in another order; nothing else may differ.
CLOSE = {"rel": 1e-12, "abs": 1e-9}


@pytest.mark.parametrize("variant", ["rouge", "rouge_score"])
def test_rouge_l_of_each_pair_is_the_package_s(variant):
    for prediction, reference, rouge, rouge_score in GOLDEN["rouge"]:
        expected = rouge if variant == "rouge" else rouge_score
        found = rouge_l([prediction], [reference], variant)
        assert found == pytest.approx(expected, **CLOSE), (prediction, reference)


@pytest.mark.parametrize("case", GOLDEN["rouge_long"], ids=lambda case: f"{case[1]}-words")
def test_rouge_l_of_thousands_of_words_is_the_package_s(case):
    *spec, rouge, rouge_score = case
    texts = [[text] for text in long_texts(*spec)]
    assert rouge_l(*texts) == pytest.approx(rouge, **CLOSE)
    assert rouge_l(*texts, "rouge_score") == pytest.approx(rouge_score, **CLOSE)


def test_rouge_l_of_all_pairs_is_their_mean():
    predictions, references, scores, _ = zip(*GOLDEN["rouge"], strict=True)
    assert rouge_l(predictions, references) == pytest.approx(sum(scores) / len(scores), **CLOSE)


@pytest.mark.parametrize("variant", ["difflib", "rapidfuzz"])
def test_edit_similarity_of_each_pair_is_the_package_s_integer(variant):
    for prediction, reference, difflib, rapidfuzz in GOLDEN["similarity"]:
        expected = difflib if variant == "difflib" else rapidfuzz
        found = edit_similarity([prediction], [reference], variant)
        assert found == expected, (prediction, reference)


def test_sari_of_each_example_is_the_package_s():
    for source, prediction, references, expected in GOLDEN["sari"]:
        found = sari([source], [prediction], [references])
        assert found == pytest.approx(expected, **CLOSE), (source, prediction, references)


def test_sari_of_all_examples_is_their_mean():
    sources, predictions, references, scores = zip(*GOLDEN["sari"], strict=True)
    expected = sum(scores) / len(scores)
    assert sari(sources, predictions, references) == pytest.approx(expected, **CLOSE)


def test_tokens_are_those_of_sacrebleu_13a():
    for text, expected in GOLDEN["tokens"]:
        assert " ".join(tokens(text)) == expected, text


def test_the_golden_texts_tell_the_variants_apart():
    assert any(abs(a - b) > 1 for *_, a, b in GOLDEN["rouge"])
    assert any(a != b for *_, a, b in GOLDEN["similarity"])
    assert any("ü" in text for text, *_ in GOLDEN["rouge"])
    assert any("政" in text for text, *_ in GOLDEN["rouge"])

"""What a run over image domains computes and writes, for every method that X-TAIL takes."""

import csv
import json
import math
from statistics import mean

import numpy as np
import pytest
import torch
from choices import DRAWN, TRAINED, Choices, answers_of, assert_same_answers
from PIL import Image
from tiny_models import assert_equal
from xtail_support import (
    DOMAINS,
    NAMES,
    REFUSED,
    ROWS,
    STEPS,
    TAKEN,
    TEMPLATES,
    TEST,
    answers,
    run,
    steps_of,
    tiny_clip,
    tokenize,
    write_domains,
)

import moram
from moram import adapters
from moram.layers import Adapter
from moram.methods import METHODS
from moram.models.clip import MEAN, STD, Clip

# RAIL learns without steps.
NO_STEPS = ("zero-shot", "rail-primal", "rail-dual")
# 4, 3 and 2 classes of 4 test images each.
TESTS, TRUTH = [16, 12, 8], [[0, 1, 2, 3], [4, 5, 6], [7, 8]]
every_method = pytest.mark.parametrize("method", TAKEN)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_domains(tmp_path_factory.mktemp("domains"))


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """The folder and the results of a method's run, made when first asked for."""
    found, root = {}, tmp_path_factory.mktemp("runs")

    def get(method):
        if method not in found:
            clip = CountingClip()
            results = run(data, root / method, method, clip=clip)
            found[method] = root / method, results, clip
        return found[method]

    return get


class CountingClip(Clip):
    """A tiny CLIP that notes how many texts and images it encodes while nothing is trained."""

    def __init__(self):
        clip = tiny_clip()
        super().__init__(clip.model, clip.tokenize, clip.preprocess)
        self.texts, self.images = [], []

    def encode_text(self, ids):
        if not torch.is_grad_enabled():
            self.texts.append(len(ids))
        return super().encode_text(ids)

    def encode_image(self, pixels):
        if not torch.is_grad_enabled():
            self.images.append(len(pixels))
        return super().encode_image(pixels)


def final_state(out):
    """All that is needed to go on, without what depends on the clock."""
    state = torch.load(out / "state.pt", weights_only=True)
    return state["adapters"], state["method"]


def all_answers(out):
    return {path.name: json.loads(path.read_text()) for path in (out / "predictions").iterdir()}


def by_hand(matrix):
    """The four scores of R from their formulas."""
    count = len(matrix)
    early = [mean(matrix[t][i] for t in range(i)) for i in range(1, count)]
    best = [max(matrix[t][i] for t in range(i, count)) for i in range(count - 1)]
    drops = [top - matrix[-1][i] for i, top in enumerate(best)]
    return {
        "transfer": mean(early),
        "average": mean(score for row in matrix for score in row),
        "last": mean(matrix[-1]),
        "forgetting": mean(drops),
    }


def classify_by_hand(clip, data, stage):
    """Answers of a CLIP to all test images, from the files up, named as those of a stage."""
    prompts = [
        TEMPLATES.get(name, "a photo of a {}.").format(text)
        for name in NAMES
        for text in DOMAINS[name]
    ]
    shift, scale = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    found = {}
    with torch.no_grad():
        texts = clip.model.encode_text(tokenize(prompts))
        texts = texts / texts.norm(dim=1, keepdim=True)
        for i, name in enumerate(NAMES):
            paths = [
                f"{data}/{name}/test/{text}/{n}.png" for text in DOMAINS[name] for n in range(TEST)
            ]
            # At the model's size already: nothing is resized or cropped.
            images = [np.array(Image.open(path).convert("RGB")) for path in paths]
            pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255
            features = clip.model.encode_image((pixels - shift) / scale)
            best = (features @ texts.T).argmax(1)
            found[f"results-{stage}-{i}-{name}.json"] = best.tolist()
    return found


def test_every_method_is_either_taken_or_refused():
    assert set(TAKEN) | set(REFUSED) == set(METHODS)
    assert {"moram", "codyra", "moe-adapters", "rail-primal", "zero-shot"} <= set(TAKEN)


@every_method
def test_a_run_fills_the_whole_matrix(finished, method):
    _, results, _ = finished(method)
    rows = ROWS.get(method, 3)
    assert results["complete"] and results["tasks"] == list(NAMES)
    assert [len(row) for row in results["matrix"]] == [3] * rows
    assert all(0 <= score <= 100 for row in results["matrix"] for score in row)
    stages = {"zero-shot": [[]], "joint": [list(NAMES)]}
    assert results["stages"] == stages.get(method, [[name] for name in NAMES])
    assert results["classes"] == [4, 3, 2] and results["test_images"] == TESTS
    assert results["trained_with_steps"] == (method not in ("rail-primal", "rail-dual"))


@every_method
def test_scores_are_those_of_the_stored_answers_and_labels(finished, method):
    out, results, _ = finished(method)
    stages = [*range(len(results["matrix"]))]
    scores = [*results["matrix"]]
    if results["untrained"] is not None:
        stages, scores = ["untrained", *stages], [results["untrained"], *scores]
    names = {f"results-{n}-{i}-{name}.json" for n in stages for i, name in enumerate(NAMES)}
    assert set(all_answers(out)) == names
    for number, row in zip(stages, scores, strict=True):
        for i in range(3):
            found = answers(out, number, i)
            assert found["labels"] == [label for label in TRUTH[i] for _ in range(TEST)]
            assert all(0 <= answer < 9 for answer in found["results"])
            right = np.mean(np.array(found["results"]) == np.array(found["labels"]))
            assert row[i] == pytest.approx(100 * right)


@every_method
def test_the_summary_is_worked_out_by_hand_from_the_matrix(finished, method):
    _, results, _ = finished(method)
    (row, *_) = results["matrix"]
    expected = {"last": mean(row)}
    if method == "zero-shot":
        expected |= {"transfer": mean(row[1:]), "average": mean(row), "forgetting": 0.0}
    elif method != "joint":
        expected = by_hand(results["matrix"])
    assert results["summary"] == pytest.approx(expected)


@every_method
def test_tables_and_picture_hold_what_results_hold(finished, method):
    out, results, _ = finished(method)
    assert json.loads((out / "results.json").read_text()) == results
    with open(out / "table.csv", newline="", encoding="utf-8") as file:
        sheet = list(csv.reader(file))
    row = dict(zip(sheet[0], sheet[1], strict=True))
    cells = []
    for title in ("Transfer", "Average", "Last", "Forgetting"):
        number = results["summary"].get(title.lower())
        cells.append("-" if number is None else f"{number:.1f}")
        assert row[title] == cells[-1], title
    markdown = (out / "table.md").read_text(encoding="utf-8")
    assert f"| {results['name']} | 1 | {' | '.join(cells)} |" in markdown
    assert f"{results['name']} & 1 & {' & '.join(cells)} &" in (out / "table.tex").read_text()
    for scores in results["matrix"]:
        assert f"| {' | '.join(f'{score:.1f}' for score in scores)} |\n" in markdown
    assert "among all 9 classes" in markdown
    with Image.open(out / "matrix.png") as image:
        image.load()
        assert len(set(image.convert("L").resize((64, 64)).tobytes())) > 10


@every_method
def test_the_untrained_row_is_zero_shot(finished, method):
    (expected,) = finished("zero-shot")[1]["matrix"]
    assert finished(method)[1]["untrained"] == (None if method == "zero-shot" else expected)


def test_zero_shot_answers_are_those_of_the_plain_model(finished, data):
    out, _, _ = finished("zero-shot")
    with Choices(DRAWN) as choices:
        expected = classify_by_hand(tiny_clip(), data, 0)
    assert choices.made and not choices.unclear
    assert answers_of(out) == expected
    assert len({answer for row in expected.values() for answer in row}) > 3
    assert not (out / "adapters").exists() and not (out / "steps.csv").exists()


def test_the_last_answers_are_those_of_the_saved_adapters_in_a_fresh_model(finished, data):
    out, _, _ = finished("moram")
    clip = tiny_clip()
    moram.load(clip.model, out / "adapters")
    clip.model.eval()
    with Choices(TRAINED) as choices:
        expected = classify_by_hand(clip, data, 2)
    found = {name: row for name, row in answers_of(out).items() if name in expected}
    assert_same_answers(found, expected, choices)
    assert found != classify_by_hand(tiny_clip(), data, 2)


@pytest.mark.parametrize("method", ["rail-primal", "rail-dual"])
def test_rail_transfers_exactly_as_zero_shot_does(finished, method):
    _, zero, _ = finished("zero-shot")
    _, results, _ = finished(method)
    assert results["summary"]["transfer"] == zero["summary"]["transfer"] > 0
    for t, row in enumerate(results["matrix"]):
        assert row[t + 1 :] == zero["matrix"][0][t + 1 :]
    assert results["summary"]["last"] > 2 * zero["summary"]["last"], "something must be learned"


@pytest.mark.parametrize(
    "method", [m for m in TAKEN if m not in NO_STEPS and ROWS.get(m, 3) == 3 and m != "codyra"]
)
def test_training_changes_answers_above_the_diagonal_too(finished, method):
    out, _, _ = finished(method)
    losses = [float(loss) for stage, _, loss, _ in steps_of(out) if stage == "0"]
    assert losses[-1] < losses[0]
    before = [answers(out, "untrained", i)["results"] for i in range(3)]
    assert [answers(out, 0, i)["results"] for i in range(3)] != before


@every_method
def test_prompts_are_encoded_once_a_stage(finished, method):
    _, results, clip = finished(method)
    rows = len(results["matrix"]) + (results["untrained"] is not None)
    # MoE-Adapters: once without experts, and once for each task so far.
    expected = 1 + 2 + 3 + 4 if method == "moe-adapters" else rows
    assert [count for count in clip.texts if count == 9] == [9] * expected
    # InfLoRA passes over a task's images, with the prompts of its classes; LADA keeps these.
    assert set(clip.texts) == ({9, 2, 3, 4} if method in ("inf-lora", "lada") else {9})


@pytest.mark.parametrize("method", [m for m in TAKEN if m != "moe-adapters"])
def test_test_images_are_encoded_once_a_stage_or_once_where_features_are_frozen(finished, method):
    _, results, clip = finished(method)
    rows = len(results["matrix"]) + (results["untrained"] is not None)
    # In the run of RAIL, 3 training images of each of the 9 classes are encoded too, once.
    special = {"zero-shot": 36, "rail-primal": 36 + 27, "rail-dual": 36 + 27}
    # InfLoRA and LADA pass over them before and after each task.
    special |= {"inf-lora": rows * 36 + 2 * 27, "lada": 36 + 2 * 27}
    assert sum(clip.images) == special.get(method, rows * 36)


@pytest.mark.parametrize(
    "method", ["moram", "lora", "codyra", "moe-adapters", "dac", "lada", "rail-primal"]
)
def test_equal_seeds_give_equal_runs_bit_for_bit(finished, data, tmp_path, method):
    out, results, _ = finished(method)
    again = run(data, tmp_path / "again", method)
    assert again["matrix"] == results["matrix"]
    assert all_answers(tmp_path / "again") == all_answers(out)
    assert_equal(final_state(tmp_path / "again"), final_state(out))
    other = run(data, tmp_path / "other", method, seed=1)
    assert other["complete"]
    with pytest.raises(AssertionError):
        assert_equal(final_state(tmp_path / "other"), final_state(out))
    if method != "rail-primal":
        assert steps_of(tmp_path / "again") == steps_of(out) != steps_of(tmp_path / "other")


@pytest.mark.parametrize(
    "changes",
    [{"cache_gib": 0.0}, {"workers": 2}, {"cache_gib": 0.0, "workers": 2}],
    ids=["no-cache", "two-workers", "both"],
)
@pytest.mark.parametrize("method", ["moram", "rail-primal", "joint"])
def test_neither_cache_nor_workers_change_a_number(finished, data, tmp_path, method, changes):
    out, _, _ = finished(method)
    run(data, tmp_path / "out", method, **changes)
    assert all_answers(tmp_path / "out") == all_answers(out)
    assert_equal(final_state(tmp_path / "out"), final_state(out))


def test_steps_have_the_rate_of_half_a_cosine_from_the_peak(finished):
    out, _, _ = finished("lora")
    steps = steps_of(out)
    places = [[str(stage), str(step)] for stage in range(3) for step in range(STEPS)]
    assert [row[:2] for row in steps] == places
    rates = [0.005 * (1 + math.cos(math.pi * step / 6)) for step in range(STEPS)] * 3
    assert [float(row[3]) for row in steps] == pytest.approx(rates, rel=1e-4)


def test_costs_count_what_each_task_trained_and_stored(finished):
    _, results, clip = finished("moram")
    # 2 blocks of 6 projections in either tower, all of width 32 but for the MLP's 128.
    numbers = 2 * 2 * (4 * 2 * (32 + 32) + 2 * 2 * (32 + 128))
    assert [cost["trained"] for cost in results["costs"]] == [numbers] * 3
    assert [cost["stored_bytes"] for cost in results["costs"]] == [
        4 * numbers * n for n in (1, 2, 3)
    ]
    assert len(adapters(clip.model, Adapter)) == 2 * 2 * 6

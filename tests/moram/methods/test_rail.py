"""RAIL: the recursion and the kernel against solutions at once by numpy, and the fusion."""

import io
import itertools
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moram.methods.rail import RAILDual, RAILPrimal, fuse
from moram.methods.zero_shot import ZeroShot

SIZE, WIDTH, SEED = 13, 61, 5
COUNTS, EXAMPLES = (3, 1, 4), (23, 5, 16)
OFFSETS, CLASSES = (0, 3, 4), 8
# Batches of 7 leave an incomplete one in every task: 23 = 3 * 7 + 2, 5, 16 = 2 * 7 + 2.
PRIMAL = {"width": WIDTH, "batch": 7, "seed": SEED}
FORMS = {"primal": lambda: RAILPrimal(**PRIMAL), "dual": RAILDual}
every_form = pytest.mark.parametrize("form", FORMS)


@dataclass
class FakeStage:
    """A task's features and local labels, read in batches."""

    vectors: torch.Tensor
    labels: torch.Tensor
    offset: int
    count: int

    def features(self, size):
        yield from zip(self.vectors.split(size), self.labels.split(size), strict=True)


@dataclass
class FakeImages:
    vectors: torch.Tensor

    def features(self):
        return self.vectors


@dataclass
class FakeClip:
    """Prompts are rows of a table of unit text features."""

    table: torch.Tensor
    scale: float = 20.0

    def encode_text(self, prompts):
        return self.table[prompts]

    def logits(self, images, texts):
        return self.scale * images @ texts.T


def unit(rows, seed):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, SIZE, generator=generator), dim=-1)


def stages(order=(0, 1, 2)):
    """The three tasks in some order; a task's examples are the same wherever it stands."""
    found, offset = [], 0
    for task in order:
        labels = torch.arange(EXAMPLES[task]) % COUNTS[task]
        found.append(FakeStage(unit(EXAMPLES[task], task), labels, offset, COUNTS[task]))
        offset += COUNTS[task]
    return found


def learn(method, found=None, start=0):
    model = nn.Linear(2, 2)
    method.setup(model)
    for index, stage in enumerate(stages() if found is None else found, start):
        method.end_task(model, index, stage)
    return method


def stacked(found):
    """All features and one-hot labels [N, C] of some stages, by numpy in float64."""
    features = np.concatenate([stage.vectors.double().numpy() for stage in found])
    labels = np.concatenate([stage.labels.numpy() + stage.offset for stage in found])
    return features, np.eye(sum(stage.count for stage in found))[labels]


def random_layer():
    """The layer as the docstring describes it: uniform within 1 / sqrt(E), from the seed."""
    draws = torch.rand(
        SIZE, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(SEED)
    )
    return (2 * draws.numpy() - 1) / np.sqrt(SIZE)


def rbf(x, y, gamma=0.1):
    return np.exp(-gamma * ((x[:, None] - y[None]) ** 2).sum(-1))


def scores(method, features, clip, classes=CLASSES):
    return method.classifier(clip, torch.arange(classes))(FakeImages(features))


def assert_near(found, expected, tolerance=1e-10):
    np.testing.assert_allclose(np.asarray(found), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("batch", [1, 7, 128])
def test_recursion_equals_the_joint_ridge_solved_at_once(batch):
    method = learn(RAILPrimal(**PRIMAL | {"batch": batch}))
    features, targets = stacked(stages())
    inputs = np.maximum(features @ random_layer(), 0)
    # Ridge as least squares: sqrt(ridge) I stacked below the inputs.
    system = np.concatenate([inputs, np.sqrt(0.1) * np.eye(WIDTH)])
    rows = np.concatenate([targets, np.zeros((WIDTH, CLASSES))])
    expected = np.linalg.lstsq(system, rows, rcond=None)[0]
    assert_near(method.coefficients, expected)
    assert_near(method.inverse, np.linalg.inv(inputs.T @ inputs + 0.1 * np.eye(WIDTH)))
    queries, method.fusion = unit(31, 91), 1.0
    expected = np.maximum(queries.double().numpy() @ random_layer(), 0) @ expected
    assert_near(scores(method, queries, FakeClip(unit(CLASSES, 90))), expected)


def test_first_task_alone_equals_its_ridge():
    method = learn(RAILPrimal(**PRIMAL, ridge=2.0), stages()[:1])
    features, targets = stacked(stages()[:1])
    inputs = np.maximum(features @ random_layer(), 0)
    expected = np.linalg.solve(inputs.T @ inputs + 2 * np.eye(WIDTH), inputs.T @ targets)
    assert_near(method.coefficients, expected)


@every_form
def test_order_of_tasks_does_not_matter(form):
    clip, features = FakeClip(unit(CLASSES, 90)), unit(31, 91)
    found = []
    for order in itertools.permutations(range(3)):
        method = learn(FORMS[form](), stages(order))
        # All classes are learned: with fusion 1 the scores are the regression's.
        method.fusion = 1.0
        parts = scores(method, features, clip).split([COUNTS[task] for task in order], dim=1)
        found.append(torch.cat([parts[order.index(task)] for task in range(3)], 1))
    assert found[0].isfinite().all() and found[0].std() > 0.1
    for other in found[1:]:
        assert_near(other, found[0].numpy())


def test_dual_equals_kernel_ridge_in_closed_form():
    method = learn(RAILDual(gamma=0.7, ridge=0.01, fusion=1.0))
    features, targets = stacked(stages())
    kernel = rbf(features, features, 0.7) + 0.01 * np.eye(len(features))
    queries = unit(31, 91)
    expected = rbf(queries.double().numpy(), features, 0.7) @ np.linalg.solve(kernel, targets)
    assert_near(scores(method, queries, FakeClip(unit(CLASSES, 90))), expected)


def test_dual_with_a_linear_kernel_equals_the_primal_ridge():
    class Linear(RAILDual):
        def _kernel(self, x, y):
            return x @ y.T

    method = learn(Linear(ridge=0.05, fusion=1.0))
    features, targets = stacked(stages())
    system = features.T @ features + 0.05 * np.eye(SIZE)
    queries = unit(31, 91)
    expected = queries.double().numpy() @ np.linalg.solve(system, features.T @ targets)
    assert_near(scores(method, queries, FakeClip(unit(CLASSES, 90))), expected)


@pytest.mark.parametrize("make", [lambda **d: RAILPrimal(**PRIMAL, **d), RAILDual])
def test_float32_scores_are_near_those_of_float64(make):
    clip, queries = FakeClip(unit(CLASSES, 90)), unit(31, 91)
    single, double = (scores(learn(make(dtype=d)), queries, clip) for d in ("float32", "float64"))
    assert (single.dtype, double.dtype) == (torch.float32, torch.float64)
    assert_near(single, double.numpy(), 2e-3)


def test_fusion_by_hand_on_three_classes():
    p = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.3, 0.5], [0.5, 0.3, 0.2]], dtype=torch.float64)
    regression = torch.tensor([[-0.1, 0.9], [9.0, 9.0], [-1.0, -2.0]], dtype=torch.float64)
    # Row 0: 0.2 * 0.5 - 0.8 * 0.1 and 0.2 * 0.3 + 0.8 * 0.9. Row 1: zero-shot's answer is not
    # learned. Row 2: padded with zeros, class 2 would win with 0.2 * 0.2.
    inf = float("inf")
    expected = [[0.02, 0.78, -inf], p[1].log().tolist(), [-0.7, -1.54, -inf]]
    found = fuse(p.log(), regression, 0.8)
    assert_near(found, expected, 1e-15)
    assert found.argmax(1).tolist() == [1, 2, 0]


def test_ties_of_a_rounded_softmax_do_not_change_an_unlearned_answer():
    logits = torch.tensor([[0.0, 1e-9, 2e-9]])
    assert logits.softmax(1).unique().numel() == 1
    assert fuse(logits, torch.tensor([[5.0]]), 0.8).argmax(1).item() == 2


@every_form
@pytest.mark.parametrize("regression", ["learned", "negative", "positive"])
def test_transfer_is_exactly_zero_shots(form, regression):
    table = unit(CLASSES, 90)
    # Two unlearned classes of one text: zero-shot's ties must stay as they are.
    table[7] = table[6]
    clip, queries = FakeClip(table), unit(500, 91)
    labels = torch.randint(CLASSES, (500,), generator=torch.Generator().manual_seed(92))
    before = scores(ZeroShot(), queries, clip).argmax(1)
    method, seen = FORMS[form](), []
    for done, stage in enumerate(stages()[:2]):
        learn(method, [stage], done)
        learned = stage.offset + stage.count
        if regression != "learned":
            method.coefficients.fill_(-1e3 if regression == "negative" else 1e3)
        answers = scores(method, queries, clip).argmax(1)
        for offset, count in list(zip(OFFSETS, COUNTS, strict=True))[done + 1 :]:
            own = (labels >= offset) & (labels < offset + count)
            seen.append(((answers == labels)[own].sum(), (before == labels)[own].sum()))
        outside = before >= learned
        assert outside.any() and torch.equal(answers[outside], before[outside])
        assert (answers[~outside] < learned).all()
    assert len(seen) == 3 and all(right == expected > 0 for right, expected in seen)


@every_form
def test_answers_in_learned_classes_follow_the_regression(form):
    found = stages()[:1]
    features, labels = found[0].vectors, found[0].labels
    clip = FakeClip(unit(CLASSES, 90))
    before = scores(ZeroShot(), features, clip).argmax(1)
    answers = scores(learn(FORMS[form](), found), features, clip).argmax(1)
    inside = before < COUNTS[0]
    assert (before != labels)[inside].any()
    assert torch.equal(answers[inside], labels[inside])


@every_form
def test_before_the_first_task_scores_are_zero_shots(form):
    clip, queries = FakeClip(unit(CLASSES, 90)), unit(31, 91)
    method = FORMS[form]()
    assert torch.equal(scores(method, queries, clip), scores(ZeroShot(), queries, clip))
    assert method.state_dict() == {} and method.stored_bytes(nn.Linear(2, 2)) == 0


@every_form
@pytest.mark.parametrize("done", [0, 1, 2, 3])
def test_state_saved_after_any_task_resumes_bit_for_bit(form, done):
    clip, queries = FakeClip(unit(CLASSES, 90)), unit(31, 91)
    whole, file = learn(FORMS[form](), stages()[:done]), io.BytesIO()
    torch.save(whole.state_dict(), file)
    file.seek(0)
    # What it learned before the state is loaded must be gone.
    resumed = learn(FORMS[form](), stages((2, 1, 0)))
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(scores(resumed, queries, clip), scores(whole, queries, clip))
    learn(whole, stages()[done:], done)
    learn(resumed, stages()[done:], done)
    assert torch.equal(scores(resumed, queries, clip), scores(whole, queries, clip))
    mine, theirs = resumed.state_dict(), whole.state_dict()
    assert list(mine) == list(theirs) and len(mine) == 3
    for key, value in mine.items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(theirs[key]))


@every_form
def test_learning_on_does_not_change_a_state_taken_before(form):
    method = learn(FORMS[form](), stages()[:1])
    state = method.state_dict()
    copies = {key: torch.as_tensor(value).clone() for key, value in state.items()}
    learn(method, stages()[1:], 1)
    assert all(torch.equal(torch.as_tensor(state[key]), copies[key]) for key in copies)


@pytest.mark.parametrize(
    "method, expected",
    [
        (RAILPrimal(**PRIMAL), 61 * 61 * 8 + 61 * 8 * 8),
        (RAILPrimal(**PRIMAL, dtype="float32"), 61 * 61 * 4 + 61 * 8 * 4),
        # 44 features of 13 numbers in float32, as they came, and 44 labels.
        (RAILDual(), 44 * 13 * 4 + 44 * 8),
    ],
    ids=["primal", "primal-float32", "dual"],
)
def test_stored_bytes_are_those_of_the_tensors_to_keep(method, expected):
    assert learn(method).stored_bytes(nn.Linear(2, 2)) == expected


@every_form
def test_setup_freezes_the_model(form):
    model = nn.Linear(2, 2)
    method = FORMS[form]()
    method.setup(model)
    assert not any(p.requires_grad for p in model.parameters())
    assert (method.has_steps, method.has_frozen_features, method.needs_task_id) == (0, 1, 0)


@every_form
def test_a_task_out_of_order_or_with_foreign_labels_is_refused_and_changes_nothing(form):
    method = learn(FORMS[form](), stages()[:1])
    before = method.coefficients.clone()
    with pytest.raises(ValueError, match=r"in order: 3 classes are learned.*begin at 4"):
        learn(method, stages()[2:])
    for wrong in (-1, 1):
        labels = torch.tensor([0] * 9 + [wrong])
        with pytest.raises(ValueError, match=r"labels must be in 0\.\.0, got"):
            learn(method, [FakeStage(unit(10, 7), labels, 3, 1)])
    assert torch.equal(method.coefficients, before) and method.learned == 3


@pytest.mark.parametrize("change", [{"width": 60}, {"seed": 6}, {"dtype": "float32"}])
def test_state_of_other_settings_is_refused(change):
    state = learn(RAILPrimal(**PRIMAL)).state_dict()
    with pytest.raises(ValueError, match=r"state must be of width .*, got width 61, seed 5"):
        RAILPrimal(**PRIMAL | change).load_state_dict(state)


@pytest.mark.parametrize("form", [RAILPrimal, RAILDual])
@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"ridge": 0}, ValueError, "ridge must be finite and > 0, got 0"),
        ({"ridge": float("inf")}, ValueError, "ridge must be finite and > 0, got inf"),
        ({"ridge": float("nan")}, ValueError, "ridge must be finite and > 0, got nan"),
        ({"ridge": "1"}, TypeError, "ridge must be a number, got '1'"),
        ({"fusion": -0.1}, ValueError, r"fusion must be in \[0, 1\], got -0.1"),
        ({"fusion": 1.1}, ValueError, r"fusion must be in \[0, 1\], got 1.1"),
        ({"fusion": True}, TypeError, "fusion must be a number, got True"),
        ({"dtype": "float16"}, ValueError, "dtype must be one of float64, float32, got 'float16'"),
    ],
)
def test_bad_arguments_of_either_form_are_refused(form, arguments, error, message):
    with pytest.raises(error, match=message):
        form(**arguments)


@pytest.mark.parametrize(
    "form, arguments, error, message",
    [
        (RAILPrimal, {"width": 0}, ValueError, "width must be >= 1, got 0"),
        (RAILPrimal, {"width": 2.0}, TypeError, "width must be an integer >= 1, got 2.0"),
        (RAILPrimal, {"batch": 0}, ValueError, "batch must be >= 1, got 0"),
        (RAILPrimal, {"seed": -1}, ValueError, "seed must be >= 0, got -1"),
        (RAILDual, {"gamma": 0.0}, ValueError, "gamma must be finite and > 0, got 0.0"),
        (RAILDual, {"gamma": None}, TypeError, "gamma must be a number, got None"),
    ],
)
def test_bad_arguments_of_one_form_are_refused(form, arguments, error, message):
    with pytest.raises(error, match=message):
        form(**arguments)

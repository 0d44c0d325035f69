"""MoRAM that asks zero-shot first, this project's addition: its answers follow by hand from those
of a run without it."""

import re

import pytest
import torch
from torch import nn
from xtail_support import NAMES, SMALL_ARGS, answers, run, steps_of, write_domains

import moram
from moram.cli import main
from moram.methods import make_method
from moram.xtail.run import Stopped

# Classes learned after each of the three domains.
LEARNED = (4, 7, 9)
ASKED = {"method_args": SMALL_ARGS["moram"] | {"zero_shot_first": True}}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_domains(tmp_path_factory.mktemp("domains"))


@pytest.fixture(scope="module")
def asked(data, tmp_path_factory):
    """A folder with a finished run, and its results."""
    out = tmp_path_factory.mktemp("asked") / "run"
    return out, run(data, out, **ASKED)


class Table(nn.Module):
    """A model that doubles its input, until atoms add to it."""

    def __init__(self):
        super().__init__()
        self.twice = nn.Linear(3, 3, bias=False)
        with torch.no_grad():
            self.twice.weight.copy_(2 * torch.eye(3))


class TableClip:
    """Images are rows of a table; prompts are the axes, whose order the model leaves alone."""

    def __init__(self, model):
        self.model = model

    def encode_text(self, prompts):
        return torch.eye(3)[prompts]

    def logits(self, images, texts):
        return images @ texts.T


class Rows:
    def __init__(self, model, rows):
        self.model, self.rows = model, torch.tensor(rows)

    def features(self):
        return self.model.twice(self.rows)


def test_scores_are_the_adapted_ones_where_zero_shot_answers_with_a_learned_class():
    model = Table()
    settings = {"targets": ("twice",), "threshold": 0.0, "temperature": 1.0, "value_scale": 1.0}
    method = make_method("moram", rank=1, zero_shot_first=True, **settings)
    method.setup(model)
    bank = model.twice.bank
    with torch.no_grad():
        # One atom, whose weight is 1: it adds 3 x_0 to the last axis.
        bank.current_keys.copy_(torch.tensor([[1.0, 0, 0]]))
        bank.current_values.copy_(torch.tensor([[0, 0, 3.0]]))
    images = Rows(model, [[2.0, 1, 0], [1, 2, 0], [1, 0, 2]])
    zero_shot, adapted = [[4.0, 2, 0], [2, 4, 0], [2, 0, 4]], [[4.0, 2, 6], [2, 4, 3], [2, 0, 7]]
    for learned, which in ((0, "zzz"), (1, "azz"), (2, "aaz"), (3, "aaa")):
        method.classes = learned
        scores = method.classifier(TableClip(model), torch.arange(3))(images)
        expected = [{"z": zero_shot, "a": adapted}[w][i] for i, w in enumerate(which)]
        assert torch.equal(scores, torch.tensor(expected))
    # The atoms act again.
    assert torch.equal(images.features(), torch.tensor(adapted))


def test_a_failure_in_between_leaves_the_atoms_at_work():
    method = make_method("moram", rank=1, zero_shot_first=True, targets=("twice",))
    model = Table()
    method.setup(model)

    class Failing:
        def features(self):
            raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        method.classifier(TableClip(model), torch.arange(3))(Failing())
    assert not any(adapter.paused for adapter in moram.adapters(model).values())


def test_answers_follow_from_those_of_a_run_without_it(asked, data, tmp_path):
    out, results = asked
    plain = run(data, tmp_path / "plain")
    # It is trained in the same way.
    assert steps_of(out) == steps_of(tmp_path / "plain")
    assert results["untrained"] == plain["untrained"]
    changed = 0
    for t, learned in enumerate(LEARNED):
        for i in range(len(NAMES)):
            found = answers(out, t, i)["results"]
            without = answers(tmp_path / "plain", t, i)["results"]
            first = answers(out, "untrained", i)["results"]
            assert found == [a if z < learned else z for a, z in zip(without, first, strict=True)]
            changed += found != without
    assert changed
    assert results["matrix"][-1] == plain["matrix"][-1]
    assert results["name"] == "MoRAM, zero-shot first"


def test_a_stopped_run_goes_on_to_the_same_answers(asked, data, tmp_path):
    _, results = asked
    steps = iter(range(100))
    with pytest.raises(Stopped):
        run(data, tmp_path / "run", stop=lambda: next(steps) == 9, **ASKED)
    again = run(data, tmp_path / "run", **ASKED)
    assert again["matrix"] == results["matrix"]


def test_names_say_what_was_added():
    names = {
        "MoRAM": {},
        "MoRAM, protected": {"protect": 0.9},
        "MoRAM, aligned": {"alignment": 0.3},
        "MoRAM, zero-shot first": {"zero_shot_first": True},
        "MoRAM, protected, zero-shot first": {"protect": 0.9, "zero_shot_first": True},
    }
    assert names == {make_method("moram", **more).name: more for more in names.values()}


def test_what_does_not_fit_is_refused(tmp_path, capsys):
    message = "zero_shot_first must be true or false, got 1"
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        make_method("moram", zero_shot_first=1)
    arguments = ["--data", str(tmp_path), "--tasks", "a", "--model", "m"]
    arguments += ["--set", "method_args.zero_shot_first=true", "--out", str(tmp_path / "out")]
    assert main(["trace", "--method", "moram", *arguments]) == 1
    message = "moram trace: moram with these method_args is for CLIP models; see moram xtail\n"
    assert capsys.readouterr().err == message

"""What may change between a stop and going on: no image, and no setting that changes a result."""

import pytest
from xtail_support import picture, run, settings_for, write_domains

from moram.harness.compare import differences
from moram.xtail.plan import XtailPlan
from moram.xtail.run import Stopped
from moram.xtail.settings import make_settings


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_domains(tmp_path_factory.mktemp("data"))


def stopped(data, out, **changes):
    """A run that was stopped in its first task."""
    asked = iter([False] * 5)
    with pytest.raises(Stopped, match="stopped in task"):
        run(data, out, "lora", stop=lambda: next(asked, True), **changes)


def _more_test_images(root):
    path = root / "birds" / "test" / "emu" / "9.png"
    path.write_bytes(picture("birds", 1, "new"))


def _fewer_train_images(root):
    (root / "tools" / "train" / "saw" / "0.png").unlink()


def _another_template(root):
    (root / "birds" / "template.txt").write_text("a painting of the {}.")


def _another_class(root):
    for split in ("train", "test"):
        (root / "fruit" / split / "quince").rename(root / "fruit" / split / "pear")


def _another_image_of_that_name(root):
    next((root / "birds" / "test").rglob("*.png")).write_bytes(picture("fruit", 0, "other"))


@pytest.mark.parametrize("moment", ["before_training", "in_training"])
@pytest.mark.parametrize(
    "change",
    [
        _more_test_images,
        _another_image_of_that_name,
        _fewer_train_images,
        _another_template,
        _another_class,
    ],
)
def test_a_run_does_not_go_on_with_changed_data(tmp_path, change, moment):
    data = tmp_path / "data"
    write_domains(data)
    if moment == "in_training":
        stopped(data, tmp_path / "out")
    else:
        # After the untouched model was scored on one dataset.
        asked = iter([False, True])
        with pytest.raises(Stopped, match="stopped between two tasks"):
            run(data, tmp_path / "out", "lora", stop=lambda: next(asked))
    change(data)
    message = f"the examples in {data} changed since {tmp_path / 'out'} began"
    with pytest.raises(ValueError, match=message):
        run(data, tmp_path / "out", "lora")


def test_images_repaired_in_between_are_changed_data(tmp_path):
    data, out = tmp_path / "data", tmp_path / "out"
    write_domains(data)
    path = next((data / "birds" / "test").rglob("*.png"))
    good = path.read_bytes()
    path.write_bytes(b"")
    stopped(data, out, skip_bad=True)
    path.write_bytes(good)
    with pytest.raises(ValueError, match="changed since"):
        run(data, out, "lora", skip_bad=True)


def test_images_scored_together_count_only_where_they_are_given_to_one_task(data):
    def free(selection):
        own = {"method_args": {"selection": selection}}
        one, other = (
            settings_for(data, "out", "moe-adapters", eval_batch=n, **own) for n in (64, 1)
        )
        return not differences(one, other.to_dict(), XtailPlan.build_method(one).tied)

    assert free("image") and not free("batch")


@pytest.mark.parametrize("seed", [20261125, 2**31])
def test_a_date_may_be_a_seed(data, tmp_path, seed):
    assert run(data, tmp_path / "out", "lora", seed=seed, datasets=("fruit",))["complete"]


def test_the_config_of_a_run_is_a_file_of_settings(data, tmp_path):
    run(data, tmp_path / "out", "lora", datasets=("fruit",))
    again = make_settings(None, files=[tmp_path / "out" / "config.json"])
    assert again == settings_for(data, tmp_path / "out", "lora", datasets=("fruit",))

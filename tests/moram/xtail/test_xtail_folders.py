"""Folders of one's own images: what is read, what is passed over, what cannot be scored."""

import re
import shutil

import numpy as np
import pytest
from PIL import Image
from xtail_data import encoded, jpeg, write_coop, write_folders, write_mnist
from xtail_support import run, settings_for, write_domains

from moram.cli import main
from moram.xtail.data.check_data import check_data
from moram.xtail.data.datasets import load_domain
from moram.xtail.plan import XtailPlan
from moram.xtail.report import REPORT


@pytest.fixture
def birds(tmp_path):
    """A domain of two classes with two training images and one test image each."""
    write_folders(tmp_path, "birds", ["auk", "emu"])
    return tmp_path / "birds"


def checked(root, *names):
    lines = []
    return check_data(root, names, log=lines.append), lines


@pytest.mark.parametrize(
    ("ending", "kind"),
    [
        (".jfif", "JPEG"),
        (".JPE", "JPEG"),
        (".jp2", "JPEG2000"),
        (".tga", "TGA"),
        (".pbm", "PPM"),
        (".ico", "ICO"),
        (".dib", "DIB"),
    ],
)
def test_every_ending_that_pillow_reads_is_an_image(birds, ending, kind):
    image = Image.new("1" if kind == "PPM" else "RGB", (32, 32))
    path = birds / "train" / "auk" / f"more{ending}"
    path.write_bytes(encoded(image, kind))
    domain = load_domain("birds", birds.parent)
    place = domain.train.paths.index(str(path))
    assert domain.train.labels[place] == 0 and domain.train.load(place).size == (32, 32)
    assert domain.passed_over == ()


def pass_over(birds):
    """Put into a domain's folder what is not read; returns it in the order of its names."""
    (birds / "train" / "auk" / "notes.txt").write_text("no image")
    (birds / "train" / "auk" / "clip.mpg").write_bytes(b"no image")
    (birds / "train" / "emu" / "more").mkdir()
    (birds / "train" / "emu" / "more" / "9.jpg").write_bytes(jpeg(0, 1))
    (birds / "train" / "emu" / "folder.jpg").mkdir()
    (birds / "test" / "loose.jpg").write_bytes(jpeg(0, 1))
    (birds / "val" / "auk").mkdir(parents=True)
    return (
        "test/loose.jpg",
        "train/auk/clip.mpg",
        "train/auk/notes.txt",
        "train/emu/folder.jpg/",
        "train/emu/more/",
        "val/",
    )


def test_what_is_passed_over_is_named(birds):
    expected = pass_over(birds)
    # Files that an operating system leaves anywhere are nobody's images.
    for name in (".DS_Store", "Thumbs.db", "desktop.ini"):
        for folder in (birds, birds / "train", birds / "train" / "auk"):
            (folder / name).write_bytes(b"")
    (birds / "template.txt").write_text("a {}.")
    domain = load_domain("birds", birds.parent)
    assert domain.passed_over == expected
    assert (domain.train.labels, domain.test.labels) == ([0, 0, 1, 1], [0, 1])


SAID = (
    "6 files or folders of birds are passed over: test/loose.jpg, train/auk/clip.mpg, "
    "train/auk/notes.txt, train/emu/folder.jpg/, train/emu/more/, ...; images are read from "
    "{train,test}/CLASS/, with an ending that Pillow reads"
)


def test_check_data_says_what_is_passed_over(birds):
    pass_over(birds)
    problems, lines = checked(birds.parent, "birds")
    assert problems == 0
    assert lines[:2] == [
        "birds: OK, 2 classes, 4 train and 2 test images",
        f"  note: {SAID}",
    ]


def test_a_run_says_once_what_it_passes_over(birds, tmp_path):
    pass_over(birds)
    lines = []
    settings = settings_for(birds.parent, tmp_path / "out", datasets=("birds",))
    plan = XtailPlan(settings, log=lines.append)
    assert lines.count(SAID) == 1
    # What is not read is no part of the run.
    shutil.rmtree(birds / "val")
    assert XtailPlan(settings, log=lines.append).fingerprint == plan.fingerprint


@pytest.mark.parametrize(("split", "kind"), [("train", "training"), ("test", "test")])
def test_a_class_without_images_is_an_error_and_a_problem(birds, capsys, split, kind):
    shutil.rmtree(birds / split / "emu")
    (birds / "train" / "emu").mkdir(exist_ok=True)
    message = (
        f"birds has no {kind} image of 1 of its 2 classes: 'emu'; add some, or leave the class out"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        load_domain("birds", birds.parent)
    given = ["xtail", "check-data", str(birds.parent), "--tasks", "birds"]
    assert main(given) == 1
    assert capsys.readouterr().out.splitlines()[:2] == ["birds: 1 problem", f"  {message}"]


def test_a_published_split_without_test_images_of_a_class_is_an_error(tmp_path):
    file = write_coop(tmp_path, "dtd")
    content = file.read_text()
    file.write_text(re.sub(r'\["c1/test0.jpg", 1, "[a-z]+"\], ', "", content))
    assert file.read_text() != content
    message = (
        "dtd has no test image of 1 of its 47 classes: 'blotchy'; add some, or leave the class"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        load_domain("dtd", tmp_path)


def test_a_small_domain_without_test_images_of_a_class_is_an_error_and_a_problem(tmp_path):
    # 5010 images, a digit after the other; of the second half every tenth one is tested: zeros.
    write_mnist(tmp_path, test=501)
    said = "mnist10k has no test image of 9 of its 10 classes: '1 - one', '2 - two', '3 - three', "
    problems, lines = checked(tmp_path, "mnist10k")
    assert problems == 1 and lines[1].startswith(f"  {said}")
    settings = settings_for(tmp_path, tmp_path / "out", datasets=("mnist10k",))
    with pytest.raises(ValueError, match=re.escape(said)):
        XtailPlan(settings, log=lambda line: None)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_domains(tmp_path_factory.mktemp("data"))


def test_classes_that_settings_leave_without_test_images_are_in_every_table(data, tmp_path):
    lines = []
    # One image a dataset: the first one of its first class.
    changes = {"eval_limit": 1, "quiet": False, "log": lines.append}
    results = run(data, tmp_path / "out", "zero-shot", **changes)
    assert results["unscored"] == {
        "fruit": ["lime", "plum", "quince"],
        "birds": ["emu", "ibis"],
        "tools": ["saw"],
    }
    said = "birds: 2 of 3 classes have no test image and are not scored: emu, ibis"
    assert lines.count(said) == 1
    titles, _ = REPORT.dataset_table([results])
    names = ["fruit (1 of 4 classes)", "birds (1 of 3 classes)", "tools (1 of 2 classes)"]
    assert titles == ["method", "metric", *names]
    for name in ("table.md", "table.csv", "table.tex"):
        assert "birds (1 of 3 classes)" in (tmp_path / "out" / name).read_text(encoding="utf-8")


def test_a_class_whose_test_images_are_all_bad_is_in_every_table(data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    for path in (tmp_path / "data" / "birds" / "test" / "emu").iterdir():
        path.write_bytes(b"")
    results = run(tmp_path / "data", tmp_path / "out", "zero-shot", skip_bad=True)
    assert results["unscored"] == {"birds": ["emu"]}
    assert REPORT.dataset_table([results])[0][2:] == ["fruit", "birds (2 of 3 classes)", "tools"]


def test_results_of_earlier_versions_score_every_class(data, tmp_path):
    results = run(data, tmp_path / "out", "zero-shot")
    assert results.pop("unscored") == {}
    assert REPORT.dataset_table([results])[0] == ["method", "metric", "fruit", "birds", "tools"]


def test_runs_that_leave_out_different_classes_are_not_put_into_one_table(data, tmp_path):
    one = run(data, tmp_path / "out", "zero-shot")
    other = {**one, "unscored": {"birds": ["emu"]}}
    message = "runs must share their unscored, got {} and {'birds': ['emu']}"
    with pytest.raises(ValueError, match=re.escape(message)):
        REPORT.dataset_table([one, other])


def test_a_float_image_in_a_folder_is_read(birds):
    path = birds / "train" / "auk" / "depth.tiff"
    path.write_bytes(encoded(Image.fromarray(np.ones((4, 4), dtype=np.float32)), "TIFF"))
    domain = load_domain("birds", birds.parent)
    place = domain.train.paths.index(str(path))
    assert domain.train.load(place).getpixel((0, 0)) == (255, 255, 255)

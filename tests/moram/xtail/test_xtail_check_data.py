"""`check_data` says of each dataset what is missing, where it belongs and where it came from."""

import subprocess
import sys

import pytest
from xtail_data import TEN, write_folders, write_tree

from moram.cli import main
from moram.xtail.data.check_data import check_data


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return write_tree(tmp_path_factory.mktemp("xtail"))


def checked(root, *args, **kwargs):
    lines = []
    return check_data(root, *args, **kwargs, log=lines.append), lines


def test_a_complete_tree_has_no_problems(tree):
    problems, lines = checked(tree)
    assert problems == 0
    assert "aircraft: OK, 100 classes, 100 train and 100 test images" in lines
    assert "  note: 100 train images, expected 3334" in lines
    assert lines[-1] == f"10 of 10 datasets are complete in {tree}"


def test_a_broken_tree_is_described_line_by_line(tmp_path):
    write_tree(tmp_path, ["caltech101", "dtd", "eurosat", "oxford_pets"])
    split = tmp_path / "caltech-101" / "split_zhou_Caltech101.json"
    split.unlink()
    (tmp_path / "dtd" / "images" / "c3" / "test0.jpg").write_bytes(b"")
    (tmp_path / "eurosat" / "2750" / "c1" / "train0.jpg").unlink()
    pets = tmp_path / "oxford_pets" / "split_zhou_OxfordPets.json"
    pets.write_bytes((tmp_path / "dtd" / "split_zhou_DescribableTextures.json").read_bytes())
    names = ["caltech101", "dtd", "eurosat", "oxford_pets", "sun397"]
    problems, lines = checked(tmp_path, names, images=True)
    assert problems == 6
    drive = "https://drive.google.com/file/d/1hyarUivQE36mY6jSomru6Fjd-JzwcCzN/view"
    assert lines[:2] == [
        "caltech101: 1 problem",
        f"  missing: {split}, from {drive} (CoOp's DATASETS.md)",
    ]
    assert "dtd: 1 problem, 47 classes, 47 train and 47 test images" in lines
    assert f"  bad image: {tmp_path}/dtd/images/c3/test0.jpg: the file is empty" in lines
    (eurosat,) = (line for line in lines if "1 of 20 images" in line)
    assert f"the first {tmp_path}/eurosat/2750/c1/train0.jpg (from http://madm.dfki.de" in eurosat
    (pets_line,) = (line for line in lines if "has 47 classes" in line)
    assert "expected 37, labels 0 to 36. Is it the file of another dataset (dtd)?" in pets_line
    images = tmp_path / "sun397" / "SUN397"
    sun = "http://vision.princeton.edu/projects/2010/SUN/SUN397.tar.gz"
    assert lines[lines.index("sun397: 2 problems") + 1] == f"  missing: {images}, from {sun}"
    assert lines[-1] == f"0 of 5 datasets are complete in {tmp_path}"


def test_bad_images_are_looked_for_only_when_asked(tmp_path):
    write_tree(tmp_path, ["dtd"])
    (tmp_path / "dtd" / "images" / "c3" / "test0.jpg").write_bytes(b"")
    assert checked(tmp_path, ["dtd"])[0] == 0
    assert checked(tmp_path, ["dtd"], images=True)[0] == 1


def test_a_root_that_does_not_exist_lacks_all_and_is_not_made(tmp_path):
    root = tmp_path / "nowhere"
    problems, lines = checked(root)
    # An image folder and a split file for eight, three lists of aircraft's, four files of MNIST.
    assert problems == 8 * 2 + 1 + 3 + 4
    assert all(f"{name}: " in "\n".join(lines) for name in TEN)
    assert not root.exists()


def test_nothing_is_downloaded(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.setattr("socket.socket.connect", fail)
    monkeypatch.setattr("urllib.request.urlopen", fail)
    assert checked(tmp_path, ["mnist", "cifar100"])[0] == 7
    write_tree(tmp_path, ["mnist", "cifar100"])
    assert checked(tmp_path, ["mnist", "cifar100"])[0] == 1


def test_shared_prompts_are_notes(tmp_path):
    write_folders(tmp_path, "birds", ["auk", "emu"])
    write_folders(tmp_path, "zoo", ["emu"])
    problems, lines = checked(tmp_path, ["birds", "zoo"])
    assert problems == 0
    note = 'note: "a photo of a emu." is a prompt of both birds and zoo; ties go to the earlier'
    assert note in lines


def test_importing_the_domains_imports_no_torchvision():
    code = (
        "import sys, moram.xtail.data.datasets, moram.xtail.data.check_data;"
        "print('torchvision' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout == "False\n"


def test_check_data_says_what_is_missing_and_where_it_belongs(tmp_path, capsys):
    write_tree(tmp_path, ["dtd", "eurosat"])
    given = ["xtail", "check-data", str(tmp_path), "--tasks", "dtd,eurosat"]
    assert main(given) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "dtd: OK, 47 classes, 47 train and 47 test images" in lines
    assert lines[-1] == f"2 of 2 datasets are complete in {tmp_path}"
    split = tmp_path / "eurosat" / "split_zhou_EuroSAT.json"
    split.unlink()
    assert main(given) == 1
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith(f"  missing: {split}, from https://drive") for line in lines)
    assert lines[-1] == f"1 of 2 datasets are complete in {tmp_path}"


def test_check_data_looks_for_all_ten_and_at_images_when_asked(tmp_path, capsys):
    write_tree(tmp_path)
    assert main(["xtail", "check-data", str(tmp_path)]) == 0
    (tmp_path / "dtd" / "images" / "c3" / "test0.jpg").write_bytes(b"")
    assert main(["xtail", "check-data", str(tmp_path), "--tasks", "dtd"]) == 0
    capsys.readouterr()
    assert main(["xtail", "check-data", str(tmp_path), "--tasks", "dtd", "--images"]) == 1
    assert "c3/test0.jpg: the file is empty" in capsys.readouterr().out


def test_check_data_of_a_folder_that_does_not_exist(tmp_path, capsys):
    assert main(["xtail", "check-data", str(tmp_path / "gone")]) == 1
    assert f"0 of 10 datasets are complete in {tmp_path / 'gone'}" in capsys.readouterr().out


def test_drawn_and_small_domains_are_known_to_check_data(tmp_path, capsys):
    given = ["xtail", "check-data", str(tmp_path), "--tasks", "shapes, vehicles"]
    assert main(given) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "shapes: OK, 10 classes, 240 train and 240 test images"
    assert lines[1] == "vehicles: 1 problem" and "cifar10.zip" in lines[2]

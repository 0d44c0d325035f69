"""`moram inspect` on a run of moram xtail over a tiny CLIP with open_clip's own tokenizer."""

import json
import re
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from xtail_support import DOMAINS, NAMES, TEMPLATES, TEST, settings_for, write_backbone
from xtail_support import write_domains as write

import moram
from moram.cli import main
from moram.models.clip import MEAN, STD
from moram.xtail.inspection import image_kinds, text_kinds
from moram.xtail.run import run_xtail

# Images of 16 x 16 in patches of 8, and the class token; texts of 16 places.
IMAGE_PLACES, TEXT_PLACES = 5, 16
KINDS = ["class token", "patch", "start", "word", "end", "padding", "all"]
# The first adapters of both encoders.
IMAGE, TEXT = (f"{stack}transformer.resblocks.0.attn.q_proj" for stack in ("visual.", ""))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a finished run of MoRAM."""
    folder = tmp_path_factory.mktemp("inspect")
    backbone, data = write_backbone(folder / "clip"), write(folder / "data")
    rule = {"temperature": 0.3, "threshold": 0.6}
    run_xtail(settings_for(data, folder / "run", backbone=backbone, method_args=rule))
    return folder / "run"


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the run, to be spoiled."""
    return shutil.copytree(finished, tmp_path / "run")


def inspected(run):
    return json.loads((run / "inspect" / "inspect.json").read_text())


def read_by_hand(run, name):
    """What the first adapters read of a domain, [B, T, D], and they themselves, from the files."""
    import open_clip

    config = json.loads((run / "config.json").read_text())
    model = open_clip.create_model(config["backbone"])
    moram.load(model, run / "adapters")
    model.eval()
    shift, scale = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    images = []
    for text in DOMAINS[name]:
        for i in range(TEST):
            with Image.open(f"{config['data_dir']}/{name}/test/{text}/{i}.png") as image:
                pixels = torch.tensor(np.array(image.convert("RGB"))) / 255
            images.append((pixels.permute(2, 0, 1) - shift) / scale)
    prompts = [TEMPLATES.get(name, "a photo of a {}.").format(text) for text in DOMAINS[name]]
    found = {}

    def note(adapter, x, path):
        found[path] = adapter, x[0]

    for path in (IMAGE, TEXT):
        model.get_submodule(path).register_forward_pre_hook(partial(note, path=path))
    with torch.no_grad():
        model.encode_image(torch.stack(images))
        model.encode_text(open_clip.get_tokenizer(config["backbone"])(prompts))
    for adapter, _ in found.values():
        adapter._forward_pre_hooks.clear()
    return found


def measured(adapter, x):
    """(percent of inputs at which some atom fires, strength in percent), from what fires by the
    published rule and from what the layer adds to its base."""
    frozen, _, current, _ = adapter.bank.segments()
    with torch.no_grad():
        scores = x @ torch.cat([frozen, current]).T
        fires = (scores / scores.norm(dim=-1, keepdim=True)).amax(-1) >= 0.6
        base = adapter.base_layer(x)
        update = adapter(x) - base
    ratio = update.square().sum() / base.square().sum()
    return [100 * fires.float().mean().item(), 100 * ratio.sqrt().item()]


def test_places_of_images_and_prompts_are_those_counted_from_the_files(run, capsys):
    before = (run / "results.json").read_bytes()
    assert main(["inspect", str(run)]) == 0
    found, printed = inspected(run), capsys.readouterr().out
    assert found["inputs"] == found["tasks"] == list(NAMES) and found["kinds"] == KINDS
    tokens = [len(DOMAINS[name]) * (TEST * IMAGE_PLACES + TEXT_PLACES) for name in NAMES]
    assert found["tokens"] == tokens
    # "a drawing of the auk.": a start, as many words as tokens, the end.
    parts = {"class token": (IMAGE, slice(1)), "patch": (IMAGE, slice(1, None))}
    parts |= {"start": (TEXT, slice(1))}
    by_hand = read_by_hand(run, "birds")
    for kind, (path, part) in parts.items():
        adapter, x = by_hand[path]
        details, k = found["adapters"][path], KINDS.index(kind)
        pair = [details[name][1][k] for name in ("fired_places", "strength")]
        assert pair == pytest.approx(measured(adapter, x[:, part]), abs=0.02)
    # An adapter reads one encoder's places alone.
    assert found["adapters"][IMAGE]["strength"][1][2:6] == [None] * 4
    assert found["adapters"][TEXT]["strength"][1][:2] == [None] * 2
    for i, kind in enumerate(KINDS[:-1]):
        (row,) = re.findall(rf"^\| {kind} \| (.*) \|$", printed, re.MULTILINE)
        cells = [[float(number) for number in cell.split(" / ")] for cell in row.split(" | ")]
        pairs = [[found[name][d][i] for name in ("fired_places", "strength")] for d in range(3)]
        assert cells == [pytest.approx(pair, abs=0.06) for pair in pairs]
    rows = re.findall(r"^\| ((?:visual\.)?transformer\.resblocks\.\d) \|", printed, re.MULTILINE)
    layers = ["visual.transformer.resblocks.{}", "transformer.resblocks.{}"]
    assert rows == [layer.format(number) for layer in layers for number in (0, 1)]
    assert "at most 32 images a domain and the prompts of its classes" in printed
    assert (run / "inspect" / "inspect.md").read_text().strip() in printed
    assert (run / "inspect" / "inspect.png").read_bytes().startswith(b"\x89PNG")
    assert (run / "results.json").read_bytes() == before


def test_some_domains_with_few_of_the_images_that_were_trained_on(run, tmp_path):
    arguments = ["--tasks", "tools,fruit", "--split", "train", "--limit", "3", "--adapter", TEXT]
    assert main(["inspect", str(run), *arguments, "--out", str(tmp_path / "other")]) == 0
    found = json.loads((tmp_path / "other" / "inspect.json").read_text())
    assert found["inputs"] == ["tools", "fruit"] and found["adapter"] == TEXT
    places = [3 * IMAGE_PLACES + count * TEXT_PLACES for count in (2, 4)]
    assert found["tokens"] == places and not (run / "inspect").exists()


def test_an_encoder_without_adapters_has_no_places(tmp_path):
    backbone, data = write_backbone(tmp_path / "clip"), write(tmp_path / "data", NAMES[:2])
    changes = {"backbone": backbone, "datasets": NAMES[:2], "targets": "open_clip-text"}
    run_xtail(settings_for(data, tmp_path / "run", **changes))
    assert main(["inspect", str(tmp_path / "run")]) == 0
    found = inspected(tmp_path / "run")
    assert found["fired_places"][0][:2] == [None, None]
    assert found["tokens"] == [4 * TEXT_PLACES, 3 * TEXT_PLACES]


def test_kinds_of_places_are_those_of_clip():
    assert image_kinds(4).tolist() == [0, 1, 1, 1] and image_kinds(0).tolist() == []
    ids = torch.tensor([[8, 3, 5, 9, 0, 0], [8, 9, 0, 0, 0, 0], [9, 0, 0, 0, 0, 0]])
    assert text_kinds(ids).tolist() == [
        [2, 3, 3, 4, 5, 5],
        [2, 4, 5, 5, 5, 5],
        [4, 5, 5, 5, 5, 5],
    ]
    # Padded with the end itself: the first one closes the text.
    assert text_kinds(torch.tensor([[8, 3, 9, 9]])).tolist() == [[2, 3, 4, 5]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "a"], "text is not for runs of moram xtail: leave it out"),
        (["--last", "2"], "last is not for runs of moram xtail: leave it out"),
        (["--split", "eval"], "split must be among test, train, got 'eval'"),
        (["--tasks", "bird"], "tasks must be among fruit, birds, tools, got 'bird': did you mean"),
        (["--adapter", "q_proj"], "there is no adapter 'q_proj'; closest: "),
        (["--data", "/nowhere"], "/nowhere"),
    ],
)
def test_a_bad_argument_is_one_clear_line(run, capsys, arguments, message):
    assert main(["inspect", str(run), *arguments]) == 1
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("moram inspect: ") and message in error
    assert not (run / "inspect").exists()


def test_a_run_of_something_else_is_one_clear_line(run, capsys):
    results = json.loads((run / "results.json").read_text())
    (run / "results.json").write_text(json.dumps(results | {"format": "other"}))
    assert main(["inspect", str(run)]) == 1
    expected = "is no run of moram trace or moram xtail: the format of its results.json is 'other'"
    assert f"{run} {expected}" in capsys.readouterr().err

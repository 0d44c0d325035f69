"""The small CLIP: how it is pretrained, what its captions say, and its cache."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from moram.models.clip import MEAN, STD, load_clip
from moram.xtail import pretrain as module
from moram.xtail.pretrain import Recipe, all_things, draw_world, small_clip

TINY = Recipe(images=200, steps=4, batch=16)
WEIGHTS, CONFIG = "open_clip_model.safetensors", "open_clip_config.json"
CONTEXT = 16
# 26 letters, 10 digits, 32 pictograms, 10 shapes, 10 textures.
NUM_THINGS = 88


def silent(line):
    pass


def losses(lines):
    """The losses that a run logged, in order."""
    return [float(found[1]) for line in lines if (found := re.search(r"loss ([\d.]+)", line))]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The cache, the folder and the log of a first call."""
    cache, lines = tmp_path_factory.mktemp("cache") / "new", []
    return cache, small_clip(cache, lines.append, TINY), lines


def refuse(*_):
    raise AssertionError("trained again")


def test_the_folder_holds_a_model_that_load_clip_reads_with_equal_weights(trained):
    _, folder, _ = trained
    clip = load_clip(f"local-dir:{folder}")
    written, loaded = load_file(folder / WEIGHTS), clip.model.state_dict()
    assert loaded.keys() == written.keys()
    assert all(torch.equal(loaded[name], written[name]) for name in written)
    assert clip.preprocess == (28, MEAN, STD)
    assert not clip.model.training
    ids = clip.tokens(["a photo of the letter A.", "waves"])
    assert ids.shape == (2, CONTEXT)
    pixels = torch.zeros(3, 3, 28, 28)
    features = clip.encode_image(pixels), clip.encode_text(ids)
    assert [tuple(f.shape) for f in features] == [(3, 128), (2, 128)]


def test_the_first_call_says_that_it_trains_and_leaves_one_folder(trained):
    cache, folder, lines = trained
    assert list(cache.iterdir()) == [folder]
    assert sorted(path.name for path in folder.iterdir()) == sorted([WEIGHTS, CONFIG])
    assert "pretraining" in lines[0]
    # The first step's and the last one's.
    assert len(losses(lines)) == 2


def test_what_is_saved_is_what_was_trained_and_two_runs_are_equal(trained):
    torch.manual_seed(99)
    np.random.seed(99)
    model = module.pretrain(TINY, silent)
    written = load_file(trained[1] / WEIGHTS)
    state = model.state_dict()
    assert state.keys() == written.keys()
    assert all(torch.equal(state[name], written[name]) for name in written)


def test_a_kept_model_is_used_without_training(trained, monkeypatch):
    cache, folder, _ = trained
    monkeypatch.setattr(module, "pretrain", refuse)
    lines, before = [], (folder / WEIGHTS).stat().st_mtime_ns
    assert small_clip(str(cache), lines.append, TINY) == folder
    assert lines == [] and (folder / WEIGHTS).stat().st_mtime_ns == before


@pytest.mark.parametrize(
    "change", [{"images": 201}, {"steps": 5}, {"batch": 17}, {"lr": 2e-3}, {"seed": 1}], ids=str
)
def test_another_recipe_is_not_taken_from_the_cache(trained, monkeypatch, change):
    monkeypatch.setattr(module, "pretrain", refuse)
    with pytest.raises(AssertionError, match="trained again"):
        small_clip(trained[0], silent, replace(TINY, **change))


def test_the_default_cache_is_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / ".cache" / "moram" / f"xtail-small-clip-v{module.VERSION}"
    folder.mkdir(parents=True)
    (folder / WEIGHTS).touch()
    monkeypatch.setattr(module, "pretrain", refuse)
    assert small_clip(log=silent) == folder


@pytest.mark.parametrize("moment", ["training", "saving"])
def test_a_crash_leaves_nothing_behind_and_the_next_call_trains(tmp_path, monkeypatch, moment):
    model = torch.nn.Linear(2, 3)

    def crash(*arguments):
        if moment == "saving":
            (arguments[1] / CONFIG).write_text("{}")
            (arguments[1] / WEIGHTS).write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "pretrain", crash if moment == "training" else lambda *_: model)
        patch.setattr(module, "save", crash)
        with pytest.raises(KeyboardInterrupt):
            small_clip(tmp_path, silent, TINY)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(module, "pretrain", lambda *_: model)
    folder = small_clip(tmp_path, silent, TINY)
    assert torch.equal(load_file(folder / WEIGHTS)["weight"], model.weight)


def test_a_folder_without_weights_is_replaced(trained, tmp_path, monkeypatch):
    half = tmp_path / trained[1].name
    half.mkdir()
    (half / "rest").touch()
    monkeypatch.setattr(module, "pretrain", lambda *_: torch.nn.Linear(2, 3))
    assert small_clip(tmp_path, silent, TINY) == half
    assert sorted(path.name for path in half.iterdir()) == sorted([WEIGHTS, CONFIG])


def test_the_loss_falls(monkeypatch):
    seen, lines, pure = [], [], module.F.cross_entropy

    def watched(logits, target):
        seen.append(pure(logits, target))
        return seen[-1]

    monkeypatch.setattr(module.F, "cross_entropy", watched)
    module.pretrain(Recipe(images=300, steps=50, batch=32), lines.append)
    each = torch.stack(seen).view(50, 2).mean(1).tolist()
    assert losses(lines) == [pytest.approx(each[0], abs=6e-4), pytest.approx(each[-1], abs=6e-4)]
    # log(32) = 3.47 is chance's, where no thing comes twice.
    assert 3 < each[0] < 4.5
    assert np.mean(each[-10:]) < np.mean(each[:5]) - 0.2


def test_the_token_embedding_stays_as_it_was_drawn(trained):
    written = load_file(trained[1] / WEIGHTS)["token_embedding.weight"]
    longer = module.pretrain(replace(TINY, steps=1), silent)
    assert written.shape == (49408, 128)
    assert torch.equal(longer.token_embedding.weight, written)
    assert not longer.token_embedding.weight.requires_grad
    # Six million draws: their mean and deviation are known to four digits.
    assert abs(written.mean().item()) < 2e-4
    assert written.std().item() == pytest.approx(0.1, abs=2e-4)


def test_all_other_weights_are_trained(trained):
    start = module.pretrain(replace(TINY, steps=1, lr=0.0), silent).state_dict()
    written = load_file(trained[1] / WEIGHTS)
    same = [name for name in written if torch.equal(written[name], start[name])]
    assert same == ["token_embedding.weight"]


def fake_world(things):
    """What replaces `draw_world`: as many black images, said to show these things."""
    return lambda *_: (np.zeros((len(things), 28, 28, 3), np.uint8), np.array(things))


def test_a_batch_of_one_thing_has_no_negatives(monkeypatch):
    monkeypatch.setattr(module, "draw_world", fake_world([4] * 8))
    lines = []
    module.pretrain(Recipe(images=8, steps=1, batch=6), lines.append)
    # Each row has one finite logit: its softmax is 1.
    assert losses(lines) == [0.0]


def test_pairs_of_the_same_thing_are_no_negatives(monkeypatch):
    monkeypatch.setattr(module, "draw_world", fake_world([3] * 4 + [70] * 4))
    seen, lines, pure = [], [], module.F.cross_entropy

    def watched(logits, target):
        seen.append((logits.detach().double().numpy(), target.tolist()))
        return pure(logits, target)

    monkeypatch.setattr(module.F, "cross_entropy", watched)
    module.pretrain(Recipe(images=8, steps=1, batch=10), lines.append)
    (rows, target), (columns, other_target) = seen
    assert target == other_target == list(range(10))
    assert np.array_equal(rows.T, columns)
    # Two things: whoever is not a negative of the first row shows the same as it.
    differs = np.isfinite(rows[0])
    differs[0] = False
    assert 0 < differs.sum() < 9
    negatives = differs[:, None] != differs[None]
    assert np.array_equal(np.isfinite(rows), negatives | np.eye(10, dtype=bool))
    by_hand = []
    for logits in (rows, columns):
        for i in range(10):
            others = sum(np.exp(logits[i, j] - logits[i, i]) for j in range(10) if negatives[i, j])
            by_hand.append(np.log(1 + others))
    assert losses(lines) == [pytest.approx(np.mean(by_hand), abs=6e-4)]


def test_the_world_shows_every_thing_and_kinds_about_equally():
    images, shown = draw_world(1500, 0)
    assert images.shape == (1500, 28, 28, 3) and images.dtype == np.uint8
    things = all_things()
    assert set(shown.tolist()) == set(range(NUM_THINGS))
    kinds = [things[i][0] for i in shown]
    # Binomial, 1500 draws of a fifth: 300 and a deviation of 15.5.
    assert all(230 < kinds.count(kind) < 370 for kind in set(kinds)) and len(set(kinds)) == 5
    again, same = draw_world(1500, 0)
    assert np.array_equal(images, again) and np.array_equal(shown, same)
    assert not np.array_equal(images, draw_world(1500, 1)[0])


def test_every_thing_has_captions_that_name_it():
    things = all_things()
    assert len(things) == NUM_THINGS
    assert len({(kind, name) for kind, name, _ in things}) == NUM_THINGS
    for _, name, captions in things:
        assert len(captions) >= 8
        assert all(re.search(rf"\b{name}\b", caption) for caption in captions)
        assert not any("{" in caption for caption in captions)


def test_captions_of_digits_have_the_form_of_mnists_prompts():
    captions = {name: texts for kind, name, texts in all_things() if kind == "digit"}
    assert 'a photo of the number: "7 - seven".' in captions["seven"]
    assert 'a photo of the number: "0 - zero".' in captions["zero"]
    assert "a scan of the digit nine." in captions["nine"]


def test_no_caption_is_cut_to_the_context():
    from open_clip.tokenizer import SimpleTokenizer

    tokenizer = SimpleTokenizer()
    for _, _, captions in all_things():
        for caption in captions:
            # The start and the end are tokens of their own.
            assert len(tokenizer.encode(caption)) + 2 <= CONTEXT, caption

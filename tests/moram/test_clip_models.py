"""`Clip`: open_clip's models and Hugging Face's behind the same calls, and how they are loaded."""

import json

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from tiny_models import hf_clip, images, open_clip_model, token_ids
from torch.nn.functional import normalize

from moram.models.clip import MEAN, STD, Clip, Preprocess, load_clip

# Two merges: "ab" and "cd" are words of one token.
VOCABULARY = ["a", "b", "c", "d", "a</w>", "b</w>", "c</w>", "d</w>", "ab</w>", "cd</w>"]
SPECIAL = ["<|startoftext|>", "<|endoftext|>"]


def hugging_face_folder(folder):
    """A Hugging Face CLIP with its tokenizer, as a user has it on disk."""
    from transformers import CLIPTokenizer

    model = hf_clip()
    words = {word: index for index, word in enumerate([*VOCABULARY, *SPECIAL])}
    # The end of a text is where its feature is read.
    words[SPECIAL[1]] = model.config.text_config.eos_token_id
    (folder / "vocab.json").write_text(json.dumps(words))
    (folder / "merges.txt").write_text("#version: 0.2\na b</w>\nc d</w>\n")
    CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)
    model.save_pretrained(folder)
    return model


def open_clip_folder(folder, model):
    config = {
        "model_cfg": {
            "embed_dim": 32,
            "vision_cfg": {
                "layers": 2,
                "width": 64,
                "head_width": 32,
                "patch_size": 16,
                "image_size": 32,
            },
            "text_cfg": {
                "context_length": 8,
                "vocab_size": 64,
                "width": 64,
                "heads": 2,
                "layers": 2,
            },
        },
        "preprocess_cfg": {"size": 32, "mean": [0.5, 0.4, 0.3], "std": [0.1, 0.2, 0.3]},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file(
        {name: t.contiguous() for name, t in model.state_dict().items()},
        folder / "open_clip_model.safetensors",
    )


def test_features_of_an_open_clip_model_are_its_own_of_unit_length():
    model = open_clip_model()
    clip = Clip(model, None, Preprocess(32, MEAN, STD))
    pixels, ids = images(), token_ids(length=8)
    with torch.no_grad():
        expected = normalize(model.encode_image(pixels), dim=-1)
        assert torch.equal(clip.encode_image(pixels), expected)
        texts = normalize(model.encode_text(ids), dim=-1)
        assert torch.equal(clip.encode_text(ids), texts)
        logits = model.get_logits(pixels, ids)[0]
        torch.testing.assert_close(clip.logits(expected, texts), logits)


def test_logits_of_a_hugging_face_model_are_its_own():
    model = hf_clip()
    clip = Clip(model, None, Preprocess(32, MEAN, STD))
    ids = token_ids()
    ids[:, -1] = model.config.text_config.eos_token_id
    with torch.no_grad():
        expected = model(input_ids=ids, pixel_values=images()).logits_per_image
        logits = clip.logits(clip.encode_image(images()), clip.encode_text(ids))
    torch.testing.assert_close(logits, expected)


def test_a_folder_of_open_clip_is_loaded_with_its_weights_and_preprocessing(tmp_path):
    model = open_clip_model()
    open_clip_folder(tmp_path, model)
    clip = load_clip(f"local-dir:{tmp_path}")
    for name, tensor in model.state_dict().items():
        assert torch.equal(clip.model.state_dict()[name], tensor), name
    assert clip.preprocess == Preprocess(32, (0.5, 0.4, 0.3), (0.1, 0.2, 0.3))
    assert not clip.model.training
    random = load_clip(f"local-dir:{tmp_path}", "random")
    assert not torch.equal(random.model.state_dict()["visual.proj"], clip.model.visual.proj)
    with pytest.raises(ValueError, match="pretrained must be auto or random with local-dir"):
        load_clip(f"local-dir:{tmp_path}", "openai")
    assert clip.tokens(["a", "b"]).shape == (2, 8)


def test_a_hugging_face_folder_is_loaded_with_its_weights_and_tokenizer(tmp_path):
    model = hugging_face_folder(tmp_path)
    clip = load_clip(str(tmp_path))
    for name, tensor in model.state_dict().items():
        assert torch.equal(clip.model.state_dict()[name], tensor), name
    assert clip.preprocess == Preprocess(32, MEAN, STD)
    ids = clip.tokens(["ab cd", "ab"])
    end = model.config.text_config.eos_token_id
    # Start, words and end; what follows the end does not matter.
    assert ids[0, :4].tolist() == [10, 8, 9, end] and ids[1, :3].tolist() == [10, 8, end]
    assert ids.shape == (2, model.config.text_config.max_position_embeddings)
    with torch.no_grad():
        features = clip.encode_text(ids)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(2))


@pytest.mark.parametrize(
    ("backbone", "pretrained", "message"),
    [
        ("ViT-B-61", None, "backbone must be a model of open_clip.*'ViT-B-61'"),
        ("ViT-B-16", "opneai", "pretrained must be random, a file, or a tag of ViT-B-16.*'opneai'"),
    ],
)
def test_an_unknown_name_is_refused_before_anything_is_built(
    monkeypatch, backbone, pretrained, message
):
    def fail(*_, **__):
        raise AssertionError("a model is built")

    monkeypatch.setattr(open_clip, "create_model", fail)
    with pytest.raises(ValueError, match=message):
        load_clip(backbone, pretrained)


def test_a_hugging_face_folder_takes_no_other_weights(tmp_path):
    with pytest.raises(ValueError, match=r"pretrained must be auto with .* brings its own"):
        load_clip(str(tmp_path), "openai")


def test_a_hugging_face_model_that_is_no_clip_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match="must hold a CLIP, got a model of type 'llama'"):
        load_clip(str(tmp_path))


def test_a_file_of_weights_is_loaded_and_one_that_does_not_fit_is_refused(tiny_name, tmp_path):
    model, key = open_clip_model(), "visual.proj"
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    clip = load_clip(tiny_name, str(tmp_path / "weights.pt"))
    assert torch.equal(clip.model.state_dict()[key], model.state_dict()[key])
    torch.save({key: torch.zeros(3, 3)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other\.pt do not fit tiny-test"):
        load_clip(tiny_name, str(tmp_path / "other.pt"))
    (tmp_path / "bad.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match=r"bad\.safetensors cannot be read"):
        load_clip(tiny_name, str(tmp_path / "bad.safetensors"))
    random = load_clip(tiny_name, "random")
    assert not torch.equal(random.model.state_dict()[key], model.state_dict()[key])


class Script(torch.nn.Module):
    """What OpenAI publishes: an archive of code, with weights in 16 bits and three sizes."""

    def __init__(self, model):
        super().__init__()
        for name, tensor in model.state_dict().items():
            *path, last = name.split(".")
            at = self
            for part in path:
                if not hasattr(at, part):
                    at.add_module(part, torch.nn.Module())
                at = getattr(at, part)
            at.register_buffer(last, tensor.half())
        for name in ("input_resolution", "context_length", "vocab_size"):
            self.register_buffer(name, torch.tensor(1))

    def forward(self, x):
        return x


@pytest.fixture
def tiny_name(tmp_path):
    """An architecture of open_clip's registry that is as small as the tests need it."""
    source = tmp_path / "source"
    source.mkdir()
    open_clip_folder(source, open_clip_model())
    sizes = json.loads((source / "open_clip_config.json").read_text())["model_cfg"]
    (tmp_path / "tiny-test.json").write_text(json.dumps(sizes))
    registry = dict(open_clip.factory._MODEL_CONFIGS)
    open_clip.add_model_config(tmp_path / "tiny-test.json")
    yield "tiny-test"
    open_clip.factory._MODEL_CONFIGS.clear()
    open_clip.factory._MODEL_CONFIGS.update(registry)
    open_clip.factory._MODEL_CONFIG_PATHS.pop()
    open_clip.factory._rescan_model_configs()


def activation(clip):
    return type(clip.model.visual.transformer.resblocks[0].mlp.gelu).__name__


def test_an_archive_as_openai_publishes_is_read_with_its_activation(tiny_name, tmp_path):
    model, path = open_clip_model(), tmp_path / "tiny.pt"
    torch.jit.script(Script(model)).save(path)
    clip = load_clip(tiny_name, str(path))
    for name, tensor in model.state_dict().items():
        assert torch.equal(clip.model.state_dict()[name], tensor.half().float()), name
    assert activation(clip) == "QuickGELU"


@pytest.mark.parametrize(
    ("file", "expected"),
    [("vit_b_16-openai.pt", "QuickGELU"), ("weights.pt", "GELU")],
    ids=["openai_in_the_name", "another_name"],
)
def test_the_name_of_a_file_of_weights_tells_the_activation(tiny_name, tmp_path, file, expected):
    torch.save(open_clip_model().state_dict(), tmp_path / file)
    assert activation(load_clip(tiny_name, str(tmp_path / file))) == expected


def test_the_tag_openai_has_its_activation(monkeypatch):
    asked = {}

    def create(name, pretrained, **more):
        asked.update(more, pretrained=pretrained)
        model = open_clip_model()
        model.visual.preprocess_cfg = {"size": 32, "mean": MEAN, "std": STD}
        return model

    monkeypatch.setattr(open_clip, "create_model", create)
    load_clip("ViT-B-16")
    assert (asked["pretrained"], asked["force_quick_gelu"]) == ("openai", True)
    load_clip("ViT-B-16", "laion2b_s34b_b88k")
    assert (asked["pretrained"], asked["force_quick_gelu"]) == ("laion2b_s34b_b88k", False)

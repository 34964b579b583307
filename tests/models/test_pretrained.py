"""Saved models load completely; damaged or mismatched files are named, and a failed save keeps the old model."""

import json
import os
import pickle
import re
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.testing import assert_close

from mirror_modules import (
    BackboneConfig,
    Captioner,
    CascadedGenerator,
    ConditioningAugmentation,
    MirrorGAN,
    MirrorGANConfig,
    TextEncoder,
    Vocabulary,
)
from mirror_modules.models import PPGN, PPGNConfig, TextToImage, pretrained
from mirror_modules.models.pretrained import load_weights, save_weights

CAPTIONS = ["a red flower", "blue petals"]
SMALL = {
    "embedding_dim": 5,
    "word_dim": 6,
    "noise_dim": 3,
    "condition_dim": 4,
    "channels": 2,
    "resolutions": (4, 8),
    "residual_blocks": 1,
    "captioner_backbone": "conv",
    "captioner_embedding_dim": 4,
    "captioner_hidden_dim": 5,
}


def make(captions=CAPTIONS, **changes):
    return MirrorGAN(MirrorGANConfig(**{**SMALL, **changes}), Vocabulary.build(captions))


@pytest.fixture
def folder(tmp_path):
    make().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_saved_model_is_loaded_unchanged(tmp_path):
    model = make()
    with torch.no_grad():
        model.generator.initial.norm.running_mean.normal_()
    model.save_pretrained(tmp_path / "new" / "model")
    loaded = MirrorGAN.from_pretrained(tmp_path / "new" / "model")
    assert loaded.config == model.config
    assert loaded.vocabulary == model.vocabulary
    assert not loaded.training
    assert_close(loaded.state_dict(), model.state_dict(), atol=0, rtol=0)
    assert_close(loaded.generate(CAPTIONS, seed=1), model.generate(CAPTIONS, seed=1), atol=0, rtol=0)


def test_a_model_with_pretrained_backbone_is_loaded_without_its_file(tmp_path, recwarn):
    timm = pytest.importorskip("timm")
    backbone = tmp_path / "backbone.pth"
    torch.save(timm.create_model("test_efficientnet").state_dict(), backbone)
    model = make(captioner_backbone=BackboneConfig("timm:test_efficientnet", weights=str(backbone)))
    assert len(model.config.captioner_backbone.sha256) == 64
    model.save_pretrained(tmp_path / "model")
    backbone.unlink()
    # The name of a published network, and no weights to be found: no warning either.
    recwarn.clear()
    loaded = MirrorGAN.from_pretrained(tmp_path / "model")
    assert not recwarn.list
    assert loaded.config == model.config
    assert loaded.config.captioner_backbone.sha256 == model.config.captioner_backbone.sha256
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    assert loaded.describe(images) == model.describe(images)
    assert not any(parameter.requires_grad for parameter in loaded.captioner.image_encoder.parameters())
    with pytest.raises(FileNotFoundError, match=r"weights='.*backbone\.pth' do not exist"):
        MirrorGAN(model.config, model.vocabulary)


def test_a_model_for_images_alone_generates_them_without_building_or_reading_the_captioner(folder, monkeypatch):
    whole, names = MirrorGAN.from_pretrained(folder), []
    monkeypatch.setattr(BackboneConfig, "build", lambda *_, **__: pytest.fail("the captioner's backbone was built"))
    monkeypatch.setattr(pretrained, "_safetensors", lambda: RecordingSafetensors(names))
    model = MirrorGAN.from_pretrained(folder, only="images")
    assert set(names) == {name for name in whole.state_dict() if not name.startswith("captioner.")}
    assert dict(model.named_children()).keys() == {"text_encoder", "conditioning", "generator"}
    assert not model.training
    assert model.config == whole.config
    assert_close(model.generate(CAPTIONS, seed=1), whole.generate(CAPTIONS, seed=1), atol=0, rtol=0)
    assert_close(model.interpolate(*CAPTIONS, seed=1), whole.interpolate(*CAPTIONS, seed=1), atol=0, rtol=0)


def test_a_model_for_captions_alone_describes_images_without_building_or_reading_the_generator(folder, monkeypatch):
    whole, names = MirrorGAN.from_pretrained(folder), []
    monkeypatch.setattr(MirrorGAN, "build", lambda *_: pytest.fail("the generator was built"))
    monkeypatch.setattr(pretrained, "_safetensors", lambda: RecordingSafetensors(names))
    model = TextToImage.from_pretrained(folder, only="captions")
    assert set(names) == {name for name in whole.state_dict() if name.startswith("captioner.")}
    assert list(dict(model.named_children())) == ["captioner"]
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    assert model.describe(images) == whole.describe(images)
    assert model.device == torch.device("cpu")


class RecordingSafetensors:
    """safetensors, with a record of the tensors that are read."""

    def __init__(self, names):
        self.names = names

    @contextmanager
    def safe_open(self, path, framework):
        with safetensors.safe_open(path, framework) as file:
            yield SimpleNamespace(
                keys=file.keys, get_tensor=lambda name: self.names.append(name) or file.get_tensor(name)
            )


@pytest.mark.parametrize(
    ("only", "call", "message"),
    [
        ("images", lambda model: model.describe(torch.zeros(1, 3, 8, 8)), "describe: it needs the parts for captions"),
        ("images", lambda model: model.best_seeds(CAPTIONS, 2), "best_seeds: it needs the parts for images and capt"),
        (
            "images",
            lambda model: model.generate(CAPTIONS, best_of=2),
            "was loaded with only='images'; leave `only` out",
        ),
        ("captions", lambda model: model.generate(CAPTIONS), "generate: it needs the parts for images, but the model"),
        ("captions", lambda model: model.interpolate(*CAPTIONS), "interpolate: it needs the parts for images"),
        (
            "captions",
            lambda model: model(torch.ones(1, 2, dtype=torch.long)),
            "MirrorGAN: it needs the parts for images",
        ),
        ("images", lambda model: model.save_pretrained("new"), "save_pretrained: it needs the parts for images and"),
    ],
)
def test_a_part_that_was_not_loaded_is_named(folder, monkeypatch, tmp_path, only, call, message):
    monkeypatch.chdir(tmp_path)
    model = MirrorGAN.from_pretrained(folder, only=only)
    with pytest.raises(ValueError, match=rf"^MirrorGAN\.{message}|{message}"):
        call(model)
    assert not (tmp_path / "new").exists()


def test_an_unknown_use_is_rejected(folder):
    with pytest.raises(
        ValueError, match=r"^MirrorGAN\.from_pretrained: only must be one of 'images', 'captions', but it is 'text'"
    ):
        MirrorGAN.from_pretrained(folder, only="text")


def test_a_parameter_of_the_system_itself_is_read(folder, monkeypatch):
    built = MirrorGAN.build

    def build(self, config):
        built(self, config)
        self.scale = torch.nn.Parameter(torch.zeros(3))

    monkeypatch.setattr(MirrorGAN, "build", build)
    path = folder / "model.safetensors"
    safetensors.torch.save_file({**safetensors.torch.load_file(path), "scale": torch.tensor([1.0, 2.0, 3.0])}, path)
    assert MirrorGAN.from_pretrained(folder, only="images").scale.tolist() == [1, 2, 3]
    assert not hasattr(MirrorGAN.from_pretrained(folder, only="captions"), "scale")


def test_missing_weights_of_a_part_are_found_although_others_are_not_read(folder):
    path = folder / "model.safetensors"
    state = safetensors.torch.load_file(path)
    del state["generator.initial.linear.weight"]
    safetensors.torch.save_file(state, path)
    with pytest.raises(ValueError, match=r"1 tensors are missing \(such as generator\.initial\.linear\.weight\)"):
        MirrorGAN.from_pretrained(folder, only="images")
    assert MirrorGAN.from_pretrained(folder, only="captions").only == "captions"


def test_a_system_that_samples_with_its_captioner_keeps_it(tmp_path):
    changes = {name: value for name, value in SMALL.items() if name != "condition_dim"}
    config = PPGNConfig(**{**changes, "channels": 4, "resolutions": (8, 16)}, sampling_steps=2)
    PPGN(config, Vocabulary.build(CAPTIONS)).save_pretrained(tmp_path)
    model, whole = PPGN.from_pretrained(tmp_path, only="images"), PPGN.from_pretrained(tmp_path)
    assert_close(model.generate(CAPTIONS, seed=1), whole.generate(CAPTIONS, seed=1), atol=0, rtol=0)


def test_a_config_with_the_bare_name_of_a_backbone_is_read(folder):
    """As versions without other fields wrote it."""
    edit_config(folder, captioner_backbone="conv", image_backbone="resnet18")
    assert MirrorGAN.from_pretrained(folder).config.image_backbone == BackboneConfig("resnet18")


def test_the_folder_holds_three_readable_files_and_no_pickle(folder):
    assert sorted(files_of(folder)) == ["config.json", "model.safetensors", "vocabulary.json"]
    assert json.loads((folder / "config.json").read_text())["vocabulary_size"] == 8
    for content in files_of(folder).values():
        with pytest.raises((pickle.UnpicklingError, ValueError, KeyError, EOFError, IndexError)):
            pickle.loads(content)
    assert all((folder / name).stat().st_mode & 0o777 == 0o644 for name in files_of(folder))


def test_channels_last_weights_are_saved(tmp_path):
    model = make().to(memory_format=torch.channels_last)
    model.save_pretrained(tmp_path)
    assert_close(MirrorGAN.from_pretrained(tmp_path).state_dict(), make_contiguous(model.state_dict()), atol=0, rtol=0)


def make_contiguous(state):
    return {name: value.contiguous() for name, value in state.items()}


def fail(*arguments, **options):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("broken", ["os.replace", "safetensors.torch.save_file"])
def test_an_interrupted_save_keeps_the_old_model(folder, monkeypatch, broken):
    before = files_of(folder)
    other = make(["green leaves"], resolutions=(4, 16))
    with monkeypatch.context() as patch:
        patch.setattr(broken, fail)
        with pytest.raises(OSError, match="No space left"):
            other.save_pretrained(folder)
    assert files_of(folder) == before
    assert MirrorGAN.from_pretrained(folder).vocabulary == Vocabulary.build(CAPTIONS)


def test_a_save_over_an_old_model_replaces_it(folder):
    other = make(["green leaves"], resolutions=(4, 16))
    other.save_pretrained(folder)
    assert_close(MirrorGAN.from_pretrained(folder).state_dict(), other.state_dict(), atol=0, rtol=0)


@pytest.mark.parametrize("name", ["config.json", "vocabulary.json", "model.safetensors"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(
        FileNotFoundError, match=rf"model is not a model folder: {name} is missing; expected a folder that"
    ):
        MirrorGAN.from_pretrained(folder)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere is not a model folder: config\.json is missing"):
        MirrorGAN.from_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize("given", [".", "model/model.safetensors", "phases"])
def test_a_path_near_a_model_is_pointed_to_the_model(folder, given):
    with pytest.raises(FileNotFoundError, match=rf"is not a model folder: .*did you mean {re.escape(str(folder))}\?"):
        MirrorGAN.from_pretrained(folder.parent / given)


@pytest.mark.parametrize(
    ("part", "name"),
    [
        (TextEncoder, "text_encoder"),
        (ConditioningAugmentation, "conditioning"),
        (CascadedGenerator, "generator"),
        (Captioner, "captioner"),
    ],
)
def test_one_part_of_a_model_can_be_loaded_alone(folder, part, name):
    loaded = part.from_pretrained(folder)
    assert type(loaded) is part
    assert not loaded.training
    model = MirrorGAN.from_pretrained(folder)
    assert_close(loaded.state_dict(), getattr(model, name).state_dict(), atol=0, rtol=0)
    assert part.from_pretrained(folder, device="meta").state_dict().keys() == loaded.state_dict().keys()
    with pytest.raises(FileNotFoundError, match="is not a model folder"):
        part.from_pretrained(folder / "nowhere")


def test_a_subclass_of_a_part_is_not_in_a_saved_model(folder):
    class OtherEncoder(TextEncoder):
        pass

    with pytest.raises(TypeError, match=r"OtherEncoder.from_pretrained: .* have other classes"):
        OtherEncoder.from_pretrained(folder)


def test_the_vocabulary_can_be_loaded_alone(folder):
    assert Vocabulary.from_pretrained(folder) == Vocabulary.build(CAPTIONS)


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_truncated_weights_are_damaged(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged, or not a safetensors file \("):
        MirrorGAN.from_pretrained(folder)


def test_pickled_weights_are_refused(folder):
    torch.save({"weight": torch.zeros(3)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"is damaged, or not a safetensors file"):
        MirrorGAN.from_pretrained(folder)


def test_weights_of_another_module_are_named(folder):
    save_weights(nn.Linear(3, 5), folder / "model.safetensors")
    message = (
        r"MirrorGAN: .*model\.safetensors holds the weights of another module: \d+ tensors are missing "
        r"\(such as text_encoder\..*\), 2 are unknown \(such as (bias|weight)\)"
    )
    with pytest.raises(ValueError, match=message):
        MirrorGAN.from_pretrained(folder)


def test_weights_of_other_sizes_are_named(folder):
    save_weights(make(channels=3), folder / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"MirrorGAN: generator\.\S+ in .* is \(.*\), expected \(.*\); the configuration"
    ):
        MirrorGAN.from_pretrained(folder)


def test_a_vocabulary_of_another_size_is_named(folder):
    Vocabulary.build(["one more word than before it had"]).save(folder / "vocabulary.json")
    with pytest.raises(ValueError, match=r"vocabulary\.json has 10 entries but the model was saved with 8; restore"):
        MirrorGAN.from_pretrained(folder)


def test_weights_for_a_vocabulary_of_another_size_are_named(folder):
    save_weights(make(["green leaves"]), folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"text_encoder\.embedding\.weight in .* is \(5, 5\), expected \(8, 5\)"):
        MirrorGAN.from_pretrained(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"config\.json is damaged: it is not JSON"),
        ("", r"config\.json is damaged: it is not JSON"),
        ("[]", r"config\.json is not a 'mirror-modules model 1' file"),
        ('{"format": "something else"}', r"config\.json is not a 'mirror-modules model 1' file"),
    ],
)
def test_a_damaged_config_is_named(folder, content, message):
    (folder / "config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        MirrorGAN.from_pretrained(folder)


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        (r"unknown field 'chanels'; did you mean 'channels'\?", {"chanels": 3}),
        (r"resolutions must be increasing powers of two", {"resolutions": [5]}),
        (r"MirrorGANConfig: resolutions must be a list of image sizes in pixels", {"resolutions": 5}),
        (r"channels must be a number or one per stage, 2 in all, but they are None", {"channels": None}),
        (r"the name of a backbone must be .*, not 'vgg'", {"captioner_backbone": "vgg"}),
    ],
)
def test_an_invalid_configuration_is_named(folder, message, changes):
    edit_config(folder, **changes)
    with pytest.raises(ValueError, match=r"config\.json is not a valid model configuration: .*" + message):
        MirrorGAN.from_pretrained(folder)


def test_a_damaged_vocabulary_is_named(folder):
    (folder / "vocabulary.json").write_text('{"format": ')
    with pytest.raises(ValueError, match=r"vocabulary\.json is not JSON text"):
        MirrorGAN.from_pretrained(folder)


def test_a_module_is_unchanged_after_a_failed_load(tmp_path):
    module, other = nn.Linear(3, 5), nn.Linear(3, 7)
    save_weights(other, tmp_path / "weights.safetensors")
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(ValueError, match=r"Linear: weight in .* is \(7, 3\), expected \(5, 3\)"):
        load_weights(module, tmp_path / "weights.safetensors")
    assert_close(module.state_dict(), before, atol=0, rtol=0)
    with pytest.raises(
        FileNotFoundError, match=r"nothing\.safetensors does not exist; expected the weights of a Linear"
    ):
        load_weights(module, tmp_path / "nothing.safetensors")


def test_weights_load_into_the_dtype_of_the_module(tmp_path):
    module, wide = nn.Linear(3, 5), nn.Linear(3, 5).double()
    save_weights(module, tmp_path / "weights.safetensors")
    load_weights(wide, tmp_path / "weights.safetensors")
    assert_close(wide.weight, module.weight.double(), atol=0, rtol=0)


def test_without_safetensors_the_error_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r"pip install 'mirror-modules\[hub\]'"):
        make().save_pretrained(tmp_path)
    assert os.listdir(tmp_path) == []


def test_the_weights_file_is_plain_safetensors(folder):
    state = safetensors.torch.load_file(folder / "model.safetensors")
    assert set(state) == set(make().state_dict())

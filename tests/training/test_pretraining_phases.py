"""Phases that pretrain an image backbone by captioning, which the phase after each of them freezes."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file

from mirror_modules.models import BackboneConfig, TextToImage
from mirror_modules.training.loop import train
from mirror_modules.training.recipes import PretrainingRecipe


def same(first, second):
    return all(torch.equal(value, second[name]) for name, value in first.items())


def with_pretraining(recipe, **fields):
    pretraining = PretrainingRecipe(steps=3, batch_size=7, **fields)
    return dataclasses.replace(recipe, pretraining=pretraining, evaluator_pretraining=pretraining)


@pytest.mark.parametrize("cached_mib", [0, 64])
@pytest.mark.parametrize("input_size", [None, 16])
def test_a_pretrained_backbone_is_frozen_in_the_phase_after_it(tiny_recipe, tmp_path, input_size, cached_mib):
    backbone = BackboneConfig("conv", input_size=input_size)
    model = dataclasses.replace(tiny_recipe.model, image_backbone=backbone, captioner_backbone=backbone)
    engine = dataclasses.replace(tiny_recipe.engine, cached_features_mib=cached_mib)
    recipe = with_pretraining(dataclasses.replace(tiny_recipe, model=model, engine=engine))
    assert recipe.phases == ("pretraining", "stem", "stream", "glam", "evaluator_pretraining", "evaluator")
    run = train(recipe, tmp_path / "run")
    before = {phase: load_file(run.weights(phase)) for phase in ("pretraining", "evaluator_pretraining")}
    for phase, name in {"stem": "pretraining", "evaluator": "evaluator_pretraining"}.items():
        state = load_file(run.weights(phase))
        assert all(torch.equal(state[f"image_encoder.backbone.{key}"], value) for key, value in before[name].items())
    first, second = before.values()
    weights = [key for key, value in first.items() if value.ndim > 1]
    assert weights
    assert not any(torch.equal(first[key], second[key]) for key in weights)
    model = TextToImage.from_pretrained(run.model)
    assert torch.equal(model.captioner.image_encoder.backbone.state_dict()[weights[0]], first[weights[0]])


def test_pretraining_trains_the_backbone_by_captioning(tiny_recipe, tmp_path):
    recipe = with_pretraining(tiny_recipe)
    run = train(recipe, tmp_path / "run", phases=["pretraining"])
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert [line["phase"] for line in lines] == ["pretraining"] * 3
    assert all("cross_entropy" in line for line in lines)
    again = train(recipe, tmp_path / "again", phases=["pretraining"])
    assert same(load_file(run.weights("pretraining")), load_file(again.weights("pretraining")))
    with pytest.raises(ValueError, match=r"phase 'evaluator' needs phase 'evaluator_pretraining', which .* lacks"):
        train(recipe, tmp_path / "run", phases=["evaluator"])


def test_a_frozen_backbone_cannot_be_pretrained(tiny_recipe):
    model = dataclasses.replace(tiny_recipe.model, image_backbone=BackboneConfig("conv", trainable=False))
    with pytest.raises(ValueError, match=r"phase 'pretraining' trains the backbone of phase 'stem' from scratch, but"):
        with_pretraining(dataclasses.replace(tiny_recipe, model=model))

"""The configuration of sizes and options, and its round trip through JSON."""

import dataclasses
import json

import pytest
import torch

from mirror_modules import BackboneConfig, MirrorGANConfig
from mirror_modules.interop import checksum
from mirror_modules.stem import ConvBackbone


def test_the_defaults_are_the_papers_sizes():
    config = MirrorGANConfig()
    assert (config.noise_dim, config.condition_dim, config.word_dim, config.embedding_dim) == (100, 100, 256, 300)
    assert (config.channels, config.residual_blocks, config.resolutions) == (32, 2, (64, 128, 256))


def test_presets():
    assert MirrorGANConfig.paper() == MirrorGANConfig()
    release = MirrorGANConfig.release()
    changed = {
        field.name
        for field in dataclasses.fields(release)
        if getattr(release, field.name) != getattr(MirrorGANConfig(), field.name)
    }
    assert changed == {"sentence_bias", "score_projection"}
    assert MirrorGANConfig.release(channels=3, sentence_bias=False).channels == 3
    assert not MirrorGANConfig.release(sentence_bias=False).sentence_bias
    assert MirrorGANConfig.paper(channels=3).channels == 3


def test_json_round_trip():
    config = MirrorGANConfig.release(resolutions=(4, 16), attention="word", text_dropout=0.25)
    assert MirrorGANConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert set(config.to_dict()) == {field.name for field in dataclasses.fields(config)}


def test_a_list_of_resolutions_becomes_a_tuple():
    config = MirrorGANConfig(resolutions=[4, 8])
    assert config.resolutions == (4, 8)
    assert hash(config) == hash(MirrorGANConfig(resolutions=(4, 8)))


def test_fields_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        MirrorGANConfig().channels = 3


def test_resolutions_must_not_be_empty():
    with pytest.raises(ValueError, match=r"MirrorGANConfig: resolutions is empty; give at least one image size"):
        MirrorGANConfig(resolutions=())


def test_unknown_fields_are_named():
    with pytest.raises(ValueError, match=r"MirrorGANConfig: unknown field 'chanels'; did you mean 'channels'\?"):
        MirrorGANConfig.from_dict({"chanels": 3})
    with pytest.raises(ValueError, match=r"MirrorGANConfig: unknown field 'zzz'\.$"):
        MirrorGANConfig.from_dict({"zzz": 3})


def test_a_backbone_is_a_name_a_record_or_its_fields():
    backbone = BackboneConfig("timm:resnet10t", weights="backbone.pth", input_size=64, layer=-2)
    for given in (backbone, dataclasses.asdict(backbone)):
        config = MirrorGANConfig(image_backbone=given, captioner_backbone="conv")
        assert config.image_backbone == backbone
        assert config.captioner_backbone == BackboneConfig("conv")
        assert MirrorGANConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("weights", "trainable", "expected"),
    [(None, None, True), ("package", None, False), ("package", True, True), (None, False, False)],
)
def test_pretrained_backbones_are_frozen_unless_told_otherwise(weights, trainable, expected):
    assert BackboneConfig("efficientnet_lite0", weights=weights, trainable=trainable).is_trainable is expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (3, r"expected the name of a backbone, or its fields with 'name' among them, not 3"),
        ({"weights": "x"}, r"its fields with 'name' among them"),
        ({"name": "conv", "wieghts": "x"}, r"BackboneConfig: unknown field 'wieghts'; did you mean 'weights'\?"),
        ({"name": ""}, r"name must be that of a backbone, such as 'conv', not ''"),
        ({"name": "conv", "weights": 3}, r"weights must be a string or None, but it is 3"),
        ({"name": "conv", "input_size": 0}, r"input_size must be a whole number of at least 1"),
        ({"name": "conv", "layer": "last"}, r"layer must be a whole number or None, but it is 'last'"),
        ({"name": "conv", "trainable": 1}, r"trainable must be True, False or None, but it is 1"),
    ],
)
def test_fields_of_a_backbone_are_checked(given, message):
    with pytest.raises(ValueError, match=message):
        MirrorGANConfig(captioner_backbone=given)


def test_the_checksum_is_recorded_and_checked(tmp_path):
    path = str(tmp_path / "backbone.pth")
    torch.save(ConvBackbone().state_dict(), path)
    backbone = BackboneConfig("conv", weights=path)
    recorded = backbone.recorded()
    assert recorded.sha256 == checksum(backbone.build())
    # Whether it is recorded is no difference between two configs.
    assert recorded == backbone
    assert recorded.recorded().sha256 == recorded.sha256
    assert BackboneConfig("conv").recorded().sha256 is None
    torch.save(ConvBackbone().state_dict(), path)
    with pytest.raises(ValueError, match=rf"have the checksum \w+, but sha256 is {recorded.sha256}; restore the weig"):
        recorded.build()
    recorded.build(load=False)
    with torch.device("meta"):
        recorded.build()

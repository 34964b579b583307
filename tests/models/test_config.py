"""The configuration of sizes and options, and its round trip through JSON."""

import dataclasses
import json

import pytest

from mirror_modules import MirrorGANConfig


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

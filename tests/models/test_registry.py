"""Systems are registered by name, which files and the command line use."""

from dataclasses import dataclass

import pytest
from torch import nn

from mirror_modules import DeconvolutionGenerator, SentenceProjection, Vocabulary
from mirror_modules.models import ModelConfig, TextToImage, build_model, get_system, register_system, registry

VOCABULARY = Vocabulary.build(["a red flower", "a white flower"])
SIZES = {"word_dim": 6, "channels": 4, "resolutions": (16,), "captioner_backbone": "conv"}


@dataclass(frozen=True)
class OwnConfig(ModelConfig):
    """A system of the user's own."""

    system = "own"
    attends = False


class Own(TextToImage):
    """A system that defines the minimum."""

    config_type = OwnConfig

    def build(self, config):
        self.conditioning = SentenceProjection(config.word_dim, config.condition_dim)
        self.generator = DeconvolutionGenerator(
            config.noise_dim, config.condition_dim, channels=config.channels, resolution=config.resolutions[0]
        )

    def conditions(self, sentence, noise):
        return [self.conditioning(sentence)]

    def images(self, noise, samples, words, word_mask=None, location=None, *, need_weights=False):
        return self.generator(noise, samples[0])


def test_a_system_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "_SYSTEMS", dict(registry._SYSTEMS))
    model = Own(OwnConfig(**SIZES), VOCABULARY).eval()
    with pytest.raises(ValueError, match=r"unknown system 'own'; there are .*\. Import the module that registers it"):
        build_model(model.config, VOCABULARY)
    assert register_system(Own) is Own
    assert register_system(Own) is Own
    model.save_pretrained(tmp_path)
    assert type(TextToImage.from_pretrained(tmp_path)) is Own

    class Other(Own):
        pass

    with pytest.raises(ValueError, match=r"register_system: 'own' is the name of Own; give Other another one, in Own"):
        register_system(Other)


def test_a_system_needs_a_name():
    class Nameless(TextToImage):
        pass

    with pytest.raises(ValueError, match=r"register_system: ModelConfig\.system must be the system's name, not ''"):
        register_system(Nameless)


def test_what_is_no_system_is_refused():
    class NoConfig(TextToImage):
        config_type = dict

    class ForgottenConfig(ModelConfig):
        system = "forgotten"
        depth: int = 3

    class Forgotten(TextToImage):
        config_type = ForgottenConfig

    @dataclass(frozen=True)
    class NumberConfig(ModelConfig):
        system = 7

    class Number(TextToImage):
        config_type = NumberConfig

    for wrong in (NoConfig, nn.Linear, "own", Own(OwnConfig(**SIZES), VOCABULARY)):
        with pytest.raises(ValueError, match="register_system: expected a class derived from TextToImage, with a data"):
            register_system(wrong)
    with pytest.raises(
        ValueError, match=r"ForgottenConfig must be a dataclass itself; decorate it with @dataclass\(fro"
    ):
        register_system(Forgotten)
    with pytest.raises(ValueError, match=r"NumberConfig\.system must be the system's name, not 7"):
        register_system(Number)
    for name in (7, ["own"], None):
        with pytest.raises(ValueError, match="unknown system"):
            get_system(name)
    for config in (None, {"system": "attngan"}):
        with pytest.raises(ValueError, match=r"build_model: config must be that of a system, such as .*, not"):
            build_model(config, VOCABULARY)

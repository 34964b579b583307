"""Systems are registered by name, which files and the command line use."""

from dataclasses import dataclass

import pytest

from mirror_modules import DeconvolutionGenerator, SentenceProjection, Vocabulary
from mirror_modules.models import ModelConfig, TextToImage, build_model, register_system, registry

VOCABULARY = Vocabulary.build(["a red flower", "a white flower"])


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
    model = Own(OwnConfig(word_dim=6, channels=4, resolutions=(16,), captioner_backbone="conv"), VOCABULARY).eval()
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

    with pytest.raises(ValueError, match=r"register_system: ModelConfig\.system is empty; give the system a name"):
        register_system(Nameless)

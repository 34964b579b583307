"""The oracle of synthetic flowers: what is read off an image, and what its caption named."""

import pytest
import torch

from mirror_modules.data import ATTRIBUTES, SyntheticFlowers, attributes_named, to_float
from mirror_modules.training import attributes
from mirror_modules.training.attributes import (
    AttributeJudge,
    attribute_accuracy,
    fit_attribute_judge,
    measure_attributes,
)
from mirror_modules.training.errors import TrainingError

N, RESOLUTION = 13, 16


@pytest.fixture(scope="module")
def drawn():
    flowers = SyntheticFlowers(N, resolution=64, seed=3)
    samples = [flowers[i] for i in range(N)]
    images = to_float(torch.stack([torch.from_numpy(sample.image) for sample in samples]))
    return images, samples


def test_only_what_a_caption_names_counts():
    read = {"size": ["small", "large", "small"], "petal_color": ["red", "red", "blue"]}
    named = [{"size": "small"}, {"size": "small", "petal_color": "red"}, {"petal_color": "red", "background": "sky"}]
    accuracy = attribute_accuracy(read, named)
    assert {name: (figure.share, figure.named) for name, figure in accuracy.items()} == {
        "size": (0.5, 2),
        "petal_color": (0.5, 2),
        "all": (0.5, 4),
    }
    assert accuracy["all"].standard_error == pytest.approx(0.25)


def test_an_attribute_that_nobody_names_has_no_figure():
    assert set(attribute_accuracy({"size": ["small"], "background": ["sky"]}, [{"size": "small"}])) == {"size", "all"}


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ([{"size": "small"}], "size has 2 values for 1 captions"),
        ([{}, {}], "no caption names an attribute; are these captions of synthetic flowers"),
    ],
)
def test_errors(named, message):
    with pytest.raises(ValueError, match="attribute_accuracy: " + message):
        attribute_accuracy({"size": ["small", "large"]}, named)


def test_drawn_flowers_have_what_their_captions_name_and_not_what_others_do(drawn):
    images, samples = drawn
    own = measure_attributes(images, [sample.captions[0] for sample in samples], None)
    assert own["measured_colors"]["all"]["share"] == 1
    other = measure_attributes(images, [sample.captions[0] for sample in samples[1:] + samples[:1]], None)
    assert other["measured_colors"]["all"]["share"] < 0.6
    assert "judge" not in own


def test_a_judge_reads_values_of_its_attributes(drawn):
    images, samples = drawn
    judge = AttributeJudge(64).eval()
    read = judge.read(images)
    assert {name: len(values) for name, values in read.items()} == dict.fromkeys(ATTRIBUTES, N)
    assert all(set(values) <= set(ATTRIBUTES[name]) for name, values in read.items())
    alone = judge.read(images[3:4])
    assert {name: values[3:4] for name, values in read.items()} == alone
    figures = measure_attributes(images, [sample.captions[0] for sample in samples], judge)
    named = sum(len(attributes_named(sample.captions[0])) for sample in samples)
    assert figures["judge"]["all"]["named"] == named


def test_a_judge_that_reads_badly_is_not_kept(tmp_path):
    with pytest.raises(
        TrainingError, match=r"for 16 pixels reads held-out flowers too badly \(petal_color .*99% of each"
    ):
        fit_attribute_judge(tmp_path / "judge.safetensors", RESOLUTION, steps=2, images=70)
    assert not list(tmp_path.iterdir())


def test_a_judge_that_is_there_is_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(attributes, "ENOUGH", 0.0)
    path = tmp_path / "new" / "judge.safetensors"
    first = fit_attribute_judge(path, RESOLUTION, steps=2, images=70)
    monkeypatch.setattr(attributes, "fit_network", None)
    again = fit_attribute_judge(path, RESOLUTION)
    assert not again.training
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in first.state_dict().items())


def test_a_judge_takes_no_random_numbers_from_others(tmp_path, monkeypatch):
    monkeypatch.setattr(attributes, "ENOUGH", 0.0)
    before = torch.get_rng_state()
    for _ in ("trained", "loaded"):
        fit_attribute_judge(tmp_path / "judge.safetensors", RESOLUTION, steps=2, images=70)
        assert torch.equal(torch.get_rng_state(), before)


def test_a_damaged_judge_is_named(tmp_path):
    path = tmp_path / "judge.safetensors"
    path.write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"judge\.safetensors is damaged"):
        fit_attribute_judge(path, RESOLUTION)

"""Attribute accuracy on synthetic flowers, and the classifier that predicts their attributes."""

import itertools

import pytest
import torch

from mirror_modules.data import ATTRIBUTES, SyntheticFlowers, attributes_named, measured_box, to_bytes, to_float
from mirror_modules.evaluation import attributes
from mirror_modules.evaluation.attributes import (
    AttributeClassifier,
    attribute_accuracy,
    fit_attribute_classifier,
    measure_attributes,
    predict_attributes,
)
from mirror_modules.training.errors import TrainingError

N, RESOLUTION = 13, 16


@pytest.fixture(scope="module")
def flowers():
    dataset = SyntheticFlowers(N, resolution=64, seed=3)
    samples = [dataset[i] for i in range(N)]
    images = to_float(torch.stack([torch.from_numpy(sample.image) for sample in samples]))
    return images, samples


def test_only_named_attributes_count():
    predicted = {"size": ["small", "large", "small"], "petal_color": ["red", "red", "blue"]}
    named = [{"size": "small"}, {"size": "small", "petal_color": "red"}, {"petal_color": "red", "background": "sky"}]
    accuracy = attribute_accuracy(predicted, named)
    assert {name: (each.share, each.named) for name, each in accuracy.items()} == {
        "size": (0.5, 2),
        "petal_color": (0.5, 2),
        "all": (0.5, 4),
    }
    assert accuracy["all"].standard_error == pytest.approx(0.25)


def test_an_attribute_that_no_caption_names_has_no_accuracy():
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


def test_measured_colors_match_the_own_caption_only(flowers):
    images, samples = flowers
    predicted = predict_attributes(images, None)
    own = measure_attributes(predicted, [sample.captions[0] for sample in samples])
    assert own["measured_colors"]["all"]["share"] == 1
    other = measure_attributes(predicted, [sample.captions[0] for sample in samples[1:] + samples[:1]])
    assert other["measured_colors"]["all"]["share"] < 0.6
    assert set(own) == {"measured_colors"}


def test_colors_of_scattered_flowers_are_measured_where_the_flowers_are():
    dataset = SyntheticFlowers(97, resolution=64, seed=3, scatter=True)
    samples = [dataset[i] for i in range(97)]
    captions = [sample.captions[0] for sample in samples]
    images = to_float(torch.stack([torch.from_numpy(sample.image) for sample in samples]))
    boxes = torch.tensor([sample.box for sample in samples])

    def share(boxes):
        predicted = predict_attributes(images, AttributeClassifier(64), boxes)
        assert set(predicted) == {"measured_colors"}
        return measure_attributes(predicted, captions)["measured_colors"]["all"]["share"]

    assert share(boxes) == 1
    assert share(measured_box(to_bytes(images))) > 0.95
    assert share(boxes.roll(1, dims=0)) < 0.8


def test_a_flower_without_a_box_is_looked_for_in_the_middle(flowers):
    images, _ = flowers
    predicted = predict_attributes(images, None, torch.zeros(N, 4))
    assert predicted == predict_attributes(images, None)


def test_the_classifier_predicts_a_value_of_each_attribute(flowers):
    images, samples = flowers
    classifier = AttributeClassifier(64).eval()
    predicted = classifier.predict(images)
    assert {name: len(values) for name, values in predicted.items()} == dict.fromkeys(ATTRIBUTES, N)
    assert all(set(values) <= set(ATTRIBUTES[name]) for name, values in predicted.items())
    alone = classifier.predict(images[3:4])
    assert {name: values[3:4] for name, values in predicted.items()} == alone
    accuracy = measure_attributes(predict_attributes(images, classifier), [sample.captions[0] for sample in samples])
    named = sum(len(attributes_named(sample.captions[0])) for sample in samples)
    assert accuracy["classifier"]["all"]["named"] == named


def test_predictions_do_not_depend_on_the_chunks(flowers, monkeypatch):
    images, _ = flowers
    classifier = AttributeClassifier(64).eval()
    whole = classifier.predict(images)
    logits = classifier(images)
    for (name, values), each in zip(ATTRIBUTES.items(), logits, strict=True):
        assert whole[name] == [values[i] for i in each.argmax(1)]
    monkeypatch.setattr(attributes, "CHUNK", 5)
    assert classifier.predict(images) == whole


def test_an_inaccurate_classifier_is_not_saved(tmp_path):
    with pytest.raises(
        TrainingError,
        match=r"for 16 pixels is not accurate enough on held-out flowers \(petal_color .*each must reach 99%",
    ):
        fit_attribute_classifier(tmp_path / "attributes.safetensors", RESOLUTION, steps=2, images=70)
    assert not list(tmp_path.iterdir())


def test_a_saved_classifier_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(attributes, "MIN_ACCURACY", 0.0)
    path = tmp_path / "new" / "attributes.safetensors"
    first = fit_attribute_classifier(path, RESOLUTION, steps=2, images=70)
    monkeypatch.setattr(attributes, "fit_network", None)
    again = fit_attribute_classifier(path, RESOLUTION)
    assert not again.training
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in first.state_dict().items())


def test_a_classifier_is_trained_once_for_all_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(attributes, "MIN_ACCURACY", 0.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    first = fit_attribute_classifier(tmp_path / "a.safetensors", RESOLUTION, steps=2, images=70)
    (kept,) = (tmp_path / "cache" / "mirror-modules").iterdir()
    capsys.readouterr()
    with monkeypatch.context() as without:
        without.setattr(attributes, "fit_network", None)
        second = fit_attribute_classifier(tmp_path / "b" / "b.safetensors", RESOLUTION, steps=2, images=70)
    assert capsys.readouterr().err == f"attribute classifier: {kept}, which an earlier run trained\n"
    assert (tmp_path / "b" / "b.safetensors").is_file()
    assert not second.training
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())
    # Other settings, or other drawings, are another classifier.
    fit_attribute_classifier(tmp_path / "c.safetensors", RESOLUTION, steps=3, images=70)
    assert len(list(kept.parent.iterdir())) == 2
    # A damaged file is replaced.
    kept.write_bytes(b"no tensors")
    third = fit_attribute_classifier(tmp_path / "d.safetensors", RESOLUTION, steps=2, images=70)
    assert all(torch.equal(value, third.state_dict()[name]) for name, value in first.state_dict().items())
    assert kept.stat().st_size > 1000


def test_a_folder_that_cannot_be_written_keeps_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(attributes, "MIN_ACCURACY", 0.0)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    fit_attribute_classifier(tmp_path / "a.safetensors", RESOLUTION, steps=2, images=70)
    assert (tmp_path / "a.safetensors").is_file()


def test_fitting_does_not_advance_the_global_generator(tmp_path, monkeypatch):
    monkeypatch.setattr(attributes, "MIN_ACCURACY", 0.0)
    before = torch.get_rng_state()
    for _ in ("trained", "loaded"):
        fit_attribute_classifier(tmp_path / "attributes.safetensors", RESOLUTION, steps=2, images=70)
        assert torch.equal(torch.get_rng_state(), before)


def test_in_a_log_the_training_is_announced_and_a_line_is_printed_every_minute(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(attributes, "MIN_ACCURACY", 0.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = tmp_path / "attributes.safetensors"
    fit_attribute_classifier(path, RESOLUTION, steps=2, images=70)
    (kept,) = (tmp_path / "mirror-modules").iterdir()
    assert capsys.readouterr().err.splitlines() == [
        f"attribute classifier: drawing 70 flowers and training on them for 2 steps, once; it is kept as {kept}",
        "attribute classifier: step 2 of 2, finished after 0 min 0 s",
    ]
    fit_attribute_classifier(path, RESOLUTION)
    assert capsys.readouterr().err == ""

    # Each reading of the clock is 25 seconds after the one before.
    seconds = itertools.count(0, 25)
    network = torch.nn.Linear(3, 1)
    loss = lambda rows, random: network(torch.ones(len(rows), 3)).sum()  # noqa: E731
    attributes.fit_network("classes", network, 7, loss, 8, 0, clock=lambda: next(seconds))
    assert capsys.readouterr().err.splitlines() == [
        "classes: step 3 of 8, 2 min 5 s left",
        "classes: step 6 of 8, 0 min 50 s left",
        "classes: step 8 of 8, finished after 3 min 20 s",
    ]


def test_a_damaged_file_is_named(tmp_path):
    path = tmp_path / "attributes.safetensors"
    path.write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"attributes\.safetensors is damaged"):
        fit_attribute_classifier(path, RESOLUTION)

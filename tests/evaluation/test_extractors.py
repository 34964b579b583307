"""The class classifier and Inception v3 as extractors."""

import pytest
import torch

from mirror_modules.data import CaptionedImage, InMemoryCaptions, to_float
from mirror_modules.evaluation import extractors
from mirror_modules.evaluation.extractors import fit_class_extractor
from mirror_modules.training.errors import TrainingError

COLORS = {3: (230, 20, 20), 8: (20, 230, 20), 11: (20, 20, 230)}


def make(classes=tuple(COLORS), each=20, size=16):
    random = torch.Generator().manual_seed(0)
    samples = []
    for i in range(each):
        for class_id in classes:
            noise = torch.randint(-20, 20, (size, size, 3), generator=random)
            image = (torch.tensor(COLORS.get(class_id, (9 * i, 0, 0))) + noise).clamp(0, 255).to(torch.uint8)
            samples.append(CaptionedImage(image.numpy(), (f"color {class_id}",), class_id, {}))
    return InMemoryCaptions(samples, max_words=5)


def test_arbitrary_class_ids_are_learned(tmp_path):
    captions, path = make(), tmp_path / "classes.safetensors"
    extractor = fit_class_extractor(path, captions, 16, seed=0, steps=60)
    assert "the 3 training classes, with an accuracy of 100.0% on held-out training images" in extractor.name
    images = to_float(captions.images)
    predicted = extractor.logits(images).argmax(1)
    assert torch.equal(predicted, captions.class_ids.unique(return_inverse=True)[1])
    features = extractor.features(images)
    assert len(features) == 60
    torch.testing.assert_close(extractor.features(images[7:8]), features[7:8])
    assert not features.requires_grad


def test_held_out_images_are_not_trained_on(tmp_path):
    captions, changed = make(), make()
    changed.images[::10] = 255 - changed.images[::10]
    extractor = fit_class_extractor(tmp_path / "one.safetensors", captions, 16, seed=0, steps=20)
    fit_class_extractor(tmp_path / "other.safetensors", changed, 16, seed=0, steps=20)
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "other.safetensors").read_bytes()
    assert torch.arange(60)[extractor.held_out].tolist() == [0, 10, 20, 30, 40, 50]


def test_larger_training_images_are_resized_to_the_models_resolution(tmp_path, monkeypatch):
    sizes = set()
    forward = extractors.ClassClassifier.forward

    def record_size(classifier, images):
        sizes.add(tuple(images.shape[1:]))
        return forward(classifier, images)

    monkeypatch.setattr(extractors.ClassClassifier, "forward", record_size)
    fit_class_extractor(tmp_path / "classes.safetensors", make(size=19), 16, seed=0, steps=2)
    assert sizes == {(3, 16, 16)}


def test_fitting_does_not_advance_the_global_generator(tmp_path):
    before = torch.get_rng_state()
    for _ in ("trained", "loaded"):
        fit_class_extractor(tmp_path / "classes.safetensors", make(), 16, seed=0, steps=2)
        assert torch.equal(torch.get_rng_state(), before)


def test_a_saved_classifier_is_loaded(tmp_path, monkeypatch):
    captions, path = make(), tmp_path / "classes.safetensors"
    first = fit_class_extractor(path, captions, 16, seed=0, steps=3)
    monkeypatch.setattr(extractors, "fit_network", None)
    again, images = fit_class_extractor(path, captions, 16, seed=5), to_float(captions.images)
    assert torch.equal(again.logits(images), first.logits(images))


@pytest.mark.parametrize("classes", [(3,), tuple(range(20))])
def test_too_few_classes_or_images_are_refused(tmp_path, classes):
    captions = make(classes, each=5)
    with pytest.raises(TrainingError, match=rf"training images have {len(classes)}; --inception needs no classes"):
        fit_class_extractor(tmp_path / "classes.safetensors", captions, 16, seed=0)
    assert not list(tmp_path.iterdir())


def test_a_saved_classifier_of_other_classes_is_refused(tmp_path):
    path = tmp_path / "classes.safetensors"
    fit_class_extractor(path, make(), 16, seed=0, steps=2)
    with pytest.raises(
        ValueError, match=r"classes\.safetensors.*ClassClassifier|ClassClassifier.*classes\.safetensors"
    ):
        fit_class_extractor(path, make((3, 8)), 16, seed=0)


def test_inception_matches_torchvisions_own_preprocessing(monkeypatch):
    torchvision = pytest.importorskip("torchvision")
    get_model, built = torchvision.models.get_model, []

    def build(name, **arguments):
        torch.manual_seed(0)
        built.append(get_model(name, **arguments))
        return built[-1]

    monkeypatch.setattr(torchvision.models, "get_model", build)
    extractor = extractors.inception_extractor(weights=None)
    (network,) = built
    images = torch.rand(3, 3, 299, 299, generator=torch.Generator().manual_seed(1)) * 2 - 1
    # Torchvision normalizes with ImageNet's statistics, and its network undoes the normalization.
    reference = get_model("inception_v3", weights=None, init_weights=False, transform_input=True).eval()
    reference.load_state_dict(
        {**network.state_dict(), "fc.weight": torch.eye(1000, 2048), "fc.bias": torch.zeros(1000)}
    )
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        expected = reference(((images + 1) / 2 - mean.view(3, 1, 1)) / std.view(3, 1, 1))
    features = extractor.features(images)
    assert features.shape == (3, 2048)
    torch.testing.assert_close(features[:, :1000], expected, rtol=1e-3, atol=1e-4)
    assert extractor.logits(images[:, :, ::7, ::7]).shape == (3, 1000)
    assert "Inception v3 (custom weights)" in extractor.name


def test_failed_download_of_inception_names_the_place_of_its_weights(monkeypatch):
    torchvision = pytest.importorskip("torchvision")

    def offline(name, **arguments):
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.models, "get_model", offline)
    with pytest.raises(
        OSError, match=r"no route to host\); put https://.*inception_v3.*pth into .*checkpoints, or use"
    ):
        extractors.inception_extractor()

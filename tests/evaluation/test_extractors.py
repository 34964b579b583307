"""The evaluators' backbones, the class classifier and Inception v3 as extractors."""

import dataclasses
from functools import partial

import pytest
import torch
from safetensors.torch import save_file

from mirror_modules import BackboneConfig, MirrorGANConfig
from mirror_modules.data import CaptionedImage, InMemoryCaptions, to_float
from mirror_modules.evaluation import extractors
from mirror_modules.evaluation.evaluation import evaluate
from mirror_modules.evaluation.extractors import backbone_extractors, fit_class_extractor
from mirror_modules.evaluation.retrieval import Evaluator
from mirror_modules.models import EncoderPair
from mirror_modules.stem import ConvBackbone
from mirror_modules.training.errors import TrainingError
from mirror_modules.training.loop import train
from mirror_modules.training.recipes import DataRecipe, EvaluatorRecipe
from tests.layouts import make_flowers

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


def make_evaluators(tiny_recipe, first, second, **model):
    """Evaluators with these configs of their backbones, which are small networks in fact, and their recipe."""
    recipe = dataclasses.replace(
        tiny_recipe,
        model=dataclasses.replace(tiny_recipe.model, **model),
        evaluator=EvaluatorRecipe(backbone=first),
        second_evaluator=EvaluatorRecipe(backbone=second),
    )
    config = MirrorGANConfig(word_dim=10, image_backbone="conv")
    pairs = [EncoderPair(config, 11, backbone=ConvBackbone(channels)).eval() for channels in (3, 5)]
    return [Evaluator("evaluator", "", pairs[0]), Evaluator("second_evaluator", "", pairs[1])], recipe


def test_the_features_are_those_of_the_backbones_before_the_projection(tiny_recipe):
    lite1, lite2 = (BackboneConfig(f"efficientnet_lite{i}", "package", input_size=192, layer=-1) for i in (1, 2))
    evaluators, recipe = make_evaluators(tiny_recipe, lite1, lite2)
    found = backbone_extractors(evaluators, recipe)
    assert [each.name for each in found] == [
        "EfficientNet-Lite1 (ImageNet; package weights), 192 px",
        "EfficientNet-Lite2 (ImageNet; package weights), 192 px",
    ]
    images = torch.rand(117, 3, 16, 16) * 2 - 1
    for each, evaluator in zip(found, evaluators):
        assert each.logits is None
        assert each.held_out == slice(None)
        features = each.features(images)
        assert not features.requires_grad
        torch.testing.assert_close(features, evaluator.pair.image_encoder.backbone(images).image)


LITE1 = BackboneConfig("efficientnet_lite1", "package")


@pytest.mark.parametrize(
    ("first", "second", "names"),
    [
        # The layer concerns the regions.
        (LITE1, dataclasses.replace(LITE1, layer=-1), ["EfficientNet-Lite1 (ImageNet; package weights)"]),
        (
            LITE1,
            dataclasses.replace(LITE1, input_size=64),
            ["EfficientNet-Lite1 (ImageNet; package weights)", "EfficientNet-Lite1 (ImageNet; package weights), 64 px"],
        ),
        # Trained by the run, from scratch or further.
        (BackboneConfig("conv"), dataclasses.replace(LITE1, trainable=True), []),
        (BackboneConfig("conv"), BackboneConfig("resnet18", "DEFAULT"), ["resnet18 (weights 'DEFAULT')"]),
        (
            LITE1,
            BackboneConfig("conv", "my.pth"),
            ["EfficientNet-Lite1 (ImageNet; package weights)", "conv (weights 'my.pth')"],
        ),
        (BackboneConfig("conv", trainable=False), BackboneConfig("conv"), []),
    ],
)
def test_pretrained_backbones_count_once(tiny_recipe, first, second, names):
    assert [each.name for each in backbone_extractors(*make_evaluators(tiny_recipe, first, second))] == names


@pytest.mark.parametrize("place", ["image_backbone", "captioner_backbone"])
def test_a_backbone_that_the_generator_was_trained_with_says_so(tiny_recipe, place):
    other = dataclasses.replace(LITE1, input_size=32)
    evaluators, recipe = make_evaluators(tiny_recipe, BackboneConfig("conv"), LITE1, **{place: other})
    (extractor,) = backbone_extractors(evaluators, recipe)
    assert extractor.name.endswith("(ImageNet; package weights), which the training of the generator used too")


def test_a_run_with_pretrained_evaluators_is_measured_on_their_features(tiny_recipe, tmp_path):
    """Nothing is trained, and no classifier is saved."""
    timm = pytest.importorskip("timm")
    weights = tmp_path / "weights.safetensors"
    save_file(timm.create_model("test_efficientnet").state_dict(), weights)
    backbone = partial(BackboneConfig, "timm:test_efficientnet", str(weights))
    evaluators = [dataclasses.replace(tiny_recipe.evaluator, steps=2, backbone=backbone(size)) for size in (32, 24)]
    root = make_flowers(tmp_path / "data", training=41, validation=13)
    recipe = dataclasses.replace(
        tiny_recipe,
        data=DataRecipe("oxford-flowers", str(root), None, None, held_out_share=0.3),
        evaluator=evaluators[0],
        second_evaluator=evaluators[1],
    )
    folder = train(recipe, tmp_path / "run")
    metrics = evaluate(folder.path)
    (second,) = metrics["further_extractors"]
    name = f"timm:test_efficientnet (weights {str(weights)!r})"
    assert [metrics["extractor"], second["extractor"]] == [f"{name}, 32 px", f"{name}, 24 px"]
    for figures in (metrics["features"], second["features"]):
        assert figures["real"]["distance_images"] == figures["generated"]["distance_images"] == 13
        assert figures["generated"]["frechet_distance"] > 0
        assert 0 < figures["generated"]["diversity"] < 2
        assert "inception_score" not in figures["generated"]
    assert metrics["features"]["real"] != second["features"]["real"]
    assert not (folder.path / "classifiers").exists()
    page = folder.report.read_text(encoding="utf-8")
    assert page.count("<b>Extractor:</b> timm:test_efficientnet") == 2
    assert "features" not in evaluate(folder.path, fit_classifier=False)

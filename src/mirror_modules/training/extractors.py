"""Networks whose features and classes images are compared by: FID, KID, Inception Score and diversity need one.

A figure depends on the network as much as on the images, so every report names it. None of these networks takes part in
the training of a generator.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mirror_modules.data import ATTRIBUTES, InMemoryCaptions, to_float
from mirror_modules.models.pretrained import load_weights, save_weights
from mirror_modules.stem.image_encoder import ConvBackbone
from mirror_modules.training.attributes import AttributeJudge, fit_network, with_seed
from mirror_modules.training.batches import at_resolution
from mirror_modules.training.errors import TrainingError

STEPS = 1_500
# Every tenth training image is held out, to say how well the classes are told.
HELD_OUT = 10
CHUNK = 100
INCEPTION_PIXELS = 299


class Extractor(NamedTuple):
    """What images (N, 3, H, W) in [-1, 1] are to a network."""

    name: str
    """Which network, trained on what: it stands beside every figure."""
    features: Callable[[Tensor], Tensor]
    """(N, D)"""
    logits: Callable[[Tensor], Tensor]
    """Of its classes, (N, K)."""
    unlearned: slice = slice(None)
    """Which of the training images it has not learned from."""


class ClassJudge(nn.Module):
    """A classifier of a data set's training classes.

    Args:
        classes: How many there are.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.backbone = ConvBackbone()
        self.head = nn.Linear(self.backbone.image_dim, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> logits (B, classes)."""
        return self.head(self.backbone(images).image)


def attribute_extractor(judge: AttributeJudge) -> Extractor:
    """The judge of a synthetic flower's attributes; its classes are the colors of the petals."""
    color = list(ATTRIBUTES).index("petal_color")
    return Extractor(
        "convolutional network trained on drawn flowers; classes: colors of the petals",
        lambda images: _in_chunks(lambda some: judge.backbone(some).image, images),
        lambda images: _in_chunks(lambda some: judge(some)[color], images),
    )


def inception_extractor(weights: Any = "DEFAULT", *, device: str = "cpu") -> Extractor:
    """Torchvision's Inception v3; its features are the last block's mean, (N, 2048), its classes ImageNet's.

    Images of any size are resized to 299 pixels. Other programs use other weights of this network and resize otherwise:
    their figures do not compare with these.

    Args:
        weights: As in torchvision; "DEFAULT" are the best published ones, fetched by torchvision where it has none yet.
        device: "cpu" or "cuda".

    Raises:
        OSError: The weights are not there and cannot be fetched.
    """
    from torchvision import models

    chosen = models.get_model_weights("inception_v3")[weights] if isinstance(weights, str) else weights
    try:
        network = models.get_model("inception_v3", weights=chosen, init_weights=False)
    except OSError as error:
        raise OSError(
            f"the weights of torchvision's inception_v3 cannot be fetched ({error}); put {chosen.url} into "
            f"{torch.hub.get_dir()}/checkpoints, or use --fit-judge."
        ) from error
    head, network.fc = network.fc.to(device), nn.Identity()
    # It expects ImageNet's normalization and undoes it: what it computes with is in [-1, 1], as ours.
    network.transform_input = False
    network.to(device).eval()

    def features(images: Tensor) -> Tensor:
        size = (INCEPTION_PIXELS, INCEPTION_PIXELS)
        return network(F.interpolate(images.to(device), size, mode="bilinear", antialias=True))

    named = getattr(chosen, "name", "given by hand")
    return Extractor(
        f"torchvision's Inception v3 ({named}), images resized to {INCEPTION_PIXELS} pixels",
        lambda images: _in_chunks(lambda some: features(some).cpu(), images),
        lambda images: _in_chunks(lambda some: head(features(some)).cpu(), images),
    )


def fit_class_extractor(
    path: Path, captions: InMemoryCaptions, resolution: int, seed: int, *, steps: int = STEPS
) -> Extractor:
    """A classifier of the training classes: trained and kept, or the one that is there.

    Args:
        path: Where it lies, a safetensors file.
        captions: The training split. Its images may be larger than the model's, for random crops.
        resolution: Height and width of the images that it is to judge: those of the model.
        seed: Decides its first weights and its batches.
        steps: Optimizer steps.

    Raises:
        TrainingError: There are fewer than two classes, or too few images of them.
        ValueError: The file is not that of a classifier of these classes.
    """
    classes, class_ids = captions.class_ids.unique(return_inverse=True)
    if not 2 <= len(classes) <= len(captions) // HELD_OUT:
        raise TrainingError(
            f"a judge of classes needs at least 2 of them, with {HELD_OUT} images each on average, but the "
            f"{len(captions)} training images have {len(classes)}; --inception needs no classes."
        )
    held_out = slice(None, None, HELD_OUT)
    judge = with_seed(seed, lambda: ClassJudge(len(classes)))
    if path.exists():
        load_weights(judge, path)
    else:
        learned = (torch.arange(len(captions)) % HELD_OUT).nonzero()[:, 0]

        def loss(rows: Tensor, random: torch.Generator) -> Tensor:
            images = to_float(at_resolution(captions.images[learned[rows]], resolution))
            if bool(torch.rand((), generator=random) < 0.5):
                images = images.flip(3)
            return F.cross_entropy(judge(images), class_ids[learned[rows]], label_smoothing=0.1)

        fit_network("judge of classes", judge, len(learned), loss, steps, seed, weight_decay=1e-4)
        path.parent.mkdir(exist_ok=True)
        save_weights(judge, path)
    judge.eval()
    logits = _in_chunks(lambda some: judge(to_float(at_resolution(some, resolution))), captions.images[held_out])
    accuracy = float((logits.argmax(1) == class_ids[held_out]).float().mean())
    return Extractor(
        f"convolutional network trained on the {len(classes)} training classes, which tells {accuracy:.1%} of the "
        "held-out training images",
        lambda images: _in_chunks(lambda some: judge.backbone(some).image, images),
        lambda images: _in_chunks(judge, images),
        held_out,
    )


@torch.no_grad()
def _in_chunks(network: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    return torch.cat([network(chunk) for chunk in images.split(CHUNK)])

"""Attribute accuracy on synthetic flowers: does a generated image have the attributes that its caption names?

An attribute classifier is trained on drawn flowers only; no generator is trained against it. It is accepted only if its
accuracy on held-out flowers is close to 1, so that an error on a generated image is attributable to the image.
Colors are also measured directly in the pixels, without a network.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mirror_modules._placing import crop_box
from mirror_modules._tiles import in_chunks
from mirror_modules.data import ATTRIBUTES, SyntheticFlowers, attributes_named, measured_colors, to_bytes, to_float
from mirror_modules.models.pretrained import load_weights, save_weights
from mirror_modules.stem.image_encoder import ConvBackbone
from mirror_modules.training.errors import TrainingError
from mirror_modules.training.log import in_minutes, progress_bar

# A seed that no recipe uses by default, so that the classifier's flowers differ from those of every run.
SEED = 4_000_000_007
TRAINING_IMAGES, HELD_OUT_IMAGES = 12_000, 1_000
BATCH_SIZE, STEPS, LEARNING_RATE = 64, 2_500, 3e-3
MIN_ACCURACY = 0.99
LOWEST_CLASSIFIED_RESOLUTION = 32
# Of a drawn flower that is not scattered, as a share of the image.
MEAN_EXTENT = 0.75
MIDDLE = ((1 - MEAN_EXTENT) / 2, (1 - MEAN_EXTENT) / 2, MEAN_EXTENT, MEAN_EXTENT)
CHUNK = 100
# Seconds between two printed lines of `fit_network` if there is no terminal.
LINE_SECONDS = 60.0

Network = TypeVar("Network", bound=nn.Module)


class AttributeClassifier(nn.Module):
    """Classifier of the attributes of drawn flowers: one backbone, one linear head per attribute.

        logits_a = W_a backbone(image) + b_a    for each attribute a of `ATTRIBUTES`

    Args:
        resolution: Height and width of the images.

    Examples:
        >>> import torch
        >>> from mirror_modules.evaluation.attributes import AttributeClassifier
        >>> classifier = AttributeClassifier(resolution=16).eval()
        >>> images = torch.zeros(2, 3, 16, 16)
        >>> [tuple(logits.shape) for logits in classifier(images)][:2]
        [(2, 8), (2, 6)]
        >>> sorted(classifier.predict(images)) == sorted(ATTRIBUTES)
        True
    """

    def __init__(self, resolution: int) -> None:
        super().__init__()
        # Each block halves the resolution; limit their number so that the global pooling still spans several positions.
        self.resolution = resolution
        self.backbone = ConvBackbone(32, blocks=min(4, max(2, (resolution // 2).bit_length() - 1)))
        self.heads = nn.Linear(self.backbone.image_dim, sum(map(len, ATTRIBUTES.values())))

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images (B, 3, H, W) in [-1, 1] -> logits (B, values) of each attribute, in the order of `ATTRIBUTES`."""
        logits = self.heads(self.backbone(images).image)
        return list(logits.split([len(values) for values in ATTRIBUTES.values()], dim=1))

    @torch.no_grad()
    def predict(self, images: Tensor) -> dict[str, list[str]]:
        """Most probable value of each attribute for images (N, 3, H, W); call it in evaluation mode."""

        def classify(chunk: Tensor) -> Tensor:
            return torch.stack([logits.argmax(1) for logits in self(chunk)], dim=1)

        indices = in_chunks(classify, images, size=CHUNK).T.tolist()
        return {name: [values[i] for i in column] for (name, values), column in zip(ATTRIBUTES.items(), indices)}


class AttributeAccuracy(NamedTuple):
    """Accuracy of images for one attribute of their captions."""

    share: float
    """Share of the captions whose image has the named value, in [0, 1]."""
    named: int
    """Number of captions that name the attribute."""
    standard_error: float
    """Standard error of the share over these captions."""


def attribute_accuracy(
    predicted: Mapping[str, Sequence[str]], named: Sequence[Mapping[str, str]]
) -> dict[str, AttributeAccuracy]:
    """Compare the attributes of images with those that their captions name.

        share_a = share of captions that name attribute a whose image has the named value

    Args:
        predicted: For each attribute, its value in each image.
        named: For each caption, the attributes that it names; the others are ignored.

    Returns:
        The accuracy of each predicted attribute that at least one caption names, and "all", which pools the named
        attributes of all captions.

    Raises:
        ValueError: The numbers of values and captions differ, or no caption names an attribute.

    Examples:
        >>> from mirror_modules.evaluation.attributes import attribute_accuracy
        >>> named = [{"size": "small"}, {"size": "small", "petal_color": "red"}]
        >>> accuracy = attribute_accuracy({"size": ["small", "large"], "petal_color": ["red", "red"]}, named)
        >>> {name: (each.share, each.named) for name, each in accuracy.items() if name != "all"}
        {'size': (0.5, 2), 'petal_color': (1.0, 1)}
    """
    correct: dict[str, list[bool]] = {}
    for name, values in predicted.items():
        if len(values) != len(named):
            raise ValueError(f"attribute_accuracy: {name} has {len(values)} values for {len(named)} captions.")
        matches = [value == caption[name] for value, caption in zip(values, named) if name in caption]
        if matches:
            correct[name] = matches
    if not correct:
        raise ValueError("attribute_accuracy: no caption names an attribute; are these captions of synthetic flowers?")
    correct["all"] = [match for matches in correct.values() for match in matches]
    return {name: _accuracy(matches) for name, matches in correct.items()}


def predict_attributes(
    images: Tensor, classifier: AttributeClassifier | None, boxes: Tensor | None = None
) -> dict[str, dict[str, list[str]]]:
    """Attributes of images (N, 3, H, W) in [-1, 1], by measured colors and by an attribute classifier.

    Args:
        images: Drawn or generated flowers.
        classifier: The attribute classifier; None to measure colors alone.
        boxes: Where the flowers are, (N, 4), if they may be anywhere; None if they are in the middle. With boxes, only
            colors are measured, because the classifier has seen flowers in the middle alone. An empty box, of a flower
            that was not found, is replaced by the middle.

    Returns:
        By method, "measured_colors" and, unless it is None, "classifier": for each attribute, its value in each image.
    """
    if boxes is not None:
        is_found = (boxes[:, 2:] > 0).all(dim=1, keepdim=True)
        images, classifier = centered(images, boxes.where(is_found, boxes.new_tensor(MIDDLE))), None
    predicted = {"measured_colors": measured_colors(to_bytes(images))}
    return predicted if classifier is None else {**predicted, "classifier": classifier.predict(images)}


def measure_attributes(
    predicted: Mapping[str, Mapping[str, Sequence[str]]], captions: Sequence[str]
) -> dict[str, object]:
    """Attribute accuracy of images, by each method of `predict_attributes`.

    Returns:
        The results of `attribute_accuracy` as nested dictionaries for JSON.
    """
    named = [attributes_named(caption) for caption in captions]
    return {
        method: {name: accuracy._asdict() for name, accuracy in attribute_accuracy(values, named).items()}
        for method, values in predicted.items()
    }


def centered(images: Tensor, boxes: Tensor) -> Tensor:
    """Resize images such that the box of each is in the middle, as large as that of the flowers in the middle.

    Args:
        images: (N, 3, H, W).
        boxes: x, y, width and height as shares of the image, (N, 4).

    Returns:
        (N, 3, H, W), gray where the image ends.
    """
    side = boxes[:, 2:].amax(dim=1, keepdim=True) / MEAN_EXTENT
    corner = boxes[:, :2] + boxes[:, 2:] / 2 - side / 2
    return crop_box(images, torch.cat((corner, side, side), dim=1).to(images))


def fit_attribute_classifier(
    path: Path, resolution: int, *, steps: int = STEPS, images: int = TRAINING_IMAGES
) -> AttributeClassifier:
    """Load an attribute classifier, or train one on drawn flowers and save it if there is no file.

    A trained classifier is also kept in the user's cache, `$XDG_CACHE_HOME/mirror-modules` or
    `~/.cache/mirror-modules`, from which other runs copy it.

    Args:
        path: Weights of the classifier, a safetensors file.
        resolution: Height and width of the images.
        steps: Number of optimizer steps.
        images: Number of flowers to train on.

    Returns:
        The classifier in evaluation mode.

    Raises:
        TrainingError: Its accuracy for some attribute of held-out flowers is below 99 %.
        ValueError: The file does not hold an attribute classifier for this resolution.
    """
    classifier = with_seed(SEED, lambda: AttributeClassifier(resolution))
    if path.exists():
        load_weights(classifier, path)
        return classifier.eval()
    kept = _cached_path(resolution, steps, images)
    if _load_if_intact(classifier, kept):
        print(f"attribute classifier: {kept}, which an earlier run trained", file=sys.stderr)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_weights(classifier, path)
        return classifier.eval()
    print(
        f"attribute classifier: drawing {images:,} flowers and training on them for {steps:,} steps, once; it is kept "
        f"as {kept}",
        file=sys.stderr,
    )
    flowers, labels = _draw_flowers(images, resolution, "train")

    def loss(rows: Tensor, random: torch.Generator) -> Tensor:
        logits = classifier(to_float(flowers[rows]))
        return torch.stack([F.cross_entropy(each, labels[rows, i]) for i, each in enumerate(logits)]).sum()

    fit_network("attribute classifier", classifier, images, loss, steps, SEED)
    held_out, held_out_labels = _draw_flowers(HELD_OUT_IMAGES, resolution, "validation")
    predicted = classifier.eval().predict(to_float(held_out))
    true = [{name: values[i] for (name, values), i in zip(ATTRIBUTES.items(), row)} for row in held_out_labels.tolist()]
    shares = {name: accuracy.share for name, accuracy in attribute_accuracy(predicted, true).items()}
    if min(shares.values()) < MIN_ACCURACY:
        listed = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
        raise TrainingError(
            f"the attribute classifier for {resolution} pixels is not accurate enough on held-out flowers ({listed}; "
            f"each must reach {MIN_ACCURACY:.0%}); train it longer, or at a higher resolution."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    save_weights(classifier, path)
    # Without a home folder, or on a full disk, the next run trains its own.
    with contextlib.suppress(OSError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        save_weights(classifier, kept)
    return classifier


def _cached_path(resolution: int, steps: int, images: int) -> Path:
    """Where a classifier with these settings is kept for all runs of the user; another path if drawings change."""
    drawn = _draw_flowers(4, resolution, "train")[0].numpy().tobytes()
    settings = f"{SEED} {steps} {images} {BATCH_SIZE} {LEARNING_RATE} {MIN_ACCURACY} {HELD_OUT_IMAGES} {ATTRIBUTES}"
    digest = hashlib.sha256(drawn + settings.encode()).hexdigest()[:12]
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "mirror-modules" / f"attributes-{resolution}-{digest}.safetensors"


def _load_if_intact(classifier: AttributeClassifier, path: Path) -> bool:
    """Load the weights of a file; False if there is none, or it is damaged."""
    try:
        load_weights(classifier, path)
    except (OSError, ValueError):
        return False
    return True


def with_seed(seed: int, make: Callable[[], Network]) -> Network:
    """Build a network with initial weights from a seed, without advancing the global random generator."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return make()


def fit_network(
    title: str,
    network: nn.Module,
    count: int,
    loss: Callable[[Tensor, torch.Generator], Tensor],
    steps: int,
    seed: int,
    *,
    weight_decay: float = 0.0,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Train a classifier with Adam and a one-cycle schedule, with a progress bar or a line every minute.

    Args:
        title: Name on the progress bar.
        network: The classifier.
        count: Number of training images.
        loss: Maps the indices of a batch (each below `count`) and a random generator to the loss.
        steps: Number of optimizer steps.
        seed: Seed of the batches.
        weight_decay: Weight decay of the optimizer.
        clock: Seconds since some moment.
    """
    optimizer = torch.optim.Adam(network.parameters(), LEARNING_RATE, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    random = torch.Generator().manual_seed(seed)
    started = printed = clock()
    with progress_bar(total=steps, desc=title, unit=" steps") as bar:
        for step in range(1, steps + 1):
            rows = torch.randint(count, (BATCH_SIZE,), generator=random)
            optimizer.zero_grad()
            loss(rows, random).backward()
            optimizer.step()
            schedule.step()
            bar.update()
            now = clock()
            if bar.disable and (now - printed >= LINE_SECONDS or step == steps):
                printed = now
                left = in_minutes((steps - step) * (now - started) / step)
                state = f"{left} left" if step < steps else f"finished after {in_minutes(now - started)}"
                print(f"{title}: step {step:,} of {steps:,}, {state}", file=sys.stderr)


def _draw_flowers(count: int, resolution: int, split: str) -> tuple[Tensor, Tensor]:
    """Flowers as bytes (N, H, W, 3), and the class index of each attribute (N, attributes)."""
    samples = SyntheticFlowers(count, resolution=resolution, seed=SEED, split=split, captions_per_image=1)
    images = torch.empty(count, resolution, resolution, 3, dtype=torch.uint8)
    labels = torch.empty(count, len(ATTRIBUTES), dtype=torch.long)
    for i in range(count):
        sample = samples[i]
        images[i] = torch.from_numpy(sample.image)
        labels[i] = torch.tensor([ATTRIBUTES[name].index(value) for name, value in sample.attributes.items()])
    return images, labels


def _accuracy(matches: Sequence[bool]) -> AttributeAccuracy:
    share = sum(matches) / len(matches)
    return AttributeAccuracy(share, len(matches), (share * (1 - share) / len(matches)) ** 0.5)

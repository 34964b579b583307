"""An oracle for synthetic flowers: which attributes does an image have, and are they those that its caption names?

A network learns to read them off drawn flowers: no generator was trained against it. It is kept only if it reads
flowers that it has not seen almost without mistakes, so that what it misses in a generated image is the image's fault.
Colors are measured in the pixels as well, without any network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mirror_modules.data import ATTRIBUTES, SyntheticFlowers, attributes_named, measured_colors, to_bytes, to_float
from mirror_modules.models.pretrained import load_weights, save_weights
from mirror_modules.stem.image_encoder import ConvBackbone
from mirror_modules.training.errors import TrainingError

# Flowers of their own: no recipe has this seed unless somebody wants it.
SEED = 4_000_000_007
TRAINING_IMAGES, HELD_OUT_IMAGES = 12_000, 1_000
BATCH_SIZE, STEPS, LEARNING_RATE = 64, 2_500, 3e-3
ENOUGH = 0.99
CHUNK = 100

Network = TypeVar("Network", bound=nn.Module)


class AttributeJudge(nn.Module):
    """Reads the attributes of a flower off its image.

        logits_a = W_a backbone(image) + b_a    for each attribute a of `ATTRIBUTES`

    Args:
        resolution: Height and width of the images.
    """

    def __init__(self, resolution: int) -> None:
        super().__init__()
        # Blocks halve the image; the last ones still have some positions to take a mean and a maximum of.
        self.resolution = resolution
        self.backbone = ConvBackbone(32, blocks=min(4, max(2, (resolution // 2).bit_length() - 1)))
        self.heads = nn.Linear(self.backbone.image_dim, sum(map(len, ATTRIBUTES.values())))

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images (B, 3, H, W) in [-1, 1] -> logits (B, values) of each attribute, in the order of `ATTRIBUTES`."""
        logits = self.heads(self.backbone(images).image)
        return list(logits.split([len(values) for values in ATTRIBUTES.values()], dim=1))

    @torch.no_grad()
    def read(self, images: Tensor) -> dict[str, list[str]]:
        """The likeliest value of each attribute for images (N, 3, H, W), in evaluation mode."""
        chunks = [[logits.argmax(1) for logits in self(chunk)] for chunk in images.split(CHUNK)]
        numbers = [torch.cat(parts).tolist() for parts in zip(*chunks)]
        return {name: [values[i] for i in each] for (name, values), each in zip(ATTRIBUTES.items(), numbers)}


class AttributeAccuracy(NamedTuple):
    """How often images have the value that their captions name, of one attribute."""

    share: float
    """In [0, 1]."""
    named: int
    """Captions that name the attribute."""
    standard_error: float
    """Of the share, over these captions."""


def attribute_accuracy(
    read: Mapping[str, Sequence[str]], named: Sequence[Mapping[str, str]]
) -> dict[str, AttributeAccuracy]:
    """Compare what images have with what their captions name.

        share_a = share of captions that name attribute a whose image has the named value

    Args:
        read: For each attribute the value of each image.
        named: What each caption names; attributes that it does not name do not count.

    Returns:
        For each attribute of `read` that some caption names. "all" takes every named attribute of every caption.

    Raises:
        ValueError: There are not as many values as captions, or no caption names anything.
    """
    right: dict[str, list[bool]] = {name: [] for name in read}
    for name, values in read.items():
        if len(values) != len(named):
            raise ValueError(f"attribute_accuracy: {name} has {len(values)} values for {len(named)} captions.")
        right[name] = [value == caption[name] for value, caption in zip(values, named) if name in caption]
    right = {name: hits for name, hits in right.items() if hits}
    if not right:
        raise ValueError("attribute_accuracy: no caption names an attribute; are these captions of synthetic flowers?")
    right["all"] = [hit for hits in right.values() for hit in hits]
    return {name: _share(hits) for name, hits in right.items()}


def measure_attributes(images: Tensor, captions: Sequence[str], judge: AttributeJudge | None) -> dict[str, object]:
    """Attribute accuracy of images (N, 3, H, W) in [-1, 1] by an attribute judge and by measured colors.

    Returns:
        Ready for JSON: "measured_colors", and "judge" if there is one, as `attribute_accuracy` has them.
    """
    named = [attributes_named(caption) for caption in captions]
    result = {"measured_colors": attribute_accuracy(measured_colors(to_bytes(images)), named)}
    if judge is not None:
        result["judge"] = attribute_accuracy(judge.read(images), named)
    return {by: {name: figure._asdict() for name, figure in figures.items()} for by, figures in result.items()}


def fit_attribute_judge(
    path: Path, resolution: int, *, steps: int = STEPS, images: int = TRAINING_IMAGES
) -> AttributeJudge:
    """Train an attribute judge on drawn flowers and keep it, or take the one that is there.

    Args:
        path: Where it lies, a safetensors file.
        resolution: Height and width of the images.
        steps: Optimizer steps.
        images: Flowers to train on.

    Raises:
        TrainingError: It reads some attribute of held-out flowers in fewer than 99 % of the cases.
        ValueError: The file is not that of an attribute judge of this resolution.
    """
    judge = with_seed(SEED, lambda: AttributeJudge(resolution))
    if path.exists():
        load_weights(judge, path)
        return judge.eval()
    drawn, values = _draw(images, resolution, "train")

    def loss(rows: Tensor, random: torch.Generator) -> Tensor:
        logits = judge(to_float(drawn[rows]))
        return torch.stack([F.cross_entropy(each, values[rows, i]) for i, each in enumerate(logits)]).sum()

    fit_network("attribute judge", judge, images, loss, steps, SEED)
    flowers, truth = _draw(HELD_OUT_IMAGES, resolution, "validation")
    read = judge.eval().read(to_float(flowers))
    names = list(ATTRIBUTES)
    told = [{name: ATTRIBUTES[name][i] for name, i in zip(names, row)} for row in truth.tolist()]
    shares = {name: figure.share for name, figure in attribute_accuracy(read, told).items()}
    if min(shares.values()) < ENOUGH:
        figures = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
        raise TrainingError(
            f"the attribute judge for {resolution} pixels reads held-out flowers too badly ({figures}; {ENOUGH:.0%} of "
            "each is asked for); train it longer, or at a higher resolution."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    save_weights(judge, path)
    return judge


def with_seed(seed: int, make: Callable[[], Network]) -> Network:
    """A new network whose first weights a seed decides; what others draw stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return make()


def fit_network(
    what: str,
    network: nn.Module,
    count: int,
    loss: Callable[[Tensor, torch.Generator], Tensor],
    steps: int,
    seed: int,
    *,
    weight_decay: float = 0.0,
) -> None:
    """Train a judge, with a progress bar.

    Args:
        what: Its name on the bar.
        network: The judge.
        count: Images to learn from.
        loss: From the numbers of a batch's images, below `count`, and a source of random numbers to what is descended.
        steps: Optimizer steps.
        seed: Decides the batches.
        weight_decay: That of the optimizer.
    """
    from tqdm import tqdm

    optimizer = torch.optim.Adam(network.parameters(), LEARNING_RATE, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    random = torch.Generator().manual_seed(seed)
    for _ in tqdm(range(steps), desc=what, unit=" steps", dynamic_ncols=True, disable=None):
        rows = torch.randint(count, (BATCH_SIZE,), generator=random)
        optimizer.zero_grad()
        loss(rows, random).backward()
        optimizer.step()
        schedule.step()


def _draw(count: int, resolution: int, split: str) -> tuple[Tensor, Tensor]:
    """Flowers as bytes (N, H, W, 3), and the number of each attribute's value (N, attributes)."""
    samples = SyntheticFlowers(count, resolution=resolution, seed=SEED, split=split, captions_per_image=1)
    images = torch.empty(count, resolution, resolution, 3, dtype=torch.uint8)
    truth = torch.empty(count, len(ATTRIBUTES), dtype=torch.long)
    for i in range(count):
        sample = samples[i]
        images[i] = torch.from_numpy(sample.image)
        truth[i] = torch.tensor([ATTRIBUTES[name].index(value) for name, value in sample.attributes.items()])
    return images, truth


def _share(hits: Sequence[bool]) -> AttributeAccuracy:
    share = sum(hits) / len(hits)
    return AttributeAccuracy(share, len(hits), (share * (1 - share) / len(hits)) ** 0.5)

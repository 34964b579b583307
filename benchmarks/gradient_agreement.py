"""How much a captioner's gradient at an image depends on the image's invisible details.

    python -m benchmarks.gradient_agreement runs/flowers-64 [--images 100]

The run needs its phase `stream`. At real validation images, resized to each resolution of the generator, the gradient
of the redescription loss is compared with that at the same image plus Gaussian noise. Printed, as Markdown: the mean
cosine of the two, for each standard deviation of the noise, where the range of a pixel is 2; and the share of the
squared norm of the gradient that its means over 4 x 4 pixels keep.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from mirror_modules import RedescriptionLoss
from mirror_modules.data import to_float
from mirror_modules.functional import append_end
from mirror_modules.models import build_model
from mirror_modules.models.pretrained import load_weights
from mirror_modules.training.batches import load_splits
from mirror_modules.training.folder import RunFolder
from mirror_modules.training.step import as_learned
from mirror_modules.training.validation import unseen_pairs

# 2.5 and 13 of 256 levels of gray.
DEVIATIONS = (0.02, 0.1)
CHUNK = 50
BLOCK = 4


def main() -> None:
    """Measure one run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--images", type=int, default=100)
    options = parser.parse_args()
    folder = RunFolder(options.run)
    recipe = folder.read_recipe()
    splits = load_splits(recipe.data, recipe.model, recipe.seed)
    captioner = build_model(recipe.model, splits.vocabulary).captioner
    load_weights(captioner, folder.weights("stream"))
    redescription = RedescriptionLoss(captioner.eval(), reduction="none")
    unseen = unseen_pairs(splits, recipe.model.max_words).spread(options.images)
    tokens, word_mask = append_end(unseen.tokens, unseen.word_mask)
    noises = " | ".join(f"noise of {deviation:g}" for deviation in DEVIATIONS)
    print(f"| pixels | {noises} | share kept by {BLOCK} x {BLOCK} means |\n|---|{'---|' * (len(DEVIATIONS) + 1)}")
    for size in recipe.model.resolutions:
        images = F.interpolate(to_float(unseen.images), size=size, mode="bilinear", antialias=True)

        def loss(chunk: Tensor, rows: slice) -> Tensor:
            seen = as_learned(chunk, recipe.model, "captioner_backbone")
            return redescription(seen, tokens[rows], word_mask[rows])

        cosines = [f"{agreement(loss, images, deviation):.2f}" for deviation in DEVIATIONS]
        print(f"| {size} | {' | '.join(cosines)} | {coarse_share(gradients(loss, images)):.2f} |")


def agreement(loss: Callable[[Tensor, slice], Tensor], images: Tensor, deviation: float) -> float:
    """The mean cosine of the gradients at images and at the same images with noise.

    Args:
        loss: Loss of each image of a chunk, (b,), given the images and their rows.
        images: (N, 3, H, W).
        deviation: Standard deviation of the noise.
    """
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    pairs = gradients(loss, images).flatten(1), gradients(loss, images + deviation * noise).flatten(1)
    return float(F.cosine_similarity(*pairs).mean())


def coarse_share(gradient: Tensor) -> float:
    """The share of the squared norm that remains of the means over blocks of pixels, over all images."""
    means = F.avg_pool2d(gradient, BLOCK)
    return float(means.square().sum() * BLOCK**2 / gradient.square().sum())


def gradients(loss: Callable[[Tensor, slice], Tensor], images: Tensor) -> Tensor:
    """The gradient of each image's loss at the image, (N, 3, H, W)."""
    found = []
    for i in range(0, len(images), CHUNK):
        chunk = images[i : i + CHUNK].clone().requires_grad_(True)
        found.append(torch.autograd.grad(loss(chunk, slice(i, i + CHUNK)).sum(), chunk)[0])
    return torch.cat(found)


if __name__ == "__main__":
    main()

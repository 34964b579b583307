"""How the gradients of the adversarial and the redescription loss differ between images.

    python benchmarks/gradient_norms.py runs/demo [--images 1000] [--plot FILE.png]

The run must have its checkpoints, which hold the discriminators. For images of held-out captions, the gradient of each
loss at the finest image is measured, and its norm |a| (adversarial) and |b| (redescription) over each image. Printed,
as Markdown: quantiles of |a|, |b| and |b| / |a| in multiples of the median, and the share of the sum of squared norms
that the tenth of the images with the largest norms has.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

from mirror_modules import MirrorGAN, RedescriptionLoss
from mirror_modules.adversarial import generator_loss
from mirror_modules.functional import append_end
from mirror_modules.training.batches import load_splits
from mirror_modules.training.checkpoints import Checkpoints, load_checkpoint
from mirror_modules.training.folder import RunFolder
from mirror_modules.training.validation import Unseen, generate_images, unseen_pairs

QUANTILES = (0.01, 0.1, 0.5, 0.9, 0.99)
CHUNK = 50


def main() -> None:
    """Measure one run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    folder = RunFolder(options.run)
    recipe = folder.read_recipe()
    model = MirrorGAN.from_pretrained(folder.model)
    unseen = unseen_pairs(load_splits(recipe.data, recipe.model, recipe.seed), recipe.model.max_words)
    adversarial, redescription = measure(folder, model, unseen.spread(options.images), recipe.seed)
    ratio = redescription / adversarial
    print(f"| multiples of the median | {' | '.join(f'{q:.0%}' for q in QUANTILES)} | share of the largest tenth |")
    print(f"|---|{'---|' * (len(QUANTILES) + 1)}")
    for name, norms in (("adversarial", adversarial), ("redescription", redescription), ("quotient", ratio)):
        quantiles = torch.quantile(norms / norms.median(), torch.tensor(QUANTILES))
        squares = norms.square().sort(descending=True).values
        share = squares[: len(squares) // 10].sum() / squares.sum()
        print(f"| {name} | {' | '.join(f'{q:.2f}' for q in quantiles)} | {share:.0%} |")
    if options.plot is not None:
        draw(adversarial, redescription, options.plot)


def measure(folder: RunFolder, model: MirrorGAN, unseen: Unseen, seed: int) -> tuple[Tensor, Tensor]:
    """The gradient norm of each loss at each image, two tensors (N,)."""
    discriminator = load_discriminator(folder, model)
    redescription = RedescriptionLoss(model.captioner, reduction="none")
    images = generate_images(model, unseen.tokens, unseen.word_mask, seed)
    with torch.no_grad():
        sentences = model.text_encoder(unseen.tokens, unseen.word_mask).sentence
    norms = []
    for i in range(0, len(images), CHUNK):
        rows = slice(i, i + CHUNK)
        chunk = images[rows].requires_grad_(True)
        # Sums of losses of single images: the gradient at an image is that of its own loss.
        first = generator_loss(discriminator(chunk, sentences[rows])) * len(chunk)
        tokens, word_mask = append_end(unseen.tokens[rows], unseen.word_mask[rows])
        second = redescription(chunk, tokens, word_mask).sum()
        gradients = (torch.autograd.grad(loss, chunk)[0].flatten(1).norm(dim=1) for loss in (first, second))
        norms.append(torch.stack(tuple(gradients)))
    adversarial, of_captioner = torch.cat(norms, dim=1)
    return adversarial, of_captioner


def load_discriminator(folder: RunFolder, model: MirrorGAN) -> nn.Module:
    """The discriminator of the finest images, from the newest checkpoint."""
    path = Checkpoints(folder.checkpoints, "glam", kept=1).newest_whole()
    if path is None:
        raise SystemExit(f"{folder.path} has no checkpoint of phase glam, and so no discriminators; train it again.")
    resolution = model.config.resolutions[-1]
    weights = load_checkpoint(path)["state"]["networks"][f"discriminator_{resolution}"]
    discriminator = model.discriminators()[-1].requires_grad_(False)
    module = weights.get("module", weights)
    discriminator.load_state_dict({name.removeprefix("discriminator."): value for name, value in module.items()})
    return discriminator.eval()


def draw(adversarial: Tensor, redescription: Tensor, path: Path) -> None:
    """Histograms of both norms, in multiples of the median."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6, 3), layout="constrained")
    bins = torch.logspace(-3, 2, 60).tolist()
    for name, norms in (("adversarial", adversarial), ("redescription", redescription)):
        axis.hist((norms / norms.median()).tolist(), bins, histtype="stepfilled", alpha=0.6, label=name)
    axis.set_xscale("log")
    axis.set_xlabel("gradient norm at an image, multiples of the median")
    axis.set_ylabel("images")
    axis.legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()

"""Best of n and preference pairs, for any generator: a captioner chooses among the images of each caption.

The generator draws flowers and ignores half of what its caption names. The captioner is trained here, in seconds, on
other drawn flowers. What an image shows follows from its seed, so that the choice can be checked.
"""

import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mirror_modules import Captioner, RedescriptionScore, Vocabulary
from mirror_modules.data import ATTRIBUTES, SyntheticFlowers, attributes_named, draw_flower, to_float
from mirror_modules.functional import append_end, redescription_loss
from mirror_modules.pictures import save_images
from mirror_modules.stem import ConvBackbone
from mirror_modules.stream import best_of, preference_pairs

CAPTION = "a {size} {petal_color} flower with {background} behind it"
RESOLUTION, CAPTIONS, N = 32, 60, 8


def drawn_attributes(caption, seed):
    """Return what the image of a caption and a seed shows: a named attribute counts with probability 1/2."""
    rng = np.random.default_rng(seed)
    shown = {name: values[rng.integers(len(values))] for name, values in ATTRIBUTES.items()}
    return shown | {name: value for name, value in attributes_named(caption).items() if rng.random() < 0.5}


def generate(captions, seeds):
    """Generate images (B, 3, H, W) in [-1, 1] from captions and a seed for each."""
    rows = [
        draw_flower(drawn_attributes(caption, seed), RESOLUTION, np.random.default_rng(seed))
        for caption, seed in zip(captions, seeds)
    ]
    return to_float(torch.from_numpy(np.stack(rows)))


def train_score(steps=400, size=2000, batch_size=64):
    """Train a small captioner on drawn flowers, and return its likelihood of a caption as a score of images."""
    flowers = list(SyntheticFlowers(size, resolution=RESOLUTION, captions_per_image=1))
    images = torch.from_numpy(np.stack([flower.image for flower in flowers]))
    captions = [CAPTION.format(**flower.attributes) for flower in flowers]
    vocabulary = Vocabulary.build(captions)
    tokens, word_mask = append_end(*vocabulary.encode(captions))
    captioner = Captioner(ConvBackbone(8, blocks=3), len(vocabulary), embedding_dim=64, hidden_dim=64)
    optimizer = torch.optim.AdamW(captioner.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=steps)
    for _ in range(steps):
        rows = torch.randint(size, (batch_size,))
        logits = captioner(to_float(images[rows]), tokens[rows], word_mask[rows])
        optimizer.zero_grad()
        redescription_loss(logits, tokens[rows], word_mask[rows]).backward()
        optimizer.step()
        schedule.step()
    return RedescriptionScore(captioner, encode=lambda captions: append_end(*vocabulary.encode(captions)))


def write_pairs(score, captions, folder):
    """Write N images per caption as PNG, and the best and the worst of them as a line of JSON."""
    paths = {}
    for i, caption in enumerate(captions):
        seeds = range(i * N, i * N + N)
        paths[caption] = [str(folder / f"{seed}.png") for seed in seeds]
        for path, image in zip(paths[caption], generate([caption] * N, seeds)):
            save_images(image[None], path)
    pairs = preference_pairs(score, paths, margin=0.1, load=read_image)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair._asdict()) + "\n" for pair in pairs), "utf-8")
    return pairs


def read_image(path):
    """Read an image (3, H, W) in [-1, 1]."""
    with Image.open(path) as image:
        return to_float(torch.from_numpy(np.array(image.convert("RGB"))[None]))[0]


def right_attributes(captions, seeds):
    """Compute the share of images, one per caption and seed, that show each attribute as the caption names it."""
    rows = [(drawn_attributes(caption, seed), attributes_named(caption)) for caption, seed in zip(captions, seeds)]
    return {name: np.mean([shown[name] == named[name] for shown, named in rows]) for name in rows[0][1]}


def main():
    torch.set_num_threads(1)  # more are slower for models this small, not for real weights
    torch.manual_seed(0)
    # For real weights: RedescriptionScore(captioner_from(BlipForConditionalGeneration.from_pretrained(name),
    # AutoProcessor.from_pretrained(name))) with name = "Salesforce/blip-image-captioning-base".
    score = train_score()
    # A pipeline of diffusers as the generator: lambda captions, seeds: 2 * pipeline(captions, output_type="pt",
    # generator=[torch.Generator().manual_seed(seed) for seed in seeds]).images - 1
    make = generate

    # The score needs no `debias`: the likelihood without the image is the same for all images of a caption.
    flowers = SyntheticFlowers(CAPTIONS, split="validation", captions_per_image=1)
    captions = list(dict.fromkeys(CAPTION.format(**flower.attributes) for flower in flowers))
    best = best_of(score, make, captions, N)
    first, chosen = (right_attributes(captions, seeds) for seeds in (range(0, len(captions) * N, N), best.seeds))
    print(f"Images that show the attribute which the caption names, of {len(captions)} captions:")
    print(f"{'':12}  first of {N}  best of {N}")
    for name in first:
        print(f"{name:12}  {first[name]:10.0%}  {chosen[name]:9.0%}")

    with tempfile.TemporaryDirectory() as folder:
        pairs = write_pairs(score, captions, Path(folder))
        lines = (Path(folder) / "pairs.jsonl").read_text("utf-8").splitlines()
    print(f"\nPreference pairs in pairs.jsonl: {len(lines)}, such as\n{lines[0]}")
    prompts = [pair.prompt for pair in pairs]
    for name in ("chosen", "rejected"):
        shares = right_attributes(prompts, [int(Path(getattr(pair, name)).stem) for pair in pairs])
        print(f"{name:8} images show {np.mean(list(shares.values())):.0%} of the named attributes")


if __name__ == "__main__":
    main()

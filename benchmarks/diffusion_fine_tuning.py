"""Does balance help outside GANs? A small diffusion model, fine-tuned with redescription at fixed weights and balanced.

    python -m benchmarks.diffusion_fine_tuning runs/demo --out DIR [--seeds 0 1 2] [--jobs 2]

The demo run gives the frozen text encoder that the UNet attends to, the captioner and the encoder pair of phase `stem`
that give the two rewards, and the evaluator and the attribute classifier that measure, which give none. The UNet is
trained from scratch on drawn flowers of 32 pixels (as 12 channels of 16 x 16), then fine-tuned from the same weights in
each cell, with other batches and noise for each seed. The networks of the demo read images of 64 pixels: those of 32
are enlarged bilinearly, real ones as well.

- denoising loss alone;
- with both rewards on the one-step prediction of the image, at fixed weights. They are such that the mean over images
  of each reward's gradient norm at the predicted noise, in fractions of the denoising loss's, is the ratio of the cell
  before fine-tuning;
- the same, with that ratio for each image, by `balance_gradients`;
- with gradients of equal norm at all images, the ratio times the mean norm of the denoising loss's (`reference=`).

Finished cells are kept: the command resumes. It prints two tables as Markdown and draws a plot and a sheet of samples.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.redescription_score import cosine, features, load_pair
from mirror_modules import MirrorGAN, RedescriptionScore
from mirror_modules.data import ATTRIBUTES, SyntheticFlowers, attributes_named, to_float
from mirror_modules.evaluation.attributes import AttributeClassifier, attribute_accuracy, fit_attribute_classifier
from mirror_modules.functional import append_end, balance_gradients, frechet_distance, r_precision
from mirror_modules.models.encoder_pair import EncoderPair
from mirror_modules.training.folder import RunFolder

RESOLUTION, READ_AT, BATCH, TIMES = 32, 64, 32, 1000
TRAINING_IMAGES, CAPTIONS, REAL_IMAGES, SAMPLING_STEPS = 8192, 300, 2000, 20
# One-step predictions of later time steps are too blurred to caption.
CLEAR = 700
BASE_STEPS, BASE_RATE, BASE_DECAY = 3500, 1e-3, 0.999
TUNING_STEPS, TUNING_RATE, TUNING_DECAY, MEASURE_EVERY = 200, 2e-4, 0.98, 100
# How the rewards are weighted, and the ratio of each of the two.
CELLS = {
    "denoising alone": ("fixed", 0.0),
    "fixed, ratio 0.25": ("fixed", 0.25),
    "balanced, ratio 0.25": ("balanced", 0.25),
    "fixed, ratio 1": ("fixed", 1.0),
    "balanced, ratio 1": ("balanced", 1.0),
    "equal norms, ratio 1": ("equal", 1.0),
}
# No run draws its flowers with this seed.
SEED = 78


class Networks(NamedTuple):
    """The frozen networks of the demo run."""

    model: MirrorGAN
    score: RedescriptionScore
    stem: EncoderPair
    evaluator: EncoderPair
    classifier: AttributeClassifier


class Flowers(NamedTuple):
    """Drawn flowers: bytes (N, H, W, 3), and the captions of each."""

    images: Tensor
    captions: list[tuple[str, ...]]

    def batch(self, random: torch.Generator) -> tuple[Tensor, list[str]]:
        """Images (B, 3, H, W) in [-1, 1], each with one of its captions."""
        rows = torch.randint(len(self.captions), (BATCH,), generator=random)
        choices = torch.randint(len(self.captions[0]), (BATCH,), generator=random)
        captions = [self.captions[row][choice] for row, choice in zip(rows.tolist(), choices.tolist())]
        return to_float(self.images[rows]), captions


def main() -> None:
    """Run what is not there yet, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="cells at a time, one thread each")
    parser.add_argument("--cell", nargs=2, metavar=("NAME", "SEED"), help="fine-tune one cell and stop")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    networks = load_networks(options.run)
    if options.cell:
        name, seed = options.cell
        torch.set_num_threads(1)
        run_cell(networks, options.out, name, int(seed))
        return
    if not (options.out / "base.safetensors").exists():
        train_base(networks, options.out)
    if not (options.out / "base.json").exists():
        write_base(networks, options.out)
    start_cells(options)
    print(curves_table(options.out, options.seeds), results_table(options.out, options.seeds), sep="\n\n")
    draw(options.out, options.seeds)


def load_networks(run: Path) -> Networks:
    """The networks of an evaluated demo run, frozen."""
    folder = RunFolder(run)
    model = MirrorGAN.from_pretrained(folder.model).eval().requires_grad_(False)

    def encode(captions: list[str]) -> tuple[Tensor, Tensor]:
        return append_end(*model.vocabulary.encode(captions, max_words=model.config.max_words))

    pairs = [load_pair(folder, model, phase).requires_grad_(False) for phase in ("stem", "evaluator")]
    classifier = fit_attribute_classifier(folder.path / "classifiers" / "attributes.safetensors", READ_AT)
    return Networks(model, RedescriptionScore(model.captioner, encode=encode), *pairs, classifier.requires_grad_(False))


def draw_flowers(count: int, split: str) -> Flowers:
    """Flowers that no run was trained on."""
    flowers = list(SyntheticFlowers(count, resolution=RESOLUTION, split=split, seed=SEED))
    return Flowers(torch.from_numpy(np.stack([each.image for each in flowers])), [each.captions for each in flowers])


def make_unet() -> UNet2DConditionModel:
    """A UNet of 16 x 16 positions that attends to the words of the caption at 8 x 8."""
    return UNet2DConditionModel(
        sample_size=RESOLUTION // 2,
        in_channels=12,
        out_channels=12,
        block_out_channels=(48, 112),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def make_scheduler(kind: type = DDPMScheduler) -> Any:
    """The noise of the cosine schedule."""
    return kind(num_train_timesteps=TIMES, beta_schedule="squaredcos_cap_v2", clip_sample=True)


@torch.no_grad()
def encode_words(networks: Networks, captions: list[str]) -> dict[str, Tensor]:
    """What the UNet attends to."""
    tokens, word_mask = networks.model.vocabulary.encode(captions, max_words=networks.model.config.max_words)
    words = networks.stem.text_encoder(tokens, word_mask).words
    return {"encoder_hidden_states": words, "encoder_attention_mask": word_mask.long()}


def predict(networks: Networks, unet: nn.Module, images: Tensor, captions: list[str], random: torch.Generator) -> Any:
    """The noisy images, their time steps, the noise in them, and the noise that the UNet predicts."""
    pixels = F.pixel_unshuffle(images, 2)
    noise = torch.randn(pixels.shape, generator=random)
    timesteps = torch.randint(TIMES, (len(images),), generator=random)
    noisy = make_scheduler().add_noise(pixels, noise, timesteps)
    return noisy, timesteps, noise, unet(noisy, timesteps, **encode_words(networks, captions)).sample


def rewards(networks: Networks, noisy: Tensor, timesteps: Tensor, predicted: Any, captions: list[str]) -> list[Tensor]:
    """Mean log likelihood and mean cosine of the one-step predictions, each from its own copy of the noise."""
    signal = make_scheduler().alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    images = [to_pixels((noisy - (1 - signal).sqrt() * each) / signal.sqrt()) for each in predicted]
    both = networks.score(images[0], captions), cosine(networks.stem, networks.model, images[1], captions)
    return [(each * (timesteps < CLEAR)).mean() for each in both]


def to_pixels(latents: Tensor) -> Tensor:
    """The images (B, 3, 64, 64) of 12 channels of 16 x 16."""
    return enlarge(F.pixel_shuffle(latents, 2).clamp(-1, 1))


def enlarge(images: Tensor) -> Tensor:
    """Enlarge images to the resolution that the networks of the demo read."""
    return F.interpolate(images, size=(READ_AT, READ_AT), mode="bilinear")


def train_base(networks: Networks, out: Path) -> None:
    """Train the UNet from scratch with the denoising loss alone, and save its moving average."""
    torch.manual_seed(SEED)
    random = torch.Generator().manual_seed(SEED)
    unet = make_unet()
    average = torch.optim.swa_utils.AveragedModel(
        unet, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(BASE_DECAY), use_buffers=True
    )
    flowers = draw_flowers(TRAINING_IMAGES, "train")
    optimizer = torch.optim.AdamW(unet.parameters(), BASE_RATE, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, BASE_RATE, total_steps=BASE_STEPS, pct_start=0.05)
    started, losses = time.monotonic(), []
    for step in range(1, BASE_STEPS + 1):
        images, captions = flowers.batch(random)
        _, _, noise, predicted = predict(networks, unet, images, captions, random)
        loss = F.mse_loss(predicted, noise)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(unet)
        losses.append(loss.item())
        if step % 100 == 0:
            print(f"base: step {step}, {np.mean(losses[-100:]):.4f}, {time.monotonic() - started:.0f} s", flush=True)
    save_file(average.module.state_dict(), out / "base.safetensors")


def write_base(networks: Networks, out: Path) -> None:
    """Measure the base model, and the gradients of its rewards, from which the fixed weights follow."""
    unet = make_unet()
    unet.load_state_dict(load_file(out / "base.safetensors"))
    random = torch.Generator().manual_seed(SEED + 1)
    flowers = draw_flowers(1024, "train")
    norms = []
    for _ in range(16):
        images, captions = flowers.batch(random)
        noisy, timesteps, noise, predicted = predict(networks, unet, images, captions, random)
        predicted = predicted.detach().requires_grad_(True)
        losses = [F.mse_loss(predicted, noise), *rewards(networks, noisy, timesteps, (predicted,) * 2, captions)]
        gradients = [torch.autograd.grad(loss, predicted)[0].flatten(1).norm(dim=1) for loss in losses]
        norms.append(torch.stack(gradients, dim=1)[timesteps < CLEAR])
    denoising, *others = torch.cat(norms).T
    weights = [(denoising.mean() / each.mean()).item() for each in others]
    # The share of the sum of squared gradient norms that the tenth of the images with the largest holds.
    shares = [
        (squares.sort(descending=True).values[: len(squares) // 10].sum() / squares.sum()).item()
        for squares in (each.square() for each in (denoising, *others))
    ]
    quantiles = [
        torch.quantile(each / denoising / (each / denoising).median(), torch.tensor([0.05, 0.95])).tolist()
        for each in others
    ]
    record = {
        "denoising_norm": denoising.mean().item(),
        "weights": weights,
        "shares": shares,
        "quantiles": quantiles,
        "measured": measure(networks, unet, out / "base"),
    }
    (out / "base.json").write_text(json.dumps(record, indent=1))


def run_cell(networks: Networks, out: Path, name: str, seed: int) -> None:
    """Fine-tune the base model in one way, and write what was measured on the way."""
    kind, ratio = CELLS[name]
    unet = make_unet()
    unet.load_state_dict(load_file(out / "base.safetensors"))
    average = torch.optim.swa_utils.AveragedModel(
        unet, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(TUNING_DECAY), use_buffers=True
    )
    base = json.loads((out / "base.json").read_text())
    weights = [ratio * weight for weight in base["weights"]]
    random = torch.Generator().manual_seed(1000 + seed)
    flowers = draw_flowers(TRAINING_IMAGES, "train")
    optimizer = torch.optim.AdamW(unet.parameters(), TUNING_RATE, weight_decay=0.01, fused=True)
    measured = {0: base["measured"]}
    for step in range(1, TUNING_STEPS + 1):
        images, captions = flowers.batch(random)
        noisy, timesteps, noise, predicted = predict(networks, unet, images, captions, random)
        if kind == "fixed":
            copies: tuple[Tensor, ...] = (predicted,) * 3
        else:
            reference = base["denoising_norm"] if kind == "equal" else None
            copies = balance_gradients(predicted, (1, ratio, ratio), reference=reference)
        loss = F.mse_loss(copies[0], noise)
        if ratio > 0:
            likelihood, match = rewards(networks, noisy, timesteps, copies[1:], captions)
            # Balanced, weights have no effect.
            loss = loss - weights[0] * likelihood - weights[1] * match
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(unet)
        if step % MEASURE_EVERY == 0:
            images_to = out / cell_name(name, seed) if step == TUNING_STEPS else None
            measured[step] = measure(networks, copy.deepcopy(average.module), images_to)
    (out / f"{cell_name(name, seed)}.json").write_text(json.dumps(measured, indent=1))


def cell_name(name: str, seed: int) -> str:
    """The name of a cell's files."""
    return f"{name.replace(',', '').replace(' ', '-')}-{seed}"


@torch.no_grad()
def measure(networks: Networks, unet: nn.Module, images_to: Path | None) -> dict[str, float]:
    """Attribute accuracy, R-precision and distance to real drawings of images of held-out captions."""
    held_out = draw_flowers(REAL_IMAGES, "validation")
    captions = [each[0] for each in held_out.captions[:CAPTIONS]]
    images = torch.cat(list(sample(networks, unet.eval(), captions)))
    if images_to is not None:
        save_file({"images": images[:16]}, f"{images_to}.samples")
    classifier = networks.classifier
    accuracy = attribute_accuracy(classifier.predict(images), [attributes_named(each) for each in captions])
    result = {name: 100 * accuracy[name].share for name in (*ATTRIBUTES, "all")}
    random = torch.Generator().manual_seed(SEED)
    precision = r_precision(
        *features(networks.evaluator, networks.model, images, captions), candidates=100, generator=random
    )
    real = enlarge(to_float(held_out.images))
    # A second extractor: what both show is not an artifact of one.
    extractors = {"FID": classifier.backbone, "FID, evaluator": networks.evaluator.image_encoder}
    distances = {}
    for title, extractor in extractors.items():
        compared = [torch.cat([extractor(chunk).image for chunk in each.split(100)]) for each in (real, images)]
        distances[title] = frechet_distance(*compared)
    likelihood = torch.cat(
        [networks.score(images[i : i + 100], captions[i : i + 100]) for i in range(0, CAPTIONS, 100)]
    )
    result["R-precision"] = 100 * precision.top1
    return result | distances | {"log likelihood": likelihood.mean().item()}


def sample(networks: Networks, unet: nn.Module, captions: list[str]) -> Iterator[Tensor]:
    """Images (B, 3, H, W) in [-1, 1] by DDIM, without guidance, equal noise in every call."""
    scheduler = make_scheduler(DDIMScheduler)
    scheduler.set_timesteps(SAMPLING_STEPS)
    random = torch.Generator().manual_seed(SEED)
    for i in range(0, len(captions), 50):
        words = encode_words(networks, captions[i : i + 50])
        pixels = torch.randn(len(captions[i : i + 50]), 12, RESOLUTION // 2, RESOLUTION // 2, generator=random)
        for t in scheduler.timesteps:
            pixels = scheduler.step(unet(pixels, t, **words).sample, t, pixels).prev_sample
        yield to_pixels(pixels)


def start_cells(options: argparse.Namespace) -> None:
    """Fine-tune the cells that are not there yet, some processes at a time."""
    waiting = [
        (name, seed)
        for seed in options.seeds
        for name in CELLS
        if not (options.out / f"{cell_name(name, seed)}.json").exists()
    ]
    running: list[subprocess.Popen[bytes]] = []
    while waiting or running:
        while waiting and len(running) < options.jobs:
            name, seed = waiting.pop(0)
            command = [sys.executable, "-m", "benchmarks.diffusion_fine_tuning", options.run, "--out", options.out]
            running.append(subprocess.Popen([*command, "--cell", name, str(seed)]))
        time.sleep(1)
        if any(process.poll() not in (None, 0) for process in running):
            for process in running:
                process.terminate()
            raise SystemExit("a cell failed; see its error above")
        running = [process for process in running if process.poll() is None]


def read_cells(out: Path, seeds: list[int]) -> dict[str, list[dict[str, dict[str, float]]]]:
    """What was measured: for each cell, one record per seed, by step."""
    return {name: [json.loads((out / f"{cell_name(name, seed)}.json").read_text()) for seed in seeds] for name in CELLS}


def deviation(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Standard deviation over seeds, the first axis; 0 for a single seed."""
    return values.std(axis=0, ddof=min(1, len(values) - 1))


def results_table(out: Path, seeds: list[int]) -> str:
    """The last step of each cell: mean and standard deviation over seeds."""
    cells = read_cells(out, seeds)
    base = json.loads((out / "base.json").read_text())["measured"]
    lines = [f"| | {' | '.join(name.replace('_', ' ') for name in base)} |", f"|---|{'---|' * len(base)}"]
    lines.append(f"| before | {' | '.join(f'{value:.3g}' for value in base.values())} |")
    for name, records in cells.items():
        last = [record[str(TUNING_STEPS)] for record in records]
        values = {key: np.array([each[key] for each in last]) for key in base}
        shown = " | ".join(f"{each.mean():.3g} ± {deviation(each):.2g}" for each in values.values())
        lines.append(f"| {name} | {shown} |")
    return "\n".join(lines)


def curves_table(out: Path, seeds: list[int], keys: tuple[str, ...] = ("all", "R-precision", "FID")) -> str:
    """A few figures over the steps, each the mean over seeds."""
    cells = read_cells(out, seeds)
    steps = [str(step) for step in range(0, TUNING_STEPS + 1, MEASURE_EVERY)]
    lines = [f"| {', '.join(keys)} | {' | '.join(f'step {step}' for step in steps)} |", f"|---|{'---|' * len(steps)}"]
    for name, records in cells.items():
        means = [[np.mean([record[step][key] for record in records]) for key in keys] for step in steps]
        lines.append(f"| {name} | {' | '.join(', '.join(f'{mean:.1f}' for mean in each) for each in means)} |")
    return "\n".join(lines)


def draw(out: Path, seeds: list[int]) -> None:
    """A plot of attribute accuracy, R-precision and FID over the steps, and a sheet of samples, one row per cell."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from mirror_modules.pictures.grids import grid, write_png

    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    steps = range(0, TUNING_STEPS + 1, MEASURE_EVERY)
    for i, (name, records) in enumerate(read_cells(out, seeds).items()):
        style = {"color": ("black", "C0", "C0", "C1", "C1", "C2")[i], "linestyle": "--" if "fixed" in name else "-"}
        for axis, key in zip(axes, ("all", "R-precision", "FID")):
            values = np.array([[record[str(step)][key] for step in steps] for record in records])
            axis.errorbar(steps, values.mean(axis=0), deviation(values), label=name, capsize=2, **style)
            axis.set_xlabel("fine-tuning step")
    for axis, title in zip(axes, ("attributes, %", "R-precision, %", "FID")):
        axis.set_title(title)
    axes[0].legend(fontsize=8)
    figure.savefig(out / "curves.png", dpi=110)
    rows = [
        load_file(out / f"{name}.samples")["images"][:12] for name in ("base", *(cell_name(n, seeds[0]) for n in CELLS))
    ]
    write_png(grid(torch.cat(rows), columns=12), out / "samples.png")


if __name__ == "__main__":
    main()

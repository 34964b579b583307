"""A run: the phases one after the other, each kept on disk as soon as it is done.

Phase `stem` trains text and image encoder by the matching loss, `stream` the captioner on real pairs, `glam` the
generator against one discriminator per stage, and `judge` another encoder pair, for the evaluation alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

from mirror_modules.data import CaptionBatch
from mirror_modules.models import MirrorGAN
from mirror_modules.models.pretrained import load_weights, save_weights, write_whole
from mirror_modules.training.batches import Splits, load_splits, training_batches, unseen_captions
from mirror_modules.training.folder import RunFolder
from mirror_modules.training.log import PhaseLog
from mirror_modules.training.pretrain import EncoderPair, train_captioner, train_encoders
from mirror_modules.training.recipes import PHASES, MatchingRecipe, Recipe
from mirror_modules.training.state import start
from mirror_modules.training.step import adversarial_step

NEEDS = {"stem": (), "stream": ("stem",), "glam": ("stem", "stream"), "judge": ()}
# Each phase has random streams of its own, so that it comes out the same whether or not others ran before it.
SEED_OFFSETS = {"stem": 100, "stream": 200, "glam": 300, "judge": 400}


def train(recipe: Recipe, out: str | Path, *, phases: Sequence[str] = PHASES, device: str = "cpu") -> RunFolder:
    """Train the phases that the folder does not hold yet.

    Args:
        recipe: What to train.
        out: The run's folder. Finished phases in it are taken as they are.
        phases: Which to train, in any order.
        device: "cpu" or "cuda".

    Returns:
        The run's folder.

    Raises:
        ValueError: A phase is unknown or lacks the ones before it, the folder holds something else, or the recipe
            cannot be trained and evaluated on its data.
    """
    folder = RunFolder(out)
    for phase in phases:
        if phase not in PHASES:
            raise ValueError(f"unknown phase {phase!r}; there are {', '.join(PHASES)}.")
        for needed in NEEDS[phase]:
            if needed not in phases and not folder.weights(needed).exists():
                raise ValueError(f"phase {phase!r} needs phase {needed!r}, which {folder.path} lacks; train it too.")
    folder.check(recipe)
    todo = [phase for phase in PHASES if phase in phases and not folder.weights(phase).exists()]
    for phase in phases:
        if phase not in todo:
            print(f"{phase}: already trained, taken from {folder.weights(phase)}")
    if not todo:
        return folder
    splits = load_splits(recipe.data, recipe.model, recipe.seed)
    folder.check_vocabulary(splits.vocabulary)
    _check_feasible(recipe, splits)
    folder.begin(recipe)
    write_whole(folder.vocabulary, splits.vocabulary.save)
    trainers = {"stem": train_stem, "stream": train_stream, "glam": train_glam, "judge": train_judge}
    for phase in todo:
        torch.manual_seed(recipe.seed + SEED_OFFSETS[phase])
        module = trainers[phase](recipe, folder, splits, torch.device(device))
        save_weights(module, folder.weights(phase))
    return folder


def train_stem(recipe: Recipe, folder: RunFolder, splits: Splits, device: torch.device) -> nn.Module:
    """Text and image encoder by the matching loss."""
    return _train_pair("stem", recipe.stem, recipe, folder, splits, device)


def train_judge(recipe: Recipe, folder: RunFolder, splits: Splits, device: torch.device) -> nn.Module:
    """An encoder pair of its own seed, which no other phase uses."""
    return _train_pair("judge", recipe.judge, recipe, folder, splits, device)


def _train_pair(
    phase: str, matching: MatchingRecipe, recipe: Recipe, folder: RunFolder, splits: Splits, device: torch.device
) -> nn.Module:
    pair = EncoderPair(recipe.model, len(splits.vocabulary)).to(device)
    with PhaseLog(phase, matching.steps, folder.log, recipe.log_every) as log:
        train_encoders(pair, _batches(phase, recipe, splits, matching.batch_size, device), matching, log)
    return pair


def train_stream(recipe: Recipe, folder: RunFolder, splits: Splits, device: torch.device) -> nn.Module:
    """The captioner on real pairs; it starts from the image encoder of phase `stem` where they are alike."""
    captioner = MirrorGAN(recipe.model, splits.vocabulary).captioner
    if recipe.model.captioner_backbone == recipe.model.image_backbone:
        encoder = load_pair(folder, "stem", recipe, splits).image_encoder
        captioner.image_encoder = encoder if recipe.model.captioner_projection else encoder.backbone
    captioner.to(device)
    with PhaseLog("stream", recipe.stream.steps, folder.log, recipe.log_every) as log:
        batches = _batches("stream", recipe, splits, recipe.stream.batch_size, device)
        train_captioner(captioner, batches, recipe.stream, log)
    return captioner


def train_glam(recipe: Recipe, folder: RunFolder, splits: Splits, device: torch.device) -> nn.Module:
    """The generator against its discriminators; the model is kept with the averaged generator."""
    model = MirrorGAN(recipe.model, splits.vocabulary)
    model.text_encoder.load_state_dict(load_pair(folder, "stem", recipe, splits).text_encoder.state_dict())
    load_weights(model.captioner, folder.weights("stream"))
    model.to(device)
    random = torch.Generator().manual_seed(recipe.seed + SEED_OFFSETS["glam"])
    state = start(model, recipe.glam, random)
    batches = _batches("glam", recipe, splits, recipe.glam.batch_size, device)
    with PhaseLog("glam", recipe.glam.steps, folder.log, recipe.log_every) as log:
        for _ in range(recipe.glam.steps):
            batch = next(batches)
            log.step(len(batch.images), adversarial_step(state, batch, recipe.glam))
    state.painter.load_state_dict(state.average.module.state_dict())
    model.requires_grad_(True).eval().save_pretrained(folder.model)
    return state.painter


def load_pair(folder: RunFolder, phase: str, recipe: Recipe, splits: Splits) -> EncoderPair:
    """The encoder pair of phase `stem` or `judge`, in evaluation mode."""
    pair = EncoderPair(recipe.model, len(splits.vocabulary))
    load_weights(pair, folder.weights(phase))
    return pair.eval()


def _check_feasible(recipe: Recipe, splits: Splits) -> None:
    """Fail before anything is written and trained, and not at the end of it."""
    unseen, candidates = len(unseen_captions(splits)), recipe.evaluation.candidates
    if unseen < candidates:
        raise ValueError(
            f"evaluation.candidates={candidates} needs as many validation images with a caption that no training image "
            f"has, but there are {unseen}; take more validation images, or lower evaluation.candidates."
        )
    # Sizes that no network can have.
    MirrorGAN(recipe.model, splits.vocabulary)
    EncoderPair(recipe.model, len(splits.vocabulary))


def _batches(
    phase: str, recipe: Recipe, splits: Splits, batch_size: int, device: torch.device
) -> Iterator[CaptionBatch]:
    seed = recipe.seed + SEED_OFFSETS[phase] + 10
    return training_batches(splits.training, batch_size, recipe.model.resolutions[-1], seed, device)

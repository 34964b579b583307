"""From a recipe to batches: the two splits in memory, and a loader of training batches."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from mirror_modules.data import (
    CaptionBatch,
    CaptionedImages,
    ErrorReport,
    InMemoryCaptions,
    RepeatableBatches,
    SyntheticFlowers,
    open_captions,
    to_float,
)
from mirror_modules.data.files import CaptionedFiles, check_apart
from mirror_modules.data.images import shrink
from mirror_modules.models import MirrorGANConfig
from mirror_modules.stem import Vocabulary
from mirror_modules.training.errors import TrainingError, is_dead_worker
from mirror_modules.training.recipes import DataRecipe

# Random crops are taken from images larger by this factor, as in the published code.
CROP_MARGIN = 76 / 64


class Splits(NamedTuple):
    """Training and validation images, in memory, with the vocabulary of the training captions."""

    training: InMemoryCaptions
    """Every phase is trained on these."""
    validation: InMemoryCaptions
    """What is measured is measured on these."""
    left_out: Mapping[str, int] = {}
    """How many samples of "training" and of "validation" are damaged, and not among them."""

    @property
    def vocabulary(self) -> Vocabulary:
        """Built from the training captions alone."""
        return self.training.vocabulary


def load_splits(recipe: DataRecipe, model: MirrorGANConfig, seed: int) -> Splits:
    """Draw or decode both splits, with a progress bar.

    Raises:
        ValueError: The recipe's source needs a path, its files are not as expected, or a file is in both splits.
    """
    resolution = model.resolutions[-1]
    larger = round(resolution * CROP_MARGIN) if recipe.augment else resolution
    training: SyntheticFlowers | CaptionedFiles
    validation: SyntheticFlowers | CaptionedFiles
    reports = ErrorReport(), ErrorReport()
    if recipe.source == "synthetic-flowers":
        training = SyntheticFlowers(recipe.training_images or 4096, resolution=larger, seed=seed)
        validation = SyntheticFlowers(
            recipe.validation_images or 1000, resolution=resolution, seed=seed, split="validation"
        )
    else:
        if recipe.path is None:
            raise ValueError("this recipe trains on photographs: give their folder with --data PATH.")
        training = open_captions(recipe.path, "train", larger, recipe.source, on_error=recipe.on_error)
        validation = open_captions(recipe.path, "validation", resolution, recipe.source, on_error=recipe.on_error)
        reports = training.report, validation.report
        check_apart("load_splits", training, validation)
    in_training = _load(training, recipe, model, reports[0])
    in_validation = _load(validation, recipe, model, reports[1], in_training.vocabulary)
    left_out = {"training": len(reports[0].skipped), "validation": len(reports[1].skipped)}
    return Splits(in_training, in_validation, left_out)


def _load(
    dataset: CaptionedImages,
    recipe: DataRecipe,
    model: MirrorGANConfig,
    report: ErrorReport,
    vocabulary: Vocabulary | None = None,
) -> InMemoryCaptions:
    """Read a split into memory. The one with a given vocabulary is not trained on."""
    from tqdm import tqdm

    is_training = vocabulary is None
    what, limit = ("training", recipe.training_images) if is_training else ("validation", recipe.validation_images)
    count = len(dataset) if limit is None else min(limit, len(dataset))
    wanted: Any = dataset
    # All of a data set is handed on as it is: one that was prepared need not be copied.
    if count < len(dataset):
        # Evenly spaced, so that a part of a data set sorted by class still holds all classes.
        wanted = torch.utils.data.Subset(wanted, [i * len(dataset) // count for i in range(count)])
    with tqdm(total=count, desc=f"{what} images", unit=" images", dynamic_ncols=True, disable=None) as bar:
        loaded = InMemoryCaptions(
            wanted,
            vocabulary,
            max_words=model.max_words,
            min_count=recipe.min_count,
            long_captions=recipe.long_captions if is_training else "cut",
            progress=lambda done, total: bar.update(),
            report=report,
        )
    # Of several processes, the first one speaks.
    is_first = os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"
    if report.skipped and is_first:
        print(f"{what} images: {len(report.skipped)} left out, {len(loaded)} read: {report.listing()}")
    return loaded


def at_resolution(images: Tensor, resolution: int) -> Tensor:
    """Whole square images, bytes (B, H, H, 3), at the size of the model's where they are larger for random crops."""
    if images.shape[1] == resolution:
        return images
    return torch.stack([torch.from_numpy(shrink(image, resolution)) for image in images.numpy()])


def load_batches(
    batches: RepeatableBatches, start: int, stop: int, *, workers: int = 0, pin_memory: bool = False
) -> Iterator[CaptionBatch]:
    """Batches number `start` to `stop`, prepared by worker processes if there are any.

    Raises:
        TrainingError: A worker has died.
    """
    loader: DataLoader[CaptionBatch] = DataLoader(
        batches,
        batch_size=None,
        sampler=range(start, stop),
        num_workers=workers,
        pin_memory=pin_memory,
        # There is nothing to convert, and to look for it in every caption takes a while.
        collate_fn=_as_it_is,
        # Otherwise it draws from the global source of random numbers, and a resumed run differs.
        generator=torch.Generator(),
        worker_init_fn=_outlive_signals,
    )
    try:
        yield from loader
    except RuntimeError as error:
        if not is_dead_worker(error):
            raise
        raise TrainingError(f"a process that prepares batches has died ({error}).") from error


def _as_it_is(batch: Any) -> Any:
    return batch


def _outlive_signals(worker: int) -> None:
    """A signal to all processes of a run stops the training after its step, which still needs its batches."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def to_device(batch: CaptionBatch, device: torch.device) -> CaptionBatch:
    """A batch as networks take it: images as floats (B, 3, H, W) in [-1, 1].

    What indexes stays on the CPU, where reading it makes no device wait.
    """
    return batch._replace(
        images=to_float(batch.images.to(device, non_blocking=True)),
        tokens=batch.tokens.to(device, non_blocking=True),
        word_mask=batch.word_mask.to(device, non_blocking=True),
    )


class UnseenCaption(NamedTuple):
    """A validation image and a caption of it that no training image has."""

    image: int
    """Row of the validation images."""
    caption: str
    """What is said of it."""


def unseen_captions(splits: Splits) -> list[UnseenCaption]:
    """For each validation image its first caption that does not occur, word for word, among the training captions."""
    seen = {caption for captions in splits.training.captions for caption in captions}
    unseen = []
    for image, captions in enumerate(splits.validation.captions):
        new = next((caption for caption in captions if caption not in seen), None)
        if new is not None:
            unseen.append(UnseenCaption(image, new))
    return unseen

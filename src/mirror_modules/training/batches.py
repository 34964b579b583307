"""The data of a recipe: its splits in memory, and the loader of training batches."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from mirror_modules.data import (
    CaptionBatch,
    CaptionedImages,
    CaptionFolder,
    ErrorReport,
    InMemoryCaptions,
    RepeatableBatches,
    SyntheticFlowers,
    open_captions,
    to_float,
)
from mirror_modules.data.readers.damage import one_line, printable
from mirror_modules.data.readers.files import CaptionedFiles, check_apart
from mirror_modules.data.readers.images import shrink
from mirror_modules.data.seeding import seeded
from mirror_modules.models import ModelConfig
from mirror_modules.stem import Vocabulary
from mirror_modules.training.distributed import is_main_process
from mirror_modules.training.errors import TrainingError, is_dead_worker
from mirror_modules.training.log import progress_bar
from mirror_modules.training.recipes import DataRecipe

# Random crops are taken from images larger by this factor, as in the published code.
CROP_MARGIN = 76 / 64
# Number of the random stream, after those of the engine; see `seeded`.
HELD_OUT = 9


class Splits(NamedTuple):
    """Training and validation images in memory, with the vocabulary of the training captions."""

    training: InMemoryCaptions
    """Images and captions that every phase is trained on."""
    validation: InMemoryCaptions
    """Images and captions for validation and evaluation."""
    skipped: Mapping[str, int] = {}
    """Number of damaged samples skipped in "training", held-out images included, and in "validation"."""
    held_out: InMemoryCaptions | None = None
    """Images of training classes that no phase is trained on, where validation has other classes; None otherwise."""

    @property
    def vocabulary(self) -> Vocabulary:
        """Built from the training captions alone."""
        return self.training.vocabulary


def load_splits(recipe: DataRecipe, model: ModelConfig, seed: int) -> Splits:
    """Draw or decode the splits, with progress bars.

    Raises:
        ValueError: The recipe's source needs a path, its files are not as expected, or a file is in both splits.
    """
    resolution = model.resolutions[-1]
    training: SyntheticFlowers | CaptionedFiles
    validation: SyntheticFlowers | CaptionedFiles
    reports = ErrorReport(), ErrorReport()
    rows, held_out_rows = None, Tensor()
    if recipe.is_drawn:
        options: dict[str, Any] = {"seed": seed, "scatter": recipe.scatter}
        training = SyntheticFlowers(
            recipe.training_images or 4096, resolution=_training_resolution(recipe, model), **options
        )
        validation = SyntheticFlowers(
            recipe.validation_images or 1000, resolution=resolution, split="validation", **options
        )
    else:
        training, validation = open_splits(recipe, model)
        reports = training.report, validation.report
        classes, other_classes = (
            torch.tensor([entry.class_id for entry in each.entries]) for each in (training, validation)
        )
        # Not by the run's seed: runs that differ in their seeds train on, and are measured on, the same images.
        held_out_rows = draw_held_out(classes, other_classes, recipe.held_out_share, seed=0)
        if len(held_out_rows):
            rows = sorted({*range(len(training))} - {*held_out_rows.tolist()})
    in_training = _load("training", training, rows, recipe, model, reports[0])
    if model.takes_location and in_training.boxes is None and in_training.points is None:
        # Images with a box may all be held out, or not selected by `training_images`.
        raise _without_places(model)
    in_validation = _load("validation", validation, None, recipe, model, reports[1], in_training.vocabulary)
    held_out = None
    if recipe.path is not None and len(held_out_rows):
        # Opened again: training images may be larger, for random crops.
        same = open_captions(recipe.path, "train", resolution, recipe.source, on_error=recipe.on_error)
        same.report = reports[0]
        held_out = _load("held-out", same, held_out_rows.tolist(), recipe, model, reports[0], in_training.vocabulary)
    skipped = {"training": len(reports[0].skipped), "validation": len(reports[1].skipped)}
    return Splits(in_training, in_validation, skipped, held_out)


def open_splits(recipe: DataRecipe, model: ModelConfig) -> tuple[CaptionedFiles, CaptionedFiles]:
    """Open the training and validation images of a recipe for photographs, without decoding them.

    Raises:
        ValueError: The recipe has no path, its files are not as expected, a file is in both splits, or the system
            places its subject and the images have no place.
    """
    if recipe.path is None:
        raise ValueError("this recipe trains on photographs: pass their folder with --data PATH.")
    size = _training_resolution(recipe, model)
    training = open_captions(recipe.path, "train", size, recipe.source, on_error=recipe.on_error)
    validation = open_captions(
        recipe.path, "validation", model.resolutions[-1], recipe.source, on_error=recipe.on_error
    )
    check_apart("load_splits", training, validation)
    _check_sizes(training, validation)
    if model.takes_location and not training.is_located:
        raise _without_places(model)
    return training, validation


def _without_places(model: ModelConfig) -> ValueError:
    return ValueError(
        f"the system {model.system!r} places its subject, but the training images have neither boxes nor key points; "
        "drawn flowers and the source 'birds' have them."
    )


def _training_resolution(recipe: DataRecipe, model: ModelConfig) -> int:
    """Height and width of training images as they are loaded, before random crops."""
    return round(model.resolutions[-1] * (CROP_MARGIN if recipe.augment else 1))


def draw_held_out(class_ids: Tensor, validation_class_ids: Tensor, share: float, seed: int) -> Tensor:
    """Draw the training images that are kept from all training, in proportion to the classes.

    Images are ordered by class, within a class at random, and those at equal distances of 1 / share from a random start
    are drawn. A class thus has its share to within one image, and with a share of at most 0.5 it keeps half of its
    images, rounded down, but at least one.

    Args:
        class_ids: Class of each training image, (N,).
        validation_class_ids: Class of each validation image, (M,).
        share: Share of the images to draw, in [0, 0.5].
        seed: Seed of the draw.

    Returns:
        Rows in ascending order. Empty if fewer than two would be drawn, if the data have no classes (fewer than two
        images per class on average), or if a validation image has a training class: validation then compares images of
        training classes already.
    """
    none = torch.zeros(0, dtype=torch.long)
    if not has_classes(class_ids) or bool(torch.isin(validation_class_ids, class_ids).any()):
        return none
    random = seeded(seed, HELD_OUT)
    _, class_of, sizes = class_ids.unique(return_inverse=True, return_counts=True)
    order = torch.randperm(len(class_ids), generator=random)
    order = order[class_of[order].argsort(stable=True)]
    # A class of one image would leave the training.
    order = order[sizes[class_of[order]] > 1]
    # Rounded down, as places closer than 2 could take both images of a class; the margin keeps 0.3 of 10 at 3.
    count = int(share * len(order) + 1e-9)
    if count < 2:
        return none
    start = torch.rand((), generator=random, dtype=torch.float64)
    places = (torch.arange(count, dtype=torch.float64) + start) * (len(order) / count)
    return order[places.long().clamp(max=len(order) - 1)].sort().values


def has_classes(class_ids: Tensor) -> bool:
    """Whether there are at least two classes, with two or more images on average.

    Readers give every image a class of its own where the data have none.
    """
    return 2 <= len(class_ids.unique()) <= len(class_ids) // 2


def _check_sizes(training: CaptionedFiles, validation: CaptionedFiles) -> None:
    """Require two images in each split: a batch and R-precision compare images.

    Raises:
        ValueError: There are fewer.
    """
    if min(len(training), len(validation)) >= 2:
        return
    remedy = "add images"
    if isinstance(training, CaptionFolder) and not (training.root / "train").is_dir():
        remedy += ", or divide the folder into train/ and validation/, without which a tenth is for validation"
    raise ValueError(
        f"{printable(training.root)} has {len(training)} training and {len(validation)} validation images, and needs "
        f"at least 2 of each; {remedy}."
    )


def _load(
    split: str,
    dataset: CaptionedImages,
    rows: Sequence[int] | None,
    recipe: DataRecipe,
    model: ModelConfig,
    report: ErrorReport,
    vocabulary: Vocabulary | None = None,
) -> InMemoryCaptions:
    """Read a split into memory, or some rows of it; the training split builds the vocabulary, others reuse it."""
    is_training = vocabulary is None
    limit = recipe.training_images if is_training else recipe.validation_images
    available = range(len(dataset)) if rows is None else rows
    count = len(available) if limit is None else min(limit, len(available))
    selected: Any = dataset
    if count < len(dataset):
        # Evenly spaced, so that a subset of a data set sorted by class still has all classes.
        selected = torch.utils.data.Subset(selected, [available[i * len(available) // count] for i in range(count)])
    # Training images share their report with the held-out ones, and include files skipped when opening the data set.
    first = len(report.skipped) if split == "held-out" else 0
    with progress_bar(total=count, desc=f"{split} images", unit=" images") as bar:
        loaded = InMemoryCaptions(
            selected,
            vocabulary,
            max_words=model.max_words,
            min_count=recipe.min_count,
            long_captions=recipe.long_captions if is_training else "cut",
            progress=lambda done, total: bar.update(),
            report=report,
        )
    if (skipped := report.skipped[first:]) and is_main_process():
        print(f"{split} images: {len(skipped)} skipped, {len(loaded)} read: {one_line(skipped)}")
    return loaded


def at_resolution(images: Tensor, resolution: int) -> Tensor:
    """Resize square images, bytes (B, H, H, 3), that were loaded larger for random crops to the model's resolution."""
    if images.shape[1] == resolution:
        return images
    return torch.stack([torch.from_numpy(shrink(image, resolution)) for image in images.numpy()])


def load_batches(
    batches: RepeatableBatches, start: int, stop: int, *, workers: int = 0, pin_memory: bool = False
) -> Iterator[CaptionBatch]:
    """Batches number `start` to `stop`, prepared by worker processes if there are any.

    Raises:
        TrainingError: A worker process died.
    """
    loader: DataLoader[CaptionBatch] = DataLoader(
        batches,
        batch_size=None,
        sampler=range(start, stop),
        num_workers=workers,
        pin_memory=pin_memory,
        # Batches are tensors already; the default would traverse every caption.
        collate_fn=_identity,
        # Otherwise the loader draws from the global generator, and a resumed run differs.
        generator=torch.Generator(),
        worker_init_fn=_ignore_signals,
    )
    try:
        yield from loader
    except RuntimeError as error:
        if not is_dead_worker(error):
            raise
        raise TrainingError(f"a loader process died ({error}).") from error


def _identity(batch: Any) -> Any:
    return batch


def _ignore_signals(worker: int) -> None:
    """Let workers survive a signal sent to all processes: the main process finishes its step with their batches."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def to_device(batch: CaptionBatch, device: torch.device) -> CaptionBatch:
    """Move a batch to the device, and convert its images to floats (B, 3, H, W) in [-1, 1].

    Indices stay on the CPU, where reading them does not synchronize the device.
    """
    return batch._replace(
        images=to_float(batch.images.to(device, non_blocking=True)),
        tokens=batch.tokens.to(device, non_blocking=True),
        word_mask=batch.word_mask.to(device, non_blocking=True),
    )


class UnseenCaption(NamedTuple):
    """An image with one of its captions, which no training image has; see `unseen_captions`."""

    image: int
    """Row in the images of its split."""
    caption: str


def unseen_captions(splits: Splits, split: InMemoryCaptions | None = None) -> list[UnseenCaption]:
    """For each image of a split, or of validation, its first caption that differs from all training captions.

    The model reads tokens, cut to its maximum number of words: captions that differ only in case, in punctuation, in
    unknown words or beyond that number are the same.
    """
    seen = {tokens for captions in _token_rows(splits.training) for tokens in captions}
    unseen = []
    split = splits.validation if split is None else split
    for image, rows in enumerate(_token_rows(split)):
        new = next((i for i, tokens in enumerate(rows) if tokens not in seen), None)
        if new is not None:
            unseen.append(UnseenCaption(image, split.captions[image][new]))
    return unseen


def usable_candidates(requested: int, splits: Splits) -> int:
    """Candidate captions per image for R-precision: as requested, but no more than there are unseen captions.

    Raises:
        ValueError: Fewer than two captions are unseen, so that no image has a wrong caption to compare with.
    """
    unseen = len(unseen_captions(splits))
    if unseen < 2:
        raise ValueError(
            "evaluation needs at least 2 validation images with a caption that no training image has, but there are "
            f"{len(splits.validation)} validation images, of which {unseen} have one; use more of them, or captions "
            "that differ from those of the training images."
        )
    return min(requested, unseen)


def announce_candidates(requested: int, usable: int) -> None:
    """Print a line to standard error if fewer candidates are used than requested."""
    if usable < requested:
        print(
            f"R-precision among {usable} captions instead of evaluation.candidates={requested}, because {usable} "
            "validation images have a caption that no training image has",
            file=sys.stderr,
        )


def _token_rows(captions: InMemoryCaptions) -> Iterator[list[bytes]]:
    """The tokens of all captions of each image, without padding: as bytes, which are far smaller than Python's ints."""
    lengths = captions.word_mask.sum(dim=1).tolist()
    rows = (row[:length].tobytes() for row, length in zip(captions.tokens.int().numpy(), lengths))
    for count in captions.caption_counts.tolist():
        yield list(islice(rows, count))
